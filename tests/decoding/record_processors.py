"""Writes processors.json: what transformers' logits processors give for fixed logits (needs transformers).

Run it as `python -m tests.decoding.record_processors`.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

RECORDED = Path(__file__).with_name("processors.json")
CASES: dict[str, float | int] = {
    "temperature": 0.7,
    "top_k": 5,
    "top_p": 0.6,
    "min_p": 0.2,
    "repetition_penalty": 1.3,
}


def inputs() -> tuple[np.ndarray, np.ndarray]:
    """Prompt tokens `[4, 6]` and logits `[4, 23]`, no two of a row equal."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 23, (4, 6)), rng.normal(0, 2, (4, 23)).astype(np.float32)


def processors() -> dict[str, np.ndarray]:
    """Each processor's output, and that of all of them in the order that `generate` uses."""
    import torch
    from transformers import generation as hf

    tokens, logits = (torch.from_numpy(array) for array in inputs())
    each = {
        "repetition_penalty": hf.RepetitionPenaltyLogitsProcessor(CASES["repetition_penalty"]),
        "temperature": hf.TemperatureLogitsWarper(CASES["temperature"]),
        "top_k": hf.TopKLogitsWarper(CASES["top_k"]),
        "top_p": hf.TopPLogitsWarper(CASES["top_p"]),
        "min_p": hf.MinPLogitsWarper(CASES["min_p"]),
    }
    outputs = {name: process(tokens, logits.clone()) for name, process in each.items()}
    outputs["together"] = logits
    for process in each.values():
        outputs["together"] = process(tokens, outputs["together"].clone())
    return {name: array.numpy() for name, array in outputs.items()}


if __name__ == "__main__":
    rows = {
        name: [[None if np.isinf(x) else round(float(x), 5) for x in row] for row in array]
        for name, array in processors().items()
    }
    RECORDED.write_text(json.dumps(rows).replace("]], ", "]],\n") + "\n")
