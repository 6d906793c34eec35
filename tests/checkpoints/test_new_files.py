"""New files: locked, refused where one is, published together, made again after a kill in the middle."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mergelab.checkpoints.new_files import NewFiles
from mergelab.checkpoints.output_target import OutputLock
from mergelab.errors import OutputError


def _two(path: Path) -> None:
    path.write_text("2")


class Killed(BaseException):
    """Stands for a kill: no clean-up runs that catches errors."""


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_files_appear_together_and_nothing_is_left_beside(tmp_path: Path) -> None:
    with NewFiles([tmp_path / "a", tmp_path / "deep" / "b"]) as files:
        assert not (tmp_path / "a").exists()
        files.publish({tmp_path / "a": b"1", tmp_path / "deep" / "b": _two})
    assert (tmp_path / "a").read_bytes() == b"1" and (tmp_path / "deep" / "b").read_bytes() == b"2"
    assert _names(tmp_path) == ["a", "deep"] and _names(tmp_path / "deep") == ["b"]


def test_a_file_that_is_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "b").write_text("mine")
    with pytest.raises(OutputError, match="b is there already"), NewFiles([tmp_path / "a", tmp_path / "b"]):
        pass
    assert _names(tmp_path) == ["b"] and (tmp_path / "b").read_text() == "mine"


@pytest.mark.parametrize("renamed", [1, 2])
@pytest.mark.parametrize("same", [True, False])
def test_a_killed_publication_is_made_again_by_the_same_work_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renamed: int, same: bool
) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    replace, done = os.replace, 0

    def dying(source: Path, target: Path) -> None:
        nonlocal done
        replace(source, target)
        done += 1
        if done == renamed:
            raise Killed

    monkeypatch.setattr(os, "replace", dying)
    # A killed process removes no lock file.
    monkeypatch.setattr(OutputLock, "release", lambda lock, **_: os.close(lock._file))
    with pytest.raises(Killed), NewFiles(paths, identity="x") as files:
        files.publish({paths[0]: b"1", paths[1]: b"2"})
    monkeypatch.undo()
    again = NewFiles(paths, identity="x" if same else "y")
    if not same:
        with pytest.raises(OutputError, match="is there already"), again:
            pass
        assert (tmp_path / "a").read_bytes() == b"1"
        return
    with again as files:
        files.publish({paths[0]: b"1", paths[1]: b"2"})
    assert _names(tmp_path) == ["a", "b"] and (tmp_path / "b").read_bytes() == b"2"


def test_a_second_run_and_odd_targets_are_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "model").mkdir()
    with NewFiles([tmp_path / "a"]):
        with pytest.raises(OutputError, match="another run is writing"), NewFiles([tmp_path / "a"]):
            pass
        assert _names(tmp_path) == [".a.lock", "link", "model"]
    for path, words in {
        tmp_path / "link": "a link to nowhere, which does not exist",
        tmp_path / "model": "is a folder; choose a file",
        Path("/"): "root of the file system",
        tmp_path / "text": "is an input of this command",
    }.items():
        with pytest.raises(OutputError, match=words), NewFiles([path], inputs=[tmp_path / "text"]):
            pass
    with pytest.raises(OutputError, match="asked for twice"), NewFiles([tmp_path / "a", tmp_path / "a"]):
        pass
    assert _names(tmp_path) == ["link", "model"]


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    def full(path: Path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="a: the disk is full"), NewFiles([tmp_path / "a"]) as files:
        files.publish({tmp_path / "a": full})
    assert _names(tmp_path) == []
