"""Small models with vocabularies of any kind, written to disk as Hugging Face folders."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from mergelab.checkpoints.folder import open_checkpoint
from mergelab.checkpoints.source import Checkpoint, TensorSource


def added_token(id: int, content: str, **flags: bool) -> dict[str, Any]:
    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return {"id": id, "content": content, **dict.fromkeys(names, False), **flags}


def tokenizer_json(kind: str, tokens: list[str], added: Mapping[str, int]) -> dict[str, Any]:
    """A tokenizer of `kind` whose plain tokens have the ids 0, 1, ...; two letters make a BPE merge."""
    model: dict[str, Any] = {"type": kind, "vocab": {token: i for i, token in enumerate(tokens)}}
    if kind == "BPE":
        model["merges"] = [list(token) for token in tokens if len(token) == 2]
    elif kind == "Unigram":
        model |= {"unk_id": 0, "vocab": [[token, -float(i)] for i, token in enumerate(tokens)]}
    else:
        model["unk_token"] = tokens[0]
    if kind == "WordPiece":
        model |= {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    definitions = [added_token(number, token, special=True) for token, number in added.items()]
    pre = {"type": "Whitespace"} if kind in ("WordPiece", "WordLevel") else None
    return {"version": "1.0", "added_tokens": definitions, "pre_tokenizer": pre, "model": model}


MakeModel = Callable[..., Checkpoint]


@pytest.fixture
def make_model(tmp_path: Path) -> MakeModel:
    """`make_model(name, tokens, added=, rows=, ...)` writes a model and opens it.

    Row i of model number n is [100 n + i, -(100 n + i)]: every row says where it is from. Models are numbered
    in the order they are made.
    """
    made: list[str] = []

    def make(
        name: str,
        tokens: list[str] | None,
        *,
        added: Mapping[str, int] | None = None,
        rows: int | None = None,
        kind: str = "BPE",
        config: Mapping[str, Any] | None = None,
        tokenizer_config: Mapping[str, Any] | None = None,
        dtype: Any = np.float32,
        bias: bool = False,
        tied: bool = False,
    ) -> Checkpoint:
        folder = tmp_path / name
        folder.mkdir()
        added = added or {}
        if tokens is not None:
            (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(kind, tokens, added)))
        if tokenizer_config is not None:
            (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
        rows = rows or max([len(tokens or ()) - 1, *added.values()]) + 1
        number = 100.0 * len(made) + np.arange(rows)
        weights = {"model.embed_tokens.weight": np.stack([number, -number], 1).astype(dtype)}
        if not tied:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + np.asarray(1000, dtype)
        if bias:
            weights["lm_head.bias"] = (number + 5000).astype(dtype)
        weights["model.norm.weight"] = np.ones(2, dtype)
        save_file(weights, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"vocab_size": rows, **(config or {})}))
        made.append(name)
        return open_checkpoint(folder)

    return make


def read_all(source: TensorSource) -> np.ndarray:
    out = np.empty(int(np.prod(source.shape)), source.dtype)
    source.read_into(0, out)
    return out.reshape(source.shape)


@pytest.fixture
def read() -> Callable[[TensorSource], np.ndarray]:
    """Reads a whole source as an array of its shape."""
    return read_all
