"""What a configuration made of blocks says of all of them, and of the first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mergelab.models.layers.block import AnyBlock

__all__ = ["Stack"]


class Stack:
    """The base of configurations, frozen dataclasses with a field `blocks`, whose layers all have attention.

    Attributes:
        blocks: what each layer is made of.
    """

    blocks: tuple[AnyBlock, ...]

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def n_heads(self) -> int:
        """Heads of the first block."""
        return self._first.attention.n_heads

    @property
    def head_dim(self) -> int:
        """Width of a head of the first block."""
        return self._first.attention.head_dim

    @property
    def mlp_width(self) -> int:
        """Neurons of the feed-forward layer of the first block."""
        return self._first.mlp.hidden

    @property
    def _first(self) -> Any:
        return self.blocks[0]

    @property
    def least_tensors(self) -> int:
        """Number of tensors that the files of such a model hold at least."""
        return self.n_layers

    def one_of_each(self) -> tuple[Any, Sequence[int]]:
        """See `mergelab.models.derived.Configuration`."""
        outlines = {block: block.outline() for block in dict.fromkeys(self.blocks)}
        numbers = {outline: n for n, outline in enumerate(dict.fromkeys(outlines.values()))}
        ours: Any = self
        return replace(ours, blocks=tuple(numbers)), [numbers[outlines[block]] for block in self.blocks]
