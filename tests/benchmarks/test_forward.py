"""The forward benchmark compares like with like: one model, the same tokens, ratios against stated aims."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.forward import MODELS, build_model, render
from benchmarks.forward_worker import mergelab_program, transformers_program

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TOKENS = np.random.default_rng(0).integers(0, 256, (2, 16)).astype(np.int32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("forward") / "model"
    assert build_model(out, SHAPE) == 2 * 300 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 48 + 2 * 32) + 32
    return out


@pytest.mark.slow
def test_mergelab_answers_both_questions(folder: Path) -> None:
    program = mergelab_program(str(folder), "float32")
    assert program.prefill(TOKENS).shape == (2, 300)
    first = program.prefill(TOKENS).argmax(axis=1)
    assert np.array_equal(program.decode(TOKENS, 4)[:, 0], first)


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")  # transformers' own
def test_transformers_answers_the_same(folder: Path) -> None:
    ours, theirs = (make(str(folder), "float32") for make in (mergelab_program, transformers_program))
    np.testing.assert_allclose(ours.prefill(TOKENS), theirs.prefill(TOKENS), rtol=0, atol=1e-4)
    assert np.array_equal(ours.decode(TOKENS, 8), theirs.decode(TOKENS, 8))


def results(prefill: float, same: bool) -> dict[str, Any]:
    median = {
        "mergelab": {"prefill": prefill, "decode": 300.0},
        "transformers": {"prefill": 1000.0, "decode": 100.0},
    }
    return {
        "machine": {"cores": "2"},
        "load": 0.5,
        "repeats": 3,
        "pass": {"batch": 4, "length": 256, "new": 64, "dtype": "float32"},
        "models": {"tiny": {"parameters": 2_200_000, "median": median, "same_tokens": same}},
    }


def test_the_table_marks_what_misses_its_aim() -> None:
    text = render(results(prefill=1500.0, same=True))
    assert "| tiny (2.2M) | prefill | 1,500 | 1,000 | 1.50 | 1.2 | yes |" in text
    assert "| tiny (2.2M) | decode | 300 | 100 | 3.00 | 3 | yes |" in text
    worse = render(results(prefill=900.0, same=False))
    assert "| 900 | 1,000 | **0.90** | 1.2 | **no** |" in worse
    assert "Load average of the machine at the start: 0.5" in worse


def test_the_models_have_the_stated_sizes() -> None:
    sizes = {}
    for name, shape in MODELS.items():
        width, neurons = shape["hidden_size"], shape["intermediate_size"]
        block = 4 * width**2 + 3 * width * neurons + 2 * width
        sizes[name] = 2 * shape["vocab_size"] * width + shape["num_hidden_layers"] * block + width
    assert sizes == {"tiny": 2_164_416, "100M": 100_449_920}
