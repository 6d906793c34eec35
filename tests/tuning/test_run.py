"""Runs that write a folder: killed and resumed they are undisturbed, and the command says what was done."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from mergelab.checkpoints import open_checkpoint, with_lora
from mergelab.cli.main import cli
from mergelab.errors import OutputError, TuningError
from mergelab.models.load import load_model
from mergelab.processes import Terminated
from mergelab.tuning import LoraSettings, TunedFolder, TuningSettings, finetune_folder
from tests.tuning import small

SETTINGS = TuningSettings(context=small.LENGTH, batch=4, tokens=12 * 4 * small.LENGTH, learning_rate=0.02)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("finetune")
    small.write(place / "base")
    (place / "text.txt").write_text(small.text(400))
    return place


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run(place: Path, out: Path, **options: Any) -> TunedFolder:
    return finetune_folder(place / "base", place / "text.txt", out, SETTINGS, save_every=4, **options)


def at(step: int, act: Callable[[], None]) -> Callable[[int, int, Mapping[str, float]], None]:
    def progress(done: int, total: int, figures: Mapping[str, float]) -> None:
        if done == step:
            act()

    return progress


def test_a_run_that_was_killed_and_terminated_is_undisturbed(place: Path, tmp_path: Path) -> None:
    told: list[str] = []
    whole = run(place, place / "whole", tell=told.append)
    assert [line["step"] for line in whole.facts["history"]["steps"]] == [*range(1, 13)]
    assert whole.facts["held_out_loss"]["after"] < whole.facts["held_out_loss"]["before"]
    assert "12 steps of 4 contexts of 12 tokens" in told[0] and told[1].startswith("memory on a device: ")

    def fall() -> None:
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        run(place, tmp_path / "cut", progress=at(6, fall))
    with pytest.raises(Terminated):
        run(
            place, tmp_path / "cut", resume=True, progress=at(9, lambda: os.kill(os.getpid(), signal.SIGTERM))
        )
    assert not (tmp_path / "cut").exists()
    with pytest.raises(OutputError, match="had other settings"):
        changed = replace(SETTINGS, seed=5)
        finetune_folder(place / "base", place / "text.txt", tmp_path / "cut", changed, resume=True)
    told.clear()
    run(place, tmp_path / "cut", resume=True, tell=told.append)
    assert "the run goes on from step 10" in told or "the run goes on from step 9" in told
    assert contents(tmp_path / "cut") == contents(place / "whole")
    assert [path.name for path in tmp_path.iterdir() if "cut" in path.name and path.name != ".cut.lock"] == [
        "cut"
    ]
    assert run(place, tmp_path / "cut", resume=True).finished_before
    with pytest.raises(OutputError, match="not empty"):
        run(place, tmp_path / "cut")


def test_the_command_writes_a_model_that_is_read_and_an_adapter(place: Path, tmp_path: Path) -> None:
    given = [
        "finetune",
        str(place / "base"),
        "--text",
        str(place / "text.txt"),
        "--context",
        "12",
        "--batch",
        "4",
    ]
    options = ["--tokens", "576", "--lr", "0.02", "--held-out", str(place / "text.txt")]
    out = ["--out", str(tmp_path / "adapter"), "--lora", "2", "--target", "q_proj", "--dtype", "bfloat16"]
    result = CliRunner().invoke(cli, [*given, *options, *out, "--json"])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["modules"] == ["model.layers.0.self_attn.q_proj"] and said["steps"] == 12
    assert said["settings"]["lora"] == {"rank": 2, "alpha": None, "targets": ["q_proj"]}
    merged = load_model(with_lora(open_checkpoint(place / "base"), tmp_path / "adapter"))[1]
    start = load_model(place / "base")[1]
    moved = [
        not np.array_equal(merged["blocks_0"]["attn"][n]["kernel"], start["blocks_0"]["attn"][n]["kernel"])
        for n in "qk"
    ]
    assert moved == [True, False]
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "LoRA factors of rank 2 (alpha 4) of 1 modules" in card and "nats a token before" in card


def test_faults_are_told_before_the_models_are_read(place: Path, tmp_path: Path) -> None:
    with pytest.raises(TuningError, match="no teacher"):
        finetune_folder(place / "base", place / "text.txt", tmp_path / "a", replace(SETTINGS, kl=1.0))
    given = ["finetune", str(place / "base"), "--text", str(place / "text.txt"), "--out", str(tmp_path / "b")]
    alone = CliRunner().invoke(cli, [*given, "--alpha", "3"])
    assert alone.exit_code == 2 and "give their rank with --lora" in alone.stderr
    missing = CliRunner().invoke(
        cli, ["finetune", str(place / "base"), "--text", "no.txt", "--out", str(tmp_path / "b")]
    )
    assert missing.exit_code == 2 and "no.txt" in missing.stderr
    assert list(tmp_path.iterdir()) == []
    assert LoraSettings(8).scale == 2
