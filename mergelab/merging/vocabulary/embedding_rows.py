"""Tensors with one row per token: which rows fill them, and the source made of those."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

import numpy as np

from mergelab.checkpoints.file_tensor import check_piece
from mergelab.checkpoints.source import Checkpoint, TensorSource

__all__ = [
    "ZERO",
    "EmbeddingRow",
    "RowMap",
    "RowSource",
    "input_embedding",
    "is_output_embedding",
    "is_token_tensor",
    "row_map",
]


EmbeddingRow = tuple[tuple[str, int], ...]
"""A row to fill in: the mean of these (model, row)s; one is that row itself, none is zeros."""

ZERO: EmbeddingRow = ()


@dataclass(frozen=True)
class RowMap:
    """Where the rows of one model's re-ordered embedding come from.

    Attributes:
        model: the model; `index` counts rows of its embedding.
        index: int64[rows]: the model's own row for each output row, or -1.
        elsewhere: rows for the output rows whose index is -1.
        padding: rows from this one on are the mean of all before it (as mergekit fills them).
    """

    model: str
    index: np.ndarray
    elsewhere: Mapping[int, EmbeddingRow]
    padding: int

    def is_identity(self, rows: int) -> bool:
        """Whether a tensor of this many rows is left as it is."""
        return (
            rows == self.index.size == self.padding
            and not self.elsewhere
            and bool(np.array_equal(self.index, np.arange(rows)))
        )


def default_row(owners: Mapping[str, int], base: str | None) -> EmbeddingRow:
    """The row a model without a token takes: of the only owner, else the base, else the mean over owners.

    Args:
        owners: the models that have the token, and its row in each.
        base: the base model, if there is one.
    """
    if base is not None and base in owners:
        return ((base, owners[base]),)
    return tuple(owners.items())


def row_map(
    model: str,
    vocabulary: Mapping[str, int],
    output: Mapping[str, int],
    defaults: Mapping[str, EmbeddingRow],
    forced: frozenset[str],
    *,
    kept_rows: int,
    size: int,
) -> RowMap:
    """Lays out one model's rows in the order of the output vocabulary.

    Args:
        model: the model's name.
        vocabulary: its tokens and their rows.
        output: the output vocabulary: token -> output row.
        defaults: the row for a token that the model lacks; for forced tokens, also where it has it.
        forced: tokens whose own row is not used.
        kept_rows: output rows past the vocabulary, below this number, keep the model's own rows.
        size: the number of output rows.
    """
    named = max(output.values(), default=-1) + 1
    first_padding = max(named, kept_rows)
    index = np.full(size, -1, np.int64)
    index[named:first_padding] = np.arange(named, first_padding)
    elsewhere: dict[int, EmbeddingRow] = {}
    unused = np.ones(named, bool)
    for token, output_row in output.items():
        unused[output_row] = False
        own = vocabulary.get(token)
        if own is not None and token not in forced:
            index[output_row] = own
            continue
        row = defaults[token]
        if len(row) == 1 and row[0][0] == model:
            index[output_row] = row[0][1]
        else:
            elsewhere[output_row] = row
    if kept_rows:
        index[:named][unused] = np.flatnonzero(unused)
    else:
        elsewhere |= dict.fromkeys(np.flatnonzero(unused).tolist(), ZERO)
    return RowMap(model, index, elsewhere, first_padding)


_COMPUTED = -1
_BLOCK = 1 << 20  # elements read at a time when averaging all rows


class RowSource:
    """`own` with its rows laid out by a `RowMap`; reads only the rows that a piece touches.

    Rows of neighboring places are read in one go. A mean is taken in float32 and rounded once; a row from a
    tensor of another dtype is rounded to this one's.
    """

    def __init__(self, own: TensorSource, rows: RowMap, others: Mapping[str, TensorSource | None]) -> None:
        """Builds the virtual tensor.

        Args:
            own: the model's tensor, `[own rows, *row shape]`.
            rows: its layout.
            others: tensors for each other model named in `rows.elsewhere`, its tensor of the same row shape,
                or None where its rows count as zeros (a bias it does not have).
        """
        self._own = own
        self._rows = rows
        self._width = int(np.prod(own.shape[1:], dtype=np.int64))
        self._tensors: list[TensorSource | None] = [own, *others.values()]
        self._number = {rows.model: 0, **{model: i + 1 for i, model in enumerate(others)}}
        self._place = np.where(rows.index >= 0, 0, _COMPUTED).astype(np.int32)
        self._row = rows.index.copy()
        for output_row, row in rows.elsewhere.items():
            if len(row) == 1 and self._row[output_row] < 0:
                model, self._row[output_row] = row[0]
                self._place[output_row] = self._number[model]
        self._lock = threading.Lock()
        self._padding_row: np.ndarray | None = None

    @property
    def name(self) -> str:
        return self._own.name

    @property
    def shape(self) -> tuple[int, ...]:
        return (self._rows.index.size, *self._own.shape[1:])

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._own.dtype

    def over(self, change: Callable[[TensorSource], TensorSource]) -> Self:
        """The same rows of other tensors."""
        other = copy.copy(self)
        other._own = change(self._own)
        other._tensors = [None if tensor is None else change(tensor) for tensor in self._tensors]
        other._lock, other._padding_row = threading.Lock(), None
        return other

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Fills `out` with the flat elements `[start, start + out.size)` of the re-ordered tensor."""
        check_piece(self, self._rows.index.size * self._width, start, out)
        if not out.size:
            return
        first, last = start // self._width, (start + out.size - 1) // self._width
        for begin, end in self._runs(first, last + 1):
            low, high = max(begin * self._width, start), min(end * self._width, start + out.size)
            piece = out[low - start : high - start]
            if self._place[begin] == _COMPUTED:
                offset = low - begin * self._width
                piece[...] = self._computed(begin)[offset : offset + piece.size]
            else:
                shift = (int(self._row[begin]) - begin) * self._width
                self._copy(int(self._place[begin]), low + shift, piece)

    def _runs(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """Splits output rows `[begin, end)` where the rows to read stop being neighbors."""
        place, row = self._place[begin:end], self._row[begin:end]
        together = (place[1:] == place[:-1]) & (row[1:] == row[:-1] + 1) & (place[1:] != _COMPUTED)
        edges = [0, *(np.flatnonzero(~together) + 1).tolist(), end - begin]
        for i, j in pairwise(edges):
            yield begin + i, begin + j

    def _copy(self, place: int, start: int, out: np.ndarray) -> None:
        tensor = self._tensors[place]
        if tensor is None:
            out[...] = 0
        elif tensor.dtype == out.dtype:
            tensor.read_into(start, out)
        else:
            buffer = np.empty(out.size, tensor.dtype)
            tensor.read_into(start, buffer)
            out[...] = buffer.astype(np.float32).astype(out.dtype)

    def _computed(self, output_row: int) -> np.ndarray:
        """One row that no tensor holds, in this tensor's dtype."""
        if output_row >= self._rows.padding:
            return self._padding()
        return self._mean(self._rows.elsewhere.get(output_row, ()))

    def _mean(self, row: EmbeddingRow) -> np.ndarray:
        total = np.zeros(self._width, np.float32)
        for model, index in row:
            tensor = self._tensors[self._number[model]]
            if tensor is not None:
                buffer = np.empty(self._width, tensor.dtype)
                tensor.read_into(index * self._width, buffer)
                total += buffer.astype(np.float32)
        return (total / np.float32(max(len(row), 1))).astype(self.dtype)

    def _padding(self) -> np.ndarray:
        """The mean of all rows before the padding: one pass over the tensor, at the first need."""
        with self._lock:
            padding_row = self._padding_row
            if padding_row is None:
                total = np.zeros(self._width, np.float64)
                step = max(1, _BLOCK // self._width)
                for begin in range(0, self._rows.padding, step):
                    end = min(begin + step, self._rows.padding)
                    block = np.empty((end - begin) * self._width, self.dtype)
                    self.read_into(begin * self._width, block)
                    total += block.reshape(-1, self._width).astype(np.float32).sum(axis=0, dtype=np.float64)
                mean = (total / max(self._rows.padding, 1)).astype(np.float32)
                padding_row = self._padding_row = mean.astype(self.dtype)
            return padding_row


_INPUT = (
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
    "shared.weight",
)
_OUTPUT = (
    "lm_head.weight",
    "lm_head.bias",
    "embed_out.weight",
    "output.weight",
    "cls.predictions.bias",
    "cls.predictions.decoder.weight",
    "cls.predictions.decoder.bias",
)
_WHOLE = ("output.weight",)  # inside a layer, this name is that of a projection


def _ends_with(name: str, endings: Iterable[str]) -> bool:
    return any(name == end or (name.endswith("." + end) and end not in _WHOLE) for end in endings)


def is_output_embedding(name: str) -> bool:
    """Whether the tensor called `name` gives one logit per token (lm_head and its bias)."""
    return _ends_with(name, _OUTPUT)


def is_token_tensor(name: str) -> bool:
    """Whether the first axis of the tensor called `name` counts tokens."""
    return _ends_with(name, _INPUT) or is_output_embedding(name)


def input_embedding(checkpoint: Checkpoint) -> TensorSource | None:
    """The model's input embedding `[rows, width]`, or None if it has none under a known name."""
    return next((t for name, t in checkpoint.tensors.items() if _ends_with(name, _INPUT)), None)
