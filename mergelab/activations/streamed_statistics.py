"""Statistics of a streamed model: Gram matrices in a pass over its blocks, Fishers in one there and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from mergelab.activations.batches import batches
from mergelab.activations.kept import TokenRule, median_norm
from mergelab.activations.passes import TokenBatch, passes
from mergelab.activations.running_sums import (
    add_rounded,
    check_finite,
    log_likelihood,
    mean_of_sums,
    squared_rows,
)
from mergelab.errors import NonFiniteError
from mergelab.models.block_programs import PassRows, Programs
from mergelab.models.decoder import ENTRANCE_PARTS, Entrance, Exit
from mergelab.models.model import Model, Params
from mergelab.models.sites import Tap
from mergelab.models.spool import Spool
from mergelab.models.streamed import StreamedParams
from mergelab.models.sweep import Call, sweep
from mergelab.models.weights_by_part import next_blocks

__all__ = ["norm_limits", "streamed_fisher", "streamed_grams"]

Sums = tuple[Any, Any]


def norm_limits(
    model: Model,
    params: Params,
    tokens: np.ndarray,
    real: np.ndarray,
    kept: np.ndarray,
    sites: tuple[str, ...],
    rule: TokenRule,
    batch: int,
) -> dict[str, Array] | None:
    """The largest norm of a row that counts, of each site, by contexts spread evenly; None for no limit."""
    if rule.max_norm_multiple is None:
        return None
    chosen = np.unique(np.linspace(0, len(tokens) - 1, min(batch, len(tokens))).astype(int))
    (norms,) = passes(model, params, [TokenBatch(tokens[chosen], real[chosen])], sites, keep=_norms)
    return {
        site: jnp.float32(rule.norm_limit(median_norm(np.asarray(norms[site], np.float64)[kept[chosen]])))
        for site in sites
    }


def _norms(value: Array, extra: Any) -> Array:
    return jnp.linalg.norm(value.astype(jnp.float32).reshape(*value.shape[:2], -1), axis=-1)


def streamed_grams(
    model: Model,
    params: StreamedParams,
    tokens: np.ndarray,
    real: np.ndarray,
    kept: np.ndarray,
    sites: Sequence[str],
    *,
    rule: TokenRule,
    batch: int,
    deliver: Callable[[dict[str, np.ndarray]], None],
    advance: Callable[[int], None] = lambda done: None,
) -> None:
    """Gram matrices, handed over block by block; two passes over the weights where the rule limits norms.

    Args:
        model: the model.
        params: its streamed parameters.
        tokens: token ids `[contexts, length]`.
        real: True for real tokens.
        kept: tokens that count.
        sites: sites of the matrices' inputs.
        rule: which rows count by their norms.
        batch: contexts in one program.
        deliver: called with the matrices of the sites of one block, `[in, in]` float32.
        advance: called with contexts done, spread over the blocks.

    Raises:
        NonFiniteError: a site holds NaN or infinity.
    """
    limits = norm_limits(model, params, tokens, real, kept, tuple(sites), rule, batch)
    parts = list(batches(len(tokens), batch))
    calls = [Call(tokens[rows], real[rows]) for rows, _ in parts]
    counted = [kept[rows] & (np.arange(len(rows)) < count)[:, None] for rows, count in parts]
    sums: dict[str, tuple[Sums, int]] = {}
    ready: dict[str, np.ndarray] = {}
    done = 0

    def sink(number: int, site: str, value: Array) -> None:
        nonlocal done
        if ready and _part(next(iter(ready))) != _part(site):
            deliver(dict(ready))
            ready.clear()
        added, rows = squared_rows(value, counted[number], None if limits is None else limits[site])
        if site in sums:
            so_far, before = sums[site]
        else:
            so_far, before = (jnp.zeros_like(added), jnp.zeros_like(added)), 0
        sums[site] = _added(so_far, added), before + int(rows)
        if number == len(calls) - 1:
            (total, lost), rows_in_all = sums.pop(site)
            ready[site] = np.asarray(mean_of_sums(total, lost, rows_in_all))
            check_finite({site: ready[site]})
            done += 1
            advance(done * len(tokens) // len(sites))

    sweep(model, params.weights, calls, sites, sink, spill=params.spill)
    if ready:
        deliver(ready)


_added = jax.jit(add_rounded, donate_argnums=0)


def _part(site: str) -> str:
    """The block of a site; what stands around the blocks is one part."""
    return ".".join(site.split(".")[:2]) if site.startswith("blocks.") else ""


def streamed_fisher(
    model: Model,
    params: StreamedParams,
    tokens: np.ndarray,
    real: np.ndarray,
    kept: np.ndarray,
    batch: int,
    *,
    deliver: Callable[[str, Any], None],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Mean squared gradients, part by part: through the blocks with what enters each kept, and back.

    The weights are read twice. What enters each block waits where the parameters spill; a part takes four
    times the memory of its float32 parameters.

    Args:
        model: a decoder.
        params: its streamed parameters.
        tokens: token ids `[contexts, length]`, each context one sequence.
        real: True for real tokens.
        kept: tokens whose logarithms are taken.
        batch: sequences in one program.
        deliver: called with the name of each part and the tree of its means, float32.
        progress: called with parts done and their number.

    Raises:
        NonFiniteError: a gradient is NaN or infinite.
    """
    parts = list(batches(len(tokens), batch))
    calls = [Call(tokens[rows], real[rows]) for rows, _ in parts]
    counted = [np.arange(len(rows)) < count for rows, count in parts]
    config, programs = model.config, Programs(model, (), {}, to_the_end=True)
    outside = replace(config, blocks=config.blocks[:1])
    total = len(params)
    done = 0

    def finished(name: str, sums: Sums) -> None:
        nonlocal done
        tree = jax.tree.map(partial(mean_of_sums, count=len(tokens)), *sums)
        for path, array in jax.tree.leaves_with_path(tree):
            if not bool(jnp.isfinite(array).all()):
                leaf = ".".join([name, *(str(getattr(key, "key", key)) for key in path)])
                raise NonFiniteError(
                    f"gradients of the parameter {leaf!r} are not finite; try float32 weights"
                )
        deliver(name, tree)
        done += 1
        progress(done, total)

    with Spool(params.spill) as entered, Spool(params.spill) as back:
        sweep(model, params.weights, calls, (), _nothing, boundaries=entered, spill=params.spill)
        rows = []
        for call in calls:
            assert call.mask is not None
            places = np.cumsum(call.mask, axis=1, dtype=np.int32) - 1
            rows.append(PassRows(jnp.asarray(np.maximum(places, 0)), jnp.asarray(call.mask)))
        outer = params.outer()
        sums = _zeros(outer)
        for number, (call, place) in enumerate(zip(calls, rows, strict=True)):
            chosen, _ = parts[number]
            given = entered.get((config.n_layers, number)), jnp.asarray(call.tokens), kept[chosen]
            sums, gradient, shared = _exit_squares(
                outside, outer, sums, *given, place, jnp.asarray(counted[number])
            )
            back.put(number, np.asarray(gradient))
            if config.tied:
                back.put(("embed", number), np.asarray(shared))
        embedded = sums[0].pop("embed", None), sums[1].pop("embed", None)
        for name in outer:
            if name != "embed":
                finished(name, (sums[0][name], sums[1][name]))
        del sums, outer
        order = range(config.n_layers - 1, -1, -1)
        with next_blocks(params.weights, order) as take:
            for layer in order:
                block = take()
                sums = _zeros(block)
                for number, place in enumerate(rows):
                    x, gradient = entered.get((layer, number)), back.get(number)
                    sums, gradient = _block_squares(
                        programs.body(layer), block, sums, x, gradient, place, counted[number]
                    )
                    back.put(number, np.asarray(gradient))
                    entered.drop((layer, number))
                finished(f"blocks_{layer}", sums)
                del block, sums
        names = [name for name in ENTRANCE_PARTS if name in params]
        first = {name: params.weights.part(name) for name in names}
        sums = _zeros(first)
        if config.tied:
            sums[0]["embed"], sums[1]["embed"] = embedded
        for number, (call, place) in enumerate(zip(calls, rows, strict=True)):
            shared = back.get(("embed", number)) if config.tied else None
            given = jnp.asarray(call.tokens), back.get(number), shared
            sums = _entrance_squares(outside, first, sums, *given, place, counted[number])
        for name in names:
            finished(name, (sums[0][name], sums[1][name]))


def _nothing(number: int, site: str, value: Array) -> None:
    """Takes no site."""


def _zeros(params: Any) -> Sums:
    first, second = (
        jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32, device=p.sharding), params) for _ in range(2)
    )
    return first, second


def _squares(gradient: Any, counted: Array) -> Any:
    return jax.tree.map(lambda g: jnp.where(counted, jnp.square(g.astype(jnp.float32)), 0.0), gradient)


def _alone(place: PassRows) -> PassRows:
    """One row of `PassRows` as a batch of one."""
    return jax.tree.map(lambda x: x[None], place)


# One sequence after the other: side by side each would need gradients of its own.


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _exit_squares(
    config: Any, params: Any, sums: Sums, x: Array, tokens: Array, kept: Array, rows: PassRows, counted: Array
) -> tuple[Sums, Array, Any]:
    def step(sums: Sums, row: Any) -> tuple[Sums, Any]:
        x, tokens, kept, place, counted = row

        def likelihood(params: Any, x: Array) -> Array:
            found: Any = Exit(config).apply({"params": params}, x[None], Tap({}))
            return log_likelihood(found[0][0], tokens, place.mask, kept)

        gradient, onward = jax.grad(likelihood, argnums=(0, 1))(params, x)
        # A tied embedding's gradient is not whole yet: its rows of these tokens get more at the entrance.
        shared = gradient["embed"]["embedding"][tokens] if config.tied else None
        return add_rounded(sums, _squares(gradient, counted)), (onward, shared)

    sums, (onward, shared) = jax.lax.scan(step, sums, (x, tokens, kept, rows, counted))
    return sums, onward, shared


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _block_squares(
    body: Any, params: Any, sums: Sums, x: Array, gradient: Array, rows: PassRows, counted: Array
) -> tuple[Sums, Array]:
    def step(sums: Sums, row: Any) -> tuple[Sums, Array]:
        x, gradient, place, counted = row
        _, pull = jax.vjp(lambda p, x: body(p, x[None], _alone(place), Tap({})), params, x)
        own, onward = pull(gradient[None])
        return add_rounded(sums, _squares(own, counted)), onward

    return jax.lax.scan(step, sums, (x, gradient, rows, counted))


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _entrance_squares(
    config: Any,
    params: Any,
    sums: Sums,
    tokens: Array,
    gradient: Array,
    shared: Array | None,
    rows: PassRows,
    counted: Array,
) -> Sums:
    def step(sums: Sums, row: Any) -> tuple[Sums, None]:
        tokens, gradient, shared, place, counted = row

        def enter(params: Any) -> Any:
            return Entrance(config).apply({"params": params}, tokens[None], place.positions[None], Tap({}))

        _, pull = jax.vjp(enter, params)
        (own,) = pull(gradient[None])
        squares = _squares(own, counted)
        if shared is not None:
            # (exit + entrance)^2 = exit^2, which is summed already, + 2 exit entrance + entrance^2
            table = own["embed"]["embedding"].astype(jnp.float32)
            there = jnp.zeros_like(table).at[tokens].set(shared.astype(jnp.float32))
            crossed = jnp.where(counted, 2 * there * table, 0.0)
            squares["embed"] = {"embedding": squares["embed"]["embedding"] + crossed}
        return add_rounded(sums, squares), None

    return jax.lax.scan(step, sums, (tokens, gradient, shared, rows, counted))[0]
