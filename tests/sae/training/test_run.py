"""Training runs: a small config trains, a killed run ends in the same bytes, faults are said plainly."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from mergelab.errors import OutputError, SAEError
from mergelab.sae.formats import load_sae
from mergelab.sae.training import train
from mergelab.sae.training.config import load_config
from mergelab.sae.training.tracking import read_metrics

CONFIG: dict[str, Any] = {
    "sae": {"variant": "topk", "n_latents": 64, "k": 4},
    "data": {"kind": "toy", "toy": {"d_in": 16, "n_features": 32, "l0": 2.0}, "buffer_rows": 4096},
    "train": {"batch_size": 64, "tokens": 64 * 60, "lr": 3e-3},
    "checkpoint": {"every": 10, "log_every": 5},
}


def _with(**sections: Any) -> dict[str, Any]:
    return {**CONFIG, **{name: {**CONFIG.get(name, {}), **keys} for name, keys in sections.items()}}


def _weights(run: Path) -> bytes:
    return (run / "final" / "sae.safetensors").read_bytes()


def test_a_small_config_trains_from_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    features = rng.standard_normal((32, 16))
    x = (rng.random((6000, 32)) * (rng.random((6000, 32)) < 0.08)) @ features
    np.save(tmp_path / "a.npy", x[:4000].astype(np.float32))
    np.save(tmp_path / "b.npy", x[4000:].astype(np.float32))
    config = _with(data={"kind": "files", "path": str(tmp_path / "*.npy"), "toy": {}})
    file = tmp_path / "sae.yaml"
    file.write_text(yaml.safe_dump(config))
    said: list[int] = []
    result = train(
        file,
        tmp_path / "run",
        overrides=["train.tokens=25600", "sae.k=5"],
        progress=lambda done, total, _: said.append(done),
    )
    assert (result.steps, said[-1], result.sae.config.k) == (400, 400, 5)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(5, 401, 5))
    assert lines[-1]["nmse"] < 0.5 * lines[0]["nmse"]
    found = load_sae(tmp_path / "run" / "final")
    made = np.asarray(found(x[:512].astype(np.float32)))
    error = ((made - x[:512]) ** 2).sum() / ((x[:512] - x[:512].mean(axis=0)) ** 2).sum()
    assert error < 1.5 * lines[-1]["nmse"]  # raw activations, averaged weights
    with pytest.raises(OutputError, match="finished run"):
        train(file, tmp_path / "run")


_KILLED = """
import sys
sys.path.insert(0, {root!r})
from tests.sae.training.test_run import CONFIG
from mergelab.sae.training import train
train({{**CONFIG, "mesh": {mesh}}}, {out!r}, resume=True, progress=lambda done, *_: print(done, flush=True))
"""


@pytest.mark.slow  # `test_resume.py` stops trainings within the process
@pytest.mark.parametrize("mesh", [None, {"data": 2, "latents": 4}])
def test_a_killed_run_ends_in_the_same_bytes(tmp_path: Path, repository: Path, mesh: Any) -> None:
    config = {**CONFIG, "mesh": mesh}
    train(config, tmp_path / "whole")
    program = _KILLED.format(root=str(repository), mesh=mesh, out=str(tmp_path / "killed"))
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if int(line) >= 25:
                break
        os.kill(run.pid, signal.SIGKILL)
    assert not (tmp_path / "killed" / "final").exists()
    with pytest.raises(OutputError, match="--resume"):
        train(config, tmp_path / "killed")
    train(config, tmp_path / "killed", resume=True)
    assert _weights(tmp_path / "killed") == _weights(tmp_path / "whole")
    steps = [line["step"] for line in read_metrics(tmp_path / "killed" / "metrics.jsonl")]
    assert steps == list(range(5, 61, 5))


def test_another_mesh_goes_on_to_tolerance(tmp_path: Path) -> None:
    whole = train(CONFIG, tmp_path / "whole").sae

    class Stop(Exception):
        pass

    def stop(done: int, *_: Any) -> None:
        if done >= 35:
            time.sleep(0.5)  # let the checkpoint of step 30 be complete
            raise Stop

    with pytest.raises(Stop):
        train(CONFIG, tmp_path / "run", progress=stop)
    moved = train({**CONFIG, "mesh": {"data": 2, "latents": 4}}, tmp_path / "run", resume=True).sae
    np.testing.assert_allclose(moved.W_dec, whole.W_dec, atol=2e-3)
    assert not np.array_equal(moved.W_dec, np.asarray(whole.W_dec)[::-1])


def test_a_training_that_diverges_stops_with_its_last_good_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(SAEError, match="diverged at step"):
        train(_with(train={"lr": 1e12, "unit_decoder": False}), tmp_path / "run")
    assert not (tmp_path / "run" / "final").exists()


def test_a_run_is_resumed_as_it_was_begun(tmp_path: Path) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(CONFIG, tmp_path / "run", progress=stop)
    with pytest.raises(SAEError, match=r"train\.seed: 0, not 1"):
        train(_with(train={"seed": 1}), tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.batchsize=3", r"train\.batchsize is not a known key \(did you mean 'batch_size'\?\)"),
        ("train.tokens=many", r"train\.tokens: .*found 'many'"),
        ("train.tokens=3", "less than one batch"),
        ("sae.kk=3", "did you mean 'k'"),
        ("sae.variant=topkk", "did you mean 'topk'"),
        ("sae.d_in=3", "the data is 16 wide"),
        ("data.toy.nfeatures=3", "did you mean 'n_features'"),
        ("data.kind=files", r"data\.path is missing"),
        ("sae", "expected section.key=value"),
        ("mesh={data: 16}", "mesh of"),
        ("mesh={tensor: 8}", "the axes here are data and latents"),
        ("tran.seed=1", "tran is not a known key.*'train'"),
    ],
)
def test_faults_are_said_before_anything_is_trained(tmp_path: Path, override: str, words: str) -> None:
    with pytest.raises((SAEError, ValueError), match=words):
        train(CONFIG, tmp_path / "run", overrides=[override])
    assert not (tmp_path / "run").exists()


def test_missing_sections_are_all_named() -> None:
    with pytest.raises(SAEError) as caught:
        load_config({"sae": {"k": 3}})
    said = str(caught.value)
    assert "sae.n_latents is missing" in said and "data is missing" in said and "train is missing" in said
