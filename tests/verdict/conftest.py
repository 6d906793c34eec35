"""Two tiny models of one tokenizer, an adapter, a recipe of both, a text and tasks, in one folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.models.tiny_models import write

WORDS = [f"w{i}" for i in range(61)]
RECIPE = """merge_method: linear
models:
- {model: one, parameters: {weight: 0.75}}
- {model: other, parameters: {weight: 0.25}}
"""


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `one`, `other` and `lora` (on `one`), and `r.yaml`, `t.txt`, `docs.jsonl`, `tasks.jsonl`."""
    place = tmp_path_factory.mktemp("verdict")
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "model": {"type": "WordLevel", "vocab": {w: i for i, w in enumerate(WORDS)}, "unk_token": "w0"},
        "pre_tokenizer": {"type": "WhitespaceSplit"},
    }
    random = np.random.default_rng(0)
    for name in ("one", "other"):
        folder = write(place / name, "llama")
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "w2"}))
    weights = load_file(place / "one" / "model.safetensors")
    moved = {n: a + 0.2 * random.normal(size=a.shape).astype(a.dtype) for n, a in weights.items()}
    save_file(moved, place / "other" / "model.safetensors", metadata={"format": "pt"})
    key = "base_model.model.model.layers.0.mlp.up_proj"
    factors = {"lora_A": (2, 24), "lora_B": (40, 2)}
    (place / "lora").mkdir()
    save_file(
        {f"{key}.{n}.weight": random.normal(size=s).astype(np.float32) for n, s in factors.items()},
        place / "lora" / "adapter_model.safetensors",
    )
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["up_proj"]}
    (place / "lora" / "adapter_config.json").write_text(
        json.dumps({**settings, "base_model_name_or_path": "../one"})
    )
    (place / "r.yaml").write_text(RECIPE)

    def text(count: int) -> str:
        return " ".join(WORDS[i] for i in random.integers(3, 61, count))

    (place / "t.txt").write_text(text(300))
    documents = [text(int(n)) for n in random.integers(3, 20, 24)]
    (place / "docs.jsonl").write_text("\n".join(json.dumps({"text": one}) for one in documents))
    tasks = [{"question": text(3), "choices": [text(1), text(2)], "answer": i % 2} for i in range(12)]
    (place / "tasks.jsonl").write_text("\n".join(map(json.dumps, tasks)))
    return place


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, as the working directory."""
    monkeypatch.chdir(place)
    return place
