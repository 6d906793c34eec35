"""Parameters that stay in their files: read a block at a time, the next one while this one computes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from mergelab.checkpoints.source import Checkpoint
from mergelab.errors import MergelabError
from mergelab.models.block_programs import matched, require_only_the_stream
from mergelab.models.cache import Cache
from mergelab.models.decoder import exit_parts
from mergelab.models.load import parameter_shapes
from mergelab.models.model import Model, Output, Params
from mergelab.models.sites import Edit, TokenPlaces
from mergelab.models.sweep import one_pass
from mergelab.models.table import Leaf
from mergelab.models.weights_by_part import FileWeights, MappedWeights, Weights
from mergelab.sharding import Rules

__all__ = [
    "WAITING",
    "StreamMemory",
    "StreamedParams",
    "Streaming",
    "stream_model",
]

WAITING = 1 << 30
"""Bytes of activations that are held at a time, where nobody says how many."""


class Streaming(NamedTuple):
    """How activations wait while a model is streamed.

    Attributes:
        spill: folder in which they wait on disk; None to hold them in memory.
        memory: bytes of them that a reader of many rows holds at a time, where they are not spilled.
    """

    spill: str | Path | None = None
    memory: int = WAITING


@dataclass(frozen=True)
class StreamMemory:
    """Bytes that a streamed call holds, besides what one batch computes in one block.

    Attributes:
        blocks: the two largest blocks.
        unembedding: what makes logits, where they are asked for.
        stream: the residual stream of all tokens; 0 where it waits on disk.
        kept: the sites of all tokens; 0 where they wait on disk.
    """

    blocks: int
    unembedding: int
    stream: int
    kept: int

    @property
    def total(self) -> int:
        """The sum; blocks and unembedding are not held together."""
        return max(self.blocks, self.unembedding) + self.stream + self.kept


class StreamedParams(dict[str, Any]):
    """A model's parameters that are read when they are used, in the place of a tree of arrays.

    `model.apply(params, tokens, capture=, edit=)` runs block by block; the functions of mergelab that take a
    text run each block over all of it. `params["blocks_3"]` reads a part, anew each time. What traces or
    changes the whole tree refuses it.

    Args:
        model: the model.
        weights: where the parts come from.
        spill: folder in which activations wait on disk; None to hold them in memory.
        memory: bytes of activations that a reader of many rows holds at a time, where they are not spilled.

    Attributes:
        model, weights, spill, memory: the arguments.
    """

    def __init__(
        self, model: Model, weights: Weights, *, spill: Path | None = None, memory: int = WAITING
    ) -> None:
        super().__init__()
        self.model, self.weights, self.spill, self.memory = model, weights, spill, memory
        self._small: dict[Leaf, Any] = {}

    def __missing__(self, name: str) -> Any:
        if name not in self.weights.sizes:
            raise KeyError(name)
        return self.weights.part(name)

    def __contains__(self, name: object) -> bool:
        return name in self.weights.sizes

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights.sizes)

    def __len__(self) -> int:
        return len(self.weights.sizes)

    def __repr__(self) -> str:
        total = sum(self.weights.sizes.values())
        return f"StreamedParams({len(self)} parts of {self.model!r}, {total / 1e9:.2f} GB in files)"

    def outer(self) -> Params:
        """The parameters that stand outside the blocks and behind them: final norm, unembedding."""
        names = exit_parts(self.model.config)
        return {name: self.weights.part(name) for name in names if name in self.weights.sizes}

    def leaf(self, leaf: Leaf) -> Any:
        """A parameter that is read alone and kept: a small one, such as the gain of a norm."""
        if leaf not in self._small:
            self._small[leaf] = self.weights.leaf(leaf)
        return self._small[leaf]

    def memory_plan(
        self, tokens: int, sites: str | Sequence[str] = (), *, logits: bool = False
    ) -> StreamMemory:
        """Bytes that a call holds, besides what one batch computes in one block.

        Args:
            tokens: tokens of the call, padding among them.
            sites: names or patterns of the sites that are kept, `[batch, length, ...]`.
            logits: whether the unembedding is read.
        """
        model, sizes = self.model, self.weights.sizes
        blocks = sorted(size for name, size in sizes.items() if name.startswith("blocks_"))
        width = self.weights.itemsize
        kept = sum(
            math.prod(size for size in model.sites()[site][2:] if isinstance(size, int))
            for site in matched(model, sites)
        )
        head = "embed" if model.config.tied else "unembed"
        held = 0 if self.spill is not None else tokens * width
        return StreamMemory(
            sum(blocks[-2:]), sizes.get(head, 0) if logits else 0, held * model.config.d_model, held * kept
        )

    def mapped(self, function: Callable[..., Any], *others: StreamedParams) -> StreamedParams:
        """Parameters made of these, and of others of one shape, part by part while they are read.

        Args:
            function: map from the name of a part, and the part of each, to that part.
            others: parameters of the same model.
        """
        weights = MappedWeights(function, self.weights, *(other.weights for other in others))
        return StreamedParams(self.model, weights, spill=self.spill, memory=self.memory)

    def run_pass(
        self,
        tokens: Any,
        *,
        positions: Any,
        mask: Any,
        capture: str | Sequence[str],
        edit: Mapping[str, Edit] | None,
        cache: Cache | None,
        logits: bool,
        token_types: Any,
        places: TokenPlaces | None,
    ) -> Output:
        """One pass, as `Model.apply`, which checks and calls it."""
        if cache is not None or places is not None:
            raise MergelabError(
                "a model that is streamed from its files keeps no cache: each token would read them once; "
                "load the model to generate."
            )
        given = {"positions": positions, "mask": mask, "token_types": token_types}
        return one_pass(
            self.model,
            self.weights,
            tokens,
            spill=self.spill,
            capture=capture,
            edit=edit,
            logits=logits,
            **given,
        )


def _refused(params: StreamedParams) -> Any:
    raise MergelabError(
        "this needs all parameters of the model in memory, but they are streamed from their files "
        "(--stream-layers); load the model instead."
    )


jax.tree_util.register_pytree_node(StreamedParams, _refused, lambda held, leaves: held)


def stream_model(
    checkpoint: Checkpoint,
    *,
    mesh: Mesh | None = None,
    dtype: Any = None,
    rules: Rules | None = None,
    spill: str | Path | None = None,
    memory: int = WAITING,
) -> tuple[Model, StreamedParams]:
    """The model of an open checkpoint, and parameters that stay in it.

    Args:
        checkpoint: its headers and config are checked, and no weight is read.
        mesh: where blocks go when they are read.
        dtype: the parameters' dtype; the stored one if None.
        rules: logical axis -> mesh axes; `DEFAULT_RULES` if None.
        spill: folder in which activations wait on disk; None to hold them in memory.
        memory: bytes of activations that a reader of many rows holds at a time, where they are not spilled.

    Raises:
        CheckpointError: the config or a tensor is missing, unknown, or of another shape.
        MergelabError: the model reads images, or its blocks more than the stream.
    """
    model, dtypes = parameter_shapes(checkpoint, dtype=dtype)
    require_only_the_stream(model)
    if model.reads_images or model.reads_both:
        raise MergelabError(
            f"{checkpoint.path}: a {model.family.model_type!r} model reads images, and only models of text "
            "are streamed block by block; load it whole."
        )
    options: dict[str, Any] = {"mesh": mesh, "dtype": dtype, "rules": rules}
    weights = FileWeights(checkpoint.tensors, model, dtypes, str(checkpoint.path), **options)
    return model, StreamedParams(model, weights, spill=None if spill is None else Path(spill), memory=memory)
