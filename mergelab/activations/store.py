"""Activations on disk, written and read."""

from __future__ import annotations

import bisect
import contextlib
import glob
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mergelab.activations.left_out import LeftOut
from mergelab.activations.model_activations import ModelActivations
from mergelab.activations.store_pieces import read_in_pieces
from mergelab.checkpoints import TensorSource, open_safetensors
from mergelab.checkpoints.folder import weights_sha256
from mergelab.checkpoints.json_data import parse_json_object, read_json
from mergelab.checkpoints.locations import is_url, location_text
from mergelab.checkpoints.manifest import Entry, file_fault, write_whole
from mergelab.checkpoints.new_files import check_new_folder, write_tensors
from mergelab.checkpoints.npy_files import NpyFile, open_npy
from mergelab.checkpoints.output_target import disk_errors
from mergelab.checkpoints.publish import WorkFolder, sync_path
from mergelab.checkpoints.remote import fetch_files
from mergelab.checkpoints.remote_output import writes_anywhere
from mergelab.errors import CheckpointError, NonFiniteError, OutputError

__all__ = ["ActivationFiles", "find_activation_files", "open_activation_files", "quantized", "write_store"]


SCALES = "scales"
"""The tensor of a safetensors file that multiplies int8 rows, one number for each."""

TENSOR = "activations"
"""The tensor's name in a safetensors file; a file with a single tensor may call it anything."""


@dataclass(frozen=True)
class _Shard:
    path: Path
    rows: int
    width: int
    dtype: np.dtype
    tensor: TensorSource | NpyFile
    scales: TensorSource | None = None  # of int8 rows

    def read(self, start: int, stop: int) -> np.ndarray:
        if isinstance(self.tensor, NpyFile):
            piece = self.tensor.rows(start, stop)
        else:
            piece = np.empty((stop - start, self.width), self.dtype)
            self.tensor.read_into(start * self.width, piece.reshape(-1))
        rows = np.asarray(piece, np.float32)
        if self.scales is not None:
            scales = np.empty(stop - start, np.float32)
            self.scales.read_into(start, scales)
            rows = rows * scales[:, None]
        if not np.isfinite(rows).all():
            row = start + int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])
            raise NonFiniteError(
                f"{self.path}: row {row} holds NaN or infinity; remove it or find where it comes from"
            )
        return rows


@dataclass(frozen=True)
class ActivationFiles:
    """Rows of several files, one after the other in the order of their names."""

    shards: tuple[_Shard, ...]

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(shard.rows for shard in self.shards))

    @property
    def rows(self) -> int:
        """Rows of all files together."""
        return self._ends[-1]

    @property
    def d_in(self) -> int:
        """Width of a row."""
        return self.shards[0].width

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop`: `[stop - start, d_in]`, float32.

        Raises:
            NonFiniteError: a row holds NaN or infinity.
            CheckpointError: a file cannot be read.
        """
        pieces = []
        index = bisect.bisect_right(self._ends, start)
        while start < stop:
            shard, first = self.shards[index], self._ends[index] - self.shards[index].rows
            end = min(stop, self._ends[index])
            pieces.append(shard.read(start - first, end - first))
            start, index = end, index + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def open_activation_files(patterns: str | Path | Sequence[str | Path]) -> ActivationFiles:
    """Opens the files that match, reading their headers only.

    Args:
        patterns: a path or glob such as `acts/*.npy`, or several.

    Raises:
        CheckpointError: nothing matches, a file is not `[tokens, d]` floats, or widths differ.
    """
    paths = find_activation_files(patterns)
    shards = tuple(_open(path) for path in paths)
    for shard in shards:
        if shard.width != shards[0].width:
            raise CheckpointError(
                f"{shard.path}: activations are {shard.width} wide, but those of {shards[0].path} "
                f"{shards[0].width}; give files of one site"
            )
    shards = tuple(shard for shard in shards if shard.rows)
    if not shards:
        raise CheckpointError(f"{paths[0]}: the files hold no rows")
    return ActivationFiles(shards)


def find_activation_files(patterns: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files that match paths or globs, each pattern's in the order of their names.

    Of a folder that `mergelab activations` wrote, or a glob of files there, the files of its site, without
    the tokens beside them; of another folder its `.npy` and `.safetensors` files.

    Raises:
        CheckpointError: nothing matches one of them, or a folder holds several sites.
    """
    paths: list[Path] = []
    for pattern in map(str, [patterns] if isinstance(patterns, str | Path) else patterns):
        if is_url(pattern):
            found = fetch_files(location_text(pattern))
        elif os.path.isdir(pattern):
            found = sorted(p for p in Path(pattern).iterdir() if p.suffix in (".npy", ".safetensors"))
        else:
            found = [Path(name) for name in sorted(glob.glob(pattern)) or [pattern] if os.path.exists(name)]
        found = _of_one_site(found, pattern)
        if not found:
            raise CheckpointError(f"{pattern}: no file matches; expected .npy or .safetensors activations")
        paths += found
    return paths


def _of_one_site(paths: Sequence[Path], pattern: str) -> list[Path]:
    """The files without those of tokens in folders of `mergelab activations`, where one site is meant."""
    folders = {folder for folder in {path.parent for path in paths} if (folder / _FACTS).is_file()}
    found = [path for path in paths if path.name != _TOKENS or path.parent not in folders]
    sites = sorted({path.name.rpartition("-")[0] for path in found if path.parent in folders})
    if len(sites) > 1:
        folder = next(iter(folders))
        raise CheckpointError(
            f"{pattern}: holds the activations of several sites ({', '.join(sites[:8])}); name one, such as "
            f"{folder / sites[0]}-*.safetensors"
        )
    return found


def _open(path: Path) -> _Shard:
    if path.suffix == ".npy":
        tensor, scales = open_npy(path), None
        shape, dtype = tensor.header.shape, tensor.header.dtype
    elif path.suffix == ".safetensors":
        tensors = dict(open_safetensors(path).tensors)
        scales = tensors.pop(SCALES, None)
        if TENSOR not in tensors and len(tensors) != 1:
            raise CheckpointError(
                f"{path}: holds {len(tensors)} tensors, none of them {TENSOR!r}; name the activations so"
            )
        tensor = tensors[TENSOR] if TENSOR in tensors else next(iter(tensors.values()))
        shape, dtype = tensor.shape, tensor.dtype
    else:
        raise CheckpointError(f"{path}: activations are read from .npy and .safetensors files")
    kinds = ("int8",) if scales is not None else ("float32", "float16", "bfloat16", "float64")
    if len(shape) != 2 or not shape[1] or dtype.name not in kinds:
        raise CheckpointError(
            f"{path}: holds {dtype.name} of shape {list(shape)}; expected floats of shape [tokens, d]"
        )
    if scales is not None and (scales.shape != shape[:1] or scales.dtype != np.float32):
        raise CheckpointError(f"{path}: {SCALES!r} must be float32 of shape [{shape[0]}], one for each row")
    return _Shard(path, shape[0], shape[1], dtype, tensor, scales)


_TOKENS, _FACTS = "tokens.safetensors", "store.json"
_SHARD_ROWS = 65_536


@writes_anywhere()
def write_store(
    source: ModelActivations,
    out: Path | WorkFolder,
    *,
    model: Path,
    rows: int | None = None,
    dtype: str = "float32",
    progress: Callable[[int, int], None] = lambda done, total: None,
    notice: Callable[[str], None] | None = None,
    left_out: LeftOut | None = None,
) -> int:
    """Writes `SITE-NNNNN.safetensors` for each site, `tokens.safetensors` and `store.json`.

    All rows are written. `store.json` tells the source's rule, the special tokens and each site's median
    norm, by which readers take the rows that count.

    The folder appears under its name when it is complete. A writing that was stopped goes on with the shards
    that are as they were written.

    Args:
        source: the activations.
        out: a new folder; or the work folder of one, which the caller has entered and leaves.
        model: the model's folder, whose weights' digest is kept: features belong to one model.
        rows: largest number of rows, in whole contexts.
        dtype: `float32`, `bfloat16`, or `int8` with a float32 scale per row.
        progress: called with rows done and rows in all.
        notice: is told what the user should know, such as a damaged shard that is written again; a Python
            warning if None.
        left_out: counts what the source's rule leaves out of the rows that are written.

    Returns:
        How many rows were written.

    Raises:
        OutputError: the folder is taken, holds the begun work of another call, is being written by another
            run, or cannot be written.
    """
    length = source.tokens.shape[1]
    total = source.rows if rows is None else max(min(rows, source.rows) // length, 1) * length
    given = isinstance(out, WorkFolder)
    with contextlib.nullcontext(out) if given else WorkFolder(out, inputs=[model]) as work:
        tokens = source.tokens.reshape(-1)[:total].astype(np.int32, copy=False)
        facts: dict[str, Any] = {
            "format": "mergelab-activations-1",
            "model": str(model),
            "model_sha256": weights_sha256(model),
            "tokens_sha256": hashlib.sha256(np.ascontiguousarray(tokens).data).hexdigest(),
            "sites": {site: width for site, width in zip(source.sites, source.widths, strict=True)},
            "rows": total,
            "context": length,
            "dtype": dtype,
            "rule": source.rule.facts(),
            "special_ids": list(source.special_ids),
            **_text_facts(source),
        }
        if source.counted is not None:
            counted = source.counted.reshape(-1)[:total].astype(np.uint8)
            facts["counted_sha256"] = hashlib.sha256(counted.tobytes()).hexdigest()
        identity = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        if not work.finished(identity):
            check_new_folder(work.out)
            work.prepare(_bytes(facts))
            left_out = LeftOut() if left_out is None else left_out
            _fill(work, source, facts, tokens, progress, notice or _warn, left_out)
            work.publish(identity)
    return total


def _text_facts(source: ModelActivations) -> dict[str, Any]:
    """How the text became contexts, where that is known and other than by default."""
    if source.text is None:
        return {}
    other = {"packing": source.text.packing, "roles": source.text.roles}
    told = {name: value for name, value in other.items() if value not in ("packed", "all")}
    return {"prepend_bos": source.text.bos is True} | told


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def _bytes(facts: Mapping[str, Any]) -> int:
    """What the rows take on the disk."""
    size = {"float32": 4, "bfloat16": 2, "int8": 1}[facts["dtype"]]
    scales = 4 * len(facts["sites"]) if facts["dtype"] == "int8" else 0
    return facts["rows"] * (sum(facts["sites"].values()) * size + scales + 4)


def _fill(
    work: WorkFolder,
    source: ModelActivations,
    facts: Mapping[str, Any],
    tokens: np.ndarray,
    progress: Callable[[int, int], None],
    notice: Callable[[str], None],
    left_out: LeftOut,
) -> None:
    """Makes all files in the work folder, but for those of a begun one that are whole."""
    total, dtype = len(tokens), facts["dtype"]
    by_place, context = source.by_place.reshape(-1), facts["context"]
    pieces = _pieces(work)
    with disk_errors(work.out):
        _claim(work, facts, notice)
        known = _receipts(work.journal)
        names = [_FACTS, _TOKENS]
        for number, start in enumerate(range(0, total, _SHARD_ROWS)):
            stop = min(start + _SHARD_ROWS, total)
            files = [f"{site}-{number:05d}.safetensors" for site in source.sites]
            names += files
            wanted = {name: known.get(name) for name in files}
            fault = file_fault(work.path, wanted) if all(wanted.values()) else "is new"
            if fault is not None:
                if fault != "is new":
                    notice(f"the begun {work.out.name} {fault}; it is written again")
                rows = read_in_pieces(source, start, stop, pieces, lambda done: progress(done, total))
                for name, values in zip(files, rows, strict=True):
                    _write(_stored(values, dtype), work.path / name)
                    _note(work.journal, name, asdict(Entry.of(work.path / name)))
                shutil.rmtree(pieces, ignore_errors=True)
            else:
                rows = tuple(_open(work.path / name).read(0, stop - start) for name in files)
            kept = source.kept_among(rows, start)
            left_out.add(kept, by_place[start:stop], first=start, context=context)
            progress(stop, total)
        held = {"tokens": tokens}
        if source.counted is not None:
            held["counted"] = source.counted.reshape(-1)[:total].astype(np.uint8)
        _write(held, work.path / _TOKENS)
        medians = dict(zip(source.sites, source.median_norms, strict=True))
        told = {**facts, "median_norms": medians, "left_out": left_out.facts()}
        write_whole(work.path / _FACTS, json.dumps(told, indent=2) + "\n")
        work.keep_only(names)


def _pieces(work: WorkFolder) -> Path:
    """Where rows of the shard under way are kept; beside them may be the tokens of the text."""
    return work.stages / "rows"


def _claim(work: WorkFolder, facts: Mapping[str, Any], notice: Callable[[str], None]) -> None:
    """Says in the work folder what is being made there; only the same work goes on."""
    path = work.path / "store.json"
    if work.path.is_dir() and any(work.path.iterdir()):
        try:
            said = read_json(path)
        except CheckpointError:
            said = None
            notice(f"the begun {work.out.name} does not say what it is of, so it is begun anew")
        # What is found on the way is added at the end.
        if isinstance(said, dict) and {name: said.get(name) for name in facts} == facts:
            return
        if said is not None:
            raise OutputError(
                f"{work.path}: the begun work of another call for {work.out.name} (other model, text or "
                "settings); delete it first"
            )
    work.journal.unlink(missing_ok=True)
    work.clear()
    shutil.rmtree(_pieces(work), ignore_errors=True)
    write_whole(path, json.dumps(facts, indent=2) + "\n")


def _receipts(path: Path) -> dict[str, Any]:
    """Size and digest of the shards written so far; a line that a kill has torn counts for nothing."""
    found: dict[str, Any] = {}
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            said = parse_json_object(line, "the line")
            found[said["file"]] = said["entry"]
        except (CheckpointError, KeyError, TypeError):
            continue
    return found


def _note(path: Path, name: str, entry: Mapping[str, Any]) -> None:
    """Appends a receipt on a line of its own, even after a torn one."""
    with path.open("ab") as file:
        file.write(b"\n" + json.dumps({"file": name, "entry": dict(entry)}).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _write(arrays: Mapping[str, np.ndarray], path: Path) -> None:
    partial = path.with_name(f".{path.name}")
    try:
        write_tensors(partial, arrays)
        sync_path(partial)
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _stored(rows: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
    if dtype == "int8":
        values, scales = quantized(rows)
        return {"activations": values, "scales": scales}
    return {"activations": rows.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)}


def quantized(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows in eight bits: int8 `[rows, d]` and float32 scales `[rows]`; off by at most half a scale."""
    scales = np.abs(rows).max(axis=1) / 127
    scales = np.where(scales > 0, scales, 1).astype(np.float32)
    return np.rint(rows / scales[:, None]).astype(np.int8), scales
