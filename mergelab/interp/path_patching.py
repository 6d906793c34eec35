"""Path patching: what one component tells another directly, with everything between them held fixed.

Goldowsky-Dill et al. 2023 (arXiv:2304.05969); Wang et al. 2022 (arXiv:2211.00593), appendix B.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial

from mergelab.activations.batches import batches, map_pieces
from mergelab.activations.capture import Patterns, check_pairs, stream_sites
from mergelab.errors import SiteError
from mergelab.interp.logit_metrics import LogitMetric
from mergelab.interp.patching import PatchGrid, cell_grid, rows_of
from mergelab.models.model import Model, Params
from mergelab.models.sites import Edit

__all__ = ["path_patching"]


def path_patching(
    model: Model,
    params: Params,
    source: Any,
    target: Any,
    senders: Patterns,
    receivers: Patterns,
    metric: LogitMetric,
    *,
    mask: Any = None,
    by_head: bool = False,
    receiver_head: int | None = None,
    batch: int = 16,
    paths_at_once: int = 4,
) -> PatchGrid:
    """Patches each sender, but lets only the receivers notice, and only along the residual stream.

    On the target prompts, a sender takes what it has on the source prompts, at all tokens; every attention
    and MLP output between it and the receivers keeps its value. What the receivers then hold is put into one
    more pass on the target prompts, in which everything after them runs freely.

    Args:
        model: the model.
        params: its parameters, on any mesh.
        source: tokens `[prompts, length]` to take the senders' activations from.
        target: tokens `[prompts, length]`.
        senders: names or patterns of sites, such as `blocks.*.attn.z`.
        receivers: later sites, such as `blocks.3.attn.q`; `logits` for the direct effect.
        metric: scores the logits, see `mergelab.interp.logit_metrics`.
        mask: True for real tokens, of both.
        by_head: patch the senders' heads apart.
        receiver_head: only this head of the receivers notices.
        batch: prompts in one pass.
        paths_at_once: senders that are computed side by side.

    Returns:
        A grid with one position: `[prompts, senders, 1]`, or `[prompts, senders, 1, heads]`.

    Raises:
        SiteError: a sender does not come before every receiver, a receiver has no such head, or as
            `patch_grid`.
    """
    sent, received = stream_sites(model, senders), stream_sites(model, receivers)
    source, target, real = check_pairs(model, source, target, mask)
    held, frozen = _held_fixed(model, sent, received)
    if receiver_head is not None:
        _check_head(model, received, receiver_head)
    cells, shape = cell_grid(model, sent, 1, by_head)
    parts: list[tuple[np.ndarray, ...]] = []
    for rows, count in batches(len(source), batch):
        found = _paths(
            model, params, source[rows], target[rows], real[rows], cells, frozen[cells[:, 0]],
            rows_of(metric, rows, len(source)),
            np.int32(-1 if receiver_head is None else receiver_head),
            sent=sent, received=received, held=held, at_once=paths_at_once,
        )  # fmt: skip
        parts.append(tuple(np.asarray(value).T[:count] for value in found))
    patched, there, here = (np.concatenate(part) for part in zip(*parts, strict=True))
    return PatchGrid(sent, patched.reshape(-1, *shape), there, here)


def _held_fixed(
    model: Model, senders: tuple[str, ...], receivers: tuple[str, ...]
) -> tuple[tuple[str, ...], np.ndarray]:
    """The outputs that may be held fixed, and which of them each sender needs: bool `[senders, outputs]`."""
    order = {name: number for number, name in enumerate(model.sites())}
    first, last = order[receivers[0]], order[receivers[-1]]
    held = tuple(
        name
        for name in order
        if name.endswith((".attn.out", ".mixer.out", ".mlp.out")) and order[name] < last
    )
    frozen = np.zeros((len(senders), len(held)), bool)
    for row, sender in enumerate(senders):
        if order[sender] >= first:
            raise SiteError(
                f"the sender {sender!r} does not come before the receiver {receivers[0]!r}; a path leads "
                "from an earlier site to a later one."
            )
        # What a part of attention or MLP does reaches the stream through that layer's own output.
        own = sender.rpartition(".")[0] + ".out"
        frozen[row] = [order[name] > order[sender] and name != own for name in held]
    return held, frozen


def _check_head(model: Model, receivers: tuple[str, ...], head: int) -> None:
    for name in receivers:
        shape = model.sites()[name]
        if len(shape) != 4 or not isinstance(shape[2], int) or not 0 <= head < shape[2]:
            raise SiteError(
                f"the receiver {name!r} has shape {list(shape)}, and so no head {head}; leave receiver_head "
                "away, or take a site [batch, length, heads, head_dim] that has it."
            )


@partial(jax.jit, static_argnames=("model", "sent", "received", "held", "at_once"))
def _paths(
    model: Model,
    params: Params,
    source: Array,
    target: Array,
    mask: Array,
    cells: Array,
    frozen: Array,
    metric: LogitMetric,
    head: Array,
    *,
    sent: tuple[str, ...],
    received: tuple[str, ...],
    held: tuple[str, ...],
    at_once: int,
) -> tuple[Array, Array, Array]:
    """The metric by path `[paths, batch]`, and of source and target `[batch]`."""

    def run(tokens: Array, capture: tuple[str, ...], edits: Mapping[str, Edit]) -> tuple[Any, Array]:
        out = model.apply(params, tokens, mask=mask, capture=capture, edit=edits)
        assert out.logits is not None
        return out.captured, metric(out.logits)

    new, there = run(source, sent, {})
    old, here = run(target, (*held, *received), {})

    def one(cell: Array, fixed: Array) -> Array:
        edits = {
            name: Partial(_on_the_path, old[name], fixed[i], None, jnp.bool_(False), cell)
            for i, name in enumerate(held)
        }
        for i, name in enumerate(sent):
            kept = (old[name], fixed[held.index(name)]) if name in held else (None, jnp.bool_(False))
            edits[name] = Partial(_on_the_path, *kept, new[name], cell[0] == i, cell)
        told = model.apply(
            params, target, mask=mask, capture=received, edit=edits, logits="logits" in received
        ).captured
        heard = {name: Partial(_heard, told[name], head) for name in received}
        return run(target, (), heard)[1]

    found = map_pieces(lambda pair: one(*pair), (cells, frozen), at_once)
    return found, there, here


def _on_the_path(
    old: Array | None, fixed: Array, new: Array | None, patched: Array, cell: Array, x: Array
) -> Array:
    if old is not None:
        x = jnp.where(fixed, old, x)
    if new is None:
        return x
    chosen = jnp.broadcast_to(patched, x.shape)
    if x.ndim == 4:
        heads = (cell[2] == jnp.arange(x.shape[2])) | (cell[2] < 0)
        chosen = chosen & heads.reshape(1, 1, -1, 1)
    return jnp.where(chosen, new, x)


def _heard(told: Array, head: Array, x: Array) -> Array:
    if x.ndim != 4:
        return told
    chosen = ((head == jnp.arange(x.shape[2])) | (head < 0)).reshape(1, 1, -1, 1)
    return jnp.where(jnp.broadcast_to(chosen, x.shape), told, x)
