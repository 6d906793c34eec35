"""A merge that is killed with SIGKILL and resumed writes the bytes of one that was not."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

from mergelab.cli.main import cli
from mergelab.merging import merge

TENSORS, SHAPE = 10, (640, 1024)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TIES recipe over three checkpoints of 26 MB, stored in two shards' worth of tensors."""
    folder = tmp_path_factory.mktemp("models")
    rng = np.random.default_rng(0)
    base = {f"model.layers.{i}.mlp.weight": rng.standard_normal(SHAPE, np.float32) for i in range(TENSORS)}
    for model in ("base", "one", "two"):
        shift = 0.0 if model == "base" else 0.1
        tensors = {k: v + shift * rng.standard_normal(SHAPE, np.float32) for k, v in base.items()}
        (folder / model).mkdir()
        save_file({k: v.astype(np.float32) for k, v in tensors.items()}, folder / model / "model.safetensors")
        config = {"model_type": "llama", "num_hidden_layers": TENSORS}
        (folder / model / "config.json").write_text(json.dumps(config))
    path = folder / "ties.yaml"
    path.write_text(
        "merge_method: ties\nbase_model: base\nmodels:\n"
        "- model: one\n  parameters: {weight: 1.0, density: 0.5}\n"
        "- model: two\n  parameters: {weight: 0.5, density: 0.3}\n"
    )
    return path


def command(recipe: Path, out: Path, *options: str) -> list[str]:
    program = [sys.executable, "-m", "mergelab", "merge", str(recipe), "--out", str(out)]
    return [*program, "--shard-size", "20MB", "--threads", "1", *options]


def weights(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*.safetensors*"))}


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(recipe: Path, tmp_path: Path) -> None:
    subprocess.run(command(recipe, tmp_path / "whole"), check=True, capture_output=True)
    expected = weights(tmp_path / "whole")
    assert len(expected) == 3  # two shards and their index

    out = tmp_path / "killed"
    journal = tmp_path / ".killed.journal"
    kills = 0
    for wanted in (2, 5, 8):  # receipts to wait for before each kill
        options = ("--resume",) if kills else ()
        run = subprocess.Popen(
            command(recipe, out, *options), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while run.poll() is None and _lines(journal) < wanted:
            time.sleep(0.002)
        if run.poll() is None:
            os.kill(run.pid, signal.SIGKILL)
            kills += 1
        run.wait()
        if out.exists():
            break
        assert not out.exists(), "nothing may stand under the final name before the merge is complete"
    assert kills, "the run ended before it could be killed: the test proves nothing"
    finished = subprocess.run(
        [*command(recipe, out, "--resume"), "--json"], check=True, capture_output=True, text=True
    )
    assert weights(out) == expected
    assert finished.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["killed", "whole"], "no leftovers"


def test_resume_refuses_another_recipe(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def interrupt(written: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(recipe, out, threads=1, progress=interrupt)
    assert _lines(tmp_path / ".out.journal") > 0
    other = recipe.with_name("other.yaml")
    other.write_text(recipe.read_text().replace("density: 0.5", "density: 0.6"))
    refused = CliRunner().invoke(cli, command(other, out, "--resume")[3:])
    assert refused.exit_code == 2
    assert "resume" in refused.stderr and "recipe" in refused.stderr
    assert not out.exists()


def _lines(journal: Path) -> int:
    try:
        return journal.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0
