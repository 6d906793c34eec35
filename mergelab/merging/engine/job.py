"""One tensor to make: where its inputs are, which merge makes it, and what is written."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from mergelab.checkpoints.lora_variants import decomposition_bytes
from mergelab.checkpoints.source import TensorSource
from mergelab.operators.compose import Merge
from mergelab.operators.region import TensorInfo

__all__ = ["Job"]


@dataclass(frozen=True)
class Job:
    """One output tensor of a plan; holds no weights.

    Attributes:
        name: the output tensor's name (random draws are keyed by it).
        shape: its shape; every source has the same one.
        dtype: the dtype written.
        sources: the models' tensors, the base not among them, in recipe order.
        base: the base model's tensor, or None where the merge uses none.
        merge: the operator with this tensor's resolved hyper-parameters; None copies `sources[0]`
            (non-float tensors, and tensors that only one model has).
        model_names: names for messages: the one of the model behind each of `sources`, then the base's.
        statistics: one statistic of the tensor per model (a Gram matrix, a Fisher); empty where the merge
            takes none, or some model has none of this tensor.
        reads: the axis along which the tensor's inputs lie, where its statistics or the merge need to know.
        depth: how deep its block is in the model, from 0 to 1; 0 in no block.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    sources: tuple[TensorSource, ...]
    base: TensorSource | None = None
    merge: Merge | None = None
    model_names: tuple[str, ...] = field(default=())
    statistics: tuple[TensorSource, ...] = ()
    reads: int | None = None
    depth: float = 0.0

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def inputs(self) -> tuple[TensorSource, ...]:
        """The models' tensors, then the base's."""
        return (*self.sources, *(() if self.base is None else (self.base,)))

    @cached_property
    def formula(self) -> Merge | None:
        """The merge as it acts on this tensor."""
        if self.merge is None:
            return None
        tensor = TensorInfo(self.name, self.shape, bool(self.statistics), self.reads, self.depth)
        return self.merge.at(tensor)

    @property
    def bytes_in(self) -> int:
        every = (*self.inputs, *self.statistics)
        return sum(int(np.prod(s.shape, dtype=np.int64)) * s.dtype.itemsize for s in every)

    @property
    def bytes_out(self) -> int:
        return self.size * self.dtype.itemsize

    @cached_property
    def bytes_decomposed(self) -> int:
        """Bytes that reading the inputs takes to decompose weights that adapters altered (PiSSA, OLoRA)."""
        return sum(decomposition_bytes(source) for source in self.inputs)

    @property
    def bytes_whole(self) -> int:
        """Bytes held at once where the tensor cannot be cut into blocks; 0 where it can."""
        if self.formula is None or self.formula.grain != "tensor" or not self.size:
            return 0
        in_float32 = 4 * self.size * (len(self.inputs) + 1)
        workspace = self.formula.workspace(self.shape, len(self.sources))
        return self.bytes_in + self.bytes_out + in_float32 + workspace
