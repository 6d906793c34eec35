"""Tiny models of images, alone and beside a tower for text; their weights are those of `tiny_models`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from mergelab.models.families import model_from_config
from mergelab.models.model import Model, Params
from tests.models.tiny_models import params_of, weights

_TOWER = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_TEXT = {**_TOWER, "vocab_size": 61, "max_position_embeddings": 16, "num_hidden_layers": 1}
_VISION = {**_TOWER, "image_size": 12, "patch_size": 4, "projection_dim": 20}

VISION: dict[str, dict[str, Any]] = {
    "vit": {"model_type": "vit", **_TOWER, "image_size": [8, 12], "patch_size": [4, 3]},
    "vit, biases": {"model_type": "vit", **_TOWER, "image_size": 9, "patch_size": 4, "qkv_bias": False},
    "clip_vision_model": {"model_type": "clip_vision_model", **_VISION},
    "clip": {
        "model_type": "clip",
        "projection_dim": 20,
        "text_config": {"model_type": "clip_text_model", **_TEXT, "eos_token_id": 7},
        "vision_config": {"model_type": "clip_vision_model", **_VISION},
    },
    "clip, largest id": {
        "model_type": "clip",
        "projection_dim": 20,
        "text_config": {"model_type": "clip_text_model", **_TEXT, "eos_token_id": 2},
        "vision_config": {"model_type": "clip_vision_model", **_VISION, "hidden_act": "gelu"},
    },
}
_RNG = np.random.default_rng(0)
TOKENS = _RNG.integers(8, 60, (3, 10)).astype(np.int32)
TOKENS[[0, 1, 2], [9, 5, 7]] = 7
# Texts are padded on the right, as CLIP's are.
MASK = np.arange(10)[None] <= np.array([[9], [5], [7]])


def images(model: Model) -> np.ndarray:
    """Two images of the model's shape."""
    sizes = model.config.image if model.reads_images else model.config.vision.image
    return np.random.default_rng(1).normal(size=(2, *sizes)).astype(np.float32)


def tiny(name: str) -> tuple[Model, Params]:
    """A model of `VISION` with the weights of the formula."""
    model = model_from_config(VISION[name])
    return model, params_of(model, weights(model))


def write(folder: Path, name: str) -> Path:
    """Writes a model of `VISION` as an HF folder."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(VISION[name]))
    save_file(
        weights(model_from_config(VISION[name])), folder / "model.safetensors", metadata={"format": "pt"}
    )
    return folder
