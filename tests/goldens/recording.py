"""What mergekit made of a recipe: whole, or in the small form that the repository keeps.

The small form has of each tensor every 47th entry, or all of few; of each case also either the sha256 of all
its bytes, where equality is asked for, or the sum of every 47 neighbors, so that each entry is judged.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import deserialize

STEP = 47  # prime to the widths of the models, so that every column is met
FEW = 256
DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16)}


def load(file: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, bfloat16 too."""
    return {
        name: np.frombuffer(bytes(found["data"]), DTYPES[found["dtype"]]).reshape(found["shape"])
        for name, found in deserialize(file.read_bytes())
    }


def digest(tensors: Mapping[str, np.ndarray]) -> str:
    """The sha256 of the bytes of all tensors in order of their names."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(np.ascontiguousarray(tensors[name]).tobytes())
    return found.hexdigest()


def step_of(size: int) -> int:
    return 1 if size <= FEW else STEP


def sums(value: np.ndarray) -> np.ndarray:
    """The sums of each run of `STEP` entries."""
    flat = value.astype(np.float64).ravel()
    return np.add.reduceat(flat, np.arange(0, flat.size, STEP))


@dataclasses.dataclass(frozen=True)
class Recorded:
    """One recorded tensor: its entries at every `step`-th place."""

    dtype: np.dtype
    shape: tuple[int, ...]
    step: int
    entries: np.ndarray
    sums: np.ndarray | None = None

    def at(self, value: np.ndarray) -> np.ndarray:
        """The entries of `value` at the recorded places, in float32."""
        assert value.shape == self.shape
        return value.ravel()[:: self.step].astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Recording:
    """One recorded model."""

    tensors: dict[str, Recorded]
    sha256: str | None

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def layout(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        return {name: (tensor.dtype, tensor.shape) for name, tensor in self.tensors.items()}

    def pairs(self, ours: Mapping[str, np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Our and the recorded entries of each tensor in float32, after names, shapes and dtypes."""
        assert {name: (value.dtype, value.shape) for name, value in ours.items()} == self.layout()
        return [(at.at(ours[name]), at.entries.astype(np.float32)) for name, at in self.tensors.items()]

    def sums_differ_by(self, ours: Mapping[str, np.ndarray]) -> float:
        """The largest difference of the mean of some run of entries from the recorded one (0 where whole)."""
        found = [
            np.abs(sums(ours[name]) - tensor.sums).max() / STEP
            for name, tensor in self.tensors.items()
            if tensor.sums is not None
        ]
        return float(max(found, default=0.0))

    def is_equal(self, ours: Mapping[str, np.ndarray]) -> bool:
        """Bit for bit."""
        same = all(np.array_equal(mine, theirs) for mine, theirs in self.pairs(ours))
        return same and (self.sha256 is None or digest(ours) == self.sha256)


def read(goldens: Path, name: str) -> Recording:
    """The recording of recipe `name` in a folder of goldens, whole or small."""
    case = goldens / "recipes" / name
    if (case / "SAME_AS").exists():
        case = case.parent / (case / "SAME_AS").read_text().strip()
    if (case / "model.safetensors").exists():
        whole = load(case / "model.safetensors")
        return Recording(
            {key: Recorded(value.dtype, value.shape, 1, value.ravel()) for key, value in whole.items()}, None
        )
    index = json.loads((goldens / "outputs.json").read_text())
    of = index["cases"][case.name]
    tensors: dict[str, Recorded] = {}
    with np.load(goldens / "outputs.npz") as arrays:
        entries = arrays[f"{case.name}.entries"]
        totals = arrays.get(f"{case.name}.sums")
    place = total = 0
    for key, (named, shape) in sorted(index["layouts"][of["layout"]].items()):
        size = int(np.prod(shape))
        count, runs = -(-size // step_of(size)), 0 if size <= FEW else -(-size // STEP)
        of_tensor = entries[place : place + count].view(DTYPES[named])
        its_sums = totals[total : total + runs] if totals is not None and runs else None
        tensors[key] = Recorded(DTYPES[named], tuple(shape), step_of(size), of_tensor, its_sums)
        place, total = place + count, total + runs
    assert place == len(entries) and (totals is None or total == len(totals))
    return Recording(tensors, of.get("sha256"))


def small(
    models: Mapping[str, Mapping[str, np.ndarray]], exact: set[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The small form of recorded models by case: what `outputs.json` and `outputs.npz` hold."""
    layouts: list[dict[str, Any]] = []
    cases: dict[str, Any] = {}
    arrays: dict[str, np.ndarray] = {}
    dtypes = {dtype: name for name, dtype in DTYPES.items()}
    for case, tensors in sorted(models.items()):
        ordered = dict(sorted(tensors.items()))
        layout = {name: [dtypes[value.dtype], list(value.shape)] for name, value in ordered.items()}
        if layout not in layouts:
            layouts.append(layout)
        cases[case] = {"layout": layouts.index(layout)}
        flat = np.concatenate([value.ravel()[:: step_of(value.size)] for value in ordered.values()])
        arrays[f"{case}.entries"] = flat.view(f"u{flat.itemsize}")
        if case in exact:
            cases[case]["sha256"] = digest(tensors)
        else:
            runs = [sums(value) for value in ordered.values() if value.size > FEW]
            arrays[f"{case}.sums"] = np.concatenate(runs).astype(np.float32)
    return {"layouts": layouts, "cases": cases}, arrays
