"""Contexts of a corpus: pieces of a text have the tokens of the whole; what counts is what was asked for."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from mergelab.errors import CorpusError
from mergelab.quickstart.family import train_bpe
from mergelab.text import corpus_tokens, token_rows
from mergelab.text.contexts import text_contexts
from mergelab.text.corpus import Document, TextOptions, documents_of_texts
from mergelab.text.corpus_tokens import bos_of, token_pieces
from mergelab.text.packing import pack_stream
from mergelab.text.token_rows import StoredTokens
from mergelab.text.tokenizer import Tokenizer

PROSE = Path(__file__).read_text("utf-8") + Path(__file__).with_name("test_chat.py").read_text("utf-8")
HARD = PROSE[:3000] + "=" * 700 + "\n" * 300 + " " * 500 + "é😀\u0301x" * 200 + PROSE[3000:9000]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content | trim }}{{ eos_token }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CHAT = [
    {"role": "user", "content": "assistant?"},
    {"role": "assistant", "content": " assistant\n"},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "a"},
]


def sentencepiece() -> tokenizers.Tokenizer:
    """A BPE without words, which puts a space before each text, as Llama 2's."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    backend.train_from_iterator(PROSE.replace(" ", " \0").split("\0"), trainer)
    backend.decoder = decoders.Replace("▁", " ")
    return backend


def unigram() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator([PROSE], trainer)
    return backend


def byte_level() -> tokenizers.Tokenizer:
    backend = train_bpe([PROSE], 300)
    backend.add_special_tokens(["<s>", "</s>"])
    return backend


BACKENDS = {"byte-level": byte_level, "sentencepiece": sentencepiece, "unigram": unigram}


def tokenizer(backend: tokenizers.Tokenizer, *, bos: bool = False, template: str = TEMPLATE) -> Tokenizer:
    end = backend.token_to_id("</s>")
    if bos:
        begin = ("<s>", backend.token_to_id("<s>"))
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[begin])
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    return Tokenizer(backend, special, (end,), {"default": template}, Path("model"))


@pytest.fixture(scope="module")
def plain() -> Tokenizer:
    return tokenizer(byte_level())


@pytest.fixture(scope="module")
def begun() -> Tokenizer:
    return tokenizer(byte_level(), bos=True)


@pytest.mark.parametrize("kind", BACKENDS)
@pytest.mark.parametrize(("window", "overlap"), [(512, 256), (700, 128), (4096, 512)])
def test_pieces_of_a_text_have_the_tokens_of_the_whole(
    kind: str, window: int, overlap: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_tokens, "WINDOW", window)
    monkeypatch.setattr(corpus_tokens, "_OVERLAP", overlap)
    monkeypatch.setattr(corpus_tokens, "_BATCH", 2 * window)
    mine = tokenizer(BACKENDS[kind]())
    for text in (HARD, PROSE[:window], PROSE[: window + 1]):
        pieces = [text[start : start + 97] for start in range(0, len(text), 97)]
        found = list(token_pieces(mine, [Document("a", pieces)]))
        assert np.concatenate([p.ids for p in found]).tolist() == mine.encode(text, add_special_tokens=False)
        assert [p.first for p in found] == [True] + [False] * (len(found) - 1)
        assert [p.last for p in found] == [False] * (len(found) - 1) + [True]
        assert len(found) == 1 if len(text) == window else len(text) == window + 1 or len(found) > 2


def test_the_control_windows_that_are_only_cut_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tokenizer(sentencepiece())
    cut = [id for n in range(0, len(HARD), 512) for id in mine.encode(HARD[n : n + 512])]
    assert cut != mine.encode(HARD)


def test_texts_are_packed_as_before(plain: Tokenizer) -> None:
    texts = [PROSE[:400], "", PROSE[400:1000]]
    documents = [plain.encode(text, add_special_tokens=False) for text in texts]
    expected = pack_stream(documents, 16, separator=plain.end_ids[0])
    found = text_contexts(plain, documents_of_texts(texts), 16)
    np.testing.assert_array_equal(found.tokens, expected.tokens[expected.mask.all(axis=1)])
    assert found.tokens.dtype == np.int32 and found.counted is None and found.exhausted
    with pytest.raises(CorpusError, match="do not fill one context of 1000000 tokens"):
        text_contexts(plain, documents_of_texts(texts), 10**6)


def test_a_token_that_begins_texts_stands_where_the_tokenizer_puts_it(
    plain: Tokenizer, begun: Tokenizer
) -> None:
    bos, end = begun.id_of("bos"), begun.end_ids[0]
    assert (bos_of(plain), bos_of(plain, True), bos_of(plain, False)) == (None, bos, None)
    assert (bos_of(begun), bos_of(begun, True), bos_of(begun, False)) == (bos, bos, None)
    texts = [PROSE[:300], PROSE[300:340], PROSE[340:800]]
    ids = [begun.encode(text, add_special_tokens=False) for text in texts]
    found = text_contexts(begun, documents_of_texts(texts), 16).tokens
    assert (found[:, 0] == bos).all()
    # Without those that only repeat it for a context, the stream is each text as the tokenizer has it.
    stream = [token for row in found.tolist() for token in row]
    kept = [t for n, t in enumerate(stream) if n % 16 or n == 0 or stream[n - 1] == end]
    expected = [token for text in ids for token in [bos, *text, end]]
    assert kept == expected[: len(kept)] and len(expected) - len(kept) < 16
    without = text_contexts(begun, documents_of_texts(texts), 16, TextOptions(bos=False)).tokens
    assert bos not in without
    nameless = Tokenizer(plain.backend, {}, (), {}, Path("model"))
    with pytest.raises(CorpusError, match="model names no bos_token"):
        bos_of(nameless, True)


@pytest.mark.parametrize("bos", [False, True])
def test_documents_are_kept_apart(begun: Tokenizer, bos: bool) -> None:
    texts = [PROSE[:100], PROSE[100:103], PROSE[103:400]]
    ids = [begun.encode(text, add_special_tokens=False) for text in texts]
    options = TextOptions(packing="documents", bos=bos)
    found = text_contexts(begun, documents_of_texts(texts), 8, options)
    assert found.counted is not None
    room, row = 8 - bos, 0
    for document in ids:
        for start in range(0, len(document), room):
            wanted = [begun.id_of("bos")] * bos + document[start : start + room]
            assert found.tokens[row, : len(wanted)].tolist() == wanted
            assert found.counted[row].tolist() == [True] * len(wanted) + [False] * (8 - len(wanted))
            row += 1
    assert row == len(found.tokens)


def test_of_a_conversation_only_what_was_asked_for_counts(plain: Tokenizer) -> None:
    whole = plain.encode(
        "<s><|user|>\nassistant?</s>\n<|assistant|>\nassistant</s>\n<|user|>\na</s>\n<|assistant|>\na</s>\n",
        add_special_tokens=False,
    )
    chats = [Document("a", messages=CHAT)] * 2
    found = text_contexts(plain, chats, len(whole), TextOptions(bos=True))
    assert found.tokens.tolist() == [whole, whole] and found.counted is None  # its own <s>, and no other
    found = text_contexts(plain, chats, len(whole), TextOptions(roles="assistant"))
    assert found.counted is not None and found.tokens.tolist() == [whole, whole]
    said = [plain.decode([t], skip_special_tokens=False) for t in found.tokens[found.counted].tolist()]
    assert "".join(said) == "assistant</s>a</s>" * 2
    only = [{"role": "user", "content": "no answer " * 20}]
    with pytest.raises(CorpusError, match="no assistant turn"):
        text_contexts(plain, [Document("a", messages=only)], 4, TextOptions(roles="assistant"))


def test_a_template_that_rewrites_answers_is_refused_by_name() -> None:
    rewriting = tokenizer(byte_level(), template="{% for m in messages %}{{ m.content[:2] }}{% endfor %}")
    document = Document("chats.jsonl: record 7", messages=CHAT)
    with pytest.raises(CorpusError, match=r"chats\.jsonl: record 7: the chat template of model rewrites"):
        list(token_pieces(rewriting, [document], TextOptions(roles="assistant")))
    none = Tokenizer(rewriting.backend, {}, (), {}, Path("model"))
    with pytest.raises(CorpusError, match="record 7: model has no chat template"):
        list(token_pieces(none, [document]))


def test_no_more_is_read_than_is_asked_for(plain: Tokenizer) -> None:
    read: list[int] = []

    def endless() -> Any:
        while True:
            read.append(1)
            yield Document("a", [PROSE[:2000]])

    found = text_contexts(plain, endless(), 16, TextOptions(tokens=100))
    assert found.tokens.size == 112 and not found.exhausted and len(read) < 2000
    options = TextOptions(tokens=100, packing="documents")
    apart = text_contexts(plain, documents_of_texts(["ab"] * 3000), 16, options)
    assert apart.counted is not None and 100 <= apart.counted.sum() < 116  # tokens, not padding


def test_many_contexts_lie_in_a_file_and_not_in_memory(
    plain: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    expected = text_contexts(plain, documents_of_texts(PROSE), 16)
    monkeypatch.setattr(token_rows, "HELD", 1000)
    found = text_contexts(plain, documents_of_texts(PROSE), 16)
    assert isinstance(found.tokens, StoredTokens) and not isinstance(expected.tokens, StoredTokens)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]  # nothing is left, even by a kill

    def peak(repeats: int) -> int:
        tracemalloc.start()
        text_contexts(plain, documents_of_texts([PROSE[:2000]] * repeats), 16, TextOptions(roles="all"))
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return held

    monkeypatch.setattr(corpus_tokens, "_BATCH", 1 << 12)
    peak(30)  # what is made once
    assert peak(240) < 1.2 * peak(60)  # 400 kB of ids against 100


def test_ids_are_checked_on_the_way(plain: Tokenizer) -> None:
    def check(ids: np.ndarray) -> None:
        if ids.max() > 250:
            raise CorpusError("beyond the vocabulary")

    with pytest.raises(CorpusError, match="beyond the vocabulary"):
        text_contexts(plain, documents_of_texts(PROSE), 16, check=check)
