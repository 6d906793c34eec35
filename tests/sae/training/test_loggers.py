"""Metrics in TensorBoard's event files and in Weights & Biases' runs."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mergelab.errors import DependencyError
from mergelab.sae.training import train
from mergelab.sae.training.tracking import open_loggers, read_metrics
from tests.sae.training.test_run import CONFIG


def events(folder: Path) -> list[tuple[int, str, float]]:
    """Step, tag and value of every scalar in the event files of a folder."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])  # then a checksum of 4 bytes, the event, one more
            event = Event.FromString(data[12 : 12 + length])
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            data = data[16 + length :]
    return found


def test_tensorboard_gets_what_the_file_gets(tmp_path: Path) -> None:
    train({**CONFIG, "log_to": ["tensorboard"]}, tmp_path / "run", overrides=["train.tokens=1280"])
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    shown = {(step, tag): value for step, tag, value in events(tmp_path / "run" / "tensorboard")}
    assert len(lines) == 4
    for line in lines:
        for name, value in line.items():
            if name != "step":
                assert shown.pop((line["step"], f"train/{name}")) == pytest.approx(value, rel=1e-6)
    assert not shown


class FakeRun:
    """Stands for a run of Weights & Biases, which needs an account."""

    id = "abc123"

    def __init__(self) -> None:
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.finished = False

    def log(self, values: dict[str, float], step: int) -> None:
        self.lines.append((step, values))

    def finish(self) -> None:
        self.finished = True


def test_wandb_gets_configuration_and_lines_and_resumes_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []
    run = FakeRun()

    def init(**options: Any) -> FakeRun:
        calls.append(options)
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for step in (0, 7):
        (logger,) = open_loggers(["wandb"], tmp_path, {"sae": {"k": 4}}, step)
        logger.write({"step": step + 1, "loss": 0.5})
        logger.close()
    assert [call["config"] for call in calls] == [{"sae": {"k": 4}}] * 2
    assert [(call["id"], call["resume"]) for call in calls] == [(None, None), ("abc123", "allow")]
    assert run.lines == [(1, {"train/loss": 0.5}), (8, {"train/loss": 0.5})] and run.finished


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DependencyError, match=rf"{module} is not installed; install mergelab\[{name}\]"):
        open_loggers([name], tmp_path, {}, 0)
