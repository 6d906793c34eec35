"""Tiny models whose attention is far from uniform, as parameters and as HF folders."""

from __future__ import annotations

import json
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mergelab.models.families import model_from_config
from mergelab.models.model import Model, Params
from mergelab.models.table import stored_shapes, tree_from_leaves

_LLAMA: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "rope_theta": 500.0, **_LLAMA},
    "mistral": {"model_type": "mistral", "sliding_window": 4, **_LLAMA},
    "gpt2": {"model_type": "gpt2", "vocab_size": 61, "n_embd": 24, "n_layer": 2, "n_head": 4}
    | {"n_positions": 64, "n_inner": 40},
}
PROMPTS = [[3, 14, 15, 9, 26, 5], [60, 1, 2], [35]]
NEW_TOKENS = 12


@cache
def tensors(kind: str) -> dict[str, np.ndarray]:
    """The model's HF tensors: deviation 0.4, norm scales around 1; drawn by name, whatever their order."""
    model = model_from_config(CONFIGS[kind])
    return {name: _draw(name, shape) for name, shape in stored_shapes(model.table()).items()}


@cache
def tiny(kind: str) -> tuple[Model, Params]:
    """The model and its parameters."""
    model, stored = model_from_config(CONFIGS[kind]), tensors(kind)
    leaves = {leaf: leaf.forward([stored[name] for name in leaf.hf_names]) for leaf in model.table()}
    return model, tree_from_leaves({leaf: jnp.asarray(array) for leaf, array in leaves.items()})


def write_folder(kind: str, folder: Path) -> Path:
    """The model as a folder that transformers reads."""
    from safetensors.numpy import save_file

    (folder / "config.json").write_text(json.dumps(CONFIGS[kind]))
    save_file(tensors(kind), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    is_norm_scale = ("norm" in name or ".ln_" in name) and name.endswith("weight")
    noise = np.random.default_rng(zlib.crc32(name.encode())).normal(0.0, 0.4, shape)
    return (noise + is_norm_scale).astype(np.float32)
