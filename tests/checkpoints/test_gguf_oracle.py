"""transformers reads the GGUF files that are written here to the same weights, and their tokenizers alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import mergelab as ml
from mergelab.checkpoints import open_checkpoint
from mergelab.checkpoints.gguf.write import write_gguf
from tests.checkpoints.test_gguf_tokenizer import (
    BYTE_LEVEL_CONFIG,
    PRE_TOKENIZERS,
    SENTENCEPIECE_CONFIG,
    TEXTS,
    byte_level,
    model_with,
    sentencepiece,
)

pytestmark = pytest.mark.oracle

BASE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# The fields that transformers does not read from these files have its defaults here.
CASES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "llama": ("LlamaConfig", {**BASE, "tie_word_embeddings": False}, True),
    "llama, tied": ("LlamaConfig", {**BASE, "tie_word_embeddings": True, "head_dim": 32}, True),
    "qwen2": ("Qwen2Config", BASE, True),
    "qwen3": ("Qwen3Config", {**BASE, "head_dim": 128}, True),
    "gemma2": ("Gemma2Config", {**BASE, "head_dim": 256, "sliding_window": 16}, True),
    "gemma3": ("Gemma3TextConfig", {**BASE, "head_dim": 256, "sliding_window": 16}, True),
    "phi3": ("Phi3Config", BASE, False),
    "gpt2": ("GPT2Config", {"vocab_size": 50257, "n_embd": 8, "n_layer": 2, "n_head": 4}, False),
}


@pytest.mark.parametrize("name", CASES)
def test_weights_and_logits_come_back_through_transformers(name: str, tmp_path: Path) -> None:
    import torch
    import transformers

    kind, fields, computed = CASES[name]
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**fields))
    theirs = made.float().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "model")
    path = tmp_path / "m.gguf"
    write_gguf(open_checkpoint(tmp_path / "model"), path)
    tokens = torch.arange(24)[None] * 7 % 96
    wanted = theirs(tokens).logits.detach().numpy()
    model, params = ml.load_model(path)
    ours = np.asarray(model.apply(params, jnp.asarray(tokens.numpy(), jnp.int32)).logits)
    np.testing.assert_allclose(ours, wanted, atol=1e-4, rtol=1e-4)
    if name == "phi3":  # transformers takes its usual padding token, which is beyond so small a vocabulary
        return
    read = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    ).eval()
    for key, value in theirs.state_dict().items():
        assert (read.state_dict()[key] - value).abs().max() <= (1.2e-7 if "gemma" in name else 0), key
    if computed:
        np.testing.assert_allclose(read(tokens).logits.detach().numpy(), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["gpt-2", "llama-bpe", "qwen2", "tekken", "llama"])
def test_tokenizers_come_back_through_transformers(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    if kind == "llama":
        data, config = sentencepiece(True), SENTENCEPIECE_CONFIG
    else:
        data = byte_level(PRE_TOKENIZERS[kind], ignore_merges=kind in ("llama-bpe", "tekken"))
        config = BYTE_LEVEL_CONFIG
    folder = model_with(data, tmp_path / "model", **config)
    monkeypatch.setattr("mergelab.checkpoints.gguf.tokenizer_keys.HF_JSON", "unknown.key")
    write_gguf(open_checkpoint(folder), tmp_path / "m.gguf")
    read = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    ours = ml.load_tokenizer(tmp_path / "m.gguf")
    for text in TEXTS:
        if kind == "llama" and text.startswith(" "):
            continue  # there transformers adds no space; Llama 2's own tokenizer.json and llama.cpp do, as we
        found, wanted = (t.encode(text, add_special_tokens=False) for t in (ours, read))
        assert found == wanted, text
    assert read.chat_template == ours.chat_templates["default"]
    assert json.loads(json.dumps(ours.special))["eos_token"] == read.eos_token
