"""Where every tensor of an output checkpoint will lie: files, headers, offsets, known before any weight."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergelab.checkpoints.dtypes import safetensors_name
from mergelab.errors import OutputError

__all__ = ["Place", "Shard", "ShardPlan", "TensorSpec", "plan_shards"]

_ALIGNMENT = 64
"""Data starts at a multiple of this in every file, as vector units and `device_put` like it."""


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of one tensor to be written."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: which shard, and from which byte of its file."""

    spec: TensorSpec
    shard: int
    offset: int


@dataclass(frozen=True)
class Shard:
    """One output file: its name, the bytes before its data, and its whole size."""

    file: str
    head: bytes
    size: int


@dataclass(frozen=True)
class ShardPlan:
    """The layout of an output checkpoint.

    Attributes:
        shards: the files.
        places: every tensor's place, by name, in file order.
        total_size: bytes of tensor data, as the index's `metadata.total_size` states.
    """

    shards: tuple[Shard, ...]
    places: Mapping[str, Place]
    total_size: int

    @property
    def nbytes(self) -> int:
        """Bytes of all files together, headers included."""
        return sum(shard.size for shard in self.shards)

    @property
    def index(self) -> bytes | None:
        """The text of `model.safetensors.index.json`; None for a single file, which needs none."""
        if len(self.shards) == 1:
            return None
        weight_map = {name: self.shards[place.shard].file for name, place in self.places.items()}
        index = {"metadata": {"total_size": self.total_size}, "weight_map": weight_map}
        return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()

    def digest(self) -> str:
        """Returns a SHA-256 hex digest of the layout: equal ones put equal tensors in equal places."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(f"{shard.file} {shard.size} ".encode() + shard.head)
        return digest.hexdigest()


def plan_shards(
    specs: Sequence[TensorSpec],
    shard_bytes: int,
    metadata: Mapping[str, str] | None = None,
    *,
    stem: str = "model",
) -> ShardPlan:
    """Lays tensors out in safetensors files of at most `shard_bytes` of data each, in the order given.

    A tensor is never split: one that is larger than `shard_bytes` has a file to itself. Within a file,
    tensors with wider elements come first, so that each starts at a multiple of its element size.

    Args:
        specs: the tensors, in order.
        shard_bytes: the limit, positive.
        metadata: the header's `__metadata__`; `{"format": "pt"}` if None, as Hugging Face libraries expect.
        stem: what the names of the files begin with.

    Raises:
        OutputError: no tensors, a name twice, or a limit that is not positive.
    """
    if not specs:
        raise OutputError("there is no tensor to write; check the filters of the recipe")
    if shard_bytes <= 0:
        raise OutputError(
            f"the shard size is {shard_bytes} bytes where a positive one was expected, such as 5GB"
        )
    names = [spec.name for spec in specs]
    if "__metadata__" in names:
        raise OutputError("a tensor is named '__metadata__', which safetensors reserves; rename it")
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise OutputError(f"tensor {twice!r} would be written twice; make each output tensor once")
    groups: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        if groups[-1] and filled + spec.nbytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(spec)
        filled += spec.nbytes
    shards, places = [], {}
    for number, group in enumerate(groups):
        group.sort(key=lambda spec: -spec.dtype.itemsize)
        head = _head(group, {"format": "pt"} if metadata is None else dict(metadata))
        offset = len(head)
        for spec in group:
            places[spec.name] = Place(spec, number, offset)
            offset += spec.nbytes
        shards.append(Shard(_file_name(stem, number, len(groups)), head, offset))
    return ShardPlan(tuple(shards), places, sum(spec.nbytes for spec in specs))


def _file_name(stem: str, number: int, count: int) -> str:
    return f"{stem}.safetensors" if count == 1 else f"{stem}-{number + 1:05}-of-{count:05}.safetensors"


def _head(group: Sequence[TensorSpec], metadata: dict[str, str]) -> bytes:
    """Returns header length and header, padded with spaces so that the data after it is aligned."""
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    begin = 0
    for spec in group:
        entries[spec.name] = {
            "dtype": safetensors_name(spec.dtype),
            "shape": list(spec.shape),
            "data_offsets": [begin, begin + spec.nbytes],
        }
        begin += spec.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
