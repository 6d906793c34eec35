"""The experiment on a sentence encoder runs on a tiny BERT, and its tables say what was found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.minilm_features import main
from benchmarks.minilm_tables import render
from mergelab.quickstart.corpus import sources_folder
from tests.sae.evaluation.tiny_encoder import write_encoder


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("minilm")


@pytest.fixture(scope="module")
def results(work: Path) -> dict[str, Any]:
    model = write_encoder(work / "model", (sources_folder() / "textwrap.py").read_text())
    return main(
        ["--work", str(work), "--model", str(model), "--quick", "--seeds", "1", "--controls", "random"]
    )


@pytest.mark.slow
def test_every_sae_is_judged_and_features_are_shown(work: Path, results: dict[str, Any]) -> None:
    runs = results["runs"]
    assert list(runs) == ["mergelab/0", "random/0"]
    nmse = {key: run["scores"]["reconstruction.nmse"] for key, run in runs.items()}
    assert nmse["mergelab/0"] < 0.9 * nmse["random/0"]
    assert all(0 < run["scores"]["embeddings.cosine"] <= 1 for run in runs.values())
    assert 1 <= len(results["features"]) <= 2 and results["explained"] <= 6
    assert (work / "features.html").stat().st_size > 10_000
    text = render(results)
    assert text.count("\n| ") >= 15 and "| score | mergelab | random |" in text
    for feature in results["features"]:
        assert f"| {feature['latent']} | " in text and f"{feature['recall']:.2f} |" in text


@pytest.mark.slow
def test_a_second_run_knows_the_results(work: Path, results: dict[str, Any]) -> None:
    said = json.loads((work / "minilm_features.json").read_text())
    said["runs"]["random/0"]["scores"]["reconstruction.nmse"] = 7.0
    (work / "minilm_features.json").write_text(json.dumps(said))
    again = main(
        [
            "--work",
            str(work),
            "--model",
            str(work / "model"),
            "--quick",
            "--seeds",
            "1",
            "--controls",
            "random",
        ]
    )
    assert again == said and again != results
    with pytest.raises(SystemExit):
        main(["--work", str(work), "--quick", "--publish"])


def test_means_spread_and_marks() -> None:
    run = {"seconds": {"reconstruction": 1.0}, "train_seconds": 9.0}
    runs = {
        f"mergelab/{seed}": {**run, "scores": {"reconstruction.nmse": nmse}}
        for seed, nmse in enumerate((0.1, 0.3))
    }
    feature = {
        "latent": 5, "density": 0.01, "tokens": [" a|b", " `"], "example": [" to", " be", " or"],
        "pattern": ["", " be", ""], "precision": None, "recall": 0.25,
    }  # fmt: skip
    size = {"n_latents": 9, "k": 2, "site": "blocks.0.resid_post", "tokens": 99, "judged": 8, "context": 4}
    text = render({"runs": runs, "features": [feature], "explained": 3, "size": size, "machine": {}})
    assert "| NMSE | 0.200 ± 0.141 |" in text
    assert "| 5 | 1.00% | `a¦b` `ˋ` | `to` **`be`** `or` | **`be`** | none | 0.25 |" in text
