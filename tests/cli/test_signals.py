"""Whole commands under signals, and on disks that are full or refuse: one word or sentence, and they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from mergelab.models.families import model_from_config
from mergelab.models.table import stored_shapes
from mergelab.quickstart.family import tokenizer_files, train_bpe

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 300_000,
}
GENERATE = "generate a --token-ids 1,2,3 --max-new-tokens 200000 --greedy"
ORBAX = "convert a out --to orbax --overwrite"
COMMANDS = [
    GENERATE,
    ORBAX,
    "convert a out --overwrite",
    "merge r.yaml --out out --overwrite",
    "soup a b --out out --overwrite",
    "soup a b --method greedy --text text.txt --out out --overwrite",
    "activations a --site blocks.1.resid_post --text text.txt --out out",
    "statistics a --text text.txt --kind fisher --out out",
    "extract-lora a --base b --rank 2 --out out --overwrite",
    "sae train sae.yaml --out out",
    "quickstart --preset tiny --out out",
    "inspect a",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models `a` and `b` with a tokenizer, texts, a recipe, and the configuration of a long training."""
    folder = tmp_path_factory.mktemp("signals")
    text = "some words to read, some words to write. " * 100
    (folder / "text.txt").write_text(text)
    files = tokenizer_files(train_bpe([text], 270), 512)
    shapes = stored_shapes(model_from_config(CONFIG).table())
    for seed, name in enumerate("ab"):
        (folder / name).mkdir()
        draws = np.random.default_rng(seed)
        weights = {key: draws.standard_normal(shape, np.float32) for key, shape in shapes.items()}
        save_file(weights, folder / name / "model.safetensors")
        for file, content in {**files, "config.json": json.dumps(CONFIG).encode()}.items():
            (folder / name / file).write_bytes(content)
    models = "".join(f"- {{model: {name}, parameters: {{weight: 0.5}}}}\n" for name in "ab")
    (folder / "r.yaml").write_text(f"merge_method: linear\ndtype: float32\nmodels:\n{models}")
    np.save(folder / "x.npy", np.random.default_rng(0).standard_normal((512, 16), np.float32))
    (folder / "sae.yaml").write_text(
        "sae: {variant: topk, n_latents: 32, k: 4}\ndata: {kind: files, path: x.npy}\n"
        "train: {batch_size: 64, tokens: 6400000, seed: 0}\n"
    )
    return folder


def start(command: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "mergelab", *command.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )


def hears(process: subprocess.Popen[str]) -> bool:
    """Whether the process has a handler for SIGTERM: the interpreter has started and the guard is set up."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return True
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1]
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1) or process.poll() is not None


def interrupted(command: str, folder: Path, seconds: float, signals: Sequence[int]) -> tuple[int, str, float]:
    """Status, what was said, and how long the end took; the status is 0 if the command was done before."""
    with start(command, folder) as process:
        try:
            while not hears(process):
                time.sleep(0.005)
            time.sleep(seconds)
            began = time.perf_counter()
            for each in signals:
                process.send_signal(each)
                time.sleep(0.1)
            _, err = process.communicate(timeout=30)
        finally:
            process.kill()
    return process.returncode, err, time.perf_counter() - began


@pytest.mark.skipif(sys.platform != "linux", reason="reads the process table of Linux")
@pytest.mark.parametrize(
    ("command", "seconds", "number"),
    [
        (GENERATE, 0.0, signal.SIGINT),
        pytest.param(GENERATE, 4.0, signal.SIGINT, marks=pytest.mark.slow),
        (GENERATE, 2.0, signal.SIGTERM),
        pytest.param(ORBAX, 2.0, signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_a_command(command: str, seconds: float, number: signal.Signals, folder: Path) -> None:
    status, err, took = interrupted(command, folder, seconds, [number, number, number])
    if command != ORBAX or status:  # which is short
        assert (status, err.strip()) == (128 + number, "interrupted")
    assert took < 4


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the process table of Linux")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_signal_at_any_moment_ends_every_command(
    command: str, number: signal.Signals, folder: Path
) -> None:
    seen = set()
    for seconds in (0.05, 0.5, 1, 1.5, 2, 3, 4, 6, 9, 13):
        status, err, took = interrupted(command, folder, seconds, [number, number, number])
        assert "Traceback" not in err and "Error" not in err, err
        assert status in (0, 128 + number), err
        assert status == 0 or err.endswith("interrupted\n")
        # A training finishes a checkpoint first.
        assert took < (20 if command.startswith("sae train") else 4)
        seen.add(status)
        if not status:
            break
    assert 128 + number in seen


def limited(command: str, folder: Path, limit: str) -> subprocess.CompletedProcess[str]:
    """Runs a command under a limit of the shell, such as `-f 8` (kilobytes in a file)."""
    line = f"ulimit {limit} && exec {sys.executable} -m mergelab {command}"
    return subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, cwd=folder, timeout=100,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip


def test_orbax_on_a_full_disk_is_one_sentence_and_an_end(folder: Path) -> None:
    run = limited("convert a full --to orbax", folder, "-f 8")
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1), run.stderr
    assert "the file is larger than the disk or a limit allows" in run.stderr
    assert not (folder / "full").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="a read-only place of Linux")
@pytest.mark.parametrize("command", [c for c in COMMANDS if " out" in c])
def test_a_place_that_refuses_is_one_sentence_and_an_end(command: str, folder: Path) -> None:
    run = limited(command.replace(" out", " /sys/out"), folder, "-n 1024")
    assert (run.returncode, run.stdout) == (2, ""), run.stderr
    assert "Traceback" not in run.stderr
    assert run.stderr.splitlines()[-1].startswith("error: /sys/")
