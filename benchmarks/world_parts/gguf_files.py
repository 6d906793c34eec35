"""GGUF files: SmolLM2 as published, and every type of blocks, against the gguf package and transformers."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mergelab.checkpoints import open_checkpoint, read_whole
from mergelab.checkpoints.gguf.tensors import KINDS
from tests.smollm import smollm_file

__all__ = ["blocks_of_every_type", "smollm_against_transformers"]

ROWS, WIDTH = 64, 1024
ARCHITECTURE: dict[str, int] = {
    "block_count": 1,
    "context_length": 64,
    "embedding_length": WIDTH,
    "feed_forward_length": ROWS,
    "attention.head_count": 8,
}


def blocks_of_every_type(work: Path) -> list[Sequence[str]]:
    """Files of the gguf package's writer, compared with its own dequantized values."""
    gguf: Any = importlib.import_module("gguf")
    rows = []
    for number, kind in sorted(KINDS.items(), key=lambda item: (item[1].elements, item[0])):
        data, wanted = _tensor(gguf, number)
        path = work / f"{kind.name}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        for key, value in ARCHITECTURE.items():
            writer.add_uint32(f"llama.{key}", value)
        writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
        writer.add_tensor("blk.0.ffn_up.weight", data, raw_dtype=gguf.GGMLQuantizationType(number))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        found = read_whole(open_checkpoint(path).tensors["model.layers.0.mlp.up_proj.weight"])
        error = np.abs(found.astype(np.float32) - wanted).max()
        rows.append((f"GGUF {kind.name}", "gguf package", "1", f"{error:g}"))
    return rows


def _tensor(gguf: Any, number: int) -> tuple[np.ndarray, np.ndarray]:
    """A tensor as stored, and its values: random weights, or random blocks where the package packs none."""
    rng, kind = np.random.default_rng(number), gguf.GGMLQuantizationType(number)
    weights = rng.normal(0, 0.02, (ROWS, WIDTH)).astype(np.float32)
    try:
        data = gguf.quants.quantize(weights, kind)
    except NotImplementedError:
        known = KINDS[number]
        data = rng.integers(0, 256, (ROWS, WIDTH // known.elements, known.nbytes), dtype=np.uint8)
        scales = rng.uniform(-0.1, 0.1, (*data.shape[:2], 2)).astype(np.float16).view(np.uint8)
        data[..., -4:] = scales if known.name == "Q2_K" else data[..., -4:]
        data[..., :4] = scales if known.name in ("Q4_K", "Q5_K") else data[..., :4]
        data[..., -2:] = scales[..., :2] if known.name in ("Q3_K", "Q6_K") else data[..., -2:]
        data = data.reshape(ROWS, -1)
    return data, gguf.quants.dequantize(data, kind).astype(np.float32)


def smollm_against_transformers(work: Path) -> list[Sequence[str]]:
    """SmolLM2-135M-Instruct's Q4_1 file, read here and by transformers."""
    torch, transformers = (importlib.import_module(name) for name in ("torch", "transformers"))
    path = smollm_file()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    state, tensors = model.state_dict(), open_checkpoint(path).tensors
    error = max(float(np.abs(read_whole(t) - state[name].numpy()).max()) for name, t in tensors.items())
    count = str(len(tensors))
    return [("GGUF Q4_1 (SmolLM2-135M-Instruct)", "transformers", count, f"{error:g}")]
