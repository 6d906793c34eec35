"""The compiled pieces of a pass without a cache: what stands before the blocks, one block, what stands after.

Blocks of equal specs share one program, which takes their parameters as arguments: compiling does not grow
with depth, and the parameters may come from anywhere, one block after the other. Sites and edits are those of
`Model.apply`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import jax
from jax.tree_util import Partial
from jaxtyping import Array

from mergelab.compat import register_dataclass
from mergelab.models.cache import ArrayLeaf
from mergelab.models.decoder import DecoderConfig, Entrance, Exit
from mergelab.models.encoder import EncoderEntrance, EncoderExit
from mergelab.models.layers.block import Pass
from mergelab.models.model import Model, token_places
from mergelab.models.sites import Edit, Tap, TokenPlaces, match_sites, takes

__all__ = [
    "Edits",
    "InBlock",
    "PassRows",
    "Programs",
    "around_tap",
    "matched",
    "matched_edits",
    "names_layer",
]

Edits = dict[str, tuple[Partial, ...]]
"""Edits by site, in the order they apply."""


@register_dataclass
@dataclass(frozen=True)
class PassRows:
    """Tokens of one call, as every piece of the pass needs to know them.

    Attributes:
        positions: positions of the tokens, int32 `[batch, length]`.
        mask: False for padding, bool `[batch, length]`; None if there is none.
    """

    positions: ArrayLeaf
    mask: ArrayLeaf | None


def matched(model: Model, capture: str | Sequence[str]) -> tuple[str, ...]:
    """The sites that names or patterns select, in forward order.

    Raises:
        SiteError: a name or pattern selects no site.
    """
    patterns = [capture] if isinstance(capture, str) else capture
    found = {name for pattern in patterns for name in match_sites(model.sites(), pattern)}
    return tuple(name for name in model.sites() if name in found)


def matched_edits(model: Model, edit: Mapping[str, Edit] | None) -> Edits:
    """Edits by the sites that their names or patterns select.

    Raises:
        SiteError: a name or pattern selects no site.
    """
    edits: Edits = {}
    for pattern, function in (edit or {}).items():
        found = function if isinstance(function, Partial) else Partial(function)
        for name in match_sites(model.sites(), pattern):
            edits[name] = (*edits.get(name, ()), found)
    return edits


def names_layer(edits: Edits) -> bool:
    """Whether an edit is told the site's name, and so may do something else at every layer."""
    return any(takes(function)[0] for functions in edits.values() for function in functions)


class InBlock(Tap):
    """The tap of a block that is compiled as block 0 and stands for another one.

    Args:
        layer: number that edits are told.
        capture: sites to keep, named as within the block.
        edits: edits by those names.
        places: what edits are told of the tokens.
        to_the_end: whether what the block hands on is needed.
    """

    def __init__(
        self,
        layer: int,
        capture: Sequence[str],
        edits: Edits,
        places: TokenPlaces | None,
        to_the_end: bool = True,
    ) -> None:
        self._prefix = f"blocks.{layer}."
        sites = {self._prefix + name: () for name in (*capture, *edits)}
        named = {self._prefix + name: functions for name, functions in edits.items()}
        super().__init__(sites, [self._prefix + name for name in capture], named, to_the_end, places=places)

    def __call__(self, site: str, value: jax.Array) -> jax.Array:
        return super().__call__(self._renamed(site), value)

    def uses(self, site: str) -> bool:
        return super().uses(self._renamed(site))

    def edits(self, site: str) -> bool:
        return super().edits(self._renamed(site))

    def _renamed(self, site: str) -> str:
        return self._prefix + site.removeprefix("blocks.0.")


def around_tap(
    names: Sequence[str],
    capture: Sequence[str],
    edits: Edits,
    places: TokenPlaces | None,
    to_the_end: bool = True,
) -> Tap:
    """The tap of what stands around the blocks."""
    chosen = {name: edits[name] for name in names if name in edits}
    return Tap(dict.fromkeys(names, ()), capture, chosen, to_the_end, places=places)


class Programs:
    """The programs of a model, its sites and edits given.

    Args:
        model: any model.
        capture: sites to return, in forward order.
        edits: sites that are edited; what the edits do is an argument of each call.
        to_the_end: whether the pass goes on to logits, or the last hidden state, where no site needs it.

    Attributes:
        last: number of the last block that is run; -1 for none.
        ends: whether all blocks are run.
        reads_end: whether a site is behind them.
        unembeds: whether a site needs logits.
    """

    def __init__(self, model: Model, capture: Sequence[str], edits: Edits, to_the_end: bool = False) -> None:
        config = self._config = model.config
        self._decoder = isinstance(config, DecoderConfig)
        # What stands around blocks does not depend on them.
        self._outside = replace(config, blocks=config.blocks[:1])
        sites = list(model.sites())
        inner = [n for n, name in enumerate(sites) if name.startswith("blocks.")]
        before, after = sites[: inner[0]], sites[inner[-1] + 1 :]
        self._before = tuple(name for name in before if name in capture)
        self._after = tuple(name for name in after if name in capture)
        self._names = tuple(before), tuple(after)
        self._own: dict[int, tuple[str, ...]] = {}
        for name in capture:
            if name.startswith("blocks."):
                layer, site = name.removeprefix("blocks.").split(".", 1)
                self._own[int(layer)] = (*self._own.get(int(layer), ()), site)
        self._edits = edits
        self.ends = bool(self._after) or to_the_end
        self._to_the_end, self.reads_end = to_the_end, bool(self._after)
        self.unembeds = "logits" in self._after
        self.last = config.n_layers - 1 if self.ends else max(self._own, default=-1)

    def edits_of(self, edits: Edits, layer: int | None = None) -> Edits:
        """The edits of one block, by their names within it; of what stands around the blocks without one."""
        if layer is None:
            return {name: found for name, found in edits.items() if not name.startswith("blocks.")}
        prefix = f"blocks.{layer}."
        return {name.removeprefix(prefix): found for name, found in edits.items() if name.startswith(prefix)}

    def entrance(self, rows: int | None = None) -> Callable[..., tuple[Array, dict[str, Array]]]:
        """`(params, tokens, rows, token_types, edits)` to the stream, and the sites before the blocks.

        Args:
            rows: rows of the embedding that the parameters hold, where those are not the vocabulary's.
        """
        config = self._outside if rows is None else replace(self._outside, vocab_size=rows)
        return _entrance(config, self._decoder, self._names[0], self._before)

    def block(self, layer: int) -> Callable[..., tuple[Array | None, dict[str, Array]]]:
        """`(params, stream, rows, edits)` to the stream after it, and its sites by their full names."""
        own = self._own.get(layer, ())
        named = names_layer(self.edits_of(self._edits, layer))
        onward = self.ends or layer < self.last
        run = _block(self.body(layer), own, layer if named else None, onward)
        prefix = f"blocks.{layer}."

        def call(*arguments: Any) -> tuple[Array | None, dict[str, Array]]:
            x, found = run(*arguments)
            return x, {prefix + name: value for name, value in found.items()}

        return call

    def body(self, layer: int) -> _Body:
        """What a block computes: `(params, stream, rows, tap)` to the stream.

        What all blocks of an encoder share (`relative`) stands among the block's parameters.
        """
        config = self._config
        return _BlockBody(config.blocks[layer], config.causal, None if self._decoder else config.relative)

    def exit(self) -> Callable[..., tuple[Array | None, Array, dict[str, Array]]]:
        """`(params, stream, rows, edits)` to logits, last hidden state, and the sites after the blocks."""
        return _exit(self._outside, self._decoder, self._names[1], self._after, self._to_the_end)


_Body = Callable[[Any, Array, PassRows, Tap], Array]


@dataclass(frozen=True)
class _BlockBody:
    spec: Any
    causal: bool
    relative: Any

    def __call__(self, params: Any, x: Array, rows: PassRows, tap: Tap) -> Array:
        shared = None
        if self.relative is not None:
            shared = self.relative.module("relative").apply({"params": params["relative"]}, x.shape[1])
        module = self.spec.module(0, 1.0, "block")  # the gain is that of initial weights
        given: Any = Pass(rows.positions, rows.mask, None, tap, causal=self.causal, relative=shared)  # pyright: ignore[reportArgumentType]
        return module.apply({"params": params}, x, given)[0]


def _told(edits: Edits, rows: PassRows) -> TokenPlaces | None:
    return token_places(rows.positions, rows.mask, None) if edits else None  # pyright: ignore[reportArgumentType]


@lru_cache(maxsize=128)
def _entrance(config: Any, decoder: bool, names: tuple[str, ...], capture: tuple[str, ...]) -> Any:
    @jax.jit
    def run(params: Any, tokens: Array, rows: PassRows, types: Array | None, edits: Edits) -> Any:
        tap = around_tap(names, capture, edits, _told(edits, rows))
        if decoder:
            x = Entrance(config).apply({"params": params}, tokens, rows.positions, tap)
        else:
            x = EncoderEntrance(config).apply({"params": params}, tokens, rows.positions, types, tap)
        return x, tap.captured

    return run


@lru_cache(maxsize=256)
def _block(body: _Body, capture: tuple[str, ...], layer: int | None, onward: bool) -> Any:
    @jax.jit
    def run(params: Any, x: Array, rows: PassRows, edits: Edits) -> Any:
        tap = InBlock(layer or 0, capture, edits, _told(edits, rows), onward)
        after = body(params, x, rows, tap)
        return after if onward else None, {name.split(".", 2)[2]: kept for name, kept in tap.captured.items()}

    return run


@lru_cache(maxsize=128)
def _exit(
    config: Any, decoder: bool, names: tuple[str, ...], capture: tuple[str, ...], to_the_end: bool
) -> Any:
    @jax.jit
    def run(params: Any, x: Array, rows: PassRows, edits: Edits) -> Any:
        tap = around_tap(names, capture, edits, _told(edits, rows), to_the_end)
        found: Any = (Exit if decoder else EncoderExit)(config).apply({"params": params}, x, tap)
        logits, hidden = found if decoder else (None, found)
        return logits, hidden, tap.captured

    return run
