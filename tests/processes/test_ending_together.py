"""Real runs of several processes: they start, fail, are killed and stopped as one, and go on."""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from mergelab.sae.training import train
from mergelab.sae.training.checkpoints import Checkpoints
from tests.several_processes import PATIENCE, REPOSITORY, Several, options, slurm, variables

pytestmark = pytest.mark.slow

AT_ONCE = 10.0
SLACK = 50.0  # what a busy machine may add
SAE = "final/sae.safetensors"
CONFIG: dict[str, Any] = {
    "sae": {"variant": "topk", "n_latents": 64, "k": 4},
    "data": {"kind": "toy", "toy": {"d_in": 16, "n_features": 32, "l0": 2.0}, "buffer_rows": 4096},
    "train": {"batch_size": 64, "tokens": 64 * 600, "lr": 3e-3, "dead_after_tokens": 256},
    "checkpoint": {"every": 100, "log_every": 10},
}


def command(folder: Path, *more: str, count: int = 2, out: str = "run") -> list[str]:
    (folder / "sae.yaml").write_text(yaml.safe_dump({**CONFIG, "mesh": {"data": count}}))
    return ["sae", "train", "sae.yaml", "--out", out, *more]


def step(folder: Path, out: str = "run") -> int:
    """The last step that a run has logged."""
    try:
        return json.loads((folder / out / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    except (OSError, IndexError, ValueError):
        return 0


def undisturbed(folder: Path, count: int) -> bytes:
    with Several(folder, lambda _: command(folder, count=count, out="whole"), count) as run:
        ended = run.end()
    assert [process.status for process in ended] == [0] * count, run.said()
    return (folder / "whole" / SAE).read_bytes()


@pytest.mark.parametrize("place", [options, variables, slurm])
def test_a_run_starts_from_the_command_line(tmp_path: Path, place: Any) -> None:
    words = command(tmp_path, "--set", "train.tokens=6400", "--json")
    with Several(tmp_path, lambda _: words, place=place) as run:
        ended = run.end()
    assert [process.status for process in ended] == [0, 0], run.said()
    assert json.loads(ended[0].out)["steps"] == 100  # and nothing else on standard output
    assert (ended[1].out, ended[1].err) == ("", "")


def test_a_second_training_of_one_folder_is_refused(tmp_path: Path) -> None:
    words = command(tmp_path, "--resume")
    with Several(tmp_path, lambda _: words) as run:
        run.wait_until(lambda: step(tmp_path) > 0)
        before = {path.name for path in (tmp_path / "run").iterdir()}
        alone = [sys.executable, "-m", "mergelab", *words, "--set", "mesh=null"]
        env = {"PATH": "", "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu", "SLURM_NTASKS": "2"}
        second = subprocess.run(
            alone, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=PATIENCE
        )
        assert second.returncode == 2
        warning, error = second.stderr.splitlines()
        assert warning.startswith("warning: Slurm has allotted 2 tasks") and "srun" in warning
        assert "another run is writing this output" in error
        assert {path.name for path in (tmp_path / "run").iterdir()} >= before


def data(folder: Path, *, bad: bool) -> None:
    folder.mkdir()
    rows = np.random.default_rng(0).normal(size=(8192, 16)).astype(np.float32)
    if bad:
        rows[::7, 3] = np.nan
    save_file({"activations": rows}, folder / "rows.safetensors")


def one_sided(kind: str, folder: Path) -> tuple[Any, Any]:
    """The command line and the preparation of processes of which number 1 fails, and only there."""
    words = command(folder)
    if kind == "missing":
        data(folder / "data-0", bad=False)
        return lambda n: [*words, "--set", "data.kind=files", "--set", f"data.path=data-{n}"], None
    if kind == "nan":
        data(folder / "data-0", bad=False)
        data(folder / "data-1", bad=True)
        return lambda n: [*words, "--set", "data.kind=files", "--set", f"data.path=data-{n}"], None
    if kind == "unshared":
        return lambda n: [*words, "--out", f"run-{n}"], None

    def small_files(number: int) -> None:
        if number == 1:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    # Its half of the latents does not fit into a file of that size.
    halves = [*words, "--set", "sae.n_latents=2048", "--set", "mesh={latents: 2}"]
    return lambda _: halves, small_files


@pytest.mark.parametrize("kind", ["missing", "nan", "unshared", "full"])
def test_what_fails_in_one_process_ends_all_with_the_cause(tmp_path: Path, kind: str) -> None:
    arguments, prepare = one_sided(kind, tmp_path)
    with Several(tmp_path, arguments, prepare=prepare) as run:
        until = time.monotonic() + PATIENCE
        while all(process.poll() is None for process in run._all):
            assert time.monotonic() < until, run.said()
            time.sleep(0.05)
        ended = run.end(AT_ONCE + SLACK)  # of the first's end
    assert [process.status for process in ended] == [2, 2], run.said()
    assert "in process 1 of 2" in ended[0].err or "process 1 of 2 (" in ended[0].err
    for process in ended:
        assert "Traceback" not in process.err and "F1" not in process.err
        assert [line.split(":")[0] for line in process.err.splitlines()][-1] == "error"


@pytest.mark.parametrize(("count", "victim"), [(2, 0), (2, 1), (4, 0), (4, 2)])
def test_a_killed_process_ends_all_and_the_run_goes_on_to_the_same_bytes(
    tmp_path: Path, count: int, victim: int
) -> None:
    expected = undisturbed(tmp_path, count)
    at = random.Random(count * 10 + victim).randrange(110, 480)
    with Several(tmp_path, lambda _: command(tmp_path, count=count), count) as run:
        run.wait_until(lambda: step(tmp_path) >= at)
        run.signal(signal.SIGKILL, victim)
        ended = run.end(AT_ONCE + SLACK)
    for number, process in enumerate(ended):
        if number != victim:
            assert process.status == 2, run.said()
            last = process.err.splitlines()[-1]
            assert f"process {victim} of {count}" in last and "vanished" in last and "--resume" in last
    with Several(tmp_path, lambda _: command(tmp_path, "--resume", count=count), count) as run:
        assert [process.status for process in run.end()] == [0] * count, run.said()
    assert (tmp_path / "run" / SAE).read_bytes() == expected


@pytest.mark.parametrize("told", [(0,), (1,), (0, 1)])
def test_sigterm_keeps_a_step_that_all_agree_on(tmp_path: Path, told: Sequence[int]) -> None:
    expected = undisturbed(tmp_path, 2)
    words = command(tmp_path, "--resume", "--grace", "240s")
    with Several(tmp_path, lambda _: words) as run:
        run.wait_until(lambda: step(tmp_path) >= 120)
        run.signal(signal.SIGTERM, *told)
        ended = run.end(PATIENCE)
    assert [process.status for process in ended] == [143, 143], run.said()
    assert all(process.err.splitlines()[-1] == "interrupted" for process in ended)
    kept = max(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept > 120 and kept % 100
    with Several(tmp_path, lambda _: words) as run:  # requeued, by the same command
        assert [process.status for process in run.end()] == [0, 0], run.said()
    assert (tmp_path / "run" / SAE).read_bytes() == expected


def test_processes_that_never_come_are_named(tmp_path: Path) -> None:
    words = command(tmp_path, "--join-timeout", "5s")
    with Several(tmp_path, lambda _: words, 1, place=lambda port, _, n: options(port, 3, n)) as run:
        (ended,) = run.end()
    assert ended.status == 2 and not (tmp_path / "run").exists()
    assert ended.err.startswith("error: processes 1 to 2 of 3 did not join the run within 5 s")


DAMAGES = {
    "a file is missing": lambda path: path.unlink(),
    "a file is empty": lambda path: path.write_bytes(b""),
    "a file is cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "a bit is turned": lambda path: path.write_bytes(
        bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]
    ),
}


def test_every_damage_to_the_newest_checkpoint_passes_it_over_with_one_warning(tmp_path: Path) -> None:
    short = {
        **CONFIG,
        "train": {**CONFIG["train"], "tokens": 64 * 45},
        "checkpoint": {"every": 10, "keep": 3},
    }

    class Stop(Exception):
        pass

    def stop(done: int, *_: Any) -> None:
        if done >= 40:
            raise Stop

    short["checkpoint"]["log_every"] = 5
    whole = train(short, tmp_path / "whole").path / "sae.safetensors"
    with pytest.raises(Stop):
        train(short, tmp_path / "stopped", progress=stop)
    steps = sorted(int(path.name) for path in (tmp_path / "stopped" / "checkpoints").glob("[0-9]*"))
    newest = tmp_path / "stopped" / "checkpoints" / str(steps[-1])
    files = sorted(path.relative_to(newest) for path in newest.rglob("*") if path.is_file())
    assert len(files) > 4
    again = tmp_path / "again"
    for file, damage in ((file, damage) for file in files for damage in DAMAGES):
        shutil.copytree(tmp_path / "stopped" / "checkpoints", again)
        target = again / str(steps[-1]) / file
        if target.stat().st_size or damage == "a file is missing":
            DAMAGES[damage](target)
            found = Checkpoints(again, 3).find()
            assert (found.step, len(found.passed_over)) == (steps[-2], 1), (damage, file)
        shutil.rmtree(again)
    largest = max((newest / file for file in files), key=lambda path: path.stat().st_size)
    DAMAGES["a file is cut"](largest)
    said: list[str] = []
    finished = train(short, tmp_path / "stopped", resume=True, notice=said.append)
    assert len(said) == 1 and f"goes on from step {steps[-2]}" in said[0]
    assert (finished.path / "sae.safetensors").read_bytes() == whole.read_bytes()
