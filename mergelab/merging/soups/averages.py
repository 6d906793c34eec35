"""Averages of parameter trees in memory: of all, or of the candidates that are given."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int, PyTree

from mergelab.compat import register_dataclass
from mergelab.errors import EvaluationError, OperatorError
from mergelab.operators.arithmetic import rounded
from mergelab.trees import named_leaves

__all__ = [
    "Candidates",
    "ExponentialAverage",
    "Loader",
    "RunningAverage",
    "exponential_soup",
    "last_soup",
    "load_weights",
    "loaders",
    "uniform_soup",
]


@register_dataclass
@dataclass(frozen=True)
class RunningAverage:
    """The equal-weight mean of the trees seen so far, `mean <- mean + (tree - mean) / (count + 1)`.

    A pytree: it passes through `jit`, `scan` and checkpointing, and keeps the sharding of its input. Means
    are held in float32 (float64 for float64 leaves), so rounding does not compound over narrow dtypes.
    Leaves that are not floating point (step counters, masks) are kept from the first tree.

        average = RunningAverage.of(first)
        for tree in others:
            average = average.add(tree)
        soup = average.result()

    Attributes:
        mean: the tree of means; floating leaves in the accumulation dtype.
        count: how many trees were averaged, int32 scalar.
        dtypes: the dtypes of the first tree's leaves, which `result` returns to.

    Reference:
        Wortsman et al., Model soups (arXiv:2203.05482); Izmailov et al., SWA (arXiv:1803.05407).
    """

    mean: PyTree[Array]
    count: Int[Array, ""]
    dtypes: tuple[np.dtype[Any], ...] = field(metadata={"static": True})

    @classmethod
    def of(cls, tree: PyTree) -> RunningAverage:
        """Returns the average of this one tree."""
        return cls(_widen(tree), jnp.ones((), jnp.int32), _dtypes(tree))

    def add(self, tree: PyTree) -> RunningAverage:
        """Returns the average with one more tree in it.

        Raises:
            OperatorError: `tree` differs in structure or in a leaf's shape, or (outside `jit`, where values
                can be read) in a leaf that is not floating point and so has no mean.
        """
        _check_alike(self.mean, tree)
        count = self.count + 1
        return RunningAverage(_move(self.mean, tree, 1 / _real(count)), count, self.dtypes)

    def result(self) -> PyTree[Array]:
        """Returns the mean in the dtypes of the first tree, rounded once."""
        return _narrow(self.mean, self.dtypes)


@register_dataclass
@dataclass(frozen=True)
class ExponentialAverage:
    """The exponential moving average `mean <- decay * mean + (1 - decay) * tree`, started at the first tree.

    Same dtypes, sharding and treatment of non-floating leaves as `RunningAverage`.

    Attributes:
        mean: the tree of means; floating leaves in the accumulation dtype.
        decay: how much of the old mean each new tree leaves; may be a traced scalar.
        dtypes: the dtypes of the first tree's leaves, which `result` returns to.
    """

    mean: PyTree[Array]
    decay: float | Array
    dtypes: tuple[np.dtype[Any], ...] = field(metadata={"static": True})

    @classmethod
    def of(cls, tree: PyTree, decay: float | Array) -> ExponentialAverage:
        """Returns the average of this one tree.

        Raises:
            OperatorError: `decay` is a number outside [0, 1].
        """
        if isinstance(decay, int | float) and not 0 <= decay <= 1:
            raise OperatorError(f"decay is {decay}; an exponential average needs a decay within [0, 1].")
        return cls(_widen(tree), decay, _dtypes(tree))

    def add(self, tree: PyTree) -> ExponentialAverage:
        """Returns the average moved towards one more tree; raises as `RunningAverage.add` does."""
        _check_alike(self.mean, tree)
        return ExponentialAverage(_move(self.mean, tree, 1 - _real(self.decay)), self.decay, self.dtypes)

    def result(self) -> PyTree[Array]:
        """Returns the mean in the dtypes of the first tree, rounded once."""
        return _narrow(self.mean, self.dtypes)


@jax.jit
def _move(mean: PyTree[Array], tree: PyTree, gain: Array) -> PyTree[Array]:
    """`mean + gain * (tree - mean)`, the product rounded first: the same bits in every program."""

    def move(old: Array, new: Any) -> Array:
        if not _averages(old):
            return old
        return old + rounded((jnp.asarray(new).astype(old.dtype) - old) * gain.astype(old.dtype))

    return jax.tree.map(move, mean, tree)


def _real(number: Any) -> Array:
    """The widest float in use: float64 where it is enabled."""
    return jnp.asarray(number).astype(jnp.result_type(float))


def _averages(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def _dtypes(tree: PyTree) -> tuple[np.dtype[Any], ...]:
    return tuple(np.dtype(jnp.asarray(leaf).dtype) for leaf in jax.tree.leaves(tree))


def _widen(tree: PyTree) -> PyTree[Array]:
    def widen(leaf: Any) -> Array:
        array = jnp.asarray(leaf)
        narrow = jnp.issubdtype(array.dtype, jnp.floating) and array.dtype.itemsize < 4
        return array.astype(jnp.float32) if narrow else array

    return jax.tree.map(widen, tree)


def _narrow(mean: PyTree[Array], dtypes: tuple[np.dtype[Any], ...]) -> PyTree[Array]:
    leaves, treedef = jax.tree.flatten(mean)
    return treedef.unflatten([leaf.astype(d) for leaf, d in zip(leaves, dtypes, strict=True)])


def _check_alike(mean: PyTree, tree: PyTree) -> None:
    names, leaves, structure = named_leaves(mean)
    new_names, new_leaves, new_structure = named_leaves(tree)
    if structure != new_structure:
        odd = sorted(set(names) ^ set(new_names))
        where = "is only in " + ("the trees averaged so far" if odd and odd[0] in names else "the new tree")
        what = f"leaf {odd[0]!r} {where} ({len(odd)} leaves differ)" if odd else "containers differ in type"
        raise OperatorError(f"The trees to average differ: {what}; average models of one architecture.")
    for name, leaf, new in zip(names, leaves, new_leaves, strict=True):
        if jnp.shape(leaf) != jnp.shape(new):
            raise OperatorError(
                f"Leaf {name!r} has shape {jnp.shape(new)} where the trees averaged so far have "
                f"{jnp.shape(leaf)}; average models of one architecture."
            )
        known = not isinstance(leaf, Tracer) and not isinstance(new, Tracer)
        if known and not _averages(leaf) and not np.array_equal(np.asarray(leaf), np.asarray(new)):
            raise OperatorError(
                f"Leaf {name!r} is of type {leaf.dtype} and differs between trees, so it has no average; "
                "leave it out of the trees or make it equal in all of them."
            )


Loader = Callable[[], PyTree[Array]]
"""Returns one candidate's parameters; called each time they are needed, so nothing else need hold them."""

Candidates = Mapping[str, Any] | Sequence[Any]
"""Parameter trees, loaders or checkpoint paths: by name, or in order (named `model_0`, `model_1`, ...)."""


def loaders(candidates: Candidates) -> dict[str, Loader]:
    """Returns one loader per candidate, by name.

    A string or path is a checkpoint folder, read into `{tensor name: array}`; a callable that is not itself
    a pytree node is a loader; anything else is the parameter tree.

    Raises:
        EvaluationError: there are no candidates.
    """
    if not candidates:
        raise EvaluationError("A soup needs at least one candidate; none was given.")
    if isinstance(candidates, Mapping):
        return {str(name): _loader(candidate) for name, candidate in candidates.items()}
    width = len(str(len(candidates) - 1))
    return {f"model_{i:0{width}}": _loader(candidate) for i, candidate in enumerate(candidates)}


def load_weights(path: str | Path) -> dict[str, np.ndarray]:
    """Returns every tensor of a checkpoint folder as an array, by name.

    Raises:
        CheckpointError: the folder is missing, malformed or unsafe to read.
    """
    from mergelab.checkpoints import open_checkpoint, read_whole

    return {name: read_whole(source) for name, source in open_checkpoint(path).tensors.items()}


def _loader(candidate: Any) -> Loader:
    if isinstance(candidate, str | Path):
        return partial(load_weights, candidate)
    # A callable pytree node (a module object) is parameters; only a callable *leaf* is a loader.
    if callable(candidate) and jax.tree_util.all_leaves([candidate]):
        return candidate
    return lambda: candidate


def uniform_soup(trees: Mapping[str, Any] | Iterable[Any]) -> PyTree[Array]:
    """Returns the equal-weight mean of the trees, holding one tree and one float32 mean at a time.

    Args:
        trees: a collection (by name or in order) or generator of parameter trees, loaders or checkpoint
            paths (see `candidates.loaders`); a generator is consumed as it goes.

    Returns:
        A tree like the first one, in its dtypes.

    Raises:
        OperatorError: there are no trees, or they differ in structure, shape or a non-floating leaf.

    Reference:
        Wortsman et al., Model soups (arXiv:2203.05482), recipe 1.
    """
    average: RunningAverage | None = None
    for tree in _each(trees):
        average = RunningAverage.of(tree) if average is None else average.add(tree)
    if average is None:
        raise OperatorError("uniform_soup was given no trees; it needs at least one.")
    return average.result()


def last_soup(trees: Iterable[Any], count: int) -> PyTree[Array]:
    """Returns the mean of the last `count` items of a stream (latest weight averaging, arXiv:2209.14981).

    Items are kept unloaded until the stream ends, so a stream of loaders or paths costs one tree of memory
    and a stream of trees costs `count`. Fewer than `count` items are all averaged.

    Raises:
        OperatorError: `count` < 1, or as `uniform_soup`.
    """
    if count < 1:
        raise OperatorError(f"count is {count}; last_soup averages at least 1 tree.")
    return uniform_soup(deque(trees, maxlen=count))


def exponential_soup(trees: Iterable[Any], decay: float) -> PyTree[Array]:
    """Returns the exponential moving average of a stream, oldest first, started at its first tree.

    Raises:
        OperatorError: there are no trees, they differ, or `decay` is outside [0, 1].
    """
    average: ExponentialAverage | None = None
    for tree in _each(trees):
        average = ExponentialAverage.of(tree, decay) if average is None else average.add(tree)
    if average is None:
        raise OperatorError("exponential_soup was given no trees; it needs at least one.")
    return average.result()


def _each(trees: Mapping[str, Any] | Iterable[Any]) -> Iterator[PyTree[Array]]:
    for item in trees.values() if isinstance(trees, Mapping) else trees:
        (load,) = loaders([item]).values()
        yield load()
