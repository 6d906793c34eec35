"""`mergelab convert` changes form, dtype and files of a model, and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

from mergelab.checkpoints import open_checkpoint, read_whole
from mergelab.cli.main import cli
from mergelab.models.families import model_from_config
from mergelab.models.orbax import is_orbax_model
from mergelab.models.save import save_model

CONFIG = {
    "model_type": "gpt2",
    "vocab_size": 24,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 32,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = model_from_config(CONFIG)
    files = {"tokenizer.json": b'{"any": "bytes"}'}
    return save_model(model, model.init(0), tmp_path_factory.mktemp("saved") / "source", files=files)


@pytest.fixture
def source(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "source"))


def convert(*arguments: object) -> str:
    result = CliRunner().invoke(cli, ["convert", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def weights(folder: Path) -> dict[str, np.ndarray]:
    return {name: read_whole(tensor) for name, tensor in open_checkpoint(folder).tensors.items()}


def test_orbax_and_back_keeps_every_byte(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "orbax", "--to", "orbax", "--mesh", "fsdp=2,tensor=4")
    assert is_orbax_model(tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "back")
    before, after = weights(source), weights(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == b'{"any": "bytes"}'
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config == json.loads((source / "config.json").read_text())


def test_dtype_and_files(source: Path, tmp_path: Path) -> None:
    report = json.loads(
        convert(source, tmp_path / "half", "--dtype", "bfloat16", "--shard-size", "2KB", "--json")
    )
    assert len(list((tmp_path / "half").glob("*.safetensors"))) > 1
    before, after = weights(source), weights(tmp_path / "half")
    assert report["bytes"] == sum(array.nbytes for array in after.values())
    for name, array in before.items():
        assert np.array_equal(after[name], array.astype(ml_dtypes.bfloat16))


def test_a_model_of_no_supported_family_keeps_its_tensors(tmp_path: Path) -> None:
    source = tmp_path / "foreign"
    source.mkdir()
    tensors = {"a.weight": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4), "ids": np.arange(5)}
    save_file(tensors, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps({"model_type": "rwkv9", "torch_dtype": "float32"}))
    convert(source, tmp_path / "half", "--dtype", "bfloat16")
    after = weights(tmp_path / "half")
    assert np.array_equal(after["a.weight"], tensors["a.weight"].astype(ml_dtypes.bfloat16))
    assert np.array_equal(after["ids"], tensors["ids"]) and after["ids"].dtype == np.int64
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert config == {"model_type": "rwkv9", "torch_dtype": "bfloat16"}
    refused = CliRunner().invoke(cli, ["convert", str(source), str(tmp_path / "orbax"), "--to", "orbax"])
    assert refused.exit_code == 2 and "rwkv9" in refused.stderr


def test_outputs_are_not_replaced_unasked(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out")
    result = CliRunner().invoke(cli, ["convert", str(source), str(tmp_path / "out")])
    assert (result.exit_code, "is not empty" in result.stderr) == (2, True)
    convert(source, tmp_path / "out", "--overwrite", "--dtype", "float16")
    result = CliRunner().invoke(cli, ["convert", str(source), str(source), "--overwrite"])
    assert (result.exit_code, "is an input of this command" in result.stderr) == (2, True)
    assert weights(source)
