"""What a model says of itself, and to those who come with the names of other libraries."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest

from mergelab.errors import TokenError
from mergelab.models.families import model_from_config
from mergelab.models.token_checks import check_token_array
from tests.models.tiny_models import CONFIGS


def test_a_model_shows_as_one_line() -> None:
    shown = repr(model_from_config(CONFIGS["mixtral"]))
    assert shown == "Model('mixtral', n_layers=2, d_model=24, vocab_size=61, parameters=29,736)"


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("run_with_cache", r"model\.apply\(params, tokens, capture="),
        ("run_with_hooks", r"model\.apply\(params, tokens, edit="),
        ("to_tokens", r"load_tokenizer\(path\)\.encode"),
        ("generate", r"mergelab\.generate\(model, params"),
        ("from_pretrained", r"mergelab\.load_model\(path\)"),
        ("cfg", r"model\.config"),
        ("W_E", r"params\['embed'\]\['embedding'\]"),
        ("W_Q", r"\['attn'\]\['q'\]\['kernel'\]"),
    ],
)
def test_names_of_other_libraries_lead_to_ours(name: str, instead: str) -> None:
    model: Any = model_from_config(CONFIGS["llama"])
    with pytest.raises(AttributeError, match=f"has no attribute '{name}': .*{instead}"):
        getattr(model, name)


def test_other_names_are_plain_attribute_errors_and_models_are_copied_and_compared() -> None:
    model: Any = model_from_config(CONFIGS["llama"])
    with pytest.raises(AttributeError, match=r"object has no attribute 'nonsense'$"):
        model.nonsense  # noqa: B018
    assert not hasattr(model, "run_with_cache")
    assert copy.deepcopy(model.config) == model.config == pickle.loads(pickle.dumps(model.config))
    again = model_from_config(CONFIGS["llama"])
    assert again == model and hash(again) == hash(model) and model != model_from_config(CONFIGS["qwen2"])


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ("The cat", "found the text 'The cat'.*encode it first"),
        (["The cat"], r"found the text \['The cat'\]"),
        ([1, 2, 3], r"found a list, .*write jnp\.array\(\[ids\]\)"),
        (np.arange(3), r"found an array of shape \[3\]"),
    ],
)
def test_tokens_that_are_no_batch_of_ids_are_refused_in_a_sentence(tokens: Any, message: str) -> None:
    with pytest.raises(TokenError, match=message):
        check_token_array(tokens)
    check_token_array(np.zeros((2, 3), np.int32))
