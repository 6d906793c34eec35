"""Small recipes and model folders that several tests of this room share."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

BLOCK = ("attn.weight", "mlp.weight", "norm.weight")


def write_model(
    folder: Path,
    tensors: Mapping[str, np.ndarray] | None = None,
    *,
    layers: int = 3,
    width: int = 4,
    rows: int = 6,
    seed: int = 0,
    drop: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a tiny model of the usual shape, or exactly `tensors`; returns its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if tensors is None:
        random = np.random.default_rng(seed)
        names = {"model.embed_tokens.weight": (rows, width), "model.norm.weight": (width,)}
        for i in range(layers):
            names |= {f"model.layers.{i}.{s}": (width,) if "norm" in s else (width, width) for s in BLOCK}
        names["lm_head.weight"] = (rows, width)
        tensors = {n: random.normal(size=s).astype(np.float32) for n, s in names.items() if n not in drop}
    else:
        layers = len({match[1] for name in tensors if (match := re.search(r"\.(\d+)\.", name))})
    save_file(dict(tensors), folder / "model.safetensors")
    stated = {"model_type": "tiny", "num_hidden_layers": layers, "vocab_size": rows, "hidden_size": width}
    (folder / "config.json").write_text(json.dumps(stated if config is None else dict(config)))
    return folder
