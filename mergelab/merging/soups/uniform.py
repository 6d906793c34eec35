"""Soups that need no evaluation: the mean of all models, of the last few, or an exponential average."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jaxtyping import Array, PyTree

from mergelab.errors import OperatorError
from mergelab.merging.soups.averages import ExponentialAverage, RunningAverage
from mergelab.merging.soups.candidates import loaders

__all__ = ["exponential_soup", "last_soup", "uniform_soup"]


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
