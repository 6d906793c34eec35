"""Statistics of models whose weights stay in their files, beside those of the loaded ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import mergelab as ml
from mergelab.activations.kept import EVERY_TOKEN, TokenRule
from mergelab.activations.statistics import fisher, gram, write_statistics
from tests.models.tiny_models import MASK, TOKENS, write

RULE = TokenRule(1, False, 1.3)


def near(found: Any, expected: Any) -> None:
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=0, atol=2e-6 * np.abs(other).max()),
        jax.tree.map(np.asarray, found),
        jax.tree.map(np.asarray, expected),
    )


@pytest.mark.parametrize("rule", [EVERY_TOKEN, RULE], ids=["every token", "without long rows"])
def test_gram_matrices_are_those_in_memory(rule: TokenRule, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", "llama")
    expected, found = (
        gram(model, params, TOKENS, mask=MASK, batch=2, rule=rule)
        for model, params in (ml.load_model(folder), ml.stream(folder, spill=tmp_path))
    )
    near(found.tree, expected.tree)
    assert found.tokens == expected.tokens


# Not gemma2: its pass in memory differs from itself by 5e-6 (tests/models/test_streamed_families.py).
@pytest.mark.parametrize("name", ["llama", "llama, one key head, tied, biases", "gpt2"])
def test_fishers_are_those_in_memory(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", name)
    # Half of the batch is a filling row.
    expected, found = (
        fisher(model, params, TOKENS, mask=MASK, batch=2)
        for model, params in (ml.load_model(folder), ml.stream(folder, spill=tmp_path))
    )
    near(found.tree, expected.tree)
    # Control: another text has another one.
    other = fisher(*ml.stream(folder), TOKENS[::-1].copy(), mask=MASK, batch=2)
    with pytest.raises(AssertionError):
        near(other.tree, expected.tree)


@pytest.mark.parametrize("kind", ["gram", "fisher"])
def test_folders_hold_the_same_tensors(kind: Literal["gram", "fisher"], tmp_path: Path) -> None:
    folder = write(tmp_path / "model", "phi3")  # whose tensors are fused
    read = []
    for out, opened in (("memory", ml.load_model(folder)), ("streamed", ml.stream(folder))):
        steps: list[tuple[int, int]] = []
        write_statistics(
            *opened,
            TOKENS,
            tmp_path / out,
            kind=kind,
            batch=3,
            progress=lambda done, total, into=steps: into.append((done, total)),
        )
        assert steps[-1][0] == steps[-1][1]
        files = sorted((tmp_path / out).glob("*.safetensors"))
        read.append({name: array for file in files for name, array in load_file(file).items()})
    assert read[0].keys() == read[1].keys()
    near(read[1], read[0])
