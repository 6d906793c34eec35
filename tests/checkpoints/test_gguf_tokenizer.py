"""Tokenizers in GGUF files: read as llama.cpp and transformers read them, written so that they come back."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

import mergelab as ml
from mergelab.checkpoints import open_checkpoint
from mergelab.checkpoints.companions import companion_json, has_companion, read_companion
from mergelab.checkpoints.gguf.header import read_header
from mergelab.checkpoints.gguf.pre_tokenizers import PRE_TOKENIZERS
from mergelab.checkpoints.gguf.tokenizer import tokenizer_from
from mergelab.checkpoints.gguf.write import write_gguf
from mergelab.errors import CheckpointError

TEXTS = [
    "Hello world, hello 12345 worlds!",
    "  two  spaces\n\n\tand a tab ",
    "naïve café — 日本語 🙂",
    "<|im_start|>user\nIt's 'fine'<|im_end|>",
    "I'LL say x'y DON'T",
    "",
]
TRAINING = [*TEXTS, "hello hello world worlds user fine spaces and and the the say it's don't"] * 3
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@cache
def trained() -> str:
    """A byte-level tokenizer that has seen the texts."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    )
    backend.train_from_iterator(TRAINING, trainer)
    return backend.to_str()


def byte_level(pre: dict[str, Any], **model: Any) -> dict[str, Any]:
    """That tokenizer with another way to cut text, as the content of its file."""
    data = json.loads(trained())
    data["added_tokens"][1]["special"] = False
    return {**data, "pre_tokenizer": pre, "model": {**data["model"], **model}}


def sentencepiece(prefix: bool) -> dict[str, Any]:
    """A tokenizer of Llama 2's kind: `▁` for spaces, bytes to fall back on."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        show_progress=False,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
    )
    backend.train_from_iterator([text.replace(" ", "▁") for text in TRAINING if text.isascii()], trainer)
    data = json.loads(backend.to_str())
    parts = [{"type": "Prepend", "prepend": "▁"}] if prefix else []
    steps = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return {
        **data,
        "added_tokens": data["added_tokens"][:3],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [*parts, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}],
        },
        "decoder": {"type": "Sequence", "decoders": [*steps, *strip]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "model": {**data["model"], "byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"},
    }


def model_with(data: dict[str, Any], folder: Path, **config: Any) -> Path:
    """A tiny model with this tokenizer."""
    size = len(tokenizers.Tokenizer.from_str(json.dumps(data)).get_vocab(with_added_tokens=True))
    fields = {
        "model_type": "llama",
        "vocab_size": size + 5,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }
    model = ml.model_from_config(fields)
    params: dict[str, Any] = {}
    for leaf in model.table():
        place = params
        for key in leaf.path[:-1]:
            place = place.setdefault(key, {})
        place[leaf.path[-1]] = np.zeros(leaf.shape, np.float32)
    files = {
        "tokenizer.json": json.dumps(data).encode(),
        "tokenizer_config.json": json.dumps({"chat_template": TEMPLATE, **config}).encode(),
    }
    return ml.save_model(model, params, folder, files=files)


BYTE_LEVEL_CONFIG = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
SENTENCEPIECE_CONFIG = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def check_same(first: ml.Tokenizer, second: ml.Tokenizer) -> None:
    for text in TEXTS:
        ids = first.encode(text)
        assert second.encode(text) == ids, text
        assert second.decode(ids) == first.decode(ids)
        assert second.decode(ids, skip_special_tokens=False) == first.decode(ids, skip_special_tokens=False)
    assert second.special == first.special and second.end_ids == first.end_ids
    assert second.chat_templates == first.chat_templates == {"default": TEMPLATE}


@pytest.mark.parametrize("whole", [True, False], ids=["with its tokenizer.json", "from keys alone"])
@pytest.mark.parametrize(
    "kind", ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "gpt-4o", "llama", "no prefix"]
)
def test_a_tokenizer_comes_back(
    kind: str, whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind in ("llama", "no prefix"):
        data, config = sentencepiece(kind == "llama"), SENTENCEPIECE_CONFIG
    else:
        words_first = kind in ("llama-bpe", "tekken")
        data, config = byte_level(PRE_TOKENIZERS[kind], ignore_merges=words_first), BYTE_LEVEL_CONFIG
    folder = model_with(data, tmp_path / "model", **config)
    if not whole:  # as every file that llama.cpp wrote
        monkeypatch.setattr("mergelab.checkpoints.gguf.tokenizer_keys.HF_JSON", "unknown.key")
    write_gguf(open_checkpoint(folder), tmp_path / "m.gguf")
    check_same(ml.load_tokenizer(folder), ml.load_tokenizer(tmp_path / "m.gguf"))


def test_merges_are_made_again_from_scores() -> None:
    """SentencePiece keeps a score for each token, and tries the best first."""
    data = sentencepiece(True)
    tokens = sorted(data["model"]["vocab"], key=data["model"]["vocab"].get)
    made = {"".join(pair): -float(place) for place, pair in reversed([*enumerate(data["model"]["merges"])])}
    types = [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)]
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [made.get(token, -1e4) for token in tokens],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    first = tokenizers.Tokenizer.from_str(json.dumps(data))
    second = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_from(metadata, "m.gguf")))
    for text in TEXTS:
        assert second.encode(text).ids == first.encode(text).ids
    backwards = {**metadata, "tokenizer.ggml.scores": [-score for score in metadata["tokenizer.ggml.scores"]]}
    third = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_from(backwards, "m.gguf")))
    assert any(third.encode(text).ids != first.encode(text).ids for text in TRAINING)


def test_the_space_runs_of_gemma_are_normal_tokens() -> None:
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "▁", "  ", "   ", "a", "b", "▁a"]
    metadata = {
        "general.architecture": "gemma2",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 10,
        "tokenizer.ggml.token_type": [3, 3, 3, 2, 1, 4, 4, 1, 1, 1],
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.add_space_prefix": False,
    }
    backend = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_from(metadata, "m.gguf")))
    assert backend.encode("a   b a").ids == [2, 7, 6, 8, 9]
    assert backend.decode(backend.encode("a   b a").ids) == "a   b a"


def test_small_files_are_made_of_metadata(tmp_path: Path) -> None:
    folder = model_with(byte_level(PRE_TOKENIZERS["gpt-2"]), tmp_path / "model", **BYTE_LEVEL_CONFIG)
    path = tmp_path / "m.gguf"
    write_gguf(open_checkpoint(folder), path)
    assert (
        companion_json(path, "config.json")["vocab_size"]
        == companion_json(folder, "config.json")["vocab_size"]
    )
    assert companion_json(path, "tokenizer_config.json")["chat_template"] == TEMPLATE
    assert companion_json(path, "generation_config.json")["eos_token_id"] == 2
    assert not has_companion(path, "vocab.json") and companion_json(path, "vocab.json") == {}
    with pytest.raises(CheckpointError, match=r"does not describe a vocab\.json"):
        read_companion(path, "vocab.json")
    tokens = read_header(path).metadata["tokenizer.ggml.tokens"]
    assert tokens[-5:] == [f"[PAD{len(tokens) - i}]" for i in range(5, 0, -1)]  # rows that no text uses


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokenizer.ggml.model": "bert"}, "kind 'bert'"),
        ({"tokenizer.ggml.pre": "unheard-of"}, "names 'unheard-of' how text is cut"),
        ({"tokenizer.ggml.pre": ""}, "does not say how text is cut"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "the token 'a' twice"),
        ({"tokenizer.ggml.token_type": [1]}, "one number for each token"),
        ({"tokenizer.ggml.merges": ["ab"]}, "merges of two parts"),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_one_sentence(change: dict[str, Any], words: str) -> None:
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["a", "b", "ab"],
        "tokenizer.ggml.merges": ["a b"],
    }
    with pytest.raises(CheckpointError, match=words):
        tokenizer_from({**metadata, **change}, "m.gguf")


def test_a_tokenizer_without_a_name_in_llama_cpp_is_not_written(tmp_path: Path) -> None:
    data = byte_level({"type": "Whitespace"})
    folder = model_with(data, tmp_path / "model", **BYTE_LEVEL_CONFIG)
    with pytest.raises(CheckpointError, match=r"in a way that llama\.cpp has no name for"):
        write_gguf(open_checkpoint(folder), tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()
