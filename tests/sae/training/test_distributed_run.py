"""Two real processes train one SAE: the one that a single process trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from mergelab.sae.training import train
from mergelab.sae.training.tracking import read_metrics
from tests.sae.training.distributed_worker import CONFIG, MESHES
from tests.two_processes import run_two

pytestmark = pytest.mark.slow  # `tests/models/test_distributed.py` starts two processes in the light suite


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder that two processes worked in, and what each of them reported."""
    folder = tmp_path_factory.mktemp("distributed")
    return folder, run_two("tests.sae.training.distributed_worker", folder)


@pytest.mark.parametrize("name", MESHES)
def test_two_processes_train_what_one_trains(run: tuple[Path, list[Any]], tmp_path: Path, name: str) -> None:
    folder, reports = run
    train(CONFIG, tmp_path / "alone")
    expected = load_file(tmp_path / "alone" / "final" / "sae.safetensors")
    found = load_file(folder / name / "final" / "sae.safetensors")
    assert found.keys() == expected.keys()
    for tensor, value in expected.items():
        # Reductions run in another order: float tolerance after 24 steps of Adam.
        np.testing.assert_allclose(found[tensor], value, rtol=0, atol=2e-5)
    assert reports[0][name] == reports[1][name]
    alone = read_metrics(tmp_path / "alone" / "metrics.jsonl")[-1]
    for metric, value in reports[0][name].items():
        assert value == pytest.approx(alone[metric], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", MESHES)
def test_each_process_writes_and_reads_what_its_devices_hold(run: tuple[Path, list[Any]], name: str) -> None:
    _, reports = run
    part = 64 // MESHES[name]["latents"]
    for report in reports:
        assert report[f"{name}, read again"] == {
            "same": True,
            "held": {"W_enc": [16, part], "b_enc": [part], "W_dec": [part, 16], "b_dec": [16]},
        }


def test_a_stopped_run_ends_in_the_same_bytes(run: tuple[Path, list[Any]]) -> None:
    folder, reports = run
    assert all(report["stopped"] for report in reports)
    whole = folder / "each process its tokens" / "final" / "sae.safetensors"
    assert (folder / "resumed" / "final" / "sae.safetensors").read_bytes() == whole.read_bytes()


def test_both_processes_pass_over_what_one_finds_damaged(run: tuple[Path, list[Any]]) -> None:
    folder, reports = run
    assert [len(report["said"]) for report in reports] == [1, 0]
    assert "20 has a damaged manifest" in reports[0]["said"][0]
    assert "goes on from step 10" in reports[0]["said"][0]
    assert [(report["resumed"], report["again"]) for report in reports] == [(False, True)] * 2
    assert not [path for path in folder.rglob(".*") if path.name.startswith(".")]


def test_sigterm_to_one_process_keeps_one_step_of_both(run: tuple[Path, list[Any]]) -> None:
    folder, reports = run
    step = reports[0]["terminated"]
    assert step == reports[1]["terminated"] and step > 8 and step not in (10, 20)
    assert not (folder / "terminated" / "final").exists()


def test_faults_are_said_in_every_process(run: tuple[Path, list[Any]]) -> None:
    _, reports = run
    for report in reports:
        assert "2 processes train together: say how, with a mesh" in report["no mesh"]
        assert "a finished run is there" in report["occupied"]
