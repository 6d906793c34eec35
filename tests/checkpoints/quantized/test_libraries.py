"""What `record.py` recorded is what the libraries say today, on files that they write anew."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mergelab.checkpoints import open_checkpoint, read_whole
from tests.checkpoints.quantized.test_recorded import RECORDED

IN_TRANSFORMERS = ("fp8_blocks", "fp8_per_tensor", "fp8_exponent_scales", "mxfp4_experts")
OF_OTHER_LIBRARIES = tuple(name for name in RECORDED if name.startswith(("bitsandbytes_", "compressed_")))


def compare(name: str, path: Path) -> None:
    from safetensors.torch import save_file

    from tests.checkpoints.quantized import record

    stored, config, expected = record.CASES[name]()
    save_file({key: value.contiguous() for key, value in stored.items()}, path / "model.safetensors")
    whole = config if "model_type" in config else {"quantization_config": config}
    (path / "config.json").write_text(json.dumps(whole))
    found = open_checkpoint(path).tensors
    assert expected.keys() == RECORDED[name]["tensors"].keys()
    for tensor, value in expected.items():
        np.testing.assert_array_equal(read_whole(found[tensor]), value.numpy(), err_msg=tensor)


@pytest.mark.oracle
@pytest.mark.parametrize("name", IN_TRANSFORMERS)
def test_transformers_dequantizes_to_the_same_values(name: str, tmp_path: Path) -> None:
    compare(name, tmp_path)


@pytest.mark.oracle
def test_transformers_dequantizes_larger_float8_blocks_to_the_same_values(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from tests.checkpoints.quantized.record import transformers_fp8

    quantize, dequantize = transformers_fp8([128, 128])
    stored = quantize.convert({"up_proj.weight": torch.randn(384, 512)})
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    found = read_whole(open_checkpoint(tmp_path).tensors["up_proj.weight"])
    wanted = dequantize._dequantize_one(*stored.values(), torch.float32)
    np.testing.assert_array_equal(found, wanted.numpy())


@pytest.mark.oracle
def test_transformers_reads_back_what_convert_wrote(tmp_path: Path) -> None:
    from click.testing import CliRunner
    from transformers import AutoModelForCausalLM

    from mergelab.cli.main import cli
    from tests.checkpoints.quantized.test_recorded import folder

    quantized = folder("bitsandbytes_nf4", tmp_path / "nf4")
    assert CliRunner().invoke(cli, ["convert", str(quantized), str(tmp_path / "plain")]).exit_code == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype="float32")
    found = open_checkpoint(quantized).tensors
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(read_whole(found[name]).astype(np.float32), value.numpy(), err_msg=name)


@pytest.mark.peers
@pytest.mark.parametrize("name", OF_OTHER_LIBRARIES)
def test_bitsandbytes_and_compressed_tensors_dequantize_to_the_same_values(name: str, tmp_path: Path) -> None:
    compare(name, tmp_path)
