"""Prompts in every usual form give the same activations, in one shape."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mergelab.activations.capture import capture
from mergelab.errors import SiteError, TokenError
from mergelab.models.families import model_from_config
from tests.decoding.tiny import CONFIGS

SITE = "blocks.1.resid_post"
PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]


@pytest.fixture(scope="module")
def llama() -> Any:
    model = model_from_config(CONFIGS["llama"])
    return model, model.init(0)


def test_a_ragged_list_is_padded_on_the_left_with_zeros_there(llama: Any) -> None:
    width = llama[0].config.d_model
    found = capture(*llama, PROMPTS, [SITE], batch=2)[SITE]
    assert found.shape == (3, 4, width) and found.dtype == np.float32
    for row, prompt in zip(found, PROMPTS, strict=True):
        alone = capture(*llama, prompt, SITE)[SITE]
        assert alone.shape == (1, len(prompt), width)
        np.testing.assert_allclose(row[4 - len(prompt) :], alone[0], atol=1e-5)
        assert (row[: 4 - len(prompt)] == 0).all()
    assert np.abs(found[0, 2:] - found[1, 2:]).max() > 1e-2  # the control: prompts differ


@pytest.mark.parametrize("form", [list, np.asarray, lambda ids: [ids], lambda ids: (np.asarray(ids),)])
def test_one_prompt_may_come_in_any_form(llama: Any, form: Any) -> None:
    expected = capture(*llama, np.array([[5, 6, 7]]), SITE)[SITE]
    np.testing.assert_array_equal(capture(*llama, form([5, 6, 7]), [SITE])[SITE], expected)


def test_heads_and_patterns_keep_their_axes(llama: Any) -> None:
    c = llama[0].config
    found = capture(*llama, PROMPTS, ["blocks.0.attn.pattern", "blocks.0.attn.z"])
    assert found["blocks.0.attn.pattern"].shape == (3, c.n_heads, 4, 4)
    assert found["blocks.0.attn.z"].shape == (3, 4, c.n_heads, c.head_dim)


@pytest.mark.parametrize("text", ["The capital", ["The capital", "of France"]])
def test_text_is_told_to_become_tokens_first(llama: Any, text: Any) -> None:
    with pytest.raises(
        TokenError, match=r"text where token ids were expected; encode them first, with load_"
    ):
        capture(*llama, text, [SITE])


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("blocks.1.hook_resid_post", SITE),
        ("blocks.1.hook_attn_out", "blocks.1.attn.out"),
        ("blocks.1.attn.hook_z", "blocks.1.attn.z"),
        ("blocks.0.ln2.hook_scale", "blocks.0.mlp_norm.scale"),
        ("block.1.resid_post", SITE),
    ],
)
def test_an_unknown_site_is_answered_with_the_nearest(llama: Any, wrong: str, right: str) -> None:
    with pytest.raises(SiteError, match=rf"did you mean '{right}'\?"):
        capture(*llama, PROMPTS, [wrong])


@pytest.mark.parametrize("tokens", [[], [[]], [[1], []], [[[1, 2]], [[3]]], np.zeros((2, 0), int)])
def test_what_holds_no_prompt_is_refused(llama: Any, tokens: Any) -> None:
    with pytest.raises(SiteError, match="prompts"):
        capture(*llama, tokens, [SITE])
    with pytest.raises(SiteError, match="have no mask"):
        capture(*llama, PROMPTS, [SITE], mask=np.ones((3, 4), bool))
