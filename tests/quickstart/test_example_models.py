"""Examples run on the models asked for, or on the nearest that are at hand; which, they say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mergelab.errors import CheckpointError
from mergelab.quickstart import example_models as face
from mergelab.quickstart.experiment import run

MODULE = sys.modules["mergelab.quickstart.example_models"]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is said; nothing is downloaded or trained."""

    def no_hub(name: str) -> Path:
        raise OSError("offline\nand more")

    monkeypatch.setattr(MODULE, "_from_hub", no_hub)
    monkeypatch.setattr(MODULE, "run", lambda folder, settings: None)
    monkeypatch.setattr(MODULE, "_PACKAGE", "no_such_package")
    return []


def test_folders_that_exist_are_taken(tmp_path: Path, said: list[str]) -> None:
    assert face(str(tmp_path), say=said.append) == (tmp_path,)
    assert said == [f"models: {tmp_path}"]


def test_the_hub_is_asked_for_all_or_none(monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    monkeypatch.setattr(MODULE, "_from_hub", lambda name: Path("cache") / name)
    assert face("org/a", "org/b", say=said.append) == (Path("cache/org/a"), Path("cache/org/b"))
    assert said == ["models of the hub: org/a, org/b"]


def test_without_a_hub_the_quickstart_has_some(said: list[str]) -> None:
    found = face("org/a", "org/b", folder="there", otherwise=("base", "code"), say=said.append)
    assert found == (Path("there/models/base"), Path("there/models/code"))
    assert said == ["models of the quickstart: base, code, since the hub did not give it (offline)"]


def test_the_package_comes_before_the_quickstart_if_its_file_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    package = tmp_path / "a_package_with_a_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('nothing of it is imported')")
    (package / "Model.gguf").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(MODULE, "_PACKAGE", package.name)
    opened: list[Path] = []
    monkeypatch.setattr(MODULE, "open_checkpoint", opened.append)
    assert face("org/a", say=said.append) == (package / "Model.gguf",) == tuple(opened)
    assert face("org/a", "org/b", otherwise=("base", "code"), say=said.append)[1].name == "code"

    def unread(path: Path) -> None:
        raise CheckpointError("not a format of this version")

    monkeypatch.setattr(MODULE, "open_checkpoint", unread)
    assert face("org/a", say=said.append)[0].name == "base"


def test_the_quickstart_that_is_meant_is_the_one_that_there_is() -> None:
    assert MODULE.run is run
