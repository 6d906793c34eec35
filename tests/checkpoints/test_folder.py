"""Model folders: found, cross-checked with their index, and refused when they contradict themselves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from mergelab.checkpoints.folder import open_checkpoint
from mergelab.checkpoints.lora_tensor import read_whole
from mergelab.checkpoints.model_files import check_file_name
from mergelab.checkpoints.source import TensorSource
from mergelab.errors import CheckpointError

DATA = Path(__file__).parent / "data"
A, B = np.arange(4, dtype=np.float32), np.ones((2, 3), np.float16)
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def save(folder: Path, name: str, **arrays: np.ndarray) -> None:
    folder.mkdir(exist_ok=True)
    safetensors.numpy.save_file(arrays, folder / name)


def sharded(folder: Path, weight_map: Any = None) -> Path:
    save(folder, SHARDS[0], a=A)
    save(folder, SHARDS[1], b=B)
    weight_map = {"a": SHARDS[0], "b": SHARDS[1]} if weight_map is None else weight_map
    index = {"metadata": {"total_size": 28}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("model", ["llama-ft1", "llama-ft1-bf16"])
def test_golden_sharded_model(model: str, goldens: Path) -> None:
    folder = goldens / "models" / model
    checkpoint = open_checkpoint(folder)
    assert checkpoint.path == folder and checkpoint.config["num_hidden_layers"] == 4
    assert len(checkpoint.files) == 3 and len(checkpoint.tensors) == 39
    for file in checkpoint.files:
        reference = dict(safetensors.deserialize(file.file.path.read_bytes()))
        assert reference.keys() == file.tensors.keys()
        for name, expected in reference.items():
            assert read_whole(checkpoint.tensors[name]).tobytes() == bytes(expected["data"])


def test_sources_keep_the_contract(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(sharded(tmp_path / "m"))
    assert list(checkpoint.tensors) == ["a", "b"] and checkpoint.config == {}
    assert all(isinstance(source, TensorSource) for source in checkpoint.tensors.values())


@pytest.mark.parametrize("name", ["model.safetensors", "anything.safetensors"])
def test_single_files_alone_and_in_a_folder(name: str, tmp_path: Path) -> None:
    save(tmp_path / "m", name, a=A)
    (tmp_path / "m" / "config.json").write_text('{"hidden_size": 4, "limits": [0, Infinity]}')
    for path in (tmp_path / "m", tmp_path / "m" / name):
        checkpoint = open_checkpoint(path)
        assert checkpoint.config["hidden_size"] == 4 and checkpoint.path == tmp_path / "m"
        assert np.array_equal(read_whole(checkpoint.tensors["a"]), A)


def test_safetensors_are_preferred_and_training_files_ignored(tmp_path: Path) -> None:
    save(tmp_path / "m", "model.safetensors", a=A)
    shutil.copy(DATA / "state_dict.pt", tmp_path / "m" / "pytorch_model.bin")
    assert list(open_checkpoint(tmp_path / "m").tensors) == ["a"]
    (tmp_path / "m" / "model.safetensors").unlink()
    (tmp_path / "m" / "training_args.bin").write_bytes(b"not weights")
    assert "weight" in open_checkpoint(tmp_path / "m").tensors


def test_sharded_bin_files(tmp_path: Path) -> None:
    shutil.copy(DATA / "state_dict.pt", tmp_path / "pytorch_model-00001-of-00001.bin")
    names = open_checkpoint(tmp_path / "pytorch_model-00001-of-00001.bin").tensors
    weight_map = dict.fromkeys(names, "pytorch_model-00001-of-00001.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert open_checkpoint(tmp_path).tensors.keys() == names.keys()


def test_links_to_whole_files_are_followed(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--x" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    save(tmp_path / "models--x" / "blobs", "blob", a=A)
    (snapshot / "model.safetensors").symlink_to("../../blobs/blob")
    assert np.array_equal(read_whole(open_checkpoint(snapshot).tensors["a"]), A)


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/x", "a/b", "a\\b", "..", ".", "C:x", "NUL", "con.safetensors", "x.", "x ", "a\0b", "a\nb",
     "\\\\host\\x", "x" * 256, "", 3, None, "a?b"],
)  # fmt: skip
def test_shard_names_cannot_leave_the_folder(name: object, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="file name"):
        check_file_name(name, "here")
    with pytest.raises(CheckpointError, match=r"index\.json: tensor 'a' gives"):
        open_checkpoint(sharded(tmp_path / "m", {"a": name, "b": SHARDS[1]}))


def test_ordinary_names_are_allowed() -> None:
    for name in ("model-00001-of-00002.safetensors", "weights v2.bin", "модель.safetensors", "console.bin"):
        assert check_file_name(name, "here") == name


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": SHARDS[0], "b": "model-3.safetensors"}, "model-3.safetensors', which is missing"),
        ({"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[1]}, "puts tensor 'c' in .*no file has it"),
        ({"a": SHARDS[1], "b": SHARDS[1]}, "tensor 'a' in .*no file has it"),
        ({"a": SHARDS[1], "b": SHARDS[0]}, "tensor 'a' in .*-00001-of-00002.safetensors has"),
        ({}, "no weight_map"),
        ([], "no weight_map"),
    ],
)
def test_index_and_files_must_agree(weight_map: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(sharded(tmp_path / "m", weight_map))


def test_extra_and_duplicate_tensors(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    save(folder, SHARDS[1], b=B, extra=A)
    with pytest.raises(CheckpointError, match="'extra', which its index does not name"):
        open_checkpoint(folder)
    save(folder, SHARDS[1], b=B, a=A)
    with pytest.raises(CheckpointError, match="tensor 'a' is in more than one file"):
        open_checkpoint(folder)


def test_broken_json_names_file_and_line(tmp_path: Path) -> None:
    save(tmp_path / "m", "model.safetensors", a=A)
    config = tmp_path / "m" / "config.json"
    for text, message in (
        ('{\n"a": 1,\n"b" 2}', r"config\.json is not valid JSON: .* line 3"),
        ('{"a": 1, "a": 2}', r"config\.json has the key 'a' twice"),
        ("[]", r"config\.json holds a JSON list"),
    ):
        config.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(tmp_path / "m")


def test_folders_without_a_clear_choice(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"has no weights: .* found notes\.txt"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="not a weight file by its name"):
        open_checkpoint(tmp_path / "notes.txt")
    save(tmp_path, "x.safetensors", a=A)
    save(tmp_path, "y.safetensors", a=A)
    with pytest.raises(CheckpointError, match=r"2 weight files \(x\.safetensors, y\.safetensors"):
        open_checkpoint(tmp_path)


def test_a_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(CheckpointError, match=r"cannot be read .*Permission denied"):
        open_checkpoint(tmp_path)


def test_an_adapter_is_not_a_model(goldens: Path) -> None:
    with pytest.raises(CheckpointError, match=r"LoRA adapter, not a model; .* base\+adapter"):
        open_checkpoint(goldens / "models" / "llama-lora")


def test_fingerprint_and_hashes(tmp_path: Path) -> None:
    one, two = open_checkpoint(sharded(tmp_path / "one")), open_checkpoint(sharded(tmp_path / "two"))
    assert one.fingerprint() == two.fingerprint() and len(one.fingerprint()) == 64
    assert one.sha256_files() == two.sha256_files() and set(one.sha256_files()) == set(SHARDS)
    (tmp_path / "two" / "config.json").write_text('{"x": 1}')
    assert open_checkpoint(tmp_path / "two").fingerprint() != one.fingerprint()
    save(tmp_path / "two", SHARDS[0], a=A + 1)
    assert open_checkpoint(tmp_path / "two").sha256_files()[SHARDS[0]] != one.sha256_files()[SHARDS[0]]
