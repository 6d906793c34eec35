"""A model on disk: its config, its tensors, and the digest that identifies it."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from mergelab.checkpoints.gguf.model_file import SUFFIX, GgufFile, is_gguf, open_gguf
from mergelab.checkpoints.json_data import read_json_object, read_optional_json
from mergelab.checkpoints.locations import local_path
from mergelab.checkpoints.model_files import check_file_name
from mergelab.checkpoints.quantized.box_source import BoxSource
from mergelab.checkpoints.quantized.detect import dequantized, split_config
from mergelab.checkpoints.safetensors_file import SafetensorsFile, open_safetensors
from mergelab.checkpoints.source import TensorSource
from mergelab.checkpoints.torch_reader import PickledFile, open_pickled
from mergelab.errors import CheckpointError

__all__ = ["FolderCheckpoint", "bounded_digest", "open_checkpoint", "stat_sha256", "weights_sha256"]

_logger = logging.getLogger(__name__)


def weights_sha256(folder: str | Path) -> str:
    """SHA-256 over the weight files of a folder or a GGUF file, their names and contents, in the order of
    names.

    Raises:
        CheckpointError: there are none, or one cannot be read.
    """
    folder = local_path(folder)
    if is_gguf(folder):
        files = [part.file.path for part in open_gguf(folder).files]
    else:
        files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not files:
        raise CheckpointError(f"{folder}: holds no weight files; expected *.safetensors")
    total = hashlib.sha256()
    try:
        for file in files:
            with file.open("rb") as stream:
                total.update(file.name.encode() + hashlib.file_digest(stream, "sha256").digest())
    except OSError as error:
        raise CheckpointError(f"{folder}: weights cannot be read ({error.strerror})") from error
    return total.hexdigest()


_BLOCK = 1 << 18


def bounded_digest(path: Path, most: int) -> str:
    """XXH3-128 of a file, in hex: of all of it, or of its size and blocks spread over it where it is larger.

    Args:
        path: the file.
        most: bytes that are read, at least those of a few blocks.

    Raises:
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    total = xxhash.xxh3_128(size.to_bytes(8, "little"))
    blocks = max(most // _BLOCK, 4)
    with path.open("rb") as file:
        if size <= blocks * _BLOCK:
            while piece := file.read(_BLOCK):
                total.update(piece)
        else:
            for block in range(blocks):  # the first begins the file, and the last ends it
                file.seek(block * (size - _BLOCK) // (blocks - 1))
                total.update(file.read(_BLOCK))
    return total.hexdigest()


def stat_sha256(*paths: str | Path) -> str:
    """SHA-256 over names, sizes and times of files, and of all files in folders; reads no contents.

    For a note that lives as long as one interrupted command, where reading everything again would be waste.

    Raises:
        CheckpointError: a path cannot be read.
    """
    total = hashlib.sha256()
    for path in map(Path, paths):
        try:
            for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                facts = file.stat()
                times = f"{facts.st_size} {facts.st_mtime_ns} {facts.st_ctime_ns}"
                total.update(os.fsencode(file) + f" {times}\n".encode())
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
    return total.hexdigest()


PICKLED = (".bin", ".pt", ".pth")
_SHARD = re.compile(r".*?(\d{1,9})-of-(\d{1,9})\.[a-z]+")
_DIGITS = re.compile(r"\d+")
_NOT_WEIGHTS = frozenset(
    ["training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.bin", "scheduler.pt", "scaler.pt"]
)


@dataclass(frozen=True)
class FolderCheckpoint:
    """A model folder (or one weight file and the folder it lies in); holds no weights.

    Attributes:
        path: the folder of config and tokenizer files, or the GGUF file that has them in it.
        config: `config.json` as plain data, less what it says of a quantization; empty if there is none.
        tensors: tensor sources by name, in file order; quantized ones as they are dequantized.
        files: the weight files, in order.
        quantization: what `config.json` or a file of its own says of a quantization; empty if nothing.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorSource]
    files: tuple[SafetensorsFile | PickledFile | GgufFile, ...]
    quantization: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_quantized(self) -> bool:
        """Whether config or files are of a quantized model, so that those of a dequantized copy differ."""
        return bool(self.quantization) or any(isinstance(t, BoxSource) for t in self.tensors.values())

    @property
    def model_bytes(self) -> int:
        """Bytes of all tensors as they are read; more than the files have where these are quantized."""
        return sum(math.prod(t.shape) * t.dtype.itemsize for t in self.tensors.values())

    def fingerprint(self) -> str:
        """Returns a SHA-256 hex digest of headers, file sizes and config; reads no weights."""
        parts = {
            "config": self.config,
            "files": [[file.file.path.name, file.file.size, file.header_sha256] for file in self.files],
        }
        if self.quantization:
            parts["quantization"] = self.quantization
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def sha256_files(self) -> dict[str, str]:
        """Returns the SHA-256 hex digest of every weight file by name; reads all of them once.

        Raises:
            CheckpointError: a file cannot be read.
        """
        digests = {}
        for file in self.files:
            try:
                with open(file.file.path, "rb") as stream:
                    digests[file.file.path.name] = hashlib.file_digest(stream, "sha256").hexdigest()
            except OSError as error:
                raise CheckpointError(f"{file.file.path} cannot be read ({error.strerror})") from error
        return digests


def open_checkpoint(path: Path | str, *, as_stored: bool = False) -> FolderCheckpoint:
    """Opens a model folder or a single weight file, reading headers and config, and no weights.

    Quantized weights are float32 tensors that are computed as they are read (`checkpoints/quantized/`).

    A model on the Hugging Face hub (`org/name[@revision][:subfolder]`) or at a URL is fetched first. A GGUF
    file is a model of its own: config and tokenizer come from its metadata, its tensors have their Hugging
    Face names, and quantized ones are dequantized to float32 as they are read.

    A folder is searched for `model.safetensors`, `model.safetensors.index.json`, any one `*.safetensors`,
    then `pytorch_model.bin`, `pytorch_model.bin.index.json`, any one `*.bin`, `*.pt` or `*.pth`.

    Args:
        path: Folder or file.
        as_stored: Whether to leave quantized weights the codes and scales that the files hold.

    Raises:
        CheckpointError: nothing there, several candidates, any file malformed or inconsistent, or weights
            that are quantized in a way that cannot be read.
    """
    path = local_path(path)
    try:
        checkpoint = _open(path, as_stored)
        _logger.info(
            "opened %s: %d tensors in %d files", path, len(checkpoint.tensors), len(checkpoint.files)
        )
        return checkpoint
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error}); check its permissions") from error


def _open(path: Path, as_stored: bool) -> FolderCheckpoint:
    if is_gguf(path):
        model = open_gguf(path)
        return FolderCheckpoint(path, model.config, model.tensors, model.files)
    if path.is_file():
        folder, files, index = path.parent, [path], None
    elif path.is_dir():
        folder = path
        files, index = _find_weights(path)
    else:
        raise CheckpointError(f"{path} does not exist; name a model folder or a weight file")
    config = read_optional_json(folder / "config.json")
    opened = tuple(_open_file(file) for file in files)
    tensors: dict[str, TensorSource] = {}
    for file in opened:
        for name, source in file.tensors.items():
            if name in tensors:
                raise CheckpointError(
                    f"{folder}: tensor {name!r} is in more than one file, last in {file.file.path.name}; "
                    "remove the copy the index does not name"
                )
            tensors[name] = source
    if index is not None:
        _check_index(index, opened)
        _check_none_is_left_out(index, [file.name for file in files])
    if as_stored:
        return FolderCheckpoint(folder, config, tensors, opened)
    split = split_config(config, folder)
    model = dequantized(tensors, split, str(path))
    return FolderCheckpoint(folder, split.model, model, opened, split.quantization)


def _open_file(path: Path) -> SafetensorsFile | PickledFile:
    if path.suffix == ".safetensors":
        return open_safetensors(path)
    if path.suffix in PICKLED:
        return open_pickled(path)
    if path.suffix in (".yaml", ".yml"):
        raise CheckpointError(
            f"{path} is a recipe by its name, not a model; write the merge first (mergelab merge), or load "
            "it unwritten with mergelab.load_model"
        )
    raise CheckpointError(
        f"{path} is not a weight file by its name; expected .safetensors, {SUFFIX}, {', '.join(PICKLED)} or "
        "a model folder"
    )


def _find_weights(folder: Path) -> tuple[list[Path], Path | None]:
    """Returns the weight files of a folder, and the index that names them if there is one."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    families = (
        (
            "model.safetensors",
            [n for n in names if n.endswith(".safetensors") and not n.startswith("adapter_")],
        ),
        ("pytorch_model.bin", [n for n in names if n.endswith(PICKLED) and _may_hold_weights(n)]),
    )
    for standard, candidates in families:
        if standard in names:
            return [folder / standard], None
        if f"{standard}.index.json" in names:
            index = folder / f"{standard}.index.json"
            return [folder / name for name in _shards(index)], index
        if len(candidates) == 1:
            if (part := _SHARD.fullmatch(candidates[0])) and int(part[2]) > 1:
                raise CheckpointError(
                    f"{folder} has only the file {candidates[0]}, by its name one of {int(part[2])}; "
                    "finish the download"
                )
            return [folder / candidates[0]], None
        if candidates:
            raise CheckpointError(
                f"{folder} has {len(candidates)} weight files ({', '.join(candidates[:4])}, ...) but no "
                f"{standard}.index.json to say how they belong together; add the index or name one file"
            )
    if ggufs := [name for name in names if name.endswith(SUFFIX)]:
        raise CheckpointError(
            f"{folder} has no weights but GGUF files, each a model of its own; name one, such as "
            f"{folder / ggufs[0]}"
        )
    if "adapter_config.json" in names:
        raise CheckpointError(
            f"{folder} is a LoRA adapter, not a model; write the model as base+adapter in a recipe, and use "
            "elsewhere what `mergelab merge` makes of it, or merge adapters alone to one (merge --as-adapter "
            "rank=R)"
        )
    raise CheckpointError(
        f"{folder} has no weights: expected model.safetensors, model.safetensors.index.json or "
        f"pytorch_model.bin, found {', '.join(names[:6]) or 'nothing'}; check the path or finish the download"
    )


def _may_hold_weights(name: str) -> bool:
    return name not in _NOT_WEIGHTS and not name.startswith(("adapter_", "rng_state"))


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map of tensor names to files; download it again")
    return {name: check_file_name(file, f"{index}: tensor {name!r}") for name, file in weight_map.items()}


def _shards(index: Path) -> list[str]:
    """Returns the shard names an index lists, each checked to be a plain name of a file beside it."""
    shards = sorted(set(_weight_map(index).values()))
    for shard in shards:
        if not (index.parent / shard).is_file():
            raise CheckpointError(f"{index} names the file {shard!r}, which is missing; finish the download")
    return shards


def _check_none_is_left_out(index: Path, shards: list[str]) -> None:
    """Checks that no file beside the shards is called as they are, but for its number."""
    kinds = {_DIGITS.sub("#", shard) for shard in shards}
    names = sorted(entry.name for entry in index.parent.iterdir() if entry.is_file())
    rest = [name for name in names if name not in shards and _DIGITS.sub("#", name) in kinds]
    if rest:
        more = f" and {len(rest) - 1} more" if len(rest) > 1 else ""
        raise CheckpointError(
            f"{index.parent} has the shard {rest[0]!r}{more}, which {index.name} does not name; download the "
            "index again, or remove what is not part of the model"
        )


def _check_index(index: Path, files: tuple[SafetensorsFile | PickledFile, ...]) -> None:
    """Checks that index and files name the same tensors in the same places."""
    listed = _weight_map(index)
    found = {name: file.file.path.name for file in files for name in file.tensors}
    for name, shard in listed.items():
        if found.get(name) != shard:
            where = f"that file has no such tensor, {found[name]} has" if name in found else "no file has it"
            raise CheckpointError(
                f"{index} puts tensor {name!r} in {shard} but {where}; download the model again"
            )
    for name, shard in found.items():
        if name not in listed:
            raise CheckpointError(
                f"{shard} in {index.parent} has tensor {name!r}, which its index does not name; "
                "download the model again"
            )
