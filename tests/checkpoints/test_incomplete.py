"""What clones and broken downloads leave behind: Git LFS pointers, lone shards and those nobody names."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from mergelab.checkpoints import open_checkpoint
from mergelab.checkpoints.companion_files import donor_files
from mergelab.checkpoints.json_data import read_json_object
from mergelab.errors import CheckpointError
from mergelab.text.tokenizer import load_tokenizer

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4" * 64 + b"\nsize 2471645608\n"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.pth"])
def test_a_weight_file_that_is_an_lfs_pointer_is_said_to_be_one(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(CheckpointError, match=rf"{name} is a Git LFS pointer.*git lfs pull"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "adapter_config.json"])
def test_a_json_file_that_is_an_lfs_pointer_is_said_to_be_one(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(CheckpointError, match=rf"{name} is a Git LFS pointer.*git lfs pull"):
        read_json_object(tmp_path / name)


def test_a_tokenizer_that_is_an_lfs_pointer_is_neither_read_nor_copied(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(POINTER)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is a Git LFS pointer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(POINTER)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model is a Git LFS pointer"):
        donor_files(tmp_path, None)


def test_a_small_weight_file_is_no_pointer(tmp_path: Path) -> None:
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "model.safetensors")
    assert list(open_checkpoint(tmp_path).tensors) == ["a"]


def shards(folder: Path, named: tuple[str, ...]) -> None:
    for i, shard in enumerate(SHARDS):
        save_file({f"t{i}": np.ones(2, np.float32)}, folder / shard)
    weight_map = {f"t{i}": shard for i, shard in enumerate(SHARDS) if shard in named}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("named", SHARDS)
def test_a_shard_that_the_index_does_not_name_is_refused(named: str, tmp_path: Path) -> None:
    shards(tmp_path, (named,))
    (left_out,) = set(SHARDS) - {named}
    with pytest.raises(CheckpointError, match=f"has the shard '{left_out}', which .* does not name"):
        open_checkpoint(tmp_path)
    shards(tmp_path, SHARDS)
    save_file({"other": np.ones(2, np.float32)}, tmp_path / "consolidated.safetensors")
    save_file({"lora": np.ones(2, np.float32)}, tmp_path / "adapter_model.safetensors")
    assert list(open_checkpoint(tmp_path).tensors) == ["t0", "t1"]


def test_one_shard_of_several_is_no_model(tmp_path: Path) -> None:
    shards(tmp_path, SHARDS)
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / SHARDS[1]).unlink()
    with pytest.raises(CheckpointError, match=r"only the file model-00001-of-00002\..* one of 2"):
        open_checkpoint(tmp_path)
    (tmp_path / SHARDS[0]).rename(tmp_path / "model-00001-of-00001.safetensors")
    assert list(open_checkpoint(tmp_path).tensors) == ["t0"]


@pytest.mark.parametrize(
    "page", [b"<!DOCTYPE html>\n<html>", b"\xef\xbb\xbf\n<HTML>", b"<?xml version='1.0'?><Error>"]
)
def test_a_web_page_in_place_of_a_file_is_said_to_be_one(page: bytes, tmp_path: Path) -> None:
    """What a proxy, a login or a missing file leaves behind where a download did not look at the status."""
    page += b" not found " * 40
    for name in ("model.safetensors", "pytorch_model.bin", "model.gguf"):
        (tmp_path / name).write_bytes(page)
        with pytest.raises(CheckpointError, match=rf"{name} is a web page in place of weights; download"):
            open_checkpoint(tmp_path / name)
    (tmp_path / "config.json").write_bytes(page)
    with pytest.raises(CheckpointError, match=r"config\.json is a web page in place of JSON; download"):
        read_json_object(tmp_path / "config.json")


@pytest.mark.parametrize("nothing", [b"", b" \n"])
def test_an_empty_json_file_is_said_to_be_empty(nothing: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(nothing)
    with pytest.raises(CheckpointError, match=r"config\.json is empty; download"):
        read_json_object(tmp_path / "config.json")
