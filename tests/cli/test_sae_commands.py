"""`mergelab sae`: train, eval and export from the command line; the configurations that are shipped."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from mergelab.cli.main import cli
from mergelab.quickstart.presets import PRESETS
from mergelab.sae.formats import load_sae
from mergelab.sae.training.config import load_config


def _invoke(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sae")
    rng = np.random.default_rng(0)
    features = rng.standard_normal((32, 16))
    x = (rng.random((4000, 32)) * (rng.random((4000, 32)) < 0.08)) @ features
    np.save(folder / "acts.npy", x.astype(np.float32))
    config = folder / "sae.yaml"
    config.write_text(
        "sae: {variant: topk, d_in: 16, n_latents: 64, k: 4}\n"
        f"data: {{kind: files, path: {folder}/acts.npy}}\n"
        "train: {batch_size: 128, tokens: 25600, seed: 0}\n"
    )
    code, said = _invoke("sae", "train", config, "--out", folder / "run", "--set", "train.lr=3e-3", "--json")
    assert code == 0
    assert json.loads(said.splitlines()[-1])["steps"] == 200
    return folder


def test_eval_reports_figures(run: Path) -> None:
    code, said = _invoke("sae", "eval", run / "run", "--data", run / "acts.npy", "--json")
    figures = json.loads(said)
    assert code == 0 and 0 < figures["nmse"] < 0.6 and 0 < figures["l0"] <= 4
    code, said = _invoke("sae", "eval", run / "run", "--data", run / "acts.npy", "--rows", 500)
    assert code == 0 and "relative bias" in said


@pytest.mark.parametrize("format", ["saelens", "sparsify", "dictionary_learning"])
def test_export_keeps_the_function(run: Path, tmp_path: Path, format: str) -> None:
    code, _ = _invoke("sae", "export", run / "run", "--format", format, "--out", tmp_path / "out")
    x = np.load(run / "acts.npy")[:50]
    mine, theirs = load_sae(run / "run" / "final"), load_sae(tmp_path / "out")
    assert code == 0
    np.testing.assert_allclose(theirs(x), mine(x), atol=1e-4)


def test_metadata_is_put_in_once(run: Path, tmp_path: Path) -> None:
    facts = [
        "--metadata",
        "site=blocks.8.resid_post",
        "--metadata",
        "context=128",
        "--metadata",
        "model=gpt2=x",
    ]
    code, _ = _invoke("sae", "export", run / "run", "--format", "mergelab", "--out", tmp_path / "a", *facts)
    found = load_sae(tmp_path / "a").config
    assert code == 0 and found.reads == ("blocks.8.resid_post",) == found.writes
    assert (found.metadata["context"], found.metadata["model"]) == (128, "gpt2=x")
    assert found.metadata["settings"]  # what was known stays
    code, _ = _invoke("sae", "export", tmp_path / "a", "--format", "saelens", "--out", tmp_path / "b")
    said = json.loads((tmp_path / "b" / "cfg.json").read_text())["metadata"]
    assert code == 0 and (said["hook_name"], said["model_name"], said["context_size"]) == (
        "blocks.8.hook_resid_post", "gpt2=x", 128,
    )  # fmt: skip
    for format, wrong, words in (
        ("mergelab", ["--metadata", "site"], "not KEY=VALUE"),
        ("mergelab", ["--metadata", "a=1", "--metadata", "a=2"], "twice"),
        ("mergelab", ["--metadata", "site=3"], "expected a site"),
        ("mergelab", ["--metadata", "site=x", "--site", "y"], "--site is 'y', but"),
        ("sparsify", ["--metadata", "model=gpt2"], "no place for"),
    ):
        out = tmp_path / "c"
        code, said = _invoke("sae", "export", run / "run", "--format", format, "--out", out, *wrong)
        assert code == 2 and words in " ".join(said.split()) and not out.exists(), said


def test_faults_are_one_line_and_status_2(run: Path, tmp_path: Path) -> None:
    code, said = _invoke("sae", "export", run / "run", "--format", "openai", "--out", tmp_path / "x.pt")
    assert code == 2 and said.startswith("error: the format 'openai'") and said.count("\n") == 1
    code, said = _invoke("sae", "train", run / "sae.yaml", "--out", tmp_path / "y", "--set", "train.steps=3")
    assert code == 2 and "train.steps is not a known key" in said
    np.save(tmp_path / "narrow.npy", np.ones((5, 3), np.float32))
    code, said = _invoke("sae", "eval", run / "run", "--data", tmp_path / "narrow.npy")
    assert code == 2 and "3 wide" in said


def test_shipped_configurations_are_valid(repository: Path) -> None:
    files = sorted((repository / "configs" / "sae").glob("*.yaml"))
    assert len(files) >= 4
    for file in files:
        config = load_config(file)
        assert config.train.build().steps > 0
        config.sae.build(config.sae.d_in or 128, None)


def test_the_quickstarts_configuration_is_what_the_quickstart_does(repository: Path) -> None:
    config = load_config(repository / "configs" / "sae" / "quickstart.yaml")
    settings = PRESETS["default"].autoencoder
    shown = (config.data.site, config.sae.n_latents, (config.sae.model_extra or {})["k"], config.train.tokens)
    assert shown == (settings.site, settings.n_latents, settings.k, settings.tokens)
    assert (config.train.batch_size, config.data.context) == (settings.batch_size, settings.context)
    assert str(config.data.text).endswith("/sae.txt") and str(config.data.model).endswith("/models/base")
