"""A GGUF file as a checkpoint: tensors under their Hugging Face names, and a config from its metadata."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from mergelab.checkpoints.file_tensor import FileTensor, WeightFile
from mergelab.checkpoints.gguf.architectures import (
    ARCHITECTURES,
    FOLDED,
    GgufArchitecture,
    Tensor,
    by_stored,
    fused_heads_order,
    pattern_of,
    rotary_order,
)
from mergelab.checkpoints.gguf.config import config_from
from mergelab.checkpoints.gguf.header import GgufHeader, GgufTensorInfo, read_header
from mergelab.checkpoints.gguf.tensors import KINDS, GgufTensor, StoredTensor, kind_name
from mergelab.checkpoints.source import TensorSource
from mergelab.errors import CheckpointError, did_you_mean, quoted

__all__ = ["SUFFIX", "GgufFile", "GgufModel", "is_gguf", "open_gguf", "stored_tensors"]

SUFFIX = ".gguf"
_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
_MAX_FOLDED = 4096
_NO_MODELS = {
    "controlvector": "is a control vector, not a model; read it with `load_steering`",
    "clip": "is the picture encoder of a model (mmproj); name the file of the language model",
}


@dataclass(frozen=True)
class GgufFile:
    """One file of a model.

    Attributes:
        file: the file.
        tensors: its tensors by their Hugging Face name.
        header_sha256: hex digest of the header.
    """

    file: WeightFile
    tensors: Mapping[str, TensorSource]
    header_sha256: str


@dataclass(frozen=True)
class GgufModel:
    """A model in one GGUF file, or in the parts of a split one.

    Attributes:
        path: the file that was named.
        config: what `config.json` says of such a model.
        metadata: that of the first file.
        files: the files, in order.
    """

    path: Path
    config: Mapping[str, Any]
    metadata: Mapping[str, Any]
    files: tuple[GgufFile, ...]

    @property
    def tensors(self) -> dict[str, TensorSource]:
        """All tensors, in file order."""
        return {name: tensor for file in self.files for name, tensor in file.tensors.items()}


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file by its name."""
    return path.suffix.lower() == SUFFIX and path.is_file()


def open_gguf(path: Path) -> GgufModel:
    """Opens a GGUF file, with the other parts of a split one; reads headers only.

    Raises:
        CheckpointError: a file is damaged or cut off, holds another kind of model or tensors of a type that
        is
            not read; or a part is missing.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); check the path") from error
    stamp = (status.st_size, status.st_mtime_ns, status.st_ino)
    model = _open(path, stamp)
    if not all(_unchanged(part.file) for part in model.files):
        _open.cache_clear()
        model = _open(path, stamp)
    return model


def _unchanged(file: WeightFile) -> bool:
    return file.path.is_file() and WeightFile.open(file.path) == file


@lru_cache(maxsize=8)
def _open(path: Path, stamp: tuple[int, ...]) -> GgufModel:
    del stamp  # a file that has changed is read again
    headers = _headers(path)
    first = headers[0]
    faults = [*_unknown_types(headers), *_misplaced(headers)]
    if faults:
        raise CheckpointError(faults)
    architecture = _architecture(first.metadata, path)
    kinds = by_stored(architecture.tensors)
    infos = [info for header in headers for info in header.tensors]
    shapes = {info.name: info.shape for info in infos}
    unknown = [i.name for i in infos if i.name not in FOLDED and pattern_of(i.name)[0] not in kinds]
    if unknown or len(shapes) != len(infos):
        raise CheckpointError(_strangers(path, first.metadata, unknown, infos))
    folded = {
        info.name: _values(header, info)
        for header in headers
        for info in header.tensors
        if info.name in FOLDED
    }
    config = config_from(
        first.metadata, architecture.model_type, shapes, folded, _usual_dtype(infos), str(path)
    )
    files = tuple(
        GgufFile(header.file, _sources(header, kinds, config, path), header.sha256) for header in headers
    )
    return GgufModel(path, config, first.metadata, files)


def _headers(path: Path) -> list[GgufHeader]:
    """The header of the file, or those of all parts of a split model."""
    header = read_header(path)
    count = header.metadata.get("split.count", 0)
    if type(count) is not int or count < 2:
        return [header]
    named = _SPLIT.fullmatch(path.name)
    if named is None or int(named[3]) != count:
        raise CheckpointError(
            f"{path} is one of the {count} files of a split model by its metadata, but not by its name; "
            f"rename it as it was published, NAME-00001-of-{count:05d}.gguf"
        )
    parts = [
        path.with_name(f"{named[1]}-{i:05d}-of-{count:05d}.gguf") for i in range(1, min(count, 1000) + 1)
    ]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise CheckpointError(
            f"{path} is one of the {count} files of a model, but {missing[0]} is missing; finish the download"
        )
    return [read_header(part) for part in parts]


def stored_tensors(header: GgufHeader) -> dict[str, StoredTensor]:
    """The tensors of a file as they are stored, by their name in the file.

    Raises:
        CheckpointError: some are of a type that is not read, or do not lie where a tensor can.
    """
    faults = [*_unknown_types([header]), *_misplaced([header])]
    if faults:
        raise CheckpointError(faults)
    return {info.name: _stored(header, info) for info in header.tensors}


def _stored(header: GgufHeader, info: GgufTensorInfo) -> StoredTensor:
    return StoredTensor(header.file, info.name, info.kind, info.offset, math.prod(info.shape))


def _unknown_types(headers: Sequence[GgufHeader]) -> Iterator[str]:
    """One sentence for each type of tensors that is not read."""
    found: dict[int, list[str]] = {}
    for header in headers:
        for info in header.tensors:
            if info.kind not in KINDS:
                found.setdefault(info.kind, []).append(info.name)
    known = ", ".join(kind.name for kind in KINDS.values())
    for kind, names in found.items():
        yield (
            f"{headers[0].file.path} has {len(names)} tensors of the type {kind_name(kind)} (the first is "
            f"{quoted(names[0])}), which is not read; use a file of the types {known}"
        )


def _misplaced(headers: Sequence[GgufHeader]) -> Iterator[str]:
    """One sentence for each tensor whose bytes are not where they can be."""
    for header in headers:
        end, before = 0, ""
        for info in sorted(header.tensors, key=lambda info: info.offset):
            if info.kind not in KINDS:
                continue
            kind, place = KINDS[info.kind], f"{header.file.path}: tensor {quoted(info.name)}"
            row = info.shape[-1] if info.shape else 1
            if row % kind.elements:
                yield (
                    f"{place} has rows of {row} elements, but {kind.name} packs {kind.elements} together; "
                    "download or convert the file again"
                )
                continue
            nbytes = math.prod(info.shape) // kind.elements * kind.nbytes
            if info.offset < end:
                yield f"{place} overlaps {quoted(before)}; download or convert the file again"
            if info.offset + nbytes > header.file.size:
                yield (
                    f"{place} reaches to byte {info.offset + nbytes:,} but the file ends at "
                    f"{header.file.size:,}; it is truncated: download or copy it again"
                )
                return  # so do all that follow
            end, before = info.offset + nbytes, info.name


def _architecture(metadata: Mapping[str, Any], path: Path) -> GgufArchitecture:
    name = metadata.get("general.architecture")
    if name in _NO_MODELS:
        raise CheckpointError(f"{path} {_NO_MODELS[name]}")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        near = did_you_mean(name, ARCHITECTURES) if isinstance(name, str) else ""
        raise CheckpointError(
            f"{path} is a model of the architecture {quoted(name)}{near}, but GGUF files are read of "
            f"{', '.join(ARCHITECTURES)}; use the Hugging Face folder of the model"
        )
    choices = ARCHITECTURES[name]
    return choices[-1 if metadata.get(f"{name}.expert_count") else 0]


def _strangers(
    path: Path, metadata: Mapping[str, Any], unknown: Sequence[str], infos: Sequence[GgufTensorInfo]
) -> list[str]:
    architecture = metadata["general.architecture"]
    faults = [
        f"{path} has the tensor {quoted(name)}, which is not known of the architecture {architecture!r}; use "
        "the Hugging Face folder of the model"
        for name in unknown
    ]
    seen: set[str] = set()
    for info in infos:
        if info.name in seen:
            faults.append(f"{path} has the tensor {quoted(info.name)} twice; download or convert it again")
        seen.add(info.name)
    return faults


def _values(header: GgufHeader, info: GgufTensorInfo) -> list[float]:
    if math.prod(info.shape) > _MAX_FOLDED or KINDS[info.kind].elements != 1:
        raise CheckpointError(
            f"{header.file.path}: tensor {quoted(info.name)} is {KINDS[info.kind].name} {list(info.shape)}, "
            "not a list of rotary factors; convert the model again"
        )
    stored = _stored(header, info)
    return [float(value) for value in stored.read(0, stored.size).astype(np.float32)]


def _usual_dtype(infos: Sequence[GgufTensorInfo]) -> str:
    """The dtype that most elements are read as."""
    counts: dict[str, int] = {}
    for info in infos:
        name = str(KINDS[info.kind].dtype)
        counts[name] = counts.get(name, 0) + math.prod(info.shape)
    return max(counts, key=lambda name: counts[name], default="float32")


def _sources(
    header: GgufHeader, kinds: Mapping[str, Tensor], config: Mapping[str, Any], path: Path
) -> dict[str, TensorSource]:
    found: dict[str, TensorSource] = {}
    for info in header.tensors:
        if info.name in FOLDED:
            continue
        pattern, numbers, ending = pattern_of(info.name)
        kind = kinds[pattern]
        layer = str(numbers[0]) if numbers else ""
        expert = str(numbers[1]) if len(numbers) > 1 else "{e}"
        name = kind.name.replace("{i}", layer).replace("{e}", expert) + ending
        if kind.change == "experts":
            for e in range(info.shape[0]):
                one = _source(header, info, name.replace("{e}", str(e)), "", config, path, expert=e)
                found[one.name] = one
        else:
            found[name] = _source(header, info, name, kind.change, config, path)
    return found


def _source(
    header: GgufHeader,
    info: GgufTensorInfo,
    name: str,
    change: str,
    config: Mapping[str, Any],
    path: Path,
    expert: int | None = None,
) -> TensorSource:
    """The tensor as a Hugging Face model has it."""
    kind, stored = KINDS[info.kind], _stored(header, info)
    shape = info.shape if expert is None else info.shape[1:]
    begin = 0 if expert is None else expert * math.prod(shape)
    if change == "transposed" and len(shape) == 2:
        return GgufTensor(name, shape[::-1], stored, transposed=True)
    if change == "minus_one":
        return GgufTensor(name, shape, stored, shift=-1.0)
    if change in ("rotary", "rotary_kv", "fused_heads"):
        key = "num_key_value_heads" if change == "rotary_kv" else "num_attention_heads"
        heads = config.get(key, config.get("n_head", 0))
        parts = 3 if change == "fused_heads" else 2
        if not 0 < heads <= shape[0] or shape[0] % (parts * heads):
            raise CheckpointError(
                f"{path}: tensor {quoted(info.name)} has {shape[0]} rows, which {heads} heads do not share "
                "evenly; convert the model again with a recent llama.cpp"
            )
        order = (fused_heads_order if change == "fused_heads" else rotary_order)(heads, shape[0])
        return GgufTensor(name, shape, stored, order=order)
    if kind.elements == 1:
        return FileTensor(name, shape, kind.dtype, header.file, info.offset + begin * kind.nbytes)
    return GgufTensor(name, shape, stored, begin)
