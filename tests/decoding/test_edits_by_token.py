"""Edits in a generation know prompt from generated tokens, and a mask is one of the prompt's columns."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mergelab.decoding import generate, generation_state, pad_prompts, steps
from mergelab.errors import SiteError
from mergelab.interp import ablate, patch, steer
from mergelab.interp.latent_edits import add
from mergelab.models.model import Model, Params
from mergelab.models.sites import Edit
from tests.decoding.tiny import tiny
from tests.interp.saes import random_sae

SITE = "blocks.0.resid_post"
PROMPTS = [[3, 14, 15, 9, 26, 5], [60, 1, 2]]
NEW = 6
DIRECTION = 3 * np.sin(np.arange(24)).astype(np.float32)


LENGTH = 12  # of the longest prompt with its new tokens


@partial(jax.jit, static_argnums=0)
def _logits(model: Model, params: Params, tokens: jax.Array, mask: jax.Array, edit: Edit) -> jax.Array:
    return model.apply(params, tokens, mask=mask, edit={SITE: edit}).logits


def whole_texts(edit_of: Callable[[int], Edit]) -> list[list[int]]:
    """Greedy search without a cache: each prompt by itself, all columns of the text to come edited at once.

    Args:
        edit_of: from the number of a prompt's tokens to the edit of its `LENGTH` columns.
    """
    model, params = tiny("llama")
    found = []
    for prompt in PROMPTS:
        text, edit = list(prompt), edit_of(len(prompt))
        for _ in range(NEW):
            tokens = jnp.asarray([text + [0] * (LENGTH - len(text))], jnp.int32)
            logits = _logits(model, params, tokens, jnp.asarray(first(len(text))), edit)
            text.append(int(jnp.argmax(logits[0, len(text) - 1])))
        found.append(text[len(prompt) :])
    return found


def first(count: int) -> np.ndarray:
    """A mask of the first columns."""
    return np.arange(LENGTH)[None] < count


def generated(edit: Edit, **options: Any) -> list[list[int]]:
    model, params = tiny("llama")
    tokens, mask = pad_prompts(PROMPTS)
    return generate(model, params, tokens, mask, max_new_tokens=NEW, edit={SITE: edit}, **options).rows()


@pytest.fixture(params=["by block", "in one program"], autouse=True)
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "in one program":
        for module in (generation_state, steps):
            monkeypatch.setattr(module, "runs_by_block", lambda *trees: False)


def test_tokens_are_told_apart_by_their_kind() -> None:
    everywhere = generated(steer(DIRECTION))
    for where, expected in (
        ("prompt", whole_texts(lambda n: steer(DIRECTION, where=first(n)))),
        ("generated", whole_texts(lambda n: steer(DIRECTION, where=~first(n)))),
    ):
        found = generated(steer(DIRECTION, where=where))  # type: ignore[arg-type]
        assert found == expected != everywhere


def test_a_mask_is_one_of_the_prompts_columns() -> None:
    # The last token of the first prompt, and the second of the other, which is padded with three columns.
    where = np.zeros((2, 6), bool)
    where[0, 5] = where[1, 4] = True
    chosen = {6: first(6) & ~first(5), 3: first(2) & ~first(1)}
    for edit_at in (
        lambda where: steer(DIRECTION, where=where),
        lambda where: ablate(DIRECTION, where=where),
        lambda where: add(random_sae(24), [3], 40.0, where=where),
    ):
        assert generated(edit_at(where)) == whole_texts(lambda n, edit_at=edit_at: edit_at(chosen[n]))
    twice = generated(steer(DIRECTION, where=where), samples=2)
    assert twice[::2] == twice[1::2] == generated(steer(DIRECTION, where=where))


def test_a_patch_takes_the_place_of_the_prompt_alone() -> None:
    value = np.random.default_rng(0).normal(size=(2, 6, 24)).astype(np.float32)

    def of_text(count: int) -> Edit:
        row = value[[0]] if count == 6 else value[[1], 3:]
        padded = np.pad(row, ((0, 0), (0, LENGTH - count), (0, 0)))
        return patch(padded, where=first(count))

    assert generated(patch(value)) == whole_texts(of_text) != generated(lambda x: x)


def test_an_edit_asks_for_positions_and_mask() -> None:
    def even(x: jax.Array, positions: jax.Array, mask: jax.Array) -> jax.Array:
        chosen = (positions % 2 == 0) & mask
        return x + jnp.where(chosen[..., None], jnp.asarray(DIRECTION)[None, None], 0.0)

    every_other = whole_texts(lambda n: steer(DIRECTION, where=np.arange(LENGTH)[None] % 2 == 0))
    assert generated(even) == every_other != generated(steer(DIRECTION))


def test_masks_for_other_prompts_are_refused() -> None:
    with pytest.raises(SiteError, match=r"a mask of shape \[5, 6\] for tokens \[batch, length\] = \[2, "):
        generated(steer(DIRECTION, where=np.ones((5, 6), bool)))
    with pytest.raises(SiteError, match="expected a mask, 'prompt' or 'generated'"):
        steer(DIRECTION, where="new")  # type: ignore[arg-type]
    with pytest.raises(SiteError, match=r"where has shape \[6\]; expected a mask \[batch, length\]"):
        steer(DIRECTION, where=np.ones(6, bool))
    model, params = tiny("llama")
    with pytest.raises(SiteError, match=r"a mask of shape \[1, 4\] for tokens \[batch, length\] = \[1, 3\]"):
        edit = {SITE: steer(DIRECTION, where=np.ones((1, 4), bool))}
        model.apply(params, jnp.asarray([[1, 2, 3]], jnp.int32), edit=edit)
