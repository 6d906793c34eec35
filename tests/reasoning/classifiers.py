"""Tiny classifiers with weights of a formula; as a program, records what transformers computes of them."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from mergelab.models.families import model_from_config
from tests.models.tiny_models import CONFIGS, MASK, TOKENS, weights

RECORDED = Path(__file__).with_name("classifier_outputs.json")

CASES = [
    ("llama", "sequence"),
    ("qwen2", "token"),
    ("gpt2", "sequence"),
    ("gpt_neox", "token"),
    ("bert", "token"),
]
LIGHT = CASES[:2]
_CLASSES = {"llama": "Llama", "qwen2": "Qwen2", "gpt2": "GPT2", "gpt_neox": "GPTNeoX", "bert": "Bert"}


def write_classifier(folder: Path, kind: str, head: str, labels: int = 3, **more: np.ndarray) -> Path:
    """Writes a classifier as transformers would: `head` is `sequence` or `token`."""
    folder.mkdir(exist_ok=True)
    suffix = {"sequence": "ForSequenceClassification", "token": "ForTokenClassification"}[head]
    config = {
        **CONFIGS[kind],
        "architectures": [_CLASSES[kind] + suffix],
        "id2label": {str(n): f"class {n}" for n in range(labels)},
        "label2id": {f"class {n}": n for n in range(labels)},
        "pad_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config))
    tensors = weights(model_from_config(CONFIGS[kind]))
    absent = ("lm_head", "embed_out", "bert.pooler")
    tensors = {name: x for name, x in tensors.items() if not name.startswith(absent)}
    rng = np.random.default_rng(5)
    if not more:
        module = "classifier" if head == "token" and kind in ("gpt2", "gpt_neox", "bert") else "score"
        tensors[f"{module}.weight"] = rng.normal(0, 0.4, (labels, _width(kind))).astype(np.float32)
        if head == "token":
            tensors[f"{module}.bias"] = rng.normal(0, 0.4, labels).astype(np.float32)
    save_file({**tensors, **more}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _width(kind: str) -> int:
    return CONFIGS[kind].get("hidden_size") or CONFIGS[kind]["n_embd"]


def in_transformers(folder: Path, head: str) -> np.ndarray:
    """Logits of a folder's classifier on the tokens of the tiny models, padding with its id."""
    import torch
    import transformers

    loader: Any = {
        "sequence": transformers.AutoModelForSequenceClassification,
        "token": transformers.AutoModelForTokenClassification,
    }[head]
    model, info = loader.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    options: dict[str, Any] = {}
    if "bert" not in type(model).__name__.lower():
        options["position_ids"] = torch.tensor(np.maximum(MASK.cumsum(1) - 1, 0))
    with torch.no_grad():
        return model(
            torch.tensor(np.where(MASK, TOKENS, 0), dtype=torch.int64),
            attention_mask=torch.tensor(MASK.astype(np.int64)),
            **options,
        ).logits.numpy()


def record() -> None:
    """Writes `classifier_outputs.json`: the light cases, to six digits."""
    found = {}
    for kind, head in LIGHT:
        with tempfile.TemporaryDirectory() as folder:
            place = write_classifier(Path(folder) / "model", kind, head)
            found[f"{kind} {head}"] = np.round(in_transformers(place, head), 6).tolist()
    RECORDED.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    sys.exit(record())
