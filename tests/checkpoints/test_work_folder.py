"""Outputs: what may be written or replaced, one writer at a time, and one step from the old to the new."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mergelab.checkpoints.output_target import MARKER, OutputLock, check_target, recorded_identity
from mergelab.checkpoints.publish import WorkFolder, publish_file
from mergelab.errors import OutputError


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model and a link to it, a recipe, a text, a dangling link; the working directory is `here/below`."""
    (tmp_path / "models" / "a").mkdir(parents=True)
    (tmp_path / "models" / "a" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "link").symlink_to(tmp_path / "models" / "a")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "r.yaml").write_text("x")
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    return tmp_path


@pytest.mark.parametrize(
    ("out", "sentence"),
    [
        ("models/a", "is an input"),
        ("models", "contains the input"),
        ("models/a/merged", "lies inside the input"),
        ("recipes/r.yaml", "is a file"),
        ("recipes", "contains the input"),
        ("link", "is a link to"),
        ("dangling", "is a link to .*nowhere, which does not exist"),
        ("dangling/out", "writing failed|cannot be written"),
        ("file.txt", "is a file"),
        ("file.txt/out", "writing failed|cannot be written"),
        ("here/below", "is the working directory"),
        ("here", "contains the working directory"),
        ("/", "is the root"),
        ("x" * 250, "has 250 bytes"),
        ("new/" + "é" * 130, "has 260 bytes"),
        ("y" * 300, "has 300 bytes"),
    ],
)
@pytest.mark.parametrize("through_link", [False, True])
def test_an_output_that_would_cost_the_user_something_is_refused(
    out: str, sentence: str, through_link: bool, places: Path
) -> None:
    model = places / ("link" if through_link else "models/a")
    before = sorted(places.rglob("*"))
    inputs = [model, places / "recipes" / "r.yaml"]
    with (
        pytest.raises(OutputError, match=sentence),
        WorkFolder(places / out, inputs=inputs, overwrite=True) as work,
    ):
        work.prepare()
    assert sorted(places.rglob("*")) == before


def test_an_output_beside_its_inputs_is_fine(places: Path) -> None:
    inputs = [places / "models" / "a", places / "recipes" / "r.yaml"]
    for out in ("models/b", "recipes/out", "here/other", "new/deep/er"):
        check_target(places / out, inputs)
    check_target(places / "models" / "a" / "page.html", inputs, folder=False)


def test_only_a_folder_with_the_marker_is_replaced(places: Path) -> None:
    theirs = places / "theirs"
    theirs.mkdir()
    (theirs / "thesis.tex").write_text("years of work")
    for overwrite, sentence in ((False, "is not empty"), (True, "was not written by mergelab")):
        with pytest.raises(OutputError, match=sentence), WorkFolder(theirs, overwrite=overwrite) as work:
            work.prepare()
    assert (theirs / "thesis.tex").read_text() == "years of work"
    assert not list(places.glob(".*"))


def publish(out: Path, text: str, *, overwrite: bool = False) -> None:
    with WorkFolder(out, overwrite=overwrite) as work:
        work.prepare()
        work.clear()
        (work.path / "nested").mkdir()
        (work.path / "nested" / "content").write_text(text)
        work.publish(f"identity of {text}")


def test_what_was_published_is_marked_and_can_be_replaced(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    publish(out, "one")
    assert (out / MARKER).is_file() and recorded_identity(out) is None
    publish(out, "two", overwrite=True)
    assert (out / "nested" / "content").read_text() == "two"
    assert os.listdir(out.parent) == ["out"]


def test_what_appears_meanwhile_in_the_outputs_place_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OutputError, match="is not empty"), WorkFolder(out) as work:
        work.prepare()
        work.clear()
        out.mkdir()
        (out / "theirs").write_text("theirs")
        work.publish("id")
    assert (out / "theirs").read_text() == "theirs"


def test_folders_above_a_refused_output_are_not_left_behind(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="needs"), WorkFolder(tmp_path / "a" / "b" / "out") as work:
        work.prepare(1 << 62)
    assert os.listdir(tmp_path) == []


def test_a_second_writer_is_refused_and_touches_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with WorkFolder(out) as first:
        first.prepare()
        first.clear()
        (first.path / "piece").write_text("first")
        program = "import sys; from mergelab.checkpoints.publish import WorkFolder\n"
        program += "with WorkFolder(sys.argv[1], overwrite=True) as w: w.prepare(); w.clear()"
        second = subprocess.run([sys.executable, "-c", program, str(out)], capture_output=True, text=True)
        assert "another run is writing this output" in second.stderr
        assert (first.path / "piece").read_text() == "first"
        first.publish("id")
    with WorkFolder(out, overwrite=True) as again:
        again.prepare()


def test_a_lock_whose_file_was_removed_while_it_was_taken_is_taken_anew(tmp_path: Path) -> None:
    lock = OutputLock(tmp_path / "out")
    named = lock._is_named
    removed = []

    def remove_first(file: int) -> bool:
        if not removed:
            removed.append(lock.path.unlink())
        return named(file)

    lock._is_named = remove_first  # type: ignore[method-assign]
    lock.acquire()
    assert lock.path.exists()
    with pytest.raises(OutputError, match="another run"):
        OutputLock(tmp_path / "out").acquire()
    lock.release()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"identity": "x"}', b"\xff\xfe", b"[" * 60_000])
def test_a_torn_note_of_a_publication_is_no_note(content: bytes, tmp_path: Path) -> None:
    (tmp_path / ".out.lock").write_bytes(content)
    publish(tmp_path / "out", "one")
    assert os.listdir(tmp_path) == ["out"]


def test_one_file_is_published_in_one_step(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    publish_file(page, b"one")
    publish_file(page, lambda path: path.write_text("two") and None)
    assert page.read_text() == "two"

    def failing(path: Path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="the disk is full"):
        publish_file(page, failing)
    with pytest.raises(OutputError, match="is an input"):
        publish_file(page, b"", inputs=[page])
    assert page.read_text() == "two" and os.listdir(tmp_path) == ["page.html"]
