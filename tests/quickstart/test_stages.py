"""A stage runs once for a key; what was interrupted or changed runs again; foreign folders are left alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergelab.errors import OutputError
from mergelab.quickstart.experiment import RECORD, Stages, stage_key


class Work:
    """Writes its product and counts how often."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, path: Path) -> int:
        self.runs += 1
        path.mkdir()
        (path / "weights").write_text(str(self.runs))
        return self.runs


def test_a_stage_runs_once_for_a_key(tmp_path: Path) -> None:
    work = Work()
    assert Stages(tmp_path / "out").run("train", "a", work, "models/base") == 1
    again = Stages(tmp_path / "out")
    assert again.run("train", "a", work, "models/base") == 1
    assert again.seconds.keys() == {"train"}
    assert again.run("train", "b", work, "models/base") == 2
    assert (tmp_path / "out" / "models" / "base" / "weights").read_text() == "2"


def test_a_missing_product_or_force_runs_it_again(tmp_path: Path) -> None:
    work = Work()
    Stages(tmp_path).run("train", "a", work, "base")
    (tmp_path / "base" / "weights").unlink()
    (tmp_path / "base").rmdir()
    Stages(tmp_path).run("train", "a", work, "base")
    assert work.runs == 2
    Stages(tmp_path, force=True).run("train", "a", work, "base")
    assert work.runs == 3


def test_a_stage_that_failed_is_not_on_record(tmp_path: Path) -> None:
    work = Work()
    Stages(tmp_path).run("train", "a", work, "base")

    def fail(path: Path) -> None:
        assert not path.exists()
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        Stages(tmp_path).run("train", "b", fail, "base")
    assert Stages(tmp_path).run("train", "b", work, "base") == 2


def test_keys_tell_every_part_and_the_version_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {stage_key("a", 1), stage_key("a", 2), stage_key("b", 1), stage_key("a1")}
    monkeypatch.setattr("mergelab.quickstart.experiment.__version__", "another")
    assert len(keys | {stage_key("a", 1)}) == 5


def test_a_folder_of_someone_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(OutputError, match=rf"was not written by the quickstart \(it has no {RECORD}\)"):
        Stages(tmp_path)
    with pytest.raises(OutputError, match="was not written"):
        Stages(tmp_path / "thesis.txt")
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_a_torn_record_starts_over(tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text('{"train": {"ke')
    assert Stages(tmp_path).run("train", "a", Work(), "base") == 1
