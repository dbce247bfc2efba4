"""Many changed runs of the same samples, with what they share computed once.

The clean pass of a batch keeps, for every layer a variant begins at, the residual before it and
its z. Up to that z a variant is the same as the clean run, so it starts there; variants with the
same start and method are stacked along the batch. A prefix that prompts share is not reused:
a head removed at every position changes the prefix's keys and values in all later layers.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_headnorm.data.batches import Batch, make_batch
from tl_headnorm.data.plan import Group, plan_batches
from tl_headnorm.data.tokens import Encoded
from tl_headnorm.engine.memory import auto_batch_tokens
from tl_headnorm.engine.protocol import Tail
from tl_headnorm.interventions import edits
from tl_headnorm.interventions.edits import SetActivations, Start
from tl_headnorm.interventions.magnitudes import largest
from tl_headnorm.interventions.replacements import Reference, replacement
from tl_headnorm.measures import last_real_position, take_position
from tl_headnorm.model.loading import Model

# Past this many tokens a pass is no faster per token, and its activations leave the cache.
MOST_TOKENS = {"cpu": 4096, "cuda": 65536}
PROFILE = ("top1", "top2", "top3", "median", "pos", "dim")


@dataclass(frozen=True)
class Variant:
    """One changed run: heads (with a method), MLPs switched off, or activations set.

    `masks` [sample, layer, head] chooses heads per input instead of the same for all.
    """

    name: str
    method: str = "zero"
    heads: tuple[tuple[int, int], ...] = ()
    mlps: tuple[int, ...] = ()
    masks: Bool[np.ndarray, "sample layer head"] | None = field(default=None, compare=False)
    activations: SetActivations | None = None

    def head_layers(self) -> list[int]:
        if self.masks is not None:
            return [int(layer) for layer in np.flatnonzero(self.masks.any(axis=(0, 2)))]
        return sorted({layer for layer, _ in self.heads})

    def start(self) -> int | None:
        """The first layer it changes; None where it changes nothing."""
        touched = [*self.head_layers(), *self.mlps]
        if self.activations is not None:
            touched.append(self.activations.layer)
        return min(touched, default=None)


@dataclass(frozen=True)
class Options:
    """How the runs are batched, and what else is read."""

    batch_size: int = 8
    max_batch_tokens: int | str = "auto"
    padding_side: str = "right"
    seed: int = 0
    profile: bool = False
    share: bool = True


@dataclass
class Outcome:
    """Per variant and sample, the clean run first: the readout's values, and the profile.

    `values[name]` is [1 + variant, sample]; `profile[name]` is [1 + variant, sample, layer], of
    the residual after every block.
    """

    values: dict[str, Float[np.ndarray, "variant sample"]]
    profile: dict[str, Float[np.ndarray, "variant sample layer"]]


@torch.inference_mode()
def run_variants(
    model: Model,
    samples: Sequence[Encoded],
    variants: Sequence[Variant],
    readout: Any,
    *,
    reference: Reference | None = None,
    options: Options | None = None,
    progress: bool = False,
) -> Outcome:
    """The clean run and every variant, over all samples; rows in the samples' order."""
    options = options or Options()
    n_rows, n_layers = 1 + len(variants), model.info.n_layers
    values: dict[str, np.ndarray] = {}
    shape = (n_rows, len(samples), n_layers)
    profile = {k: np.full(shape, np.nan) for k in PROFILE} if options.profile else {}
    row_of = {sample.index: row for row, sample in enumerate(samples)}
    most = _most_tokens(model, options)
    group = Group(tuple(samples), 0)
    # A bridge's own mask handling is only relied on where padding cannot come before a token.
    side = options.padding_side if edits.can_start_late(model.tl) else "right"
    bar = tqdm(total=len(samples) * n_rows, unit="run", disable=not progress, desc="ablate")
    for chosen in plan_batches(group, options.batch_size, most):
        batch = make_batch(chosen, side)
        rows = [row_of[sample.index] for sample in chosen]
        runs = _Runs(model, batch, variants, readout, reference, options, most)
        for which, found, seen in runs:
            for name, value in found.items():
                table = values.setdefault(name, np.full((n_rows, len(samples)), np.nan))
                table[np.ix_(which, rows)] = value.double().cpu().numpy()
            for name, sizes in seen.items():
                profile[name][np.ix_(which, rows)] = sizes
            bar.update(len(which) * len(rows))
    bar.close()
    return Outcome(values, profile)


def _most_tokens(model: Model, options: Options) -> int:
    if options.max_batch_tokens != "auto":
        return int(options.max_batch_tokens)
    return min(auto_batch_tokens(model), MOST_TOKENS.get(model.device.type, 16384))


Rows = tuple[list[int], Mapping[str, Tensor], dict[str, np.ndarray]]


class _Runs:
    """All runs of one batch: (numbers of the runs, 0 is clean; values; profile) at a time."""

    def __init__(
        self, model: Model, batch: Batch, variants: Sequence[Variant], readout: Any,
        reference: Reference | None, options: Options, most: int,
    ) -> None:  # fmt: skip
        self.model, self.batch, self.variants, self.readout = model, batch, variants, readout
        self.reference, self.options, self.most = reference, options, most
        self.ids, self.mask = batch.ids.to(model.device), batch.mask.to(model.device)
        self.last = last_real_position(self.mask)
        self.before: dict[int, Tensor] = {}
        self.z: dict[int, Tensor] = {}
        self.share = options.share and edits.can_start_late(model.tl)
        # A profile reads every block's output, which only a whole block gives.
        self.mid = self.share and edits.can_start_mid(model.tl) and not options.profile

    def __iter__(self) -> Iterator[Rows]:
        starts = {v.start() for v in self.variants} - {None}
        clean, seen = self._clean({int(s) for s in starts if s is not None})
        found = self.readout(self.model, self.batch, self.mask, clean[None], clean)
        yield [0], found, {name: value[None] for name, value in seen.items()}
        for start, numbers in self._stacks():
            if start is None:  # nothing changed: the clean run itself, bit for bit
                for number in numbers:
                    yield [number], found, {name: value[None] for name, value in seen.items()}
                continue
            resid, profiles = self._stacked(start, numbers, seen)
            changed = self.readout(self.model, self.batch, self.mask, resid, clean)
            yield numbers, changed, profiles

    def _stacks(self) -> Iterator[tuple[int | None, list[int]]]:
        """Variants that begin at the same layer with the same method, as many as fit."""
        by_kind: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        for number, variant in enumerate(self.variants, 1):
            kind = (variant.start(), variant.method, variant.activations)
            by_kind[kind if variant.activations is None else (*kind, number)].append(number)
        width = max(1, self.most // self.batch.ids.numel())
        for kind, numbers in by_kind.items():
            for first in range(0, len(numbers), width):
                yield kind[0], numbers[first : first + width]

    def _tail(self, n_stacked: int, whole: bool) -> Tail | None:
        if not self.readout.last_only or self.options.profile or whole:
            return None
        return Tail(self.last.repeat(n_stacked), False, True)

    def _clean(self, starts: set[int]) -> tuple[Tensor, dict[str, np.ndarray]]:
        """The unchanged run; keeps the residual where variants begin."""
        wanted = sorted(starts) if self.share else []
        keep = edits.read_resid(wanted, False, self.before.__setitem__)
        if self.mid:
            keep += edits.read_z(wanted, self.z.__setitem__)
        profile = _Profile(self.mask, self.model.info.n_layers) if self.options.profile else None
        readers = profile.hooks(0) if profile else []
        resid = edits.run_hooked(
            self.model.tl, Start(self.ids), self.mask, [*keep, *readers], self._tail(1, False)
        )
        return self._cut(resid), profile.found(1)[0] if profile else {}

    def _cut(self, resid: Tensor) -> Tensor:
        """The last position only, where the readout wants no more."""
        if not self.readout.last_only or resid.shape[1] == 1:
            return resid
        rows = torch.arange(len(resid), device=resid.device)
        last = self.last.repeat(len(resid) // len(self.last))
        return resid[rows, last][:, None]

    def _stacked(
        self, start: int, numbers: Sequence[int], clean: dict[str, np.ndarray]
    ) -> tuple[Tensor, dict[str, np.ndarray]]:
        """The final residual [variant, batch, pos, d_model] of some variants, and profiles."""
        n, mask = len(numbers), self.mask.repeat(len(numbers), 1)
        chosen = [self.variants[number - 1] for number in numbers]
        whole = any(v.activations is not None for v in chosen)
        if self.mid and not whole:
            return self._from_mid(start, chosen, mask), {}
        changes = self._edits(chosen, mask)
        begin = Start(self.ids.repeat(n, 1))
        if self.share:
            begin = Start(layer=start, resid=self.before[start].repeat(n, 1, 1))
        profile = _Profile(mask, self.model.info.n_layers) if self.options.profile else None
        readers = profile.hooks(start if self.share else 0) if profile else []
        resid = edits.run_hooked(
            self.model.tl, begin, mask, [*changes, *readers], self._tail(n, whole)
        )
        resid = self._cut(resid).unflatten(0, (n, len(self.batch)))
        return resid, _filled(profile.found(n), clean) if profile else {}

    def _from_mid(self, start: int, chosen: Sequence[Variant], mask: Tensor) -> Tensor:
        """The final residual of variants, from the known z of the layer they begin at."""
        n, ended = len(chosen), start == self.model.info.n_layers - 1
        heads = self._heads(chosen, start)
        # Where only an MLP is switched off, nothing takes the place of z.
        new = (
            self._new(chosen[0], start) if heads.any() else self.before[start].new_zeros(1, 1, 1, 1)
        )
        parts = [self.before[start], self.z[start], new]
        if ended and self.readout.last_only:  # nothing else is read of the last layer
            parts = [p if p.shape[1] == 1 else _at(p, self.last) for p in parts]
        off = torch.tensor([start in v.mlps for v in chosen], device=mask.device)
        resid_pre, z, new = parts
        resid = edits.finish_layer(self.model.tl, start, resid_pre, z, heads, new, off)
        if not ended:
            begin = Start(layer=start + 1, resid=resid)
            changes = self._edits(chosen, mask, start + 1)
            resid = edits.run_hooked(self.model.tl, begin, mask, changes, self._tail(n, False))
        return self._cut(resid).unflatten(0, (n, len(self.batch)))

    def _new(self, variant: Variant, layer: int) -> Tensor:
        return replacement(
            variant.method, layer, self.batch.samples, self.mask, self.reference,
            self.options.seed,
        )  # fmt: skip

    def _edits(self, chosen: Sequence[Variant], mask: Tensor, first: int = 0) -> list[edits.Hook]:
        made = []
        for layer in range(first, self.model.info.n_layers):
            heads = self._heads(chosen, layer)
            if heads.any():
                new = self._new(chosen[0], layer)
                made.append(edits.replace_heads(layer, heads, new, self.last))
            off = torch.tensor([layer in v.mlps for v in chosen], device=mask.device)
            if off.any():
                rows = off.repeat_interleave(len(self.batch))
                made.append(edits.drop_mlp(self.model.tl, layer, rows))
        made.extend(
            edits.set_activations(v.activations, mask) for v in chosen if v.activations is not None
        )
        return made

    def _heads(self, chosen: Sequence[Variant], layer: int) -> Bool[Tensor, "variant batch head"]:
        n_heads, rows = self.model.info.n_heads, [s.index for s in self.batch.samples]
        grid = np.zeros((len(chosen), len(self.batch), n_heads), dtype=bool)
        for i, variant in enumerate(chosen):
            if variant.masks is not None:
                grid[i] = variant.masks[rows, layer]
            else:
                grid[i, :, [head for at, head in variant.heads if at == layer]] = True
        return torch.from_numpy(grid).to(self.mask.device)


class _Profile:
    """The largest entries of the residual after every block, reduced as the pass goes."""

    def __init__(self, mask: Tensor, n_layers: int) -> None:
        self.mask, self.n_layers = mask, n_layers
        self.rows = {name: np.full((len(mask), n_layers), np.nan) for name in PROFILE}

    def hooks(self, first: int) -> list[edits.Hook]:
        return edits.read_resid(range(first, self.n_layers), True, self._take)

    def _take(self, layer: int, resid: Tensor) -> None:
        seen = largest(resid, self.mask)
        columns = [*seen.top.T, seen.median, seen.pos, seen.dim]
        for name, column in zip(PROFILE, columns, strict=True):
            self.rows[name][:, layer] = column.double().cpu().numpy()

    def found(self, n: int) -> list[dict[str, np.ndarray]]:
        """Per stacked variant, [sample, layer]."""
        split = {name: np.split(rows, n) for name, rows in self.rows.items()}
        return [{name: parts[i] for name, parts in split.items()} for i in range(n)]


def _at(x: Tensor, last: Tensor) -> Tensor:
    """x at the last position; what is the same for all samples gets a row for each."""
    return take_position(x.expand(len(last), *x.shape[1:]), last)


def _filled(
    found: list[dict[str, np.ndarray]], clean: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Layers before the start are the clean run's."""
    return {
        name: np.stack([np.where(np.isnan(one[name]), value, one[name]) for one in found])
        for name, value in clean.items()
    }
