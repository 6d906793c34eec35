"""A small checkpoint whose table uses every transform, and sources that count what is read of them."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from mergelab.checkpoints.source import TensorSource
from mergelab.models.table import Fused, FusedHeads, Leaf, stored_shapes

TABLE = (
    Leaf(("embed",), "wte", (40, 16), axes=("vocab", "embed")),
    Leaf(("odd",), "odd", (7, 5), "transpose", axes=("embed", "mlp")),
    *(
        Leaf(("attn", n), "c_attn", (16, width), Fused(start, 32, False), ("embed", "heads"))
        for n, start, width in (("q", 0, 16), ("k", 16, 8), ("v", 24, 8))
    ),
    *(Leaf(("bias", n), "qkv.bias", (16,), FusedHeads(i, 3, 4), ("heads",)) for i, n in enumerate("qkv")),
    *(
        Leaf(("neox", n), "qkv.weight", (24, 16), FusedHeads(i, 3, 4), ("embed", "heads"))
        for i, n in enumerate("qkv")
    ),
    *(
        Leaf(("mlp", n), "gate_up", (16, 24), Fused(24 * i, 48), ("embed", "mlp"))
        for i, n in enumerate(("gate", "up"))
    ),
    Leaf(("down",), "down", (24, 16), "transpose", ("mlp", "embed")),
    Leaf(("experts",), "experts.{}.w", (4, 16, 24), "transpose", ("experts", "embed", "mlp"), stack=4),
    Leaf(("norm",), "norm", (16,), axes=("embed",)),
    Leaf(("scalar",), "scalar", ()),
    Leaf(("empty",), "empty", (0, 8), "transpose", (None, "mlp")),
)


def tensors(dtype: Any, seed: int = 0) -> dict[str, np.ndarray]:
    """Random HF tensors for `TABLE`, drawn bit by bit from the finite values of `dtype`."""
    rng = np.random.default_rng(seed)
    return {n: rng.normal(size=shape).astype(dtype) for n, shape in stored_shapes(TABLE).items()}


def write(folder: Path, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Writes the checkpoint's one weight file and returns its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    made = tensors(dtype)
    save_file(made, folder / "model.safetensors")
    return made


def expected(leaf: Leaf, stored: Mapping[str, np.ndarray]) -> np.ndarray:
    return leaf.forward([stored[name] for name in leaf.hf_names])


class Counted:
    """A source that counts the bytes that pass through it."""

    def __init__(self, source: TensorSource, count: list[int]) -> None:
        self.source, self.name, self.shape, self.dtype = source, source.name, source.shape, source.dtype
        self._count, self._lock = count, threading.Lock()

    def read_into(self, start: int, out: np.ndarray) -> None:
        with self._lock:
            self._count[0] += out.nbytes
        self.source.read_into(start, out)
