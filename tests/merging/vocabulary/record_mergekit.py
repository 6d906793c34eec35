"""Records what mergekit makes of recipes with tokenizer rules: the rows of interest, ids and added tokens.

    python tests/merging/vocabulary/record_mergekit.py GOLDENS path/to/mergekit-yaml

`GOLDENS` is the folder that `tests/goldens/record.py` writes, whose models the recipes merge. Writes
`data/mergekit.json` and `data/mergekit.safetensors`; `test_mergekit.py` compares with them. Every recipe has
a base model, and rows are recorded by token: without a base, mergekit's donor depends on the hash seed, and
the ids it gives to new tokens always do.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

DATA = Path(__file__).parent / "data"
TENSORS = ("model.embed_tokens.weight", "lm_head.weight")
COLUMNS = 8


def linear(weights: dict[str, float], base: str, **tokenizer: Any) -> dict[str, Any]:
    """A recipe that averages models with these weights."""
    models = [{"model": model, "parameters": {"weight": weight}} for model, weight in weights.items()]
    return {"merge_method": "linear", "base_model": base, "models": models, "tokenizer": tokenizer}


def model_token(model: str, **which: Any) -> dict[str, Any]:
    return {"kind": "model_token", "model": model, **which}


CASES: dict[str, dict[str, Any]] = {
    "rules": linear(
        {"llama-ft1": 2, "llama-tok": 1},
        base="llama-tok",
        source="union",
        tokens={
            "<|im_start|>": {"source": {"kind": "zero"}},
            "<|im_end|>": {"source": model_token("llama-ft1", token="</s>"), "force": True},
            "!": {"source": "llama-tok"},
            "A": {"source": "llama-tok", "force": True},
        },
    ),
    "new_token": linear(
        {"llama-ft1": 1, "llama-perm": 3},
        base="llama-ft1",
        source="union",
        tokens={"<new>": {"source": model_token("llama-perm", token_id=5)}},
    ),
    "base_padded": linear(
        {"llama-perm": 1, "llama-tok": 2, "llama-base": 1},
        base="llama-base",
        source="base",
        pad_to_multiple_of=10,
        tokens={"A": {"source": "llama-tok", "force": True}},
    ),
    "tokenizer_of_another": linear({"llama-ft1": 1, "llama-ft2": 1}, base="llama-ft1", source="llama-tok"),
    "mean_of_owners": linear(
        {"llama-ft1": 1, "llama-tok": 1, "extended": 2}, base="llama-ft1", source="union"
    ),
    "owned_by_base_too": linear(
        {"llama-ft1": 1, "llama-tok": 1, "extended": 2}, base="extended", source="union"
    ),
    "row_past_the_vocabulary": linear(
        {"extended": 1, "llama-tok": 3},
        base="extended",
        source="union",
        tokens={"!": {"source": model_token("extended", token_id=516), "force": True}},
    ),
}


def write_extended(goldens: Path, folder: Path) -> None:
    """llama-ft2 with a BPE token, an added token, another definition of one of llama-tok's, and padding."""
    source = goldens / "models" / "llama-ft2"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    tokenizer = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["model"]["vocab"]["qz"] = 512
    tokenizer["model"]["merges"].append(["q", "z"])
    flags = {"single_word": False, "lstrip": True, "rstrip": False, "normalized": False, "special": False}
    tokenizer["added_tokens"] += [
        {"id": 513, "content": "<extra>", **flags},
        {"id": 514, "content": "<|im_end|>", **flags},
    ]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    weights = load_file(source / "model.safetensors")
    rows = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
    for sign, name in enumerate(TENSORS):
        weights[name] = np.concatenate([weights[name], rows * (-1) ** sign])
    save_file(weights, folder / "model.safetensors")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 517}), encoding="utf-8")


def run(goldens: Path, mergekit_yaml: str, recipe: dict[str, Any], folder: Path) -> Path:
    """Merges `recipe` with mergekit in `folder`, which gets a link to each model."""
    for model in (goldens / "models").iterdir():
        if model.is_dir() and not (folder / model.name).exists():
            (folder / model.name).symlink_to(model.resolve())
    if not (folder / "extended").exists():
        write_extended(goldens, folder / "extended")
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    command = [mergekit_yaml, "recipe.yaml", "out", "--allow-crimes", "--no-write-model-card", "--quiet"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder / "out"


def rows_of_interest(ids: Mapping[str, int], rows: int) -> list[int]:
    """Rows of some tokens all models have, of those past the common 512 by name, then of the padding."""
    new = sorted(token for token, number in ids.items() if number >= 512)
    return [*(ids[token] for token in ("<unk>", "</s>", "!", "A", "Ġwh", *new)), *range(len(ids), rows)]


def record(goldens: Path, mergekit_yaml: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What mergekit makes of every case: ids and added tokens, and rows by `case.tensor`."""
    facts: dict[str, Any] = {}
    arrays: dict[str, np.ndarray] = {}
    for case, recipe in CASES.items():
        with tempfile.TemporaryDirectory() as temporary:
            out = run(goldens, mergekit_yaml, recipe, Path(temporary))
            tokenizer = json.loads((out / "tokenizer.json").read_text(encoding="utf-8"))
            config = json.loads((out / "config.json").read_text(encoding="utf-8"))
            weights: dict[str, np.ndarray] = {}
            for file in out.glob("*.safetensors"):
                weights |= load_file(file)
        added = {t["content"]: t for t in tokenizer["added_tokens"]}
        ids = {**tokenizer["model"]["vocab"], **{t: added[t]["id"] for t in added}}
        facts[case] = {
            "vocab_size": config["vocab_size"],
            "new": sorted(token for token, number in ids.items() if number >= 512),
            "special": sorted(token for token in added if added[token]["special"]),
        }
        for name in TENSORS:
            arrays[f"{case}.{name}"] = weights[name][
                rows_of_interest(ids, len(weights[name])), :COLUMNS
            ].copy()
    return facts, arrays


if __name__ == "__main__":
    recorded, rows = record(Path(sys.argv[1]).resolve(), sys.argv[2])
    (DATA / "mergekit.json").write_text(
        json.dumps(recorded, indent=1, sort_keys=True) + "\n", encoding="utf-8"
    )
    save_file(rows, DATA / "mergekit.safetensors", {"made by": "mergekit 0.1.5"})
