"""A model over many batches, wherever its parameters are: in memory, or in files, read block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mergelab.compat import register_dataclass
from mergelab.models.block_programs import matched
from mergelab.models.cache import ArrayLeaf
from mergelab.models.model import Model, Params
from mergelab.models.sites import Edit, as_partials
from mergelab.models.spool import Spool
from mergelab.models.streamed import StreamedParams
from mergelab.models.sweep import Call, sweep

__all__ = [
    "Keep",
    "Read",
    "TokenBatch",
    "Trees",
    "as_it_is",
    "in_float32",
    "kept_of_all",
    "kept_sites",
    "passes",
]

Keep = Callable[[Array, Any], Any]
"""What is kept of a site: a jittable function of its value and of the batch's `extra`."""

Read = Callable[[Model, Any, dict[str, Any], Any], Any]
"""A jittable function of model, parameters (those outside the blocks are there), what is kept of each site,
and the batch's `extra`."""


@register_dataclass
@dataclass(frozen=True)
class TokenBatch:
    """Tokens of one forward pass, and what belongs to them.

    Attributes:
        tokens: token ids, int32 `[batch, length]`.
        mask: True for real tokens; None if all are.
        edit: edits by site, which may differ from batch to batch in their arrays.
        extra: a pytree of arrays for `Keep` and `Read`.
    """

    tokens: ArrayLeaf | np.ndarray
    mask: ArrayLeaf | np.ndarray | None = None
    edit: Mapping[str, Edit] = field(default_factory=dict)
    extra: Any = None


def as_it_is(value: Array, extra: Any) -> Array:
    """Keeps a site as it is."""
    return value


def in_float32(value: Array, extra: Any) -> Array:
    """Keeps a site in float32."""
    return value.astype(jnp.float32)


def _kept(model: Model, params: Any, kept: dict[str, Any], extra: Any) -> Any:
    return kept


def passes(
    model: Model,
    params: Params,
    batches: Iterable[TokenBatch],
    capture: str | Sequence[str],
    *,
    keep: Keep = as_it_is,
    read: Read = _kept,
) -> Iterator[Any]:
    """Runs batches one after the other and gives what `read` makes of the sites of each.

    Of parameters in memory, each batch is one program: the pass, `keep` and `read`. Of streamed ones, each
    block runs over all batches before the next; what `keep` gives waits on the host, or where the parameters
    spill, until every block is through, and `read` follows with the parameters that stand behind the blocks.

    Args:
        model: the model.
        params: its parameters, on any mesh, or streamed.
        batches: the tokens, one batch at a time of parameters in memory; those of one shape share programs.
        capture: names or patterns of sites; of logits, the site `logits`.
        keep: what is kept of each site: a function of a module, or a frozen dataclass that is called.
        read: what is made of all of them, such a function too.

    Raises:
        SiteError: a name or pattern selects no site.
        CheckpointError: streamed weights cannot be read.
    """
    names = matched(model, capture)
    if not isinstance(params, StreamedParams):
        for batch in batches:
            yield _whole(model, params, _traceable(batch), names=names, keep=keep, read=read)
        return
    batches = list(batches)
    with kept_of_all(model, params, batches, names, keep) as waiting:
        outer = params.outer() if read is not _kept else {}
        for number, batch in enumerate(batches):
            kept = {name: waiting.get((number, name)) for name in names}
            yield _read_alone(model, outer, kept, batch.extra, read=read)


def _traceable(batch: TokenBatch) -> TokenBatch:
    return TokenBatch(batch.tokens, batch.mask, as_partials(batch.edit), batch.extra)


@partial(jax.jit, static_argnames=("model", "names", "keep", "read"))
def _whole(
    model: Model, params: Params, batch: TokenBatch, *, names: tuple[str, ...], keep: Keep, read: Read
) -> Any:
    found = kept_sites(model, params, batch, names, keep)
    return read(model, params, found, batch.extra)


def kept_sites(
    model: Model, params: Params, batch: TokenBatch, names: Sequence[str], keep: Keep
) -> dict[str, Any]:
    """What is kept of the sites of one batch, as a part of a larger program."""
    given: Any = {"mask": batch.mask, "edit": batch.edit}
    found = model.apply(params, batch.tokens, capture=names, logits=False, **given).captured  # pyright: ignore[reportArgumentType]
    return {name: keep(found[name], batch.extra) for name in names}  # pyright: ignore[reportArgumentType]


class Trees:
    """What is kept, as trees by batch and site; a context manager that forgets them.

    Args:
        folder: where the arrays wait on disk; None for memory.
    """

    def __init__(self, folder: Path | None) -> None:
        self._spool = Spool(folder)
        self._trees: dict[Any, Any] = {}

    def put(self, key: Any, tree: Any) -> None:
        """Keeps a tree of arrays."""
        leaves, self._trees[key] = jax.tree.flatten(tree)
        for place, leaf in enumerate(leaves):
            self._spool.put((key, place), np.asarray(leaf))

    def get(self, key: Any) -> Any:
        """The tree of a key."""
        tree = self._trees[key]
        return jax.tree.unflatten(tree, [self._spool.get((key, n)) for n in range(tree.num_leaves)])

    def rows(self, key: Any, start: int, stop: int) -> np.ndarray:
        """Entries of the first axis of an array that was kept."""
        return self._spool.get((key, 0), start, stop)

    def __enter__(self) -> Trees:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives memory and disk back."""
        self._spool.close()


def kept_of_all(
    model: Model,
    params: StreamedParams,
    batches: Sequence[TokenBatch],
    names: Sequence[str],
    keep: Keep = as_it_is,
) -> Trees:
    """What is kept of all batches, by `(number, site)`; a context manager that forgets it."""
    waiting = Trees(params.spill)
    calls = [_call(batch) for batch in batches]

    def sink(number: int, site: str, value: Array) -> None:
        kept = value if keep is as_it_is else _kept_alone(value, batches[number].extra, keep=keep)
        waiting.put((number, site), kept)

    try:
        sweep(model, params.weights, calls, names, sink, spill=params.spill)
    except BaseException:
        waiting.close()
        raise
    return waiting


def _call(batch: TokenBatch) -> Call:
    mask = None if batch.mask is None else np.asarray(batch.mask)
    return Call(np.asarray(batch.tokens), mask, batch.edit)


@partial(jax.jit, static_argnames="keep")
def _kept_alone(value: Array, extra: Any, *, keep: Keep) -> Any:
    return keep(value, extra)


@partial(jax.jit, static_argnames=("model", "read"))
def _read_jitted(model: Model, outer: Params, kept: dict[str, Any], extra: Any, *, read: Read) -> Any:
    return read(model, outer, kept, extra)


def _read_alone(model: Model, outer: Params, kept: dict[str, Any], extra: Any, *, read: Read) -> Any:
    if read is _kept:
        return kept
    return _read_jitted(model, outer, jax.tree.map(jnp.asarray, kept), extra, read=read)
