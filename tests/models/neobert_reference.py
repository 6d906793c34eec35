"""NeoBERT in float64 numpy, after the authors' code on the hub (chandar-lab/NeoBERT, `model.py`), which
transformers does not hold: interleaved query, key and value, neighbors rotated, half of `w12` a gate.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file


def hidden_states(folder: Path, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The last hidden state `[batch, length, width]` of a folder's model."""
    config = json.loads((folder / "config.json").read_text())
    tensors = {name: a.astype(np.float64) for name, a in load_file(folder / "model.safetensors").items()}
    heads, width = config["num_attention_heads"], config["hidden_size"]
    head = width // heads
    batch, length = tokens.shape
    turns = np.exp(1j * np.outer(np.arange(length), 10000.0 ** (-np.arange(0, head, 2) / head)))

    def rms(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config["norm_eps"]) * tensors[name]

    def turned(x: np.ndarray) -> np.ndarray:
        pairs = (x[..., ::2] + 1j * x[..., 1::2]) * turns[None, :, None]
        return np.stack([pairs.real, pairs.imag], -1).reshape(x.shape)

    x = tensors["model.encoder.weight"][tokens]
    for layer in range(config["num_hidden_layers"]):
        name = f"model.transformer_encoder.{layer}"
        fused = rms(x, f"{name}.attention_norm.weight") @ tensors[f"{name}.qkv.weight"].T
        q, k, v = np.split(fused.reshape(batch, length, heads, 3 * head), 3, axis=-1)
        scores = np.einsum("bqhd,bkhd->bhqk", turned(q), turned(k)) / np.sqrt(head)
        scores = np.where(mask[:, None, None], scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed = np.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, length, width)
        x = x + mixed @ tensors[f"{name}.wo.weight"].T
        gate, up = np.split(
            rms(x, f"{name}.ffn_norm.weight") @ tensors[f"{name}.ffn.w12.weight"].T, 2, axis=-1
        )
        x = x + (gate / (1 + np.exp(-gate)) * up) @ tensors[f"{name}.ffn.w3.weight"].T
    return rms(x, "model.layer_norm.weight")
