"""A folder's tokenizer encodes as transformers does, whatever its file remembers of padding."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing

from mergelab.errors import CheckpointError, MergelabError
from mergelab.quickstart.family import END_OF_TEXT, train_bpe
from mergelab.text.tokenizer import load_tokenizer

TEXTS = ["the cat sat on the mat", "a <|user|> token", "", "é" * 9]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A byte-level tokenizer that begins texts with a token, with padding and truncation left on."""
    backend = train_bpe(["the cat sat on the mat, the cat sat\n" * 9], 270)
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("<|user|>", special=True)])
    begin = ("<s>", backend.token_to_id("<s>"))
    backend.post_processor = TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[begin])
    backend.enable_padding(length=32)
    backend.enable_truncation(4)
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": {"content": "<s>", "__type": "AddedToken"},
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "chat_template": [{"name": "default", "template": "old"}, {"name": "rag", "template": "R"}],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "chat_template.jinja").write_text("new")
    return tmp_path


def test_texts_come_back_and_special_tokens_are_single(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids[0] == tokenizer.id_of("bos") and tokenizer.decode(ids) == text.replace("<|user|>", "")
        assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>" + text
        assert tokenizer.encode(text, add_special_tokens=False) == ids[1:]
    assert tokenizer.vocab_size == 271 and tokenizer.end_ids == (0,) and tokenizer.id_of("mask") is None
    assert tokenizer.chat_templates == {"default": "new", "rag": "R"}


def test_generation_config_says_what_ends_a_text(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 270]}')
    assert load_tokenizer(folder).end_ids == (0, 270)


def test_tokens_that_only_the_config_knows_are_added(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    token = {"content": "<|new|>", "special": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"added_tokens_decoder": {"271": token}}))
    assert load_tokenizer(folder).encode("a<|new|>", add_special_tokens=False)[1:] == [271]


@pytest.mark.parametrize("pad_left", [False, True])
def test_a_batch_is_its_texts_padded(folder: Path, pad_left: bool) -> None:
    tokenizer = load_tokenizer(folder)
    tokens, mask = tokenizer.encode_batch(TEXTS, pad_left=pad_left)
    for row, real, text in zip(tokens, mask, TEXTS, strict=True):
        assert row[real].tolist() == tokenizer.encode(text)
        assert (row[~real] == tokenizer.pad_id).all()
    assert mask[:, -1 if pad_left else 0].all() and not mask.all()
    short, real = tokenizer.encode_batch(TEXTS, max_length=3)
    assert short.shape == (4, 3) and real.sum(axis=1).tolist() == [3, 3, 1, 3]
    np.testing.assert_array_equal(short[0], tokenizer.encode(TEXTS[0])[:3])


@pytest.mark.oracle
def test_transformers_encodes_the_same(folder: Path) -> None:
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    for text in TEXTS:
        assert theirs(text)["input_ids"] == tokenizer.encode(text)
        assert theirs.decode(tokenizer.encode(text)) == tokenizer.decode(
            tokenizer.encode(text), skip_special_tokens=False
        )
    batch = theirs(TEXTS, padding=True, truncation=True, max_length=5)
    tokens, mask = tokenizer.encode_batch(TEXTS, max_length=5)
    assert batch["input_ids"] == tokens.tolist() and batch["attention_mask"] == mask.astype(int).tolist()


def test_faulty_folders_and_settings_are_refused(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder)
    with pytest.raises(MergelabError, match="max_length=1 leaves no room"):
        tokenizer.encode_batch(TEXTS, max_length=1)
    with pytest.raises(MergelabError, match="no texts"):
        tokenizer.encode_batch([])
    with pytest.raises(CheckpointError, match=r"nowhere does not exist"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        load_tokenizer(Path(tempfile.mkdtemp(dir=tmp_path)))
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not"):
        load_tokenizer(folder)
