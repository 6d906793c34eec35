"""`mergelab sae eval`: options of its other form, unknown metrics and foreign data are refused."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

from mergelab.cli.main import cli
from mergelab.errors import NonFiniteError, SAEError
from mergelab.sae import load_sae, save_sae
from mergelab.sae.evaluation import evaluate_sae
from mergelab.sae.sae import SAE, SAEConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SAE of a known model, and a store of another one's activations at its site."""
    path = tmp_path_factory.mktemp("eval")
    eye, zero = jnp.eye(4), jnp.zeros(4)
    metadata = {"site": "blocks.0.resid_post", "model_hash": "a" * 64}
    save_sae(SAE(eye, zero, eye, zero, SAEConfig("relu", metadata=metadata)).checked(), path / "sae")
    (path / "store").mkdir()
    rows = np.random.default_rng(0).normal(size=(96, 4)).astype(np.float32)
    save_file({"activations": rows}, path / "store" / "blocks.0.resid_post-00000.safetensors")
    save_file({"tokens": np.arange(96, dtype=np.int32)}, path / "store" / "tokens.safetensors")
    facts = {
        "format": "mergelab-activations-1", "model": "m", "model_sha256": "b" * 64, "context": 16,
        "sites": {"blocks.0.resid_post": 4}, "rows": 96, "dtype": "float32", "special_ids": [],
    }  # fmt: skip
    (path / "store" / "store.json").write_text(json.dumps(facts))
    return path


def _eval(folder: Path, *more: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli, ["sae", "eval", str(folder / "sae"), *map(str, more)])
    return result.exit_code, " ".join(result.output.split())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--data", "store", "--controls"], "--controls goes with --model, not with --data"),
        (["--data", "store", "--metrics", "downstream"], "--metrics goes with --model"),
        (["--data", "store", "--text", "a.txt"], "--text goes with --model"),
        (["--data", "store", "--labels", "a.csv"], "--labels goes with --model"),
        (["--model", "m", "--text", "a.txt", "--rows", "5"], "--rows goes with --data, not with --model"),
        (["--model", "m", "--text", "a.txt", "--target-data", "x"], "with --model it is --target-site"),
        (["--model", "m"], "give either --data, or both --model and --text (or --labels)"),
        (["--model", "m", "--text", "a.txt", "--metrics", "downstrem"], "did you mean 'downstream'"),
    ],
    ids=["controls", "metrics", "text", "labels", "rows", "target", "neither", "unknown"],
)
def test_what_would_be_passed_over_is_refused(folder: Path, given: list[str], words: str) -> None:
    code, said = _eval(folder, *given)
    assert code == 2 and words in said, said


def test_stored_activations_of_another_model_are_refused(folder: Path) -> None:
    code, said = _eval(folder, "--data", folder / "store")
    assert code == 2 and "belongs to a model with SHA-256 aaaaaaaaaaaa..., but the data is of one" in said
    code, said = _eval(folder, "--data", folder / "store", "--any-model", "--json")
    assert code == 0 and json.loads(said)["rows"] == 90


def test_rows_and_names_that_say_nothing_are_refused(folder: Path) -> None:
    sae, rows = load_sae(folder / "sae"), np.ones((8, 4), np.float32)
    rows[3, 1] = np.nan
    with pytest.raises(NonFiniteError, match="row 3 of the activations"):
        evaluate_sae(sae, rows)
    with pytest.raises(SAEError, match="at least one row"):
        evaluate_sae(sae, rows[:0])
    with pytest.raises(SAEError, match="'metrics' was given with activations"):
        evaluate_sae(sae, rows, metrics=["downstream"])
