"""Passes block by block: each block is read once, runs over all tokens that wait, and is dropped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from mergelab.models.block_programs import Edits, PassRows, Programs, matched, matched_edits
from mergelab.models.cache import ArrayLeaf
from mergelab.models.decoder import ENTRANCE_PARTS, exit_parts
from mergelab.models.model import Model, Output
from mergelab.models.sites import Edit
from mergelab.models.spool import Spool
from mergelab.models.weights_by_part import Weights, next_blocks
from mergelab.sharding import DISPATCH, named_sharding

__all__ = ["Call", "one_pass", "sweep"]

Sink = Callable[[int, str, Array], None]
"""What takes a site of a call: the number of the call, the site's name, its value on the device."""


@dataclass(frozen=True)
class Call:
    """One batch of tokens.

    Attributes:
        tokens: token ids, int32 `[batch, length]`.
        mask: True for real tokens; None if all are.
        edit: edits by site name or pattern.
        positions: positions of the tokens; those that the model gives by default if None.
        token_types: segments of the tokens, of encoders that have some.
    """

    tokens: np.ndarray
    mask: np.ndarray | None = None
    edit: Mapping[str, Edit] = field(default_factory=dict)
    positions: ArrayLeaf | None = None
    token_types: ArrayLeaf | None = None


def sweep(
    model: Model,
    weights: Weights,
    calls: Sequence[Call],
    capture: str | Sequence[str],
    sink: Sink,
    *,
    logits: Callable[[int, Array | None, Array], None] | None = None,
    boundaries: Spool | None = None,
    spill: Path | None = None,
    stop: Callable[[], None] = lambda: None,
) -> None:
    """Runs all calls through the blocks one after the other; sites arrive block by block, calls in order.

    What is held is the stream of all calls, two blocks, and what one call computes in a block.

    Args:
        model: the model.
        weights: its parameters.
        calls: the tokens; calls of one shape share programs, and so do edits of the same sites.
        capture: names or patterns of sites.
        sink: what takes the sites.
        logits: what takes, of each call, logits (None of a model without) and the last hidden state.
        boundaries: takes what enters each block, under `(layer, call)`, and what leaves the last.
        spill: folder in which the stream waits on disk; None to hold it in memory.
        stop: called between the blocks; what it raises ends the sweep.

    Raises:
        SiteError: a name or pattern selects no site.
        CheckpointError: the files cannot be read.
    """
    edits = [matched_edits(model, call.edit) for call in calls]
    every: Edits = {name: found for one in edits for name, found in one.items()}
    wanted = boundaries if logits is None else logits
    programs = Programs(model, matched(model, capture), every, to_the_end=wanted is not None)
    mesh = weights.mesh
    # What all blocks read beside their own parameters.
    common = {name: weights.part(name) for name in ("relative",) if name in weights.sizes}
    with Spool(spill) as stream:
        rows = _entered(model, weights, programs, calls, edits, sink, stream)
        with next_blocks(weights, range(programs.last + 1)) as take:
            for layer in range(programs.last + 1):
                stop()
                run, block = programs.block(layer), {**take(), **common}
                for number, place in enumerate(rows):
                    entered = stream.get(number)
                    if boundaries is not None:
                        boundaries.put((layer, number), entered)
                    with DISPATCH:
                        x, found = run(
                            block, _put(entered, mesh), place, programs.edits_of(edits[number], layer)
                        )
                    for name, value in found.items():
                        sink(number, name, value)
                    if x is not None:
                        stream.put(number, np.asarray(x))
                del block
        if boundaries is not None:
            for number in range(len(calls)):
                boundaries.put((programs.last + 1, number), stream.get(number))
        if programs.reads_end or logits is not None:
            outer, run = _exit_parts(model, weights, programs, logits is not None), programs.exit()
            for number, place in enumerate(rows):
                entered = stream.get(number)
                with DISPATCH:
                    scores, hidden, found = run(
                        outer, _put(entered, mesh), place, programs.edits_of(edits[number])
                    )
                for name, value in found.items():
                    sink(number, name, value)
                if logits is not None:
                    logits(number, scores, hidden)


def _entered(
    model: Model,
    weights: Weights,
    programs: Programs,
    calls: Sequence[Call],
    edits: Sequence[Edits],
    sink: Sink,
    stream: Spool,
) -> list[PassRows]:
    """Fills the stream with what enters the first block; the places of each call's tokens."""
    mesh = weights.mesh
    ids = np.unique(np.concatenate([np.asarray(call.tokens).reshape(-1) for call in calls]))
    part = _entrance_parts(weights)
    few = weights.embedding_rows(ids)
    if few is not None:
        # A power of two, so that texts of other words find the program.
        size = 1 << max(4, (len(few) - 1).bit_length())
        part["embed"] = {"embedding": jnp.asarray(np.pad(few, ((0, size - len(few)), (0, 0))))}
        run = programs.entrance(size)
    else:
        part["embed"] = weights.part("embed")
        run = programs.entrance()
    rows = []
    for number, (call, edit) in enumerate(zip(calls, edits, strict=True)):
        tokens = np.asarray(call.tokens, np.int32)
        positions = call.positions
        if positions is None:
            positions = _positions(model, tokens, call.mask)
        place = PassRows(_put(positions, mesh), None if call.mask is None else _put(call.mask, mesh))
        given = tokens if few is None else np.searchsorted(ids, tokens).astype(np.int32)
        with DISPATCH:
            x, found = run(part, _put(given, mesh), place, call.token_types, programs.edits_of(edit))
        for name, value in found.items():
            sink(number, name, value)
        stream.put(number, np.asarray(x))
        rows.append(place)
    return rows


def _positions(model: Model, tokens: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """`Model.positions` on the host: no program for each shape."""
    if mask is None or not model.skips_padding:
        return np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32)[None], tokens.shape)
    counted = np.cumsum(np.asarray(mask), axis=1, dtype=np.int32) - 1
    return np.maximum(counted, 0).astype(np.int32)


def _entrance_parts(weights: Weights) -> dict[str, Any]:
    names = dict.fromkeys((*ENTRANCE_PARTS, "positions", "token_types", "embed_norm"))
    return {name: weights.part(name) for name in names if name in weights.sizes and name != "embed"}


def _exit_parts(model: Model, weights: Weights, programs: Programs, logits: bool) -> dict[str, Any]:
    """What stands behind the blocks; the unembedding only where there are logits to make."""
    if not model.family.architecture.causal:
        names = ("final_norm", "pooler")
    else:
        names = exit_parts(model.config, logits or programs.unembeds)
    return {name: weights.part(name) for name in names if name in weights.sizes}


def _put(array: Any, mesh: Mesh | None) -> Array:
    """An array `[batch, length, ...]` where the blocks are."""
    if mesh is None:
        return jnp.asarray(array)
    axes = ("batch", "length", *[None] * (np.ndim(array) - 2))
    return jax.device_put(array, named_sharding(mesh, np.shape(array), axes))


def one_pass(
    model: Model,
    weights: Weights,
    tokens: Any,
    *,
    positions: Any = None,
    mask: Any = None,
    token_types: Any = None,
    capture: str | Sequence[str] = (),
    edit: Mapping[str, Edit] | None = None,
    logits: bool = True,
    spill: Path | None = None,
) -> Output:
    """One pass over tokens, as `Model.apply` without a cache."""
    captured: dict[str, Array] = {}
    last: list[tuple[Array | None, Array]] = []
    call = Call(
        np.asarray(tokens), None if mask is None else np.asarray(mask), edit or {}, positions, token_types
    )
    sweep(
        model,
        weights,
        [call],
        capture,
        lambda number, site, value: captured.__setitem__(site, value),
        logits=(lambda number, scores, hidden: last.append((scores, hidden))) if logits else None,
        spill=spill,
    )
    scores, hidden = last[0] if last else (None, None)
    return Output(scores, hidden, captured, None)
