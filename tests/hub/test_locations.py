"""Models and outputs at URLs, on fsspec's own `memory://`: copies, headers, and the order of sending."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from fsspec.implementations.memory import MemoryFileSystem

import mergelab as ml
from mergelab.checkpoints import local_path, open_checkpoint
from mergelab.checkpoints.locations import location_text
from mergelab.checkpoints.remote import cache_folder, fetch_files
from mergelab.checkpoints.remote_output import local_output, mirror
from mergelab.cli.main import cli
from mergelab.errors import CheckpointError, DependencyError, OutputError
from mergelab.interp import SteeringVector


class Store(MemoryFileSystem):
    """`memory://`, which notes what is read and written; all of its instances are one."""

    log: list[tuple[str, str]] = []  # noqa: RUF012
    broken = ""

    def get_file(self, rpath: str, lpath: str, **options: Any) -> None:
        self.log.append(("get", rpath.rpartition("/")[2]))
        super().get_file(rpath, lpath, **options)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        self.log.append(("cat", f"{path.rpartition('/')[2]} {start} {end}"))
        return super().cat_file(path, start=start, end=end, **options)

    def put_file(self, lpath: str, rpath: str, **options: Any) -> None:
        name = rpath.rpartition("/")[2]
        if name == self.broken:
            raise ConnectionError("the line went dead")
        self.log.append(("put", name))
        super().put_file(lpath, rpath, **options)

    def rm_file(self, path: str) -> None:
        self.log.append(("rm", path.rpartition("/")[2]))
        super().rm_file(path)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """An empty store at `memory://`, and an empty cache."""
    import fsspec

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(Store, "store", {})
    monkeypatch.setattr(Store, "pseudo_dirs", [""])
    monkeypatch.setattr(Store, "log", [])
    monkeypatch.setattr(Store, "broken", "")
    monkeypatch.chdir(tmp_path)
    old = fsspec.get_filesystem_class("memory")
    fsspec.register_implementation("memory", Store, clobber=True)
    yield Store()
    fsspec.register_implementation("memory", old, clobber=True)


def fill(store: Store, folder: Path, root: str) -> None:
    for file in folder.iterdir():
        store.pipe_file(f"{root}/{file.name}", file.read_bytes())


def test_a_model_is_copied_once_and_again_where_it_changed(store: Store, models: Path) -> None:
    fill(store, models / "llama-ft1", "/bucket/tuned")
    store.pipe_file("/bucket/tuned/optimizer.bin", b"never read")
    found = open_checkpoint("memory://bucket/tuned")
    assert found.fingerprint() == open_checkpoint(models / "llama-ft1").fingerprint()
    assert found.path.name == "tuned" and ("get", "optimizer.bin") not in store.log
    store.log.clear()
    open_checkpoint(Path("memory://bucket/tuned"))  # which a Path makes memory:/bucket/tuned
    assert not [line for line in store.log if line[0] == "get"]
    # A negative control: other weights of other shards, and none of the old ones stays.
    store.rm("/bucket/tuned", recursive=True)
    fill(store, models / "llama-ft2", "/bucket/tuned")
    changed = open_checkpoint("memory://bucket/tuned/")
    assert changed.fingerprint() == open_checkpoint(models / "llama-ft2").fingerprint()


def test_one_file_is_a_place_too(store: Store, models: Path) -> None:
    fill(store, models / "llama-ft2", "/bucket/tuned")
    found = open_checkpoint("memory://bucket/tuned/model.safetensors")
    assert found.config == open_checkpoint(models / "llama-ft2").config
    with pytest.raises(CheckpointError, match="memory://bucket/nothing does not exist, or holds no files"):
        open_checkpoint("memory://bucket/nothing")


def test_names_in_a_store_cannot_leave_the_copy(store: Store) -> None:
    store.store["/bucket/m/../../evil.json"] = store.store.setdefault(
        "/bucket/m/config.json", _file(store, "/bucket/m/config.json")
    )
    with pytest.raises(CheckpointError, match="not a path inside it"):
        open_checkpoint("memory://bucket/m")


def _file(store: Store, path: str) -> Any:
    store.pipe_file(path, b"{}")
    return store.store[path]


def test_a_missing_package_or_scheme_is_said_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    with pytest.raises(CheckpointError, match="nosuch://x cannot be opened"):
        local_path("nosuch://x")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(DependencyError, match=r"install mergelab\[remote\]"):
        local_path("s3://bucket/x")


def test_inspect_reads_headers_only(store: Store, models: Path) -> None:
    fill(store, models / "llama-ft1", "/bucket/tuned")
    done = CliRunner().invoke(cli, ["inspect", "memory://bucket/tuned", "--json"])
    assert done.exit_code == 0, done.output
    report, here = (
        json.loads(done.output),
        CliRunner().invoke(cli, ["inspect", str(models / "llama-ft1"), "--json"]),
    )
    assert report.pop("path") == "memory://bucket/tuned"
    wanted = json.loads(here.output)
    wanted.pop("path")
    assert report == wanted
    assert not [name for kind, name in store.log if kind == "get" and name.endswith(".safetensors")]


def test_inspect_of_a_hub_model_reads_headers_only(hub: Any, models: Path) -> None:
    from mergelab.models import take_inventory

    hub.add("org/tiny", models / "llama-ft2")
    found, here = take_inventory("org/tiny"), take_inventory(models / "llama-ft2")
    assert found.parameters == here.parameters and found.stored == here.stored and not found.faults
    assert found.checkpoint.fingerprint() == here.checkpoint.fingerprint()
    cached = Path(hub_cache()) / "models--org--tiny"
    assert not list(cached.rglob("*.safetensors"))


def hub_cache() -> str:
    from huggingface_hub import constants

    return constants.HF_HUB_CACHE


def test_an_output_arrives_with_its_config_last(store: Store, models: Path, tmp_path: Path) -> None:
    fill(store, models / "llama-ft2", "/bucket/a")
    recipe = "merge_method: linear\nmodels: [{model: memory://bucket/a, parameters: {weight: 1}}]\n"
    (tmp_path / "r.yaml").write_text(recipe)
    url = "memory://bucket/out/merged"
    done = CliRunner().invoke(cli, ["merge", "r.yaml", "--out", url])
    assert done.exit_code == 0 and done.output.startswith(f"{url}: "), done.output
    puts = [name for kind, name in store.log if kind == "put"]
    assert puts[-2:] == ["config.json", "mergelab.json"] and "model.safetensors" in puts[:-2]
    assert not store.exists("/bucket/out/merged/.mergelab-sending")
    assert not list((cache_folder() / "outputs").rglob("*.safetensors")), "the local copy goes"
    ml.merge(tmp_path / "r.yaml", tmp_path / "here")
    there = store.cat_file("/bucket/out/merged/model.safetensors")
    assert there == (tmp_path / "here" / "model.safetensors").read_bytes()
    # What is there is not lost without being asked for.
    again = CliRunner().invoke(cli, ["merge", "r.yaml", "--out", url])
    assert again.exit_code == 2 and "is not empty" in again.output
    store.pipe_file("/bucket/out/merged/model-00001-of-00002.safetensors", b"of an earlier output")
    merged = ml.merge(tmp_path / "r.yaml", url, overwrite=True)
    assert not store.exists("/bucket/out/merged/model-00001-of-00002.safetensors")
    assert open_checkpoint(merged.out).tensors, "what is returned can be opened"


def test_an_output_that_broke_off_is_not_read_and_is_sent_again(
    store: Store, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = f"merge_method: linear\nmodels: [{{model: {models / 'llama-ft2'}, parameters: {{weight: 1}}}}]\n"
    (tmp_path / "r.yaml").write_text(recipe)
    monkeypatch.setattr(Store, "broken", "tokenizer.json")
    with pytest.raises(OutputError, match=r"memory://bucket/out cannot be written .*dead"):
        ml.merge(tmp_path / "r.yaml", "memory://bucket/out")
    assert not store.exists("/bucket/out/config.json")
    monkeypatch.setattr(Store, "broken", "")
    merged = ml.merge(tmp_path / "r.yaml", "memory://bucket/out", resume=True)
    assert merged.seconds_streaming == 0, "nothing is merged twice"
    assert open_checkpoint("memory://bucket/out").tensors


def test_files_of_others_are_not_replaced(store: Store) -> None:
    store.pipe_file("/bucket/mine/thesis.tex", b"x")
    with (
        pytest.raises(OutputError, match="was not written by mergelab"),
        local_output("memory://bucket/mine", overwrite=True),
    ):
        raise AssertionError("the block must not begin")


def test_a_model_and_activations_go_there_and_come_back(store: Store, tmp_path: Path, models: Path) -> None:
    from mergelab.activations import open_activation_files

    np.save(tmp_path / "a-0.npy", np.ones((3, 2), np.float32))
    np.save(tmp_path / "a-1.npy", np.zeros((2, 2), np.float32))
    for name in ("a-0.npy", "a-1.npy"):
        store.pipe_file(f"/bucket/acts/{name}", (tmp_path / name).read_bytes())
    rows = open_activation_files("memory://bucket/acts/a-*.npy")
    assert rows.rows == 5 and rows.read(0, 5)[:, 0].tolist() == [1, 1, 1, 0, 0]
    with pytest.raises(CheckpointError, match="no file matches"):
        fetch_files("memory://bucket/acts/b-*.npy")
    model, params = ml.load_model(models / "llama-base")
    ml.save_model(model, params, "memory://bucket/model")
    again = ml.load_model("memory://bucket/model")[1]
    assert np.array_equal(params["embed"]["embedding"], again["embed"]["embedding"])


def test_a_training_run_is_mirrored_and_taken_up_from_there(store: Store, tmp_path: Path) -> None:
    url = "memory://bucket/run"
    with pytest.raises(KeyboardInterrupt), local_output(url) as folder:
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "checkpoints" / "10").write_text("ten")
        mirror(folder)
        (folder / "checkpoints" / "10").unlink()
        (folder / "checkpoints" / "20").write_text("twenty")
        mirror(folder / "checkpoints")
        raise KeyboardInterrupt
    assert [path.rpartition("/")[2] for path in store.find("/bucket/run")] == ["20"]
    for path in sorted(cache_folder().rglob("*"), reverse=True):  # another machine
        path.rmdir() if path.is_dir() else path.unlink()
    with local_output(url, resume=True) as folder:
        assert (folder / "checkpoints" / "20").read_text() == "twenty"
        (folder / "config.json").write_text("{}")
    assert store.exists("/bucket/run/config.json")
    mirror(tmp_path)  # a folder that is nowhere else


def test_what_cannot_go_there_says_so_and_makes_no_folder_of_that_name(
    store: Store, tmp_path: Path, models: Path
) -> None:
    command = ["soup", str(models / "llama-ft2"), "--method", "running", "--out", "memory://bucket/average"]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 2 and "memory://bucket/average is a URL" in done.output
    with pytest.raises(OutputError, match="push a local folder"):
        ml.push("memory://bucket/average", "org/name")
    assert not list(tmp_path.glob("memory*"))


def test_every_kind_of_path_is_a_place(store: Store, models: Path) -> None:
    from etils import epath

    fill(store, models / "llama-ft2", "/bucket/tuned")
    here = open_checkpoint(models / "llama-ft2").fingerprint()

    class Elsewhere:
        def __fspath__(self) -> str:
            return "memory://bucket/tuned"

    for place in (Elsewhere(), epath.Path(models / "llama-ft2")):
        assert open_checkpoint(local_path(place)).fingerprint() == here


def test_steering_vectors_are_kept_at_urls(store: Store) -> None:
    def vector(value: float) -> SteeringVector:
        return SteeringVector(jnp.full(4, value), jnp.float32(2.0), "blocks.1.resid_post", "llama")

    place = "memory://bucket/vectors/v.gguf"
    assert location_text(ml.save_steering(vector(1), place)) == place
    assert [line for line in store.log if line[0] == "put"] == [("put", "v.gguf")]
    (found,) = ml.load_steering(place).values()
    np.testing.assert_allclose(found.edit(1.0)(jnp.zeros((1, 1, 4)))[0, 0], np.full(4, 1.0), rtol=1e-6)
    with pytest.raises(OutputError, match=f"{place} is there already"):
        ml.save_steering(vector(-1), place)
    ml.save_steering(vector(-1), place, overwrite=True)
    (found,) = ml.load_steering(place).values()
    assert float(found.vector[0]) < 0
    with pytest.raises(CheckpointError, match=r"memory://bucket/vectors/w.gguf does not exist"):
        ml.load_steering("memory://bucket/vectors/w.gguf")
