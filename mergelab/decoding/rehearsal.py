"""The programs of a generation, compiled beside the loading of the weights that they will run on.

A program depends on shapes alone. So the first pass and the first step are run once on weights that are
zeros, on one block of each kind, while the true weights are read: XLA compiles without Python's lock, and
large zeros take no memory. What runs afterwards finds its programs made.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Key

from mergelab.activations.batches import bucket_size
from mergelab.checkpoints.buffers import aligned_zeros
from mergelab.decoding.generation_state import GenerationState, on_device, start, unread
from mergelab.decoding.memory import Memory
from mergelab.decoding.samplers import Sampler, row_keys
from mergelab.decoding.steps import Steps
from mergelab.decoding.stop import Stop
from mergelab.models.blockwise import runs_by_block
from mergelab.models.model import Model, Params
from mergelab.platform import trim_memory

__all__ = ["rehearsing"]


@contextlib.contextmanager
def rehearsing(
    model: Model,
    shapes: Params,
    length: int,
    *,
    max_new_tokens: int,
    sampler: Sampler,
    stop: Stop,
    key: Key[Array, "*batch"] | int = 0,
    turns: bool = False,
) -> Iterator[None]:
    """Context in which weights are loaded, while threads compile what `generate` of one prompt will run.

    Nothing is compiled where the model does not run by block (`mergelab.models.blockwise`). A fault here is
    no fault of the generation, which would meet and report it itself.

    Args:
        model: a decoder.
        shapes: shape and dtype of each parameter, as `mergelab.models.load.parameter_shapes` tells them.
        length: number of tokens of the prompt.
        max_new_tokens: same as for `generate`.
        sampler: same as for `generate`.
        stop: same as for `generate`.
        key: same as for `generate`.
        turns: whether the prompt is the first turn of a conversation (`mergelab.decoding.Memory`).
    """
    trim_memory()  # what a tokenizer's file took
    tasks = _tasks(model, shapes, length, max_new_tokens, sampler, stop, key, turns)
    thread = threading.Thread(target=_run, args=[tasks], name="rehearsal")
    thread.start()
    yield
    thread.join()  # not where loading failed: nobody will run the programs


def _tasks(
    model: Model,
    shapes: Params,
    length: int,
    max_new_tokens: int,
    sampler: Sampler,
    stop: Stop,
    key: Key[Array, "*batch"] | int,
    turns: bool,
) -> list[Callable[[], object]]:
    """The pass over the prompt, and one step."""
    if not model.predicts or not hasattr(model.config, "blocks"):
        return []
    short, params = _one_block_of_each_kind(model, shapes)
    if not runs_by_block(short, params):
        return []
    width = bucket_size(length)
    tokens, mask = on_device(np.zeros((1, width), np.int32)), on_device(np.ones((1, width), np.bool_))
    capacity = bucket_size(max_new_tokens)

    def read() -> object:
        return start(short, params, tokens, mask, capacity=capacity, stop=stop, edit={}, width=length)

    def step(begun: GenerationState | None = None) -> object:
        if begun is None:
            begun = unread(short, params, tokens, mask, np.int32(length), stop, capacity=capacity)
        steps = Steps(short, params, sampler=sampler, keys=row_keys(key, 1), stop=stop, edit={})
        return steps.advance(begun, 1)

    def turn() -> object:
        return step(Memory().begin(short, params, [0] * length, max_new_tokens=max_new_tokens, stop=stop))

    if turns:
        return [turn]
    return [read, step] if length > 1 else [step]


def _one_block_of_each_kind(model: Model, shapes: Params) -> tuple[Model, Params]:
    """The model with one block of each kind, and zeros for its parameters."""
    kinds = {spec: model.config.blocks.index(spec) for spec in model.config.blocks}
    short = replace(model, config=replace(model.config, blocks=tuple(kinds)))
    kept: dict[str, Any] = {name: tree for name, tree in shapes.items() if not name.startswith("blocks_")}
    kept |= {f"blocks_{n}": shapes[f"blocks_{i}"] for n, i in enumerate(kinds.values())}
    return short, jax.tree.map(
        lambda leaf: jax.device_put(aligned_zeros(leaf.shape, leaf.dtype), may_alias=True), kept
    )


def _run(tasks: list[Callable[[], object]]) -> None:
    # One after the other: the compiler's own threads use several cores, and two programs twice the memory.
    for task in tasks:
        with contextlib.suppress(Exception):
            jax.block_until_ready(task())
        trim_memory()
