"""The steps of a generation: one token a row each, as one compiled loop or by block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int, Key

from mergelab.decoding.generation_state import (
    NO_CACHE,
    NOTHING,
    GenerationState,
    last_token,
    on_device,
    read_again,
    step_places,
    token_axes,
)
from mergelab.decoding.samplers import TokenChoice
from mergelab.decoding.spread import on_host
from mergelab.decoding.stop import Stop
from mergelab.decoding.transforms import History
from mergelab.models.blockwise import Blockwise, runs_by_block
from mergelab.models.layers.rotary import LongRopeScaling
from mergelab.models.model import Model, Params

__all__ = ["Steps", "advance", "grown_alone", "grown_rows", "lengths_of_rotations"]


def advance(
    model: Model,
    params: Params,
    progress: GenerationState,
    until: Int[Array, ""] | int,
    *,
    sampler: TokenChoice,
    keys: Key[Array, " batch"],
    stop: Stop,
    edit: Mapping[str, Partial],
) -> GenerationState:
    """Generates until `until` steps (at most the capacity) are done in all, or every row has ended.

    Args:
        model: the decoder.
        params: its parameters.
        progress: rows as they stand.
        until: number of steps in all, an int32 scalar.
        sampler: chooses tokens.
        keys: one per row; the `n`-th token of a row is drawn with its key folded with `n`.
        stop: rule that ends rows, of the shape that `start` was given.
        edit: edits by site, as `mergelab.models.sites.as_partials` gives them.
    """
    steps = Steps(model, params, sampler=sampler, keys=keys, stop=stop, edit=edit)
    return steps.advance(progress, until, keep=True)


def lengths_of_rotations(model: Model) -> set[int]:
    """Lengths beyond which a text is rotated otherwise, from its first token on (LongRoPE)."""
    blocks = getattr(model.config, "blocks", ())
    rotaries = [getattr(getattr(block, "attention", None), "rotary", None) for block in blocks]
    scalings = [rotary.scaling for rotary in rotaries if rotary is not None]
    return {s.original_length for s in scalings if isinstance(s, LongRopeScaling)}


class Steps:
    """What all steps of a generation share, made ready once; the arguments are those of `advance`."""

    def __init__(
        self,
        model: Model,
        params: Params,
        *,
        sampler: TokenChoice,
        keys: Key[Array, " batch"],
        stop: Stop,
        edit: Mapping[str, Partial],
    ) -> None:
        self._model, self._params, self._edit = model, params, edit
        self._sampler, self._keys, self._stop = sampler, keys, stop
        self._forward: Blockwise | None = None
        self._lengths = lengths_of_rotations(model)

    def advance(
        self,
        progress: GenerationState,
        until: Int[Array, ""] | int,
        *,
        keep: bool = False,
        sampler: TokenChoice | None = None,
    ) -> GenerationState:
        """The function `advance` with its programs at hand.

        Args:
            progress: rows as they stand.
            until: number of steps in all.
            keep: whether `progress` must stay usable; else its memory becomes that of the result.
            sampler: what chooses from now on; as before if None.
        """
        self._sampler = self._sampler if sampler is None else sampler
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((progress, until, self._params))):
            return self._run(progress, until, keep)
        last = min(int(until), progress.tokens.shape[1])
        for crossing in self._crossings(progress, last):
            progress, keep = self._run(progress, crossing, keep), False
            if int(progress.steps) == crossing and not on_host(progress.finished).all():
                progress = read_again(self._model, self._params, progress, self._edit)
        return self._run(progress, last, keep)

    def _crossings(self, progress: GenerationState, until: int) -> list[int]:
        """The steps before which a row outgrows a length at which its rotation changes."""
        if not self._lengths:
            return []
        done = int(progress.steps)
        held = on_host(progress.cache.mask).sum(axis=1)[~on_host(progress.finished)]
        steps = {done + length - int(tokens) for length in self._lengths for tokens in held}
        return sorted(step for step in steps if done <= step < until)

    def _run(self, progress: GenerationState, until: Int[Array, ""] | int, keep: bool) -> GenerationState:
        if not runs_by_block(self._model, self._params, progress.cache):
            return _loop(
                self._model,
                self._params,
                progress,
                jnp.asarray(until, jnp.int32),
                sampler=self._sampler,
                keys=self._keys,
                stop=self._stop,
                edit=self._edit,
            )
        if self._forward is None:
            captured = tuple(progress.captured)
            self._forward = Blockwise(self._model, self._params, capture=captured, edit=self._edit)
        cache, done = progress.cache, int(progress.steps)
        if keep and done < int(until):
            cache = replace(cache, keys=_copies(cache.keys), values=_copies(cache.values))
        while done < int(until) and not np.asarray(progress.finished).all():
            places = step_places(replace(progress, cache=cache)) if self._edit else None
            # Through numpy, which compiles nothing to give the tokens another shape.
            tokens = on_device(np.asarray(progress.last)[:, None])
            out = self._forward(tokens, cache, places=places)
            assert out.logits is not None and out.cache is not None
            # What is not used does not pass through the program, which would copy it.
            rest = replace(progress, cache=NO_CACHE, prompt=NOTHING)
            axes = token_axes(self._model, progress.captured)
            grown = grown_alone(axes, rest, out.logits, out.captured, self._sampler, self._keys, self._stop)
            progress = replace(grown, prompt=progress.prompt)
            cache, done = out.cache, done + 1
        return replace(progress, cache=cache)


@jax.jit
def _copies(arrays: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(jnp.copy(array) for array in arrays)


@partial(jax.jit, static_argnames="model")
def _loop(
    model: Model,
    params: Params,
    progress: GenerationState,
    until: Int[Array, ""],
    *,
    sampler: TokenChoice,
    keys: Key[Array, " batch"],
    stop: Stop,
    edit: Mapping[str, Partial],
) -> GenerationState:
    """All steps as one program."""
    until = jnp.minimum(until, progress.tokens.shape[1])

    def unfinished(p: GenerationState) -> Array:
        return (p.steps < until) & ~p.finished.all()

    def step(p: GenerationState) -> GenerationState:
        places = step_places(p) if edit else None
        capture = tuple(p.captured)
        out = model.apply(params, p.last[:, None], cache=p.cache, edit=edit, capture=capture, places=places)
        assert out.logits is not None and out.cache is not None
        axes = token_axes(model, capture)
        grown = grown_rows(axes, p, out.logits, out.captured, sampler, keys, stop)
        return replace(grown, cache=out.cache)

    return jax.lax.while_loop(unfinished, step, progress)


def grown_rows(
    axes: tuple[tuple[str, int], ...],
    p: GenerationState,
    logits: Float[Array, "batch 1 vocab"],
    captured: Mapping[str, Array],
    sampler: TokenChoice,
    keys: Key[Array, " batch"],
    stop: Stop,
) -> GenerationState:
    """The rows with one token more, but for the cache."""
    rows = jnp.arange(p.last.shape[0], dtype=jnp.int32)
    captured = last_token(axes, captured)
    draws = jax.vmap(jax.random.fold_in)(keys, p.lengths.astype(jnp.uint32))
    token = sampler(logits[:, -1], History(p.seen, p.lengths, captured, p.tokens), draws)
    recent = stop.push(p.recent, token)
    grown = ~p.finished
    vocab = p.seen.shape[1]  # where a row that has ended marks nothing

    def kept(new: Array, old: Array) -> Array:
        return jnp.where(grown.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    # A row that has ended writes nowhere: what stands there is beyond the last column, and dropped.
    place = jnp.where(grown, p.lengths, p.tokens.shape[1])
    log_probs = p.log_probs
    if log_probs is not None:
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits[:, -1]), token[:, None], axis=1)
        log_probs = log_probs.at[rows, place].set(chosen[:, 0], mode="drop")
    ended, readings = stop(recent, token), p.readings
    if stop.monitor is not None and readings is not None:
        read = stop.monitor(captured)
        ended, readings = ended | stop.monitor.ends(read), readings.at[rows, place].set(read, mode="drop")
    return replace(
        p,
        last=jnp.where(grown, token, p.last),
        seen=p.seen.at[rows, jnp.where(grown, token, vocab)].set(True, mode="drop"),
        recent=kept(recent, p.recent),
        tokens=p.tokens.at[rows, place].set(token, mode="drop"),
        lengths=p.lengths + grown.astype(jnp.int32),
        finished=p.finished | ended,
        steps=p.steps + 1,
        log_probs=log_probs,
        captured={site: kept(captured[site], old) for site, old in p.captured.items()},
        readings=readings,
    )


grown_alone = jax.jit(grown_rows, static_argnames="axes")
