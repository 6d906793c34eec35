"""Examples run on the models asked for, or on the nearest that are at hand; which, they say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import mergelab.checkpoints.hub as hub
from mergelab.errors import CheckpointError
from mergelab.quickstart import example_models as face
from mergelab.quickstart.experiment import run

MODULE = sys.modules["mergelab.quickstart.models_at_hand"]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is said; nothing is downloaded or trained."""

    def no_hub(place: object, need: object = None) -> Path:
        raise CheckpointError("offline")

    monkeypatch.setattr(hub, "fetch_from_hub", no_hub)
    monkeypatch.setattr(MODULE, "run", lambda folder, settings: None)
    monkeypatch.setattr(MODULE, "_PACKAGE", "no-such-package")
    return []


def test_folders_that_exist_are_taken(tmp_path: Path, said: list[str]) -> None:
    assert face(str(tmp_path), say=said.append) == (tmp_path,)
    assert said == [f"models: {tmp_path}"]


def test_the_hub_is_asked_for_all_or_none(monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    monkeypatch.setattr(hub, "fetch_from_hub", lambda place, need: Path("cache") / place.repo)
    assert face("org/a", "org/b", say=said.append) == (Path("cache/org/a"), Path("cache/org/b"))
    assert said == ["models: org/a, org/b"]


def test_without_a_hub_the_quickstart_has_some(said: list[str]) -> None:
    found = face("org/a", "org/b", folder="there", otherwise=("base", "code"), say=said.append)
    assert found == (Path("there/models/base"), Path("there/models/code"))
    assert (
        said[0].startswith("models of the quickstart: base, code (org/a does not exist")
        and "offline" in said[0]
    )


def test_the_package_comes_before_the_quickstart_if_its_file_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    records = tmp_path / "a_model-1.dist-info"
    records.mkdir()
    (records / "METADATA").write_text("Metadata-Version: 2.1\nName: a-model\nVersion: 1\n")
    (records / "RECORD").write_text("a_model/__init__.py,,\na_model/Model.gguf,,\n")
    file = tmp_path / "a_model" / "Model.gguf"
    file.parent.mkdir()
    file.touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(MODULE, "_PACKAGE", "a-model")
    opened: list[Path] = []
    monkeypatch.setattr(MODULE, "open_checkpoint", opened.append)
    assert face("org/a", say=said.append) == (file,) == tuple(opened)
    assert face("org/a", "org/b", otherwise=("base", "code"), say=said.append)[1].name == "code"

    def unread(path: Path) -> None:
        raise CheckpointError("not a format of this version")

    monkeypatch.setattr(MODULE, "open_checkpoint", unread)
    assert face("org/a", say=said.append)[0].name == "base"


def test_the_quickstart_that_is_meant_is_the_one_that_there_is() -> None:
    assert MODULE.run is run
