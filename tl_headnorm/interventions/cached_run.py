"""One batch run once, with the activations from which changed runs of it start.

A change at layer l leaves everything below l as it was, so a changed run starts from the
residual before l. Where only z of l, or what comes after it, is changed, the queries, keys and
scores of l are unchanged as well, and the run starts behind them, from z.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from tl_headnorm.engine import hook_names
from tl_headnorm.engine.positions import take_position
from tl_headnorm.engine.protocol import Hook, Start, Tail
from tl_headnorm.interventions import edits
from tl_headnorm.interventions.intervention import Rows, apply, stack_hooks


class CachedRun:
    """A batch's clean run (or its run under the hooks `base`), and changed runs that start in it.

    `resid` is the residual after the last block, [batch, 1, d_model] at the last real token where
    `last_only`, else [batch, pos, d_model]. `starts` are the layers changed runs may start at.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        starts: Iterable[int],
        last_only: bool,
        base: Sequence[Hook] = (),
        readers: Sequence[Hook] = (),
        everywhere: bool = False,
        share: bool = True,
    ) -> None:
        engine = rows.model.engine
        self.rows, self.engine, self.base = rows, engine, list(base)
        self.last_only, self.everywhere = last_only, everywhere
        self.starts = sorted(set(starts)) if share and engine.starts_late else []
        self.splits = engine.splits_blocks
        self.resid_pre: dict[int, Float[Tensor, "batch pos d_model"]] = {}
        self.z: dict[int, Float[Tensor, "batch z_pos head d_head"]] = {}
        hooks = [*self._keep(0), *self.base, *readers]
        self.resid = self._run(Start(rows.ids), rows, hooks)

    def stack(
        self, parts: Sequence[Sequence[Hook]], first: int
    ) -> Float[Tensor, "part batch resid_pos d_model"]:
        """The final residual of the batch under every part's hooks, in one pass from `first`."""
        hooks = stack_hooks([[*self.base, *hooks] for hooks in parts])
        index = None
        if len(parts) > 1:
            index = torch.arange(len(self.rows), device=self.rows.ids.device).repeat(len(parts))
        return self.restart(hooks, first, index).unflatten(0, (len(parts), len(self.rows)))

    def advance(self, hooks: Sequence[Hook], first: int) -> None:
        """Become the run under `hooks`, which differs from this one from layer `first` on."""
        self.resid = self.restart([*self._keep(first), *self.base, *hooks], first, None)

    def restart(
        self, hooks: Sequence[Hook], first: int, index: Int[Tensor, " row"] | None
    ) -> Float[Tensor, "row resid_pos d_model"]:
        """The final residual of the rows by number (None: all), under hooks from `first` on."""
        rows = self.rows if index is None else self.rows.at(index)
        if first not in self.resid_pre:
            return self._run(Start(rows.ids), rows, hooks)

        def of_rows(x: Shaped[Tensor, "batch ..."]) -> Shaped[Tensor, "row ..."]:
            return x if index is None else x[index.to(x.device)]

        here = [hook for hook in hooks if hook[0].startswith(f"blocks.{first}.")]
        resid, z = self.resid_pre[first], self.z.get(first)
        behind = {point(first) for point in _BEHIND_SCORES}
        if z is None or any(name not in behind for name, _ in here) or self._is_cut(z, hooks):
            return self._run(Start(layer=first, resid=of_rows(resid)), rows, hooks)
        ends = first == self.engine.n_layers - 1 and not self.everywhere
        if ends and self._tail(rows, hooks):
            resid, z = (at_last(x, self.rows.last) for x in (resid, z))
        resid = self._finish_layer(first, of_rows(resid), of_rows(z), here)
        if first + 1 == self.engine.n_layers:
            return at_last(resid, rows.last) if self.last_only else resid
        return self._run(Start(layer=first + 1, resid=resid), rows, hooks)

    def _run(
        self, start: Start, rows: Rows, hooks: Sequence[Hook]
    ) -> Float[Tensor, "row resid_pos d_model"]:
        resid = self.engine.run(start, rows.mask, hooks, tail=self._tail(rows, hooks))
        return at_last(resid, rows.last) if self.last_only else resid

    def _tail(self, rows: Rows, hooks: Sequence[Hook]) -> Tail | None:
        """The last block computes the last position only, unless a hook reads all of its output."""
        end = hook_names.resid_post(self.engine.n_layers - 1)
        if not self.last_only or any(name == end for name, _ in hooks):
            return None
        return Tail(rows.last, self.everywhere, True)

    def _is_cut(self, z: Tensor, hooks: Sequence[Hook]) -> bool:
        """Whether z of the last layer was computed at the last position, and more is read now."""
        return z.shape[1] < self.rows.ids.shape[1] and not self._tail(self.rows, hooks)

    def _keep(self, first: int) -> list[Hook]:
        """Readers of the activations that later runs start from, ahead of what changes them."""
        later = [layer for layer in self.starts if layer > first or not self.resid_pre]
        hooks = edits.read_resid(later, False, self.resid_pre.__setitem__)
        return hooks + (edits.read_z(later, self.z.__setitem__) if self.splits else [])

    def _finish_layer(
        self,
        layer: int,
        resid_pre: Float[Tensor, "row pos d_model"],
        z: Float[Tensor, "row pos head d_head"],
        hooks: Sequence[Hook],
    ) -> Float[Tensor, "row pos d_model"]:
        """The residual after a layer whose z before any change is known."""

        def after(point: Callable[[int], str], x: Tensor) -> Tensor:
            return apply([function for name, function in hooks if name == point(layer)], x)

        resid = self.engine.add_heads(layer, resid_pre, after(hook_names.z, z))
        if not self.engine.cfg.attn_only:
            resid = resid + after(hook_names.mlp_out, self.engine.mlp(layer, resid))
        return after(hook_names.resid_post, resid)


# Hook points of a layer that come after its attention scores.
_BEHIND_SCORES = (hook_names.z, hook_names.mlp_out, hook_names.resid_post)


def at_last(x: Shaped[Tensor, "row pos ..."], last: Int[Tensor, " row"]) -> Tensor:
    """x at every row's last real token, [row, 1, ...]; the pass may have computed no other."""
    return x if x.shape[1] == 1 else take_position(x, last.to(x.device))
