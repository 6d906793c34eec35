"""Latents over prompts, against the embeddings that they read by construction."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import mergelab as ml
from mergelab.errors import SAEError, SiteError
from mergelab.sae import SAEConfig
from mergelab.sae.features import LatentTable, growing_prefixes, latent_table, word_variants
from mergelab.text import Tokenizer

WORDS = ["the", "cat", "dog", "sat", "on", "mat"]
CONFIG = {
    "model_type": "llama", "vocab_size": len(WORDS), "hidden_size": 8, "intermediate_size": 8,
    "num_hidden_layers": 1, "num_attention_heads": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def subject() -> tuple[ml.Model, dict, Tokenizer, ml.SAE]:
    """A model whose stream begins with one-hot embeddings; an SAE with a latent for each word but one."""
    model = ml.model_from_config(CONFIG)
    params = model.init(0)
    eye = np.eye(len(WORDS), 8, dtype=np.float32)
    params["embed"]["embedding"] = jnp.asarray(eye)
    backend = tokenizers.Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="the"))
    backend.pre_tokenizer = Whitespace()
    tokenizer = Tokenizer(backend, {}, (), {}, Path("nowhere"))
    read = eye.T * np.array([0, 1, 2, 3, 4, 5], np.float32)
    sae = ml.SAE(
        jnp.asarray(read), jnp.zeros(6), jnp.asarray(read.T), jnp.zeros(8),
        SAEConfig("relu", metadata={"site": "blocks.0.resid_pre"}),
    )  # fmt: skip
    return model, params, tokenizer, sae.checked()


def table(subject: tuple, prompts: str | list[str], **options: object) -> LatentTable:
    model, params, tokenizer, sae = subject
    return latent_table(sae, model, prompts, params, tokenizer, **options)


def test_codes_are_read_at_the_last_token_of_each_prompt(subject: tuple) -> None:
    found = table(subject, ["the cat sat on the mat", "the dog", "the cat"])
    assert found.latents.tolist() == [5, 2, 1]  # mat 5, dog 2, cat 1; the others are off in all
    assert found.codes.tolist() == [[5, 0, 0], [0, 2, 0], [0, 0, 1]]
    assert [piece.strip() for piece in found.pieces] == ["mat", "dog", "cat"]
    assert found.records()[0] == {
        "prompt": "the cat sat on the mat",
        "token": found.pieces[0],
        "latent": 5,
        "code": 5.0,
    }


def test_what_all_prompts_share_tells_nothing(subject: tuple) -> None:
    assert table(subject, ["the cat sat", "the dog sat"]).latents.size == 0
    assert table(subject, ["the cat sat", "the dog sat"], position=1).latents.tolist() == [2, 1]
    assert table(subject, "the cat sat").latents.tolist() == [3]  # of one prompt, what is on


def test_named_latents_stay_in_their_order(subject: tuple) -> None:
    found = table(subject, ["the cat", "the dog"], latents=[4, 1])
    assert found.latents.tolist() == [4, 1]
    assert found.codes.tolist() == [[0, 1], [0, 0]]


def test_prefixes_and_variants() -> None:
    assert growing_prefixes("the cat sat") == ["the", "the cat", "the cat sat"]
    assert growing_prefixes("a  b") == ["a", "a  b"]  # no prompt ends in a blank
    assert word_variants("the {} sat", ["cat", "dog"]) == ["the cat sat", "the dog sat"]
    with pytest.raises(SAEError, match=r"has no \{\}"):
        word_variants("the cat", ["dog"])


def test_figure_and_markdown_show_every_prompt(subject: tuple) -> None:
    found = table(subject, growing_prefixes("the cat sat on the mat"))
    (axes, _) = found.figure().axes
    assert [label.get_text() for label in axes.get_yticklabels()] == list(found.prompts)
    assert np.array_equal(axes.images[0].get_array(), found.codes)
    assert found.markdown().count("\n") >= 7


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "no prompts"),
        (["the"], {"latents": [6]}, "latents 0 to 5"),
        (["the"], {"latents": [-1]}, "latent -1"),
    ],
)
def test_bad_questions_are_refused(subject: tuple, prompts: list[str], options: dict, message: str) -> None:
    with pytest.raises(SAEError, match=message):
        table(subject, prompts, **options)


def test_a_short_prompt_has_no_such_token(subject: tuple) -> None:
    with pytest.raises(SiteError, match="none at position 2"):
        table(subject, ["the cat"], position=2)
