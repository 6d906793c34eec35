"""The forward pass of a decoder as one compiled program per kind of block, called once a layer.

`Model.apply` under `jit` is one program in which every layer is compiled anew: thirty layers take thirty
times as long as one. Here layers whose specs are equal share a program that takes their parameters as
arguments, so that compiling does not grow with depth. The results are those of `Model.apply`, sites and edits
among them.

It is for what runs outside of any trace and on one CPU device: there the calls cost microseconds, and
bfloat16 weights are multiplied as they lie in memory (`mergelab.models.layers.bfloat16_bits`). Accelerators,
meshes, and whatever is traced run the whole program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from mergelab.models.block_programs import (
    Edits,
    InBlock,
    around_tap,
    matched,
    matched_edits,
    names_layer,
)
from mergelab.models.cache import Cache
from mergelab.models.decoder import DECODER, ENTRANCE_PARTS, DecoderConfig, Entrance, Exit, exit_parts
from mergelab.models.layers.bfloat16_bits import as_bits
from mergelab.models.layers.block import AnyBlock, Pass
from mergelab.models.model import Model, Output, Params, token_places
from mergelab.models.sites import Edit, TokenPlaces

__all__ = ["Blockwise", "runs_by_block"]

Stream = Float[Array, "batch length width"]


def runs_by_block(model: Model, *trees: Any) -> bool:
    """Whether `Blockwise` is for these arguments: a usual decoder, and arrays on one CPU device.

    Blocks that read more than the stream (`DecoderConfig.passes_only_the_stream`) run in the whole program.
    """
    leaves = jax.tree.leaves(trees)
    usual = model.family.architecture is DECODER and model.predicts
    usual = usual and model.config.passes_only_the_stream
    if not usual or any(isinstance(leaf, Tracer) for leaf in leaves):
        return False
    arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
    devices = {device for leaf in arrays for device in leaf.devices()}
    return len(devices) == 1 and next(iter(devices)).platform == "cpu"


@dataclass(frozen=True)
class _Layer:
    """One layer of a pass: its program, and what it takes besides the stream."""

    run: Callable[..., tuple[Stream, Array, Array, dict[str, Array]]]
    params: Any
    edits: Edits
    prefix: str


class Blockwise:
    """A decoder and its parameters, ready to be called: programs are looked up and edits matched once.

    Args:
        model: a decoder, `runs_by_block`.
        params: its parameters.
        capture: names or glob patterns of sites to return.
        edit: functions by site name or glob pattern, as in `Model.apply`.

    Raises:
        SiteError: a name or pattern selects no site.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        *,
        capture: str | Sequence[str] = (),
        edit: Mapping[str, Edit] | None = None,
    ) -> None:
        sites, wanted, edits = model.sites(), matched(model, capture), matched_edits(model, edit)
        params = as_bits(params)
        config: DecoderConfig = model.config
        around = [name for name in sites if not name.startswith("blocks.")]
        self._edits = {name: edits[name] for name in around if name in edits}
        self._edited, self._after = bool(edits), exit_parts(config)
        outside = replace(
            config, blocks=config.blocks[:1]
        )  # what stands around blocks does not depend on them
        self._entrance = _entrance(
            outside, tuple(name for name in around if name in wanted and name == "embed")
        )
        self._exit = _exit(outside, tuple(name for name in around if name in wanted and name != "embed"))
        self._outer = {name: leaf for name, leaf in params.items() if not name.startswith("blocks_")}
        self._layers: list[_Layer] = []
        for i, spec in enumerate(config.blocks):
            prefix = f"blocks.{i}."
            inner = {name.removeprefix(prefix): edits[name] for name in edits if name.startswith(prefix)}
            kept = tuple(
                name.removeprefix(prefix) for name in sites if name in wanted and name.startswith(prefix)
            )
            run = _block(spec, kept, i if names_layer(inner) else None)
            self._layers.append(_Layer(run, params[f"blocks_{i}"], inner, prefix))

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        cache: Cache,
        *,
        mask: Bool[Array, "batch length"] | None = None,
        logits: bool = True,
        places: TokenPlaces | None = None,
    ) -> Output:
        """One pass, as `Model.apply` with a cache. The keys and values of the cache given are used up.

        Args:
            tokens: token ids.
            cache: earlier tokens, with room for these; its memory becomes that of the cache returned.
            mask: False for padding.
            logits: False to leave logits, the last hidden state and their sites out.
            places: what edits are told of the tokens.
        """
        masks = (mask, cache.mask, cache.length)
        if self._edited and places is None:
            real = jnp.ones(tokens.shape, jnp.bool_) if mask is None else mask
            places = token_places(cache.positions(real), mask, cache)
        told = places if self._edited else None
        x, positions, (slots, length), captured = self._entrance(
            self._named(*ENTRANCE_PARTS), tokens, masks, self._edits, told, even=cache.even
        )
        keys, values = [], []
        for layer, key, value in zip(self._layers, cache.keys, cache.values, strict=True):
            x, key, value, found = layer.run(
                layer.params, x, positions, key, value, masks, layer.edits, told, even=cache.even
            )
            keys.append(key)
            values.append(value)
            captured |= {layer.prefix + name: kept for name, kept in found.items()}
        grown = replace(cache, keys=tuple(keys), values=tuple(values), mask=slots, length=length)
        if not logits:
            return Output(None, None, captured, grown)
        params = self._named(*self._after)
        scores, hidden, found = self._exit(params, x, self._edits, told)
        return Output(scores, hidden, captured | found, grown)

    def _named(self, *names: str) -> Params:
        return {name: self._outer[name] for name in names if name in self._outer}


_Masks = tuple[Bool[Array, "batch length"] | None, Bool[Array, "batch slots"], Int[Array, " batch"]]
"""False for padding among new tokens; which slots are real, and how many are filled, before them."""


@lru_cache(maxsize=128)
def _entrance(config: DecoderConfig, capture: tuple[str, ...]) -> Callable[..., Any]:
    """The program before the blocks: what enters the first, positions, the grown cache's mask and length."""

    @partial(jax.jit, static_argnames="even")
    def run(
        params: Params, tokens: Array, masks: _Masks, edits: Edits, places: TokenPlaces | None, *, even: bool
    ) -> Any:
        mask, slots, filled = masks
        cache = Cache((), (), slots, filled, even=even)
        real = jnp.ones(tokens.shape, jnp.bool_) if mask is None else mask
        positions = cache.positions(real)
        tap = around_tap(["embed"], capture, edits, places)
        x = Entrance(config).apply({"params": params}, tokens, positions, tap)
        return x, positions, (cache.extend_mask(real), filled + tokens.shape[1]), tap.captured

    return run


@lru_cache(maxsize=256)
def _block(spec: AnyBlock, capture: tuple[str, ...], layer: int | None) -> Callable[..., Any]:
    """The program of a block: the stream after it, its keys and values, and captured sites."""

    @partial(jax.jit, static_argnames="even", donate_argnames=("key", "value"))
    def run(
        params: Params,
        x: Stream,
        positions: Array,
        key: Array,
        value: Array,
        masks: _Masks,
        edits: Edits,
        places: TokenPlaces | None,
        *,
        even: bool,
    ) -> Any:
        mask, slots, filled = masks
        cache = Cache((key,), (value,), slots, filled, even=even)
        tap = InBlock(layer or 0, capture, edits, places)
        # The gain is that of initial weights.
        module = spec.module(0, 1.0, "block")
        found: Any = module.apply({"params": params}, x, Pass(positions, mask, cache, tap))
        x, (key, value) = found
        return x, key, value, {name.split(".", 2)[2]: kept for name, kept in tap.captured.items()}

    return run


@lru_cache(maxsize=128)
def _exit(config: DecoderConfig, capture: tuple[str, ...]) -> Callable[..., Any]:
    """The program after the blocks: logits, the normalized stream, and captured sites."""
    names = ("final_norm.scale", "unembed.input", "logits")

    @jax.jit
    def run(params: Params, x: Stream, edits: Edits, places: TokenPlaces | None) -> Any:
        tap = around_tap(names, capture, edits, places)
        logits, hidden = Exit(config).apply({"params": params}, x, tap)
        return logits, hidden, tap.captured

    return run
