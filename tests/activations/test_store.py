"""A store is found by its folder and by globs, and a harvest that was killed loses little."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from mergelab.activations import store_pieces
from mergelab.activations.model_activations import ModelActivations
from mergelab.activations.store import find_activation_files, open_activation_files, write_store
from mergelab.errors import CheckpointError
from mergelab.sae.training.config import DataSection
from mergelab.sae.training.data import host_metadata
from mergelab.text.corpus import TextOptions
from tests.models.tiny_models import tiny, write

SITE, OTHER = "blocks.0.resid_post", "blocks.0.mlp.out"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("model") / "model", "llama")


def source(*sites: str, contexts: int = 40, text: TextOptions | None = None) -> ModelActivations:
    tokens = np.random.default_rng(0).integers(3, 61, (contexts, 8)).astype(np.int32)
    return ModelActivations(*tiny("llama"), tokens, sites, batch=4, text=text)


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    write_store(source(SITE, OTHER), folder.with_name("whole"), model=folder)
    return folder.with_name("whole")


def test_a_store_is_read_by_its_folder_and_by_globs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mergelab.activations.store._SHARD_ROWS", 64)
    rows = source(SITE, text=TextOptions(bos=True, packing="documents"))
    write_store(rows, Path("acts"), model=folder)
    for pattern in ("acts", "acts/", "acts/*.safetensors", "acts/*s", "acts/blocks*"):
        files = open_activation_files(pattern)
        assert files.rows == 320 and len(files.shards) == 5
        np.testing.assert_array_equal(files.read(0, 320), rows.read_sites(0, 320)[0])
        facts = host_metadata(DataSection(kind="files", path=pattern))
        assert (facts["site"], facts["prepend_bos"], facts["packing"]) == (SITE, True, "documents")


def test_of_several_sites_one_is_to_be_named(whole: Path) -> None:
    for pattern in (whole, f"{whole}/*.safetensors", f"{whole}/blocks*"):
        with pytest.raises(CheckpointError, match=rf"several sites \({OTHER}, {SITE}\); name one, such as"):
            find_activation_files(pattern)
    assert len(find_activation_files(f"{whole}/{SITE}-*")) == 1


def test_other_folders_hold_files_of_rows(tmp_path: Path) -> None:
    np.save(tmp_path / "b.npy", np.ones((2, 3), np.float32))
    np.save(tmp_path / "a.npy", np.zeros((2, 3), np.float32))
    (tmp_path / "notes.txt").write_text("none of them")
    assert open_activation_files(tmp_path).read(0, 4)[:, 0].tolist() == [0, 0, 1, 1]
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no file matches"):
        find_activation_files(tmp_path / "empty")


def test_a_killed_harvest_goes_on_within_a_shard(
    folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count(step=9)  # a look at the clock takes 9 seconds
    monkeypatch.setattr(store_pieces, "monotonic", lambda: next(clock))
    told: list[int] = []

    def progress(done: int, total: int) -> None:
        told.append(done)
        if done == 256:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_store(source(SITE, OTHER), tmp_path / "acts", model=folder, progress=progress)
    assert told == list(range(32, 257, 32))  # rows, not shards
    kept = sorted(
        (tmp_path / ".acts.stages" / "rows").iterdir(), key=lambda path: int(path.name.split("-")[0])
    )
    assert len(kept) == 2 and not (tmp_path / "acts").exists()
    raw = bytearray(kept[-1].read_bytes())
    raw[-1] ^= 1
    kept[-1].write_bytes(raw)  # what is damaged is computed again
    again = source(SITE, OTHER)
    reads: list[int] = []
    read = again.read_sites
    object.__setattr__(again, "read_sites", lambda start, stop: reads.append(start) or read(start, stop))
    write_store(again, tmp_path / "acts", model=folder)
    first = int(kept[0].stem.split("-")[1])
    assert first > 0 and reads == list(range(first, 320, 32))
    assert {p.name: p.read_bytes() for p in (tmp_path / "acts").iterdir()} == {
        p.name: p.read_bytes() for p in whole.iterdir()
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["acts"]
