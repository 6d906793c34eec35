"""The parameters of a model part by part: from files, from memory, or made of others while they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh

from mergelab.checkpoints.source import TensorSource
from mergelab.models.load import load_params
from mergelab.models.model import Model, Params
from mergelab.models.table import Leaf, get_leaf
from mergelab.sharding import Rules

__all__ = ["FileWeights", "HeldWeights", "MappedWeights", "Weights", "next_blocks"]

_FEW_ROWS = 0.5
"""Fraction of the vocabulary up to which the rows of the tokens at hand are read in place of the table."""


@runtime_checkable
class Weights(Protocol):
    """Where the parameters of a model come from, part by part.

    A part is a name at the root of the tree: `blocks_3`, `embed`, `final_norm`.
    """

    @property
    def sizes(self) -> Mapping[str, int]:
        """Bytes of each part once it is read."""
        ...

    @property
    def itemsize(self) -> int:
        """Bytes of an element of the widest parameter."""
        ...

    @property
    def mesh(self) -> Mesh | None:
        """The devices that parts are laid on; the default one if None."""
        ...

    def part(self, name: str) -> Any:
        """The parameters of a part."""
        ...

    def leaf(self, leaf: Leaf) -> Any:
        """One parameter alone."""
        ...

    def embedding_rows(self, ids: np.ndarray) -> Any:
        """The rows of the token embedding for ascending ids; None where the whole table is the way."""
        ...


class FileWeights:
    """Parts read from an open checkpoint, whatever its tensors are: of a file, dequantized, or merged.

    Args:
        tensors: the checkpoint's tensors.
        model: their model.
        dtypes: the dtype of each parameter.
        place: the checkpoint's path, for messages.
        mesh: where parts go to.
        dtype: the parameters' dtype; the stored one if None.
        rules: logical axis -> mesh axes.
    """

    def __init__(
        self,
        tensors: Mapping[str, TensorSource],
        model: Model,
        dtypes: Params,
        place: str,
        *,
        mesh: Mesh | None = None,
        dtype: Any = None,
        rules: Rules | None = None,
    ) -> None:
        self._tensors, self._place, self._mesh, self._dtype, self._rules = tensors, place, mesh, dtype, rules
        self._leaves: dict[str, list[Leaf]] = {}
        for leaf in model.table():
            self._leaves.setdefault(leaf.path[0], []).append(leaf)
        self.itemsize = max(leaf.dtype.itemsize for leaf in jax.tree.leaves(dtypes))
        self._sizes = {
            name: sum(one.size * one.dtype.itemsize for one in jax.tree.leaves(tree))
            for name, tree in dtypes.items()
        }

    @property
    def sizes(self) -> Mapping[str, int]:
        return self._sizes

    @property
    def mesh(self) -> Mesh | None:
        return self._mesh

    def part(self, name: str) -> Any:
        """Reads a part; each device its own slices.

        Raises:
            CheckpointError: a file is truncated, has changed, or cannot be read.
            NonFiniteError: a value leaves the range of the dtype.
        """
        return self._read(self._leaves[name])[name]

    def leaf(self, leaf: Leaf) -> Any:
        """Reads one parameter."""
        return get_leaf(self._read([leaf]), leaf)

    def _read(self, leaves: Sequence[Leaf]) -> Params:
        options: dict[str, Any] = {"mesh": self._mesh, "dtype": self._dtype, "rules": self._rules}
        return load_params(self._tensors, leaves, self._place, unused=lambda name: True, **options)

    def embedding_rows(self, ids: np.ndarray) -> np.ndarray | None:
        (leaf, *_) = self._leaves["embed"]
        source = self._tensors[leaf.hf_name]
        if self._mesh is not None or leaf.transform != "identity" or leaf.stack:
            return None
        if len(ids) > _FEW_ROWS * leaf.shape[0]:
            return None
        width = leaf.shape[1]
        rows = np.empty((len(ids), width), source.dtype)
        for first, last in _runs(ids):
            source.read_into(int(ids[first]) * width, rows[first:last].reshape(-1))
        return rows if self._dtype is None else rows.astype(np.dtype(self._dtype))


def _runs(ids: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges of ascending numbers that follow each other."""
    ends = np.flatnonzero(np.diff(ids) != 1) + 1
    bounds = [0, *ends.tolist(), len(ids)]
    return ((first, last) for first, last in pairwise(bounds) if last > first)


class HeldWeights:
    """Parts of parameters that are in memory: what a streamed pass is compared with."""

    def __init__(self, params: Params) -> None:
        self._params = params

    @property
    def sizes(self) -> Mapping[str, int]:
        return {
            name: sum(leaf.nbytes for leaf in jax.tree.leaves(part)) for name, part in self._params.items()
        }

    @property
    def mesh(self) -> Mesh | None:
        return None

    @property
    def itemsize(self) -> int:
        return max((leaf.dtype.itemsize for leaf in jax.tree.leaves(self._params)), default=0)

    def part(self, name: str) -> Any:
        return self._params[name]

    def leaf(self, leaf: Leaf) -> Any:
        return get_leaf(self._params, leaf)

    def embedding_rows(self, ids: np.ndarray) -> None:
        return None


class MappedWeights:
    """Parts made of the parts of other weights while they are read: edited, or between two models.

    Args:
        function: map from the name of a part, and the part of each of the weights, to that part.
        sources: weights of one shape.
    """

    def __init__(self, function: Callable[..., Any], *sources: Weights) -> None:
        self._function, self._sources = function, sources

    @property
    def sizes(self) -> Mapping[str, int]:
        """Bytes of what is read for each part."""
        names = self._sources[0].sizes
        return {name: sum(source.sizes[name] for source in self._sources) for name in names}

    @property
    def itemsize(self) -> int:
        return self._sources[0].itemsize

    @property
    def mesh(self) -> Mesh | None:
        return self._sources[0].mesh

    def part(self, name: str) -> Any:
        return self._function(name, *(source.part(name) for source in self._sources))

    def leaf(self, leaf: Leaf) -> Any:
        return get_leaf({leaf.path[0]: self.part(leaf.path[0])}, leaf)

    def embedding_rows(self, ids: np.ndarray) -> None:
        return None


@contextmanager
def next_blocks(weights: Weights, order: Sequence[int]) -> Iterator[Callable[[], Any]]:
    """A function that gives the blocks of an order one after the other; the next is read meanwhile.

    Two blocks are in memory at most, if the caller lets each go before it asks for the next.
    """
    waiting = iter(order)
    with ThreadPoolExecutor(1, thread_name_prefix="next-block") as pool:

        def begin() -> Future[Any] | None:
            layer = next(waiting, None)
            return None if layer is None else pool.submit(weights.part, f"blocks_{layer}")

        pending = begin()

        def take() -> Any:
            nonlocal pending
            assert pending is not None, "no block is left"
            found, pending = pending.result(), None
            pending = begin()
            return found

        try:
            yield take
        finally:
            if pending is not None:
                pending.cancel()
