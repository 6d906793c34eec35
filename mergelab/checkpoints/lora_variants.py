"""What variants of LoRA make of a weight: DoRA, altered starting points, tokens, stacks of experts."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from mergelab.checkpoints.file_tensor import check_piece
from mergelab.checkpoints.lora_tensor import ChangedWeight, FactorCache, LowRankTensor, read_whole
from mergelab.checkpoints.source import TensorSource

__all__ = [
    "DoraTensor",
    "RowsTensor",
    "StackedTensor",
    "StartFactor",
    "StartFactors",
    "decomposition_bytes",
    "with_expert_updates",
]

_BLOCK = 1 << 20


@dataclass(frozen=True)
class DoraTensor:
    """A `TensorSource` equal to `magnitude / norm(weight) * weight`, rounded once to `dtype`.

    The norm is the L2 norm of each output's weights, as they are with the low-rank update ("DoRA:
    Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353, eq. 5). It takes one more pass over the weight,
    when it is first read.

    Attributes:
        weight: float32 or float64, `[rows, columns]`, with the update.
        magnitude: `[rows]`, or `[columns]` where outputs are columns.
        by_column: whether they are (Conv1D, embeddings).
        dtype: that of the model's weight.
    """

    weight: TensorSource
    magnitude: TensorSource
    by_column: bool
    dtype: np.dtype[Any]
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)
    _factors: list[np.ndarray] = field(default_factory=list, repr=False, compare=False)

    @property
    def name(self) -> str:
        return self.weight.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def over(self, change: Callable[[TensorSource], TensorSource]) -> DoraTensor:
        """The same of another weight."""
        return DoraTensor(change(self.weight), self.magnitude, self.by_column, self.dtype)

    def factor(self) -> np.ndarray:
        """`magnitude / norm` of each output, float64."""
        with self._lock:
            if not self._factors:
                rows, columns = self.shape
                squares = np.zeros(columns if self.by_column else rows)
                height = max(1, _BLOCK // columns)
                for row in range(0, rows, height):
                    block = np.empty(min(height, rows - row) * columns, self.weight.dtype)
                    self.weight.read_into(row * columns, block)
                    parts = np.square(block.reshape(-1, columns), dtype=np.float64)
                    if self.by_column:
                        squares += parts.sum(axis=0)
                    else:
                        squares[row : row + height] = parts.sum(axis=1)
                magnitude = read_whole(self.magnitude).astype(np.float64).reshape(-1)
                with np.errstate(divide="ignore", invalid="ignore"):  # a weight of zeros has no direction
                    self._factors.append(magnitude / np.sqrt(squares))
            return self._factors[0]

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Fills `out` with flat elements `[start, start + out.size)`; errors are those of the weight."""
        rows, columns = self.shape
        check_piece(self, rows * columns, start, out)
        factor = self.factor()
        for low in range(0, out.size, _BLOCK):
            piece = np.empty(min(_BLOCK, out.size - low), self.weight.dtype)
            self.weight.read_into(start + low, piece)
            places = np.arange(start + low, start + low + piece.size)
            places = places % columns if self.by_column else places // columns
            out[low : low + piece.size] = (piece * factor[places]).astype(self.dtype)


@dataclass(frozen=True, eq=False)
class StartFactors:
    """The factors with which PiSSA and OLoRA begin, and by whose product they alter the base.

    `pissa`: the `rank` largest terms of the weight's singular value decomposition (arXiv 2404.02948);
    `olora`: the first `rank` columns and rows of its QR decomposition (arXiv 2406.01775), which PEFT scales
    as the adapter.

    Attributes:
        weight: the base's, `[rows, columns]`.
        transposed: whether its rows are inputs (Conv1D).
        rank, kind: same as above.
    """

    weight: TensorSource
    transposed: bool
    rank: int
    kind: Literal["pissa", "olora"]
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _held: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    @property
    def workspace(self) -> int:
        """Bytes that the decomposition holds at its peak.

        NumPy decomposes in float64: the weight, its copies, the factors and LAPACK's arrays. Fitted to what
        processes took (600 to 4,000 rows and columns), of which it is at most 5 % short.
        """
        rows, columns = self.weight.shape
        rank = min(rows, columns)
        matrix, sides = rows * columns, rank * (rows + columns)
        floats = 9 * matrix if self.kind == "olora" else 5 * matrix + 4 * sides + 8 * rank**2
        return matrix * self.weight.dtype.itemsize + 4 * floats

    def take(self, side: str) -> np.ndarray:
        """`left` `[rows, rank]` or `right` `[rank, columns]`; each is forgotten when it has been taken."""
        with self._lock:
            if side not in self._held:
                weight = read_whole(self.weight).astype(np.float32)
                weight = weight.T if self.transposed and self.kind == "pissa" else weight
                if self.kind == "olora":  # PEFT decomposes the weight as it is stored
                    left, right = np.linalg.qr(weight)
                    left, right = left[:, : self.rank], right[: self.rank]
                else:
                    u, s, v = np.linalg.svd(weight, full_matrices=False)
                    left, right = u[:, : self.rank] * s[: self.rank], v[: self.rank]
                    if self.transposed:
                        left, right = right.T, left.T
                self._held.update(left=np.ascontiguousarray(left), right=np.ascontiguousarray(right))
            return self._held.pop(side)


@dataclass(frozen=True)
class StartFactor:
    """A `TensorSource` of one side of `StartFactors`."""

    factors: StartFactors
    side: Literal["left", "right"]

    @property
    def name(self) -> str:
        return f"{self.factors.weight.name}, {self.factors.kind} {self.side}"

    @property
    def shape(self) -> tuple[int, ...]:
        rows, columns = self.factors.weight.shape
        rank = min(self.factors.rank, rows, columns)
        return (rows, rank) if self.side == "left" else (rank, columns)

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.float32)

    def over(self, change: Callable[[TensorSource], TensorSource]) -> StartFactor:
        """The same of another weight."""
        weight = change(self.factors.weight)
        return StartFactor(replace(self.factors, weight=weight, _lock=threading.Lock(), _held={}), self.side)

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Fills `out` with flat elements; read it whole, or each piece decomposes the weight anew."""
        out[:] = self.factors.take(self.side).reshape(-1)[start : start + out.size]


def decomposition_bytes(source: TensorSource) -> int:
    """Bytes that a source takes, beside what is asked of it, to decompose the weights it begins with.

    Args:
        source: a tensor of a model, however many views of others it is made of.
    """
    found: dict[StartFactors, None] = {}

    def visit(inner: TensorSource) -> TensorSource:
        if isinstance(inner, StartFactor):
            found[inner.factors] = None
        if (over := getattr(inner, "over", None)) is not None:
            over(visit)
        return inner

    visit(source)
    return sum(factors.workspace for factors in found)


@dataclass(frozen=True)
class RowsTensor(ChangedWeight):
    """A `TensorSource` equal to `weight` with some rows replaced: trained tokens of an embedding.

    Attributes:
        rows: numbers of the replaced ones; of a number that stands twice the later counts.
        values: `[len(rows), columns]`; the weight is `[any number of rows, columns]`.
    """

    rows: tuple[int, ...]
    values: TensorSource

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Fills `out` with flat elements `[start, start + out.size)`; errors are those of both sources."""
        self.weight.read_into(start, out)
        columns, stop = self.shape[1], start + out.size
        for number, row in enumerate(self.rows):
            low, high = max(start, row * columns), min(stop, (row + 1) * columns)
            if low < high:
                piece = np.empty(high - low, self.values.dtype)
                self.values.read_into(number * columns + low - row * columns, piece)
                out[low - start : high - start] = piece.astype(self.dtype)


@dataclass(frozen=True)
class ExpertSlice:
    """A `TensorSource` of one entry of a tensor's first axis: a matrix of a stack of experts."""

    source: TensorSource
    index: int

    @property
    def name(self) -> str:
        return f"{self.source.name}[{self.index}]"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape[1:]

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.source.dtype

    def over(self, change: Callable[[TensorSource], TensorSource]) -> ExpertSlice:
        """The same entry of another tensor."""
        return ExpertSlice(change(self.source), self.index)

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Fills `out` with flat elements; errors are those of the source."""
        self.source.read_into(self.index * int(np.prod(self.shape)) + start, out)


@dataclass(frozen=True)
class StackedTensor:
    """A `TensorSource` of equally large tensors, one after the other along a new first axis."""

    name: str
    parts: tuple[TensorSource, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.parts), *self.parts[0].shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.parts[0].dtype

    def over(self, change: Callable[[TensorSource], TensorSource]) -> StackedTensor:
        """The same of other tensors."""
        return StackedTensor(self.name, tuple(map(change, self.parts)))

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Fills `out` with flat elements; errors are those of the parts."""
        size = int(np.prod(self.parts[0].shape))
        for number in range(start // size, -(-(start + out.size) // size)):
            low, high = max(start, number * size), min(start + out.size, (number + 1) * size)
            self.parts[number].read_into(low - number * size, out[low - start : high - start])


@dataclass(frozen=True)
class ExpertFactor:
    """A `TensorSource` of one expert's factor, cut out of those of all experts as PEFT stores them.

    Attributes:
        source: `A`, `[experts * rank, in]`, each expert's rows in turn; or `B`, `[out, rank * experts]`, in
            which the experts' columns alternate.
        experts: how many there are.
        index: the expert.
        side: which of both it is.
    """

    source: TensorSource
    experts: int
    index: int
    side: Literal["A", "B"]

    @property
    def name(self) -> str:
        return f"{self.source.name}[{self.index}]"

    @property
    def shape(self) -> tuple[int, ...]:
        rows, columns = self.source.shape
        return (rows // self.experts, columns) if self.side == "A" else (rows, columns // self.experts)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.source.dtype

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Fills `out` with flat elements; errors are those of the source."""
        whole = read_whole(self.source)
        if self.side == "A":
            found = whole.reshape(self.experts, -1, whole.shape[1])[self.index]
        else:
            found = whole.reshape(whole.shape[0], -1, self.experts)[:, :, self.index]
        out[:] = found.reshape(-1)[start : start + out.size]


def with_expert_updates(
    weight: TensorSource,
    a: TensorSource,
    b: TensorSource,
    scale: float,
    cache: FactorCache,
    *,
    transposed: bool,
) -> StackedTensor:
    """A stack of matrices with `scale * B_e A_e` added to each.

    Args:
        weight: `[experts, out, in]`, or `[experts, in, out]`.
        a: `[experts * rank, in]`.
        b: `[out, rank * experts]`.
        scale: what the products are multiplied with.
        cache: where factors stay.
        transposed: whether it is the latter where `in` and `out` are equal.
    """
    experts, rows, columns = weight.shape
    inputs, outputs = a.shape[1], b.shape[0]
    turned = transposed if inputs == outputs else (rows, columns) == (inputs, outputs)
    parts = []
    for index in range(experts):
        left, right = ExpertFactor(b, experts, index, "B"), ExpertFactor(a, experts, index, "A")
        factors = ((right, True), (left, True)) if turned else ((left, False), (right, False))
        parts.append(LowRankTensor(ExpertSlice(weight, index), *factors, scale, cache))
    return StackedTensor(weight.name, tuple(parts))
