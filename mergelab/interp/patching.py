"""Activation patching: which site, at which token (and head), carries what makes two prompts differ.

Every cell of the grid is one forward pass on a prompt in which one activation is replaced by what another
prompt has in its place (Vig et al. 2020, arXiv:2004.12265; Heimersheim & Nanda 2024, arXiv:2404.15255).
Attribution patching replaces the passes by one gradient, to first order (Syed et al. 2023, arXiv:2310.10348).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial

from mergelab.activations.batches import batches, map_pieces
from mergelab.activations.capture import Patterns, check_pairs, position_columns, stream_sites
from mergelab.errors import SiteError
from mergelab.interp.logit_metrics import LogitMetric
from mergelab.models.model import Model, Params
from mergelab.models.sites import Edit

Positions = int | Sequence[int] | None

__all__ = ["PatchGrid", "attribution_patching", "cell_grid", "patch_grid", "patched_metrics", "rows_of"]


@dataclass(frozen=True)
class PatchGrid:
    """What patching does to a metric.

    Attributes:
        sites: names, in forward order.
        patched: `[prompts, sites, positions]`, or `[prompts, sites, positions, heads]`: the metric with that
            cell patched, or its first-order estimate.
        source: `[prompts]`: the metric of the prompts that activations are taken from.
        target: `[prompts]`: the metric of the prompts they are put into.
    """

    sites: tuple[str, ...]
    patched: np.ndarray
    source: np.ndarray
    target: np.ndarray

    @property
    def effect(self) -> np.ndarray:
        """`patched - target`, in the metric's unit."""
        return self.patched - self.target.reshape(-1, *[1] * (self.patched.ndim - 1))

    @property
    def recovered(self) -> np.ndarray:
        """Mean effect over the mean of `source - target`: 1 where a cell restores all; without prompts."""
        return self.effect.mean(axis=0) / (self.source - self.target).mean()


def patch_grid(
    model: Model,
    params: Params,
    source: Any,
    target: Any,
    sites: Patterns,
    metric: LogitMetric,
    *,
    mask: Any = None,
    positions: Positions = None,
    by_head: bool = False,
    batch: int = 16,
    cells_at_once: int = 8,
) -> PatchGrid:
    """Patches every site at every position of the target prompts with what the source prompts have there.

    Args:
        model: the model.
        params: its parameters, on any mesh.
        source: tokens `[prompts, length]` to take activations from.
        target: tokens `[prompts, length]` to put them into, token by token in the places of `source`.
        sites: names or patterns of sites `[batch, length, ...]`, such as `blocks.*.resid_pre`.
        metric: scores the logits, see `mergelab.interp.logit_metrics`.
        mask: True for real tokens, of both.
        positions: real tokens of each prompt to patch, counted from 0, or from the end (-1: the last one);
            every column by default.
        by_head: patch heads apart, at sites `[batch, length, heads, head_dim]`.
        batch: prompts in one pass.
        cells_at_once: cells that are computed side by side; memory grows with it.

    Returns:
        A grid of `sites x positions (x heads)`; one program is compiled for all of it.

    Raises:
        SiteError: prompts do not pair up, a prompt has no token at a position, or sites have no positions, no
            heads, or different numbers of them.
    """
    names = stream_sites(model, sites)
    source, target, real = check_pairs(model, source, target, mask)
    columns = _columns(real, positions)
    count_positions = source.shape[1] if columns is None else columns.shape[1]
    cells, shape = cell_grid(model, names, count_positions, by_head)
    parts: list[tuple[np.ndarray, ...]] = []
    for rows, count in batches(len(source), batch):
        scored = rows_of(metric, rows, len(source))
        taken, there = _run(model, params, source[rows], real[rows], scored, names)
        here = _run(model, params, target[rows], real[rows], scored, names)[1]
        found = patched_metrics(
            model,
            params,
            target[rows],
            real[rows],
            taken,
            cells,
            scored,
            cells_at_once=cells_at_once,
            columns=None if columns is None else columns[rows],
        )
        parts.append(tuple(np.asarray(value)[:count] for value in (found.T, there, here)))
    patched, there, here = (np.concatenate(part) for part in zip(*parts, strict=True))
    return PatchGrid(names, patched.reshape(-1, *shape), there, here)


def attribution_patching(
    model: Model,
    params: Params,
    source: Any,
    target: Any,
    sites: Patterns,
    metric: LogitMetric,
    *,
    mask: Any = None,
    positions: Positions = None,
    by_head: bool = False,
    batch: int = 16,
) -> PatchGrid:
    """The first-order estimate of `patch_grid`: `metric + (source - target) . gradient` at the target.

    Two forward passes and one backward pass for the whole grid. It misses what is not linear: saturated
    softmaxes and norms above all. Arguments and errors as for `patch_grid`.
    """
    names = stream_sites(model, sites)
    source, target, real = check_pairs(model, source, target, mask)
    cell_grid(model, names, source.shape[1], by_head)
    columns = _columns(real, positions)
    parts: list[tuple[np.ndarray, ...]] = []
    for rows, count in batches(len(source), batch):
        scored = rows_of(metric, rows, len(source))
        taken, there = _run(model, params, source[rows], real[rows], scored, names)
        had, here = _run(model, params, target[rows], real[rows], scored, names)
        slopes = _gradients(model, params, target[rows], real[rows], scored, had)
        keep = 3 if by_head else 2
        change = [
            np.einsum("...d,...d->...", *(_flat(np.asarray(x), keep) for x in (taken[n] - had[n], slopes[n])))
            for n in names
        ]
        if columns is not None:
            at = columns[rows].reshape(*columns[rows].shape, *[1] * (keep - 2))
            change = [np.take_along_axis(x, at, axis=1) for x in change]
        estimate = np.stack(change, axis=1) + np.asarray(here).reshape(-1, *[1] * keep)
        parts.append(tuple(np.asarray(value)[:count] for value in (estimate, there, here)))
    patched, there, here = (np.concatenate(part) for part in zip(*parts, strict=True))
    return PatchGrid(names, patched, there, here)


def cell_grid(
    model: Model, names: tuple[str, ...], length: int, by_head: bool
) -> tuple[np.ndarray, tuple[int, ...]]:
    """The cells of a grid, and its shape.

    Returns:
        int32 `[cells, 3]`: site, position, and head (-1: all of them).

    Raises:
        SiteError: heads are asked for where there are none, or not as many at every site.
    """
    if not by_head:
        shape: tuple[int, ...] = (len(names), length)
        cells = np.indices(shape).reshape(2, -1).T
        return np.pad(cells, ((0, 0), (0, 1)), constant_values=-1).astype(np.int32), shape
    heads = {name: model.sites()[name][2] if len(model.sites()[name]) == 4 else 0 for name in names}
    count = next(iter(heads.values()))
    if len(set(heads.values())) > 1 or not isinstance(count, int) or not count:
        raise SiteError(
            f"the sites have {heads} heads; patch heads apart at sites that all have equally many, such as "
            "'blocks.*.attn.z'."
        )
    shape = (len(names), length, count)
    return np.indices(shape).reshape(3, -1).T.astype(np.int32), shape


@partial(jax.jit, static_argnames=("model", "cells_at_once"))
def patched_metrics(
    model: Model,
    params: Params,
    tokens: Array,
    mask: Array,
    values: Mapping[str, Array],
    cells: Array,
    metric: LogitMetric,
    *,
    cells_at_once: int = 8,
    columns: Array | None = None,
) -> Array:
    """The metric with one cell replaced, for each of the cells.

    Args:
        model: the model.
        params: its parameters.
        tokens: `[batch, length]`.
        mask: `[batch, length]`.
        values: what to put in, by site, in the order that `cells` counts sites in: `[batch, length, ...]`.
        cells: int32 `[cells, 3]`: site, position and head; -1 stands for all positions or all heads.
        metric: a `Partial`.
        cells_at_once: cells that are computed side by side.
        columns: int32 `[batch, positions]`, the column of each position that `cells` counts; by default they
            are the columns themselves.

    Returns:
        `[cells, batch]`.
    """
    names = [name for name in model.sites() if name in values]

    def one(cell: Array) -> Array:
        edits = {name: Partial(_replaced, values[name], i, cell, columns) for i, name in enumerate(names)}
        return metric(_logits(model, params, tokens, mask, edits))

    return map_pieces(one, cells, cells_at_once)


def rows_of(metric: LogitMetric, rows: np.ndarray, prompts: int) -> LogitMetric:
    """The metric of some of the prompts: cuts arrays `[prompts, ...]` that it holds.

    Raises:
        SiteError: it holds an array for another number of prompts.
    """
    metric = metric if isinstance(metric, Partial) else Partial(metric)
    for leaf in jax.tree.leaves(metric):
        if jnp.ndim(leaf) and leaf.shape[0] != prompts:
            raise SiteError(
                f"the metric holds an array of shape {list(leaf.shape)}, but there are {prompts} prompts; "
                "give it one row for each."
            )
    return jax.tree.map(lambda leaf: leaf[rows] if jnp.ndim(leaf) else leaf, metric)


def _columns(real: np.ndarray, positions: Positions) -> np.ndarray | None:
    """int32 `[prompts, positions]`: where the real tokens of these positions stand; None for all columns."""
    if positions is None:
        return None
    asked = [positions] if isinstance(positions, int) else list(positions)
    if not asked:
        raise SiteError("positions is empty; give those to patch, such as [-1], or omit it for all.")
    return np.stack([position_columns(real, position) for position in asked], axis=1).astype(np.int32)


def _replaced(new: Array, number: int, cell: Array, columns: Array | None, x: Array) -> Array:
    places = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
    wanted = cell[1] if columns is None else columns[:, cell[1], None]
    chosen = (wanted == places) | (cell[1] < 0)
    chosen = (chosen & (cell[0] == number)).reshape(*chosen.shape, *[1] * (x.ndim - 2))
    if x.ndim == 4:
        heads = (cell[2] == jnp.arange(x.shape[2])) | (cell[2] < 0)
        chosen = chosen & heads.reshape(1, 1, -1, 1)
    return jnp.where(jnp.broadcast_to(chosen, x.shape), new.astype(x.dtype), x)


def _logits(model: Model, params: Params, tokens: Array, mask: Array, edits: Mapping[str, Edit]) -> Array:
    found = model.apply(params, tokens, mask=mask, edit=edits).logits
    assert found is not None
    return found


@partial(jax.jit, static_argnames=("model", "names"))
def _run(
    model: Model, params: Params, tokens: Array, mask: Array, metric: LogitMetric, names: tuple[str, ...]
) -> tuple[dict[str, Array], Array]:
    out = model.apply(params, tokens, mask=mask, capture=names)
    assert out.logits is not None
    return out.captured, metric(out.logits)


@partial(jax.jit, static_argnames=("model",))
def _gradients(
    model: Model, params: Params, tokens: Array, mask: Array, metric: LogitMetric, like: Mapping[str, Array]
) -> dict[str, Array]:
    """The gradient of the metric with respect to each site's activation; rows of a batch are independent."""

    def total(changes: dict[str, Array]) -> Array:
        edits: dict[str, Edit] = {name: Partial(jnp.add, change) for name, change in changes.items()}
        return metric(_logits(model, params, tokens, mask, edits)).sum()

    return jax.grad(total)({name: jnp.zeros_like(value) for name, value in like.items()})


def _flat(x: np.ndarray, keep: int) -> np.ndarray:
    return x.reshape(*x.shape[:keep], -1).astype(np.float32)
