"""What a training leaves, whatever stops it, is what it goes on from: checked, its own, and never half."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from mergelab.checkpoints import state_checkpoints as checkpoints_module
from mergelab.checkpoints.output_target import OutputLock
from mergelab.errors import NonFiniteError, OutputError, SAEError
from mergelab.processes import Terminated
from mergelab.sae.training import train
from mergelab.sae.training.checkpoints import Checkpoints
from mergelab.sae.training.config import TrainingRecipe, load_config
from mergelab.sae.training.folder import RunFolder
from mergelab.sae.training.initialize import initialize
from mergelab.sae.training.tracking import MetricsFile, read_metrics
from mergelab.sae.variants import make_variant


def _config(data: Path) -> dict[str, Any]:
    return {
        "sae": {"variant": "topk", "n_latents": 32, "k": 4},
        "data": {"kind": "files", "path": str(data)},
        "train": {"batch_size": 64, "tokens": 64 * 40, "lr": 3e-3},
        "checkpoint": {"every": 10, "log_every": 5},
    }


class Stop(Exception):
    """Stands for what ends a run."""


def _stop_at(step: int) -> Callable[..., None]:
    def progress(done: int, *_: Any) -> None:
        if done >= step:
            raise Stop

    return progress


def _weights(run: Path) -> bytes:
    return (run / "final" / "sae.safetensors").read_bytes()


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a run that was never stopped, and one that was stopped after step 35."""
    path = tmp_path_factory.mktemp("runs")
    np.save(path / "x.npy", np.random.default_rng(0).standard_normal((512, 16)).astype(np.float32))
    train(_config(path / "x.npy"), path / "whole")
    with pytest.raises(Stop):
        train(_config(path / "x.npy"), path / "stopped", progress=_stop_at(35))
    return path


@pytest.fixture
def stopped(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder / "stopped", tmp_path / "run"))


def _cut(path: Path) -> None:
    for file in path.rglob("*"):
        if file.is_file():
            os.truncate(file, file.stat().st_size // 2)


def _flip(path: Path) -> None:
    file = max((path / "state").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else -1)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def _empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def _file_instead(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("30")


def _other_manifest(path: Path) -> None:
    (path / "manifest.json").write_text('{"format": "mergelab-manifest-1", "files": {"../x": {}}}')


SPOILS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "all files cut": (_cut, "damaged manifest"),
    "one bit flipped": (_flip, "other content in state/"),
    "no state": (lambda path: shutil.rmtree(path / "state"), "lacks state/"),
    "half a place": (lambda path: os.truncate(path / "place" / "metadata", 9), "9 of .* bytes of place"),
    "no place": (lambda path: shutil.rmtree(path / "place"), "lacks place/metadata"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "was not finished"),
    "half a manifest": (lambda path: os.truncate(path / "manifest.json", 40), "damaged manifest"),
    "another manifest": (_other_manifest, "damaged list"),
    "an empty folder": (_empty, "was not finished"),
    "a file": (_file_instead, "is not a folder"),
}


@pytest.mark.parametrize("name", SPOILS)
def test_a_damaged_checkpoint_is_passed_over(stopped: Path, name: str) -> None:
    spoil, words = SPOILS[name]
    whole = Checkpoints(stopped / "checkpoints", 2).find()
    assert (whole.step, whole.passed_over) == (30, ())
    spoil(stopped / "checkpoints" / "30")
    found = Checkpoints(stopped / "checkpoints", 2).find()
    assert found.step == 20
    assert len(found.passed_over) == 1 and re.search(words, found.passed_over[0])
    spoil(stopped / "checkpoints" / "20")
    assert Checkpoints(stopped / "checkpoints", 2).find().step is None


def test_a_run_goes_on_from_the_newest_whole_checkpoint(folder: Path, stopped: Path) -> None:
    _flip(stopped / "checkpoints" / "30")
    (stopped / "checkpoints" / ".40.partial").mkdir()
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write('{"step": 36, "lo')
    said: list[str] = []
    train(_config(folder / "x.npy"), stopped, resume=True, notice=said.append)
    assert len(said) == 1 and "\n" not in said[0]
    assert "checkpoints/30 has other content" in said[0] and "goes on from step 20" in said[0]
    assert _weights(stopped) == _weights(folder / "whole")
    assert [line["step"] for line in read_metrics(stopped / "metrics.jsonl")] == list(range(5, 41, 5))
    assert sorted(path.name for path in (stopped / "checkpoints").iterdir()) == ["20", "30"]
    assert not [path for path in stopped.rglob(".*")]


def test_a_run_without_a_whole_checkpoint_begins_anew_and_says_so(folder: Path, stopped: Path) -> None:
    for step in ("20", "30"):
        _cut(stopped / "checkpoints" / step)
    said: list[str] = []
    train(_config(folder / "x.npy"), stopped, resume=True, notice=said.append)
    assert len(said) == 1 and "the run begins anew" in said[0]
    assert _weights(stopped) == _weights(folder / "whole")


def test_a_finished_run_is_not_trained_again(folder: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(folder / "whole", tmp_path / "run"))
    before = _tree(run)
    result = train(_config(folder / "x.npy"), run, resume=True, progress=_stop_at(0))
    assert result.resumed and result.steps == 40 and result.metrics["step"] == 40
    assert result.metrics == read_metrics(run / "metrics.jsonl")[-1]
    assert _tree(run) == before
    with pytest.raises(SAEError, match=r"train\.seed: 0, not 1"):
        train(_config(folder / "x.npy"), run, resume=True, overrides=["train.seed=1"])
    # A result that is not what was written is made again.
    os.truncate(run / "final" / "sae.safetensors", 999)
    said: list[str] = []
    assert not train(_config(folder / "x.npy"), run, resume=True, notice=said.append).resumed
    assert len(said) == 1 and "has 999 of" in said[0]
    assert _tree(run / "final") == _tree(folder / "whole" / "final")


def test_a_run_is_not_resumed_on_other_data(folder: Path, stopped: Path, tmp_path: Path) -> None:
    data = tmp_path / "x.npy"
    rows = np.load(folder / "x.npy")
    np.save(data, rows)
    config = _config(data)
    kept = yaml.safe_load((stopped / "config.yaml").read_text())
    kept["data"]["path"] = str(data)
    (stopped / "config.yaml").write_text(yaml.safe_dump(kept))
    inputs = json.loads((stopped / "inputs.json").read_text())["files"]
    (stopped / "inputs.json").write_text(json.dumps({"files": {str(data): next(iter(inputs.values()))}}))
    rows[300, 7] += 1e-3
    np.save(data, rows)
    with pytest.raises(SAEError, match=r"x\.npy has other content since the run began"):
        train(config, stopped, resume=True)
    np.save(data, rows[:-1])
    with pytest.raises(SAEError, match=r"x\.npy has other content since the run began"):
        train(config, stopped, resume=True)
    (stopped / "inputs.json").write_text("{")
    with pytest.raises(OutputError, match=r"inputs\.json: cannot be read"):
        train(config, stopped, resume=True)


def test_nothing_is_claimed_until_the_data_has_been_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = np.load(folder / "x.npy")
    rows[400, 3] = np.nan
    np.save(tmp_path / "x.npy", rows)
    config = _config(tmp_path / "x.npy")
    with pytest.raises(NonFiniteError, match="row 400"):
        train(config, tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["x.npy"]
    # The same where the bad row is met on the way: there was no checkpoint yet that would be lost.
    monkeypatch.setattr("mergelab.sae.training.trainer.read_once", lambda *_: None)
    monkeypatch.setattr("mergelab.sae.training.start.SAMPLE_ROWS", 64)
    with pytest.raises(NonFiniteError, match="row 400"):
        train({**config, "data": {**config["data"], "buffer_rows": 1}}, tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["x.npy"]


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_with_what_a_first_moment_leaves_is_begun_in(
    folder: Path, tmp_path: Path, resume: bool
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / ".config.yaml.partial").write_text("sae: {va")
    (run / "inputs.json").write_text("{")
    settings = load_config(_config(folder / "x.npy"))
    with RunFolder(run, settings, resume=resume, notice=pytest.fail) as held:
        assert held.finished() is None and not held.begun
        held.check_inputs()
        held.claim()
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["batch_size"] == 64
    assert not (run / ".config.yaml.partial").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="is not empty and holds no run"):
        train(_config(folder / "x.npy"), tmp_path / "other", resume=resume)
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["notes.txt"]


def test_a_second_run_is_refused_and_touches_nothing(folder: Path, stopped: Path) -> None:
    before = _tree(stopped)
    with (
        OutputLock(stopped),
        pytest.raises(OutputError, match="another run is writing this output"),
    ):
        train(_config(folder / "x.npy"), stopped, resume=True)
    assert _tree(stopped) == before


def test_odd_outputs_are_refused_before_any_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "file").write_text("mine")
    config = _config(folder / "x.npy")
    monkeypatch.chdir(tmp_path)
    for out, words in {
        "dangling": "is a link to nowhere, which does not exist",
        "file": "is a file; choose a folder",
        "/": "the root of the file system",
        "n" * 255: "the name has 255 bytes",
        ".": "is the working directory",
        str(folder): "contains the input",
    }.items():
        with pytest.raises(OutputError, match=words):
            train(config, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file"]


def test_sigterm_keeps_the_step_it_came_in(folder: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def progress(done: int, *_: Any) -> None:
        if done == 15:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Terminated):
        train(_config(folder / "x.npy"), tmp_path / "run", progress=progress)
    assert signal.getsignal(signal.SIGTERM) == before
    found = Checkpoints(tmp_path / "run" / "checkpoints", 2).find()
    # A logged step is told of when the next one is under way.
    assert found.step is not None and found.step % 10 and found.step >= 15
    assert not (tmp_path / "run" / "final").exists()
    train(_config(folder / "x.npy"), tmp_path / "run", resume=True)
    assert _weights(tmp_path / "run") == _weights(folder / "whole")


def test_a_full_disk_at_a_checkpoint_names_the_last_whole_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = checkpoints_module._write_state

    def full(work: Path, *arguments: Any, **options: Any) -> None:
        if work.name == ".30.partial":
            raise ValueError("OUT_OF_RANGE: Failed to write 9 bytes [os_error_code='28']")
        write(work, *arguments, **options)

    monkeypatch.setattr(checkpoints_module, "_write_state", full)
    words = (
        r"checkpoints/30: cannot be written \(No space left on device\).*whole checkpoint is .*/20:.*--resume"
    )
    with pytest.raises(OutputError, match=words):
        train(_config(folder / "x.npy"), tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["10", "20"]
    monkeypatch.undo()
    train(_config(folder / "x.npy"), tmp_path / "run", resume=True)
    assert _weights(tmp_path / "run") == _weights(folder / "whole")


_LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
from mergelab.cli.main import cli
cli(sys.argv[2:], prog_name="mergelab")
"""


@pytest.mark.slow
def test_the_command_says_a_full_disk_in_one_sentence_and_ends(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "sae.yaml").write_text(yaml.safe_dump(_config(folder / "x.npy")))
    arguments = ["sae", "train", str(tmp_path / "sae.yaml"), "--out", str(tmp_path / "run"), "--json"]
    run = subprocess.run(
        [sys.executable, "-c", _LIMITED, "3000", *arguments], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 2, run.stderr
    assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1, run.stderr
    assert "File too large" in run.stderr and "--resume" in run.stderr
    said: list[str] = []
    train(_config(folder / "x.npy"), tmp_path / "run", resume=True, notice=said.append)
    assert _weights(tmp_path / "run") == _weights(folder / "whole")


def test_metrics_are_never_half_rewritten(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n[3]\n\xff{"step"')
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    file = MetricsFile(path, 1)
    file.write({"step": 2, "loss": 0.5})
    file.sync()
    file.close()
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 0.5}]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_without_a_listener_a_notice_is_a_warning(folder: Path, stopped: Path) -> None:
    _cut(stopped / "checkpoints" / "30")
    with pytest.raises(UserWarning, match="passed over, the run goes on from step 20"):
        train(_config(folder / "x.npy"), stopped, resume=True)  # warnings are errors here


def test_counters_of_tokens_become_counters_of_steps(tmp_path: Path) -> None:
    variant = make_variant("topk", d_in=8, n_latents=16, k=2)
    sample = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)
    first = initialize(variant, TrainingRecipe(steps=9, batch_size=32), jax.random.key(0), sample)
    state = replace(first, steps_since_fired=jnp.arange(16, dtype=jnp.int32) * 32)
    with Checkpoints(tmp_path, 2) as checkpoints:
        checkpoints.save(3, state, {"row": 96})
        checkpoints.wait()
        same, place = checkpoints.restore(3, first, 32)
        np.testing.assert_array_equal(same.steps_since_fired, state.steps_since_fired)
        # Checkpoints of before did not say what they count.
        (tmp_path / "3" / "place" / "metadata").write_text(json.dumps(place))
        found, again = checkpoints.restore(3, first, 32)
    assert place == again == {"row": 96}
    np.testing.assert_array_equal(found.steps_since_fired, np.arange(16))
    np.testing.assert_array_equal(found.params["encoder"], state.params["encoder"])
