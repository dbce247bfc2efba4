"""Contenders of `bench`: implementations of the same numbers."""

import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from einops import einsum, rearrange
from torch import Tensor

from tl_headnorm.commands.bench.settings import BenchSettings
from tl_headnorm.commands.collect.collect import measure_samples
from tl_headnorm.data.batches import Batch, batches_in_order
from tl_headnorm.data.prepare import prepare
from tl_headnorm.data.questions import load_questions
from tl_headnorm.data.tokens import Encoded
from tl_headnorm.engine import hook_names, short_blocks
from tl_headnorm.engine.families import has_hooked
from tl_headnorm.engine.select import stock_model, without_short_forms
from tl_headnorm.measures import choose_measures
from tl_headnorm.model.loading import Model, load_model, resolve_device, resolve_dtype
from tl_headnorm.model.random_models import random_llama
from tl_headnorm.oracle.hugging_face import output_projections, reading_z
from tl_headnorm.settings import Settings

Values = dict[str, np.ndarray]  # "<measure> last" and "<measure> all": [sample, layer, head]
Run = Callable[[Sequence[Encoded]], Values]
OUTPUT, CONTRIBUTION = "head_output_norm", "head_resid_contrib_norm"


@dataclass
class Bench:
    """Shared by the contenders: one set of weights, the settings, the prompts."""

    model: Model
    settings: BenchSettings
    hf_load_seconds: float
    samples: list[Encoded] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    copied: Model | None = None


def open_bench(settings: BenchSettings) -> Bench:
    """The model to run on, and real prompts where `data_dir` names some."""
    device = resolve_device(settings.device_map)
    clock = time.perf_counter()
    if settings.model_path is None:
        hf = random_llama(resolve_dtype(settings.dtype), n_layers=settings.layers, device=device)
        seconds = time.perf_counter() - clock
        return Bench(
            load_model(hf_model=hf, engine=settings.engine, self_check=False), settings, seconds
        )
    model = load_model(
        settings.model_path, dtype=settings.dtype, device_map=settings.device_map,
        engine=settings.engine, self_check=False,
    )  # fmt: skip
    bench = Bench(model, settings, time.perf_counter() - clock)
    if settings.data_dir is not None or settings.dataset.startswith("builtin:"):
        questions = load_questions(
            settings.dataset, settings.data_dir, max_samples=settings.samples
        )
        lettered = settings.task != "norms"
        plain = Settings(score_answers=lettered, max_length=min(384, model.n_ctx))
        bench.samples = prepare(model.tokenizer, model.n_ctx, questions, plain).encoded
        bench.answers = [question.answer for question in questions]
    return bench


def copied_model(bench: Bench) -> Model:
    """The same weights in TransformerLens' model as its own loader makes it."""
    if bench.copied is None:
        tl = stock_model(bench.model.hf, bench.model.tokenizer)
        bench.copied = replace(bench.model, tl=tl)
    return bench.copied


def both_aggregations(pairs: Sequence[tuple[Tensor, Tensor]], mask: Tensor) -> dict[str, Tensor]:
    """Per measure, [batch, layer, head] at the last token and over all tokens."""
    rows, last = torch.arange(len(mask)), mask.sum(1) - 1  # right padding only
    weight = (mask / mask.sum(1, keepdim=True))[..., None].to(pairs[0][0].device)
    found = {}
    for name, norms in zip((OUTPUT, CONTRIBUTION), zip(*pairs, strict=True), strict=True):
        found[f"{name} last"] = torch.stack([n[rows, last] for n in norms], dim=1)
        found[f"{name} all"] = torch.stack([(n * weight).sum(1) for n in norms], dim=1)
    return found


def straightforward(z: Tensor, W_O: Tensor) -> tuple[Tensor, Tensor]:
    """Both norms at every position, every head's d_model vector formed."""
    vectors = einsum(z, W_O, "batch pos head d_head, head d_head d_model -> batch pos head d_model")
    norm = torch.linalg.vector_norm
    return norm(z, dim=-1, dtype=torch.float32), norm(vectors, dim=-1, dtype=torch.float32)


def in_batches(bench: Bench, step: Callable[[Batch], dict[str, Tensor]]) -> Run:
    """Dataset order, padded on the right to the longest of the batch."""

    @torch.inference_mode()
    def run(samples: Sequence[Encoded]) -> Values:
        parts = [step(b) for b in batches_in_order(samples, bench.settings.batch_size, "right")]
        return {
            key: torch.cat([part[key] for part in parts]).double().cpu().numpy() for key in parts[0]
        }

    return run


def _hf_forward(bench: Bench) -> Run:
    base, device = bench.model.hf.base_model, bench.model.device

    def step(batch: Batch) -> dict[str, Tensor]:
        base(batch.ids.to(device), attention_mask=batch.mask.to(device), use_cache=False)
        return {}

    return in_batches(bench, step)


def _hf_eager(bench: Bench) -> Run:
    """The bare forward with the attention weights formed, as whoever reads them must have it."""
    hf, run = bench.model.hf, _hf_forward(bench)

    def eager(samples: Sequence[Encoded]) -> Values:
        before = hf.config._attn_implementation
        hf.set_attn_implementation("eager")
        try:
            return run(samples)
        finally:
            hf.set_attn_implementation(before)

    return eager


def _hf_hooks(bench: Bench) -> Run:
    hf, device, n_heads = bench.model.hf, bench.model.device, bench.model.info.n_heads
    W_O = [rearrange(w, "m (h d) -> h d m", h=n_heads) for _, w in output_projections(hf)]

    def step(batch: Batch) -> dict[str, Tensor]:
        pairs: list[tuple[Tensor, Tensor]] = []

        def take(layer: int, z: Tensor) -> None:
            heads = rearrange(z, "b p (h d) -> b p h d", h=n_heads)
            pairs.append(straightforward(heads, W_O[layer]))

        with reading_z(hf, take):
            hf.base_model(
                batch.ids.to(device), attention_mask=batch.mask.to(device), use_cache=False
            )
        return both_aggregations(pairs, batch.mask)

    return in_batches(bench, step)


def _tl_stock(return_type: str | None) -> Callable[[Bench], Run]:
    """Stock TransformerLens; `return_type` None leaves the unembedding out, "logits" is stock."""

    def open_run(bench: Bench) -> Run:
        model = copied_model(bench)
        tl = model.tl

        def step(batch: Batch) -> dict[str, Tensor]:
            _, cache = tl.run_with_cache(
                batch.ids.to(model.device),
                attention_mask=batch.mask.to(model.device),
                names_filter=lambda name: name.endswith("hook_z"),
                return_type=return_type,
            )
            layers = range(model.info.n_layers)
            pairs = [straightforward(cache[hook_names.z(i)], model.engine.W_O(i)) for i in layers]
            return both_aggregations(pairs, batch.mask)

        return in_batches(bench, step)

    return open_run


def _nnsight(bench: Bench) -> Run:
    from nnsight import NNsight

    hf, device, n_heads = bench.model.hf, bench.model.device, bench.model.info.n_heads
    traced = NNsight(hf.base_model)
    W_O = [rearrange(w, "m (h d) -> h d m", h=n_heads) for _, w in output_projections(hf)]

    def step(batch: Batch) -> dict[str, Tensor]:
        ids, mask = batch.ids.to(device), batch.mask.to(device)
        saved = []
        with traced.trace(ids, attention_mask=mask, use_cache=False):
            for layer in range(len(W_O)):
                saved.append(traced.layers[layer].self_attn.o_proj.input.save())
        heads = [rearrange(z, "b p (h d) -> b p h d", h=n_heads) for z in saved]
        return both_aggregations(
            [straightforward(z, w) for z, w in zip(heads, W_O, strict=True)], batch.mask
        )

    return in_batches(bench, step)


def _ours(token_agg: str, without: str | None = None) -> Callable[[Bench], Run]:
    """This package; `without` switches one of its ways off."""

    def open_run(bench: Bench) -> Run:
        model, factors = bench.model, None
        how: dict[str, Any] = {}
        if without == "views":
            model = replace(model, tl=deepcopy(copied_model(bench).tl))
            short_blocks.install(model.tl)
        elif without == "fast":
            tl = without_short_forms(model.hf, model.tokenizer, model.info.engine)
            model = replace(model, tl=tl)
        elif without == "qr":  # every head's d_model vector is formed
            factors = {
                layer: model.engine.W_O(layer).transpose(1, 2)
                for layer in range(model.info.n_layers)
            }
        elif without is not None:
            how = {{"prefix": "share_prefix", "sort": "sort"}[without]: False}

        def run(samples: Sequence[Encoded]) -> Values:
            found = measure_samples(
                model,
                samples,
                batch_size=bench.settings.batch_size,
                token_agg=token_agg,
                factors=factors,
                **how,
            )
            return {f"{k} {token_agg}": v.astype(np.float64) for k, v in found.values.items()}

        return run

    return open_run


def _ours_every_measure(bench: Bench) -> Run:
    """This package with every measure there is; the answers' letters are tokens at random."""
    letters = tuple(range(3, 7))

    def run(samples: Sequence[Encoded]) -> Values:
        found = measure_samples(
            bench.model,
            [replace(sample, letter_ids=letters) for sample in samples],
            batch_size=bench.settings.batch_size,
            measures=choose_measures("all"),
            answers=[0] * (1 + max(sample.index for sample in samples)),
        )
        return {f"{k} last": v.astype(np.float64) for k, v in found.values.items()}

    return run


@dataclass(frozen=True)
class Contender:
    """`open` prepares it for a model and returns what is timed."""

    open: Callable[[Bench], Run]
    by_default: Callable[[], bool] = lambda: True


CONTENDERS: dict[str, Contender] = {
    "hf_forward": Contender(_hf_forward),
    "hf_eager": Contender(_hf_eager),
    "hf_hooks": Contender(_hf_hooks),
    "tl_stock": Contender(_tl_stock("logits")),
    "tl_stock-logits": Contender(_tl_stock(None)),
    "nnsight": Contender(_nnsight, lambda: find_spec("nnsight") is not None),
    "ours_last": Contender(_ours("last")),
    "ours_all": Contender(_ours("all")),
    "ours_all-measures": Contender(_ours_every_measure),
    "ours_last-prefix": Contender(_ours("last", "prefix")),
    "ours_last-sort": Contender(_ours("last", "sort")),
    "ours_last-views": Contender(_ours("last", "views"), has_hooked),
    "ours_last-fast": Contender(_ours("last", "fast")),
    "ours_all-qr": Contender(_ours("all", "qr")),
}
