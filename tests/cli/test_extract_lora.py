"""`mergelab extract-lora` writes an adapter and says how much of the change it misses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from click.testing import CliRunner

from mergelab.cli.main import cli


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """The command for two models of two matrices each, without its size options."""
    draw = np.random.default_rng(0)
    base = {f"layers.0.{n}.weight": draw.standard_normal((12, 10)).astype(np.float32) for n in ("q", "up")}
    tuned = {name: weight + draw.standard_normal((12, 10), np.float32) for name, weight in base.items()}
    for name, tensors in (("base", base), ("tuned", tuned)):
        (tmp_path / name).mkdir()
        safetensors.numpy.save_file(tensors, tmp_path / name / "model.safetensors")
    paths = [str(tmp_path / "tuned"), "--base", str(tmp_path / "base"), "--out", str(tmp_path / "out")]
    return ["extract-lora", *paths]


def test_the_text_names_ranks_and_the_worst_modules(arguments: list[str]) -> None:
    result = CliRunner().invoke(cli, [*arguments, "--rank", "4"])
    assert result.exit_code == 0, result.output
    first, _, *worst = result.stdout.splitlines()
    assert "2 modules of rank 4, 0 stored whole" in first
    assert {line.split()[1] for line in worst} == {"layers.0.q", "layers.0.up"}


def test_json_has_rank_and_error_of_every_module(arguments: list[str], tmp_path: Path) -> None:
    report = json.loads(CliRunner().invoke(cli, [*arguments, "--energy", ".5", "--json"]).stdout)
    assert set(report["modules"]) == {"layers.0.q", "layers.0.up"}
    assert all(0 < m["relative_error"] ** 2 <= 0.5001 for m in report["modules"].values())
    assert report["bytes"] == (tmp_path / "out" / "adapter_model.safetensors").stat().st_size


def test_the_part_left_out_is_a_warning(arguments: list[str]) -> None:
    result = CliRunner().invoke(cli, [*arguments, "--rank", "2", "--target", "*.q"])
    assert result.exit_code == 0, result.output
    assert result.stderr == "warning: 1 changed modules were left out: layers.0.up\n"


def test_an_adapter_for_vllm_says_what_is_lost_and_how_to_serve_it(
    arguments: list[str], tmp_path: Path
) -> None:
    for name, value in (("base", 0), ("tuned", 1)):
        path = tmp_path / name / "model.safetensors"
        norm = {"norm.weight": np.full(10, value, np.float32)}
        safetensors.numpy.save_file(safetensors.numpy.load_file(path) | norm, path)
    result = CliRunner().invoke(cli, [*arguments, "--rank", "9", "--for", "vllm"])
    assert result.exit_code == 0, result.output
    assert "--enable-lora --max-lora-rank 16" in result.stdout.splitlines()[-1]
    assert (
        "1 changed modules were left out, since vLLM takes factors of linear layers alone: " in result.stderr
    )
    assert "norm (" in result.stderr and "%)" in result.stderr
    report = json.loads(
        CliRunner().invoke(cli, [*arguments, "--rank", "9", "--for", "vllm", "--overwrite", "--json"]).stdout
    )
    assert report["skipped"] == ["norm"] and 0 < report["lost"]["norm"] < 0.1


@pytest.mark.parametrize(
    ("extra", "message"), [([], "--rank or --energy"), (["--rank", "0"], "0 is not in the range")]
)
def test_sizes_that_make_no_sense_are_usage_errors(
    extra: list[str], message: str, arguments: list[str]
) -> None:
    result = CliRunner().invoke(cli, [*arguments, *extra])
    assert result.exit_code == 2
    assert message in result.stderr
