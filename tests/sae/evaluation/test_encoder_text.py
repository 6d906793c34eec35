"""An encoder's contexts are framed as it was trained, and so are the answers to probing tasks."""

from __future__ import annotations

import numpy as np
import pytest

from mergelab.activations.model_activations import contexts_of_texts
from mergelab.errors import SAEError
from mergelab.sae.evaluation.metric import Evidence, Options
from mergelab.sae.evaluation.probing_tasks import label_texts
from mergelab.sae.evaluation.scorecard import applicable_metrics, scorecard
from mergelab.text.tokenizer import load_tokenizer
from tests.sae.evaluation.tiny_encoder import LENGTH, Encoder
from tests.sae.evaluation.trained_model import SubjectModel


def test_contexts_stand_between_the_tokenizers_marks(encoder: Encoder, subject: SubjectModel) -> None:
    tokenizer, source = load_tokenizer(encoder.folder), encoder.source
    assert tokenizer.frame == (2, 3) and tokenizer.mask_id == encoder.mask_id and source.framed
    ids = tokenizer.encode(encoder.text.read_text(), add_special_tokens=False)
    inner = source.tokens[:, 1:-1]
    assert source.tokens.shape[1] == LENGTH and (source.tokens[:, [0, -1]] == [[2, 3]]).all()
    np.testing.assert_array_equal(inner.ravel(), ids[: inner.size])
    assert len(ids) - inner.size < LENGTH - 2
    assert load_tokenizer(subject.folder).frame is None and not subject.source.framed
    with pytest.raises(SAEError, match="do not fill one context of 2"):
        contexts_of_texts(encoder.folder, encoder.text.read_text(), 2)


def test_labels_belong_to_the_framed_tokens(encoder: Encoder) -> None:
    found = label_texts(encoder.folder, [encoder.text], LENGTH)
    np.testing.assert_array_equal(found.tokens, encoder.source.tokens)
    tokenizer = load_tokenizer(encoder.folder)
    signs = [tokenizer.piece(int(t)).strip() in set("()=+-*/[]:,.<>") for t in found.tokens.ravel()]
    assert found.labels["is_operator"].ravel()[signs].mean() > 0.4
    assert not any(label[:, [0, -1]].any() for label in found.labels.values())


def test_pieces_bring_their_space(encoder: Encoder, subject: SubjectModel) -> None:
    tokenizer = load_tokenizer(encoder.folder)
    ids = tokenizer.encode("bisect the lists", add_special_tokens=False)
    assert len(ids) > 3 and "".join(map(tokenizer.piece, ids)) == " bisect the lists"
    assert tokenizer.piece(2) == " [CLS]" and tokenizer.piece(10**6) == " "
    other = load_tokenizer(subject.folder)
    dash = other.encode("–", add_special_tokens=False)
    assert [other.shown_piece(i) for i in dash] == ["<0xE2>", "<0x80>", "<0x93>"]
    assert [tokenizer.shown_piece(i) for i in ids] == [tokenizer.piece(i) for i in ids]
    assert [other.piece(i) for i in range(60, 300)] == [other.decode([i]) for i in range(60, 300)]


def test_a_scorecard_of_an_encoder(encoder: Encoder) -> None:
    names = applicable_metrics(Evidence(encoder.source, {"labels": {}}))
    assert names == ("reconstruction", "embeddings", "probing", "absorption", "explanations", "progressive")
    card = scorecard(
        encoder.sae,
        Evidence(encoder.source, {"mask_token": encoder.mask_id}),
        Options(metrics=["embeddings", "explanations"], explained=3),
    )
    values = card.values()
    assert {name for name in values if name.startswith("explanations")} == {
        "explanations.precision",
        "explanations.recall",
    }
    assert 0 <= values["explanations.precision"] <= 1 and values["embeddings.cosine"] < 1
