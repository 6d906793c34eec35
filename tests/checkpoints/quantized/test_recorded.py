"""Files that other libraries quantized read as those libraries dequantize them, to the last bit."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergelab.checkpoints import FolderCheckpoint, TensorSource, open_checkpoint, open_safetensors, read_whole
from mergelab.checkpoints.quantized import BoxSource

DATA = Path(__file__).parent / "data"
RECORDED: dict[str, dict[str, Any]] = json.loads((DATA / "expected.json").read_text())


def folder(name: str, path: Path) -> Path:
    path.mkdir(exist_ok=True)
    shutil.copy(DATA / f"{name}.safetensors", path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(RECORDED[name]["config"]))
    return path


def opened(name: str, path: Path) -> FolderCheckpoint:
    return open_checkpoint(folder(name, path))


def digest(source: TensorSource) -> str:
    values = read_whole(source)
    return hashlib.sha256((values + values.dtype.type(0)).tobytes()).hexdigest()  # zeros without their sign


def test_every_file_has_its_record() -> None:
    assert {path.stem for path in DATA.glob("*.safetensors")} == RECORDED.keys()


@pytest.mark.parametrize("name", RECORDED)
def test_values_are_those_of_the_library_to_the_last_bit(name: str, tmp_path: Path) -> None:
    checkpoint = opened(name, tmp_path)
    for tensor, wanted in RECORDED[name]["tensors"].items():
        source = checkpoint.tensors[tensor]
        assert isinstance(source, BoxSource)
        assert isinstance(source, TensorSource)
        assert (source.name, list(source.shape)) == (tensor, wanted["shape"])
        assert source.dtype == np.float32
        values = read_whole(source)
        np.testing.assert_array_equal(values.flat[:3], np.float32(wanted["first"]), err_msg=tensor)
        assert digest(source) == wanted["sha256"], tensor


@pytest.mark.parametrize("name", RECORDED)
def test_codes_and_scales_are_no_tensors_of_the_model(name: str, tmp_path: Path) -> None:
    checkpoint = opened(name, tmp_path)
    plain = {
        n: t
        for n, t in open_safetensors(DATA / f"{name}.safetensors").tensors.items()
        if n in checkpoint.tensors
    }
    dequantized = RECORDED[name]["tensors"].keys()
    assert checkpoint.tensors.keys() == dequantized | plain.keys()
    for other in checkpoint.tensors.keys() - dequantized:
        assert checkpoint.tensors[other].dtype == plain[other].dtype
        assert digest(checkpoint.tensors[other]) == digest(plain[other])
    assert "quantization_config" not in checkpoint.config
    assert checkpoint.quantization
    assert checkpoint.is_quantized


@pytest.mark.parametrize("name", RECORDED)
def test_any_piece_is_that_piece_of_the_whole(name: str, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for source in opened(name, tmp_path).tensors.values():
        whole = read_whole(source).reshape(-1)
        size = math.prod(source.shape)
        for _ in range(12):
            start, stop = sorted(random.integers(0, size + 1, 2))
            piece = np.empty(stop - start, source.dtype)
            source.read_into(int(start), piece)
            np.testing.assert_array_equal(piece, whole[start:stop])


def test_a_changed_scale_is_seen(tmp_path: Path) -> None:
    path = folder("fp8_blocks", tmp_path) / "model.safetensors"
    scale = open_safetensors(path).tensors["model.layers.0.mlp.up_proj.weight_scale_inv"]
    content = bytearray(path.read_bytes())
    content[scale.offset + 20] ^= 1  # the lowest bits of one of its numbers
    path.write_bytes(content)
    name = "model.layers.0.mlp.up_proj.weight"
    wanted = RECORDED["fp8_blocks"]["tensors"][name]["sha256"]
    assert digest(open_checkpoint(tmp_path).tensors[name]) != wanted


def test_the_config_is_asked_for_numbers_alone(tmp_path: Path) -> None:
    for name in ("bitsandbytes_nf4", "gptq", "mxfp4_experts", "compressed_fp4", "compressed_int8"):
        path = folder(name, tmp_path / name)
        (path / "config.json").write_text("{}")
        checkpoint = open_checkpoint(path)
        for tensor, wanted in RECORDED[name]["tensors"].items():
            assert digest(checkpoint.tensors[tensor]) == wanted["sha256"]


def test_a_fingerprint_knows_the_numbers_of_the_quantization(tmp_path: Path) -> None:
    before = opened("fp8_blocks", tmp_path).fingerprint()
    config = RECORDED["fp8_blocks"]["config"]
    changed = {"quantization_config": {**config["quantization_config"], "weight_block_size": [24, 32]}}
    (tmp_path / "config.json").write_text(json.dumps(changed))
    assert open_checkpoint(tmp_path).fingerprint() != before
