"""Tensors outside the layers that hold one part per layer, put together for the layers of the output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergelab.checkpoints.source import TensorSource
from mergelab.errors import CheckpointError

__all__ = ["LayerParts", "MovedLayers", "with_moved_parts"]

# The axis along which the parts of all layers stand side by side (Gemma 3n, Gemma 4).
_AXES = {"embed_tokens_per_layer.weight": 1, "per_layer_model_projection.weight": 0}


@dataclass(frozen=True)
class MovedLayers:
    """Where the layers of one stack come from.

    Attributes:
        prefix: what precedes a layer's number in the output.
        sources: (model, layer) of each source, per output layer.
        counts: how many layers each model has.
    """

    prefix: str
    sources: Sequence[tuple[tuple[str, int], ...]]
    counts: Mapping[str, int]


@dataclass(frozen=True)
class LayerParts:
    """A `TensorSource` of parts of others, side by side along one axis of a matrix.

    Attributes:
        parts: the tensor and the number of the part in it, per output layer.
        width: the length of a part.
        axis: 0 for rows, 1 for columns.
    """

    parts: tuple[tuple[TensorSource, int], ...]
    width: int
    axis: int

    @property
    def name(self) -> str:
        return self.parts[0][0].name

    @property
    def shape(self) -> tuple[int, ...]:
        rows, columns = self.parts[0][0].shape
        length = self.width * len(self.parts)
        return (length, columns) if self.axis == 0 else (rows, length)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.parts[0][0].dtype

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Fills `out` with flat elements `[start, start + out.size)`."""
        columns = self.shape[1]
        first, last = start // columns, -(-(start + out.size) // columns)
        if self.axis == 0:
            self._read_rows(start, out, columns)
            return
        rows = np.empty((last - first, columns), out.dtype)
        for source in {id(source): source for source, _ in self.parts}.values():
            whole = np.empty((last - first) * source.shape[1], out.dtype)
            source.read_into(first * source.shape[1], whole)
            whole = whole.reshape(last - first, -1)
            for i, (other, part) in enumerate(self.parts):
                if other is source:
                    rows[:, i * self.width : (i + 1) * self.width] = whole[
                        :, part * self.width : (part + 1) * self.width
                    ]
        offset = start - first * columns
        out[:] = rows.reshape(-1)[offset : offset + out.size]

    def _read_rows(self, start: int, out: np.ndarray, columns: int) -> None:
        size, done = self.width * columns, 0
        while done < out.size:
            i, within = divmod(start + done, size)
            source, part = self.parts[i]
            piece = out[done : done + size - within]
            source.read_into(part * size + within, piece)
            done += piece.size


def with_moved_parts(
    tensor: TensorSource,
    name: str,
    position: int,
    stacks: Sequence[MovedLayers],
    find: Callable[[str], TensorSource | None],
) -> TensorSource:
    """A tensor with the parts of the output's layers, if it is one with a part per layer; else itself.

    Args:
        tensor: one model's tensor.
        name: what it is called in the output.
        position: index of that model among a layer's sources.
        stacks: where the layers of the output come from.
        find: that tensor of another model.

    Raises:
        CheckpointError: a model that layers come from lacks the tensor, or has it in another size.
    """
    axis = next((axis for ending, axis in _AXES.items() if name.endswith(ending)), None)
    stack = max(stacks, key=lambda each: _common(each.prefix, name), default=None)
    if axis is None or stack is None or len(tensor.shape) != 2:
        return tensor
    blocks = [each[min(position, len(each) - 1)] for each in stack.sources]
    if len({model for model, _ in blocks}) == 1:
        model = blocks[0][0]
        if [i for _, i in blocks] == list(range(stack.counts[model])):
            return tensor
    found: dict[str, TensorSource] = {}
    widths = set()
    for model in dict.fromkeys(model for model, _ in blocks):
        source = find(model)
        if source is None or source.shape[axis] % stack.counts[model] or source.dtype != tensor.dtype:
            raise CheckpointError(
                f"tensor {name!r} has a part per layer, but model {model!r}, from which layers are taken, "
                f"has {'none' if source is None else f'{list(source.shape)} {source.dtype}'} for its "
                f"{stack.counts[model]} layers; take layers from models of one kind"
            )
        found[model] = source
        widths.add((source.shape[axis] // stack.counts[model], source.shape[1 - axis]))
    if len(widths) > 1:
        raise CheckpointError(
            f"tensor {name!r} has parts per layer of unlike sizes in {', '.join(map(repr, found))}; take "
            "layers from models of the same sizes"
        )
    ((width, _),) = widths
    return LayerParts(tuple((found[model], i) for model, i in blocks), width, axis)


def _common(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
