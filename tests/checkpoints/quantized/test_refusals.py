"""What cannot be read is refused when the model is opened, all of it named at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

from mergelab.checkpoints import open_checkpoint, open_safetensors, read_whole
from mergelab.cli.main import cli
from mergelab.errors import CheckpointError
from tests.checkpoints.quantized.test_recorded import RECORDED, folder

E4M3 = ml_dtypes.float8_e4m3fn
Tensors = dict[str, np.ndarray]


def write(path: Path, tensors: Tensors, config: object = None) -> Path:
    path.mkdir(exist_ok=True)
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config or {}))
    return path


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("l.0.q_proj.W_q", "HQQ"),
        ("l.0.q_proj.codebooks", "AQLM"),
        ("l.0.q_proj.q_invperm", "EXL2"),
        ("l.0.q_proj.trellis", "EXL3"),
        ("l.0.q_proj.Qidxs", r"QuIP#"),
        ("l.0.q_proj._weight_qdata", "torchao"),
        ("l.0.q_proj.weight._data", "quanto"),
        ("l.0.q_proj.centroids.weight", "VPTQ"),
        ("l.0.q_proj.weight_scales", "EETQ"),
        ("l.0.q_proj.scale_packed", "marlin"),
        ("l.0.q_proj.bitmask", "sparse"),
    ],
)
def test_formats_of_other_libraries_are_named(name: str, word: str, tmp_path: Path) -> None:
    write(tmp_path, {name: np.zeros((4, 4), np.uint8), "norm.weight": np.ones(4, np.float32)})
    with pytest.raises(CheckpointError, match=f"quantized by .*{word}.*{name}.*cannot be read"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("method", ["bitnet", "an_unknown_one", "torchao", "fp8"])
def test_codes_without_a_scale_are_refused_where_the_config_speaks_of_a_quantization(
    method: str, tmp_path: Path
) -> None:
    for kind in (E4M3, np.int8, np.uint8, np.int32):
        tensors = {"l.0.q_proj.weight": np.ones((4, 4), kind), "norm.weight": np.ones(4, np.float32)}
        write(tmp_path, tensors, {"quantization_config": {"quant_method": method}})
        with pytest.raises(
            CheckpointError, match=rf"'l\.0\.q_proj\.weight' is .* without a scale .*{method}"
        ):
            open_checkpoint(tmp_path)


def test_an_unknown_method_is_no_fault_of_plain_weights(tmp_path: Path) -> None:
    write(
        tmp_path, {"q.weight": np.ones((2, 2), np.float16)}, {"quantization_config": {"quant_method": "what"}}
    )
    assert open_checkpoint(tmp_path).tensors["q.weight"].dtype == np.float16


def test_float8_without_any_scale_is_a_plain_type(tmp_path: Path) -> None:
    codes = np.float32([[1, -0.5], [448, 2]]).astype(E4M3)
    write(tmp_path, {"q.weight": codes, "norm.weight": np.ones(2, np.float32)})
    source = open_checkpoint(tmp_path).tensors["q.weight"]
    assert source.dtype == E4M3
    assert read_whole(source).tobytes() == codes.tobytes()
    beside = {"k.weight": codes, "k.weight_scale_inv": np.ones((1, 1), np.float32)}
    write(tmp_path, {"q.weight": codes, **beside})
    with pytest.raises(CheckpointError, match=r"'q\.weight' is float8_e4m3fn .* without a scale"):
        open_checkpoint(tmp_path)


def test_float8_beside_a_scale_of_an_unknown_name_is_no_plain_type(tmp_path: Path) -> None:
    write(tmp_path, {"q.weight": np.ones((2, 2), E4M3), "q.my_scale": np.ones(1, np.float32)})
    with pytest.raises(CheckpointError, match=r"'q\.weight' is float8_e4m3fn .* without a scale"):
        open_checkpoint(tmp_path)


def test_int8_beside_numbers_called_scale_may_be_anything(tmp_path: Path) -> None:
    for name in ("q.scale", "q.weight_scale_inv"):
        write(tmp_path, {"q.weight": np.ones((2, 32), np.int8), name: np.ones((2, 2), np.float32)})
        with pytest.raises(CheckpointError, match="no scales of int8 codes"):
            open_checkpoint(tmp_path)


def drop(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(name)


def put(name: str, value: np.ndarray) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__setitem__(name, value)


UP = "model.layers.0.mlp.up_proj"
Q = "model.layers.0.self_attn.q_proj"
L0 = "model.layers.0"
STATE = f"{Q}.weight.quant_state.bitsandbytes__nf4"


def state(**changes: object) -> np.ndarray:
    whole = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [32, 32], **changes}
    return np.frombuffer(json.dumps(whole).encode(), np.uint8)


@pytest.mark.parametrize(
    ("case", "change", "words"),
    [
        ("fp8_blocks", drop(f"{UP}.weight_scale_inv"), rf"{UP}\.weight' is float8.* without a scale"),
        ("fp8_blocks", put(f"{UP}.weight_scale_inv", np.ones((5, 2), np.float32)), r"shape \[5, 2\]"),
        ("fp8_blocks", put(f"{UP}.weight_scale_inv", np.ones((3, 2), np.int32)), "which are no scales"),
        ("fp8_blocks", drop(f"{UP}.weight"), r"weight_scale_inv' .* belongs to no weight"),
        ("fp8_blocks", put(f"{UP}.weight", np.ones((48, 64), np.float32)), "belongs to no weight"),
        ("mxfp4_experts", drop(f"{L0}.mlp.experts.down_proj_scales"), "has no .*down_proj_scales"),
        (
            "mxfp4_experts",
            put(f"{L0}.mlp.experts.down_proj_scales", np.zeros((2, 32, 2), np.uint8)),
            "one exponent per block",
        ),
        ("compressed_packed", drop(f"{L0}.q_proj.weight_scale"), "has no .*weight_scale'"),
        ("compressed_packed", drop(f"{L0}.q_proj.weight_shape"), "has no .*weight_shape' of 2 sizes"),
        (
            "compressed_packed",
            put(f"{L0}.q_proj.weight_shape", np.array([32, 999])),
            r"does not hold \[32, 999\]",
        ),
        ("compressed_packed", put(f"{L0}.q_proj.weight_scale", np.ones((32, 3), np.float32)), "does not fit"),
        (
            "compressed_packed",
            put(f"{L0}.k_proj.weight_zero_point", np.ones((7, 7), np.int32)),
            "does not fit",
        ),
        (
            "compressed_packed",
            put(f"{L0}.q_proj.weight_g_idx", np.full(64, 2, np.int32)),
            "64 columns a group",
        ),
        ("compressed_packed", put(f"{L0}.q_proj.weight", np.ones((32, 64), np.float32)), "stored beside"),
        ("compressed_fp4", drop(f"{L0}.q_proj.weight_global_scale"), "has no .*weight_global_scale"),
        ("compressed_fp4", put(f"{L0}.q_proj.weight_global_scale", np.ones(3, np.float32)), "one number"),
        ("bitsandbytes_int8", put(f"{Q}.SCB", np.ones(31, np.float32)), "one float32 per row"),
        ("bitsandbytes_int8", drop(f"{Q}.SCB"), "without a scale"),
        ("bitsandbytes_int8", drop(f"{Q}.weight"), "but there is none"),
        ("bitsandbytes_int8", put(f"{Q}.weight_format", np.array(2, np.uint8)), "order of a GPU"),
        ("bitsandbytes_nf4", drop(f"{Q}.weight.absmax"), "one maximum for each of 16 blocks"),
        ("bitsandbytes_nf4", drop(f"{Q}.weight.quant_map"), "16 float32 numbers, but there is none"),
        ("bitsandbytes_nf4", drop(f"{Q}.weight"), "which is missing"),
        ("bitsandbytes_nf4", drop(STATE), "of a weight without a .*quant_state"),
        ("bitsandbytes_nf4", put(STATE, np.frombuffer(b"{", np.uint8)), "not valid JSON"),
        ("bitsandbytes_nf4", put(STATE, np.frombuffer(b"[1]", np.uint8)), "a JSON object was expected"),
        ("bitsandbytes_nf4", put(STATE, state(shape=[32, 33])), r"does not hold \[32, 33\]"),
        ("bitsandbytes_nf4", put(STATE, state(shape="much")), "the shape in"),
        ("bitsandbytes_nf4", put(STATE, state(blocksize=63)), "blocksize 63"),
        ("bitsandbytes_nf4", put(STATE, state(quant_type="fp4")), "type 'fp4'"),
        ("bitsandbytes_nf4", put(STATE, state(nested_blocksize=256)), "nested_offset None"),
        ("gptq", drop(f"{UP}.scales"), "has no .*scales'"),
        ("gptq", drop(f"{UP}.qzeros"), "has no .*qzeros'"),
        ("gptq", put(f"{UP}.qzeros", np.ones((2, 3), np.int32)), "neither GPTQ's layout nor AWQ's"),
        ("gptq", put(f"{UP}.qweight", np.ones((8, 32), np.int64)), "matrices of int32"),
        ("gptq", put(f"{UP}.g_idx", np.full(64, 2, np.int32)), "a group from 0 to 1"),
        ("gptq", put(f"{UP}.g_idx", np.zeros(63, np.int32)), "each of 64 inputs"),
        ("awq", put(f"{UP}.qweight", np.ones((64, 5), np.int32)), "neither GPTQ's layout nor AWQ's"),
        ("awq", put(f"{UP}.qzeros", np.ones((3, 4), np.int32)), "neither GPTQ's layout nor AWQ's"),
    ],
)
def test_parts_that_lack_or_misfit_are_named(
    case: str, change: Callable[[Tensors], None], words: str, tmp_path: Path
) -> None:
    path = folder(case, tmp_path) / "model.safetensors"
    open_checkpoint(tmp_path)
    tensors = {name: read_whole(source) for name, source in open_safetensors(path).tensors.items()}
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=words) as caught:
        open_checkpoint(tmp_path)
    assert len(caught.value.faults) == 1
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        ({"quant_method": "auto-round", "packing_format": "auto_round"}, "Auto-Round as 'auto_round'"),
        ({"quant_method": "awq", "version": "gemv_fast"}, "by AWQ as version 'gemv_fast'"),
    ],
)
def test_packings_of_gptq_that_are_not_known_are_refused(
    changes: dict[str, str], words: str, tmp_path: Path
) -> None:
    config = RECORDED["gptq"]["config"]["quantization_config"]
    folder("gptq", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {**config, **changes}}))
    with pytest.raises(CheckpointError, match=words) as caught:
        open_checkpoint(tmp_path)
    assert len(caught.value.faults) == 5


def test_zero_points_that_the_config_promises_must_be_there(tmp_path: Path) -> None:
    weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "channel"}
    config = {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": weights}}}
    tensors = {"q.weight_packed": np.zeros((4, 2), np.int32), "q.weight_shape": np.array([4, 16])}
    write(
        tmp_path, {**tensors, "q.weight_scale": np.ones((4, 1), np.float32)}, {"quantization_config": config}
    )
    with pytest.raises(CheckpointError, match=r"has no 'q\.weight_zero_point'"):
        open_checkpoint(tmp_path)


def test_all_faults_are_named_at_once_and_nothing_is_written(tmp_path: Path) -> None:
    tensors = {
        "a.weight": np.ones((4, 4), E4M3),
        "a.weight_scale_inv": np.ones((3, 1), np.float32),
        "b.qweight": np.zeros((4, 4), np.int32),
        "c.W_q": np.zeros((4, 4), np.uint8),
    }
    write(tmp_path / "model", tensors)
    (tmp_path / "recipe.yaml").write_text(
        "merge_method: linear\nparameters: {weight: 1}\nmodels:\n- {model: model}\n"
    )
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "model")
    assert len(caught.value.faults) == 3
    for command in (["merge", "recipe.yaml", "--out"], ["convert", "model"]):
        first, *rest = command
        words = [first, str(tmp_path / rest[0]), *rest[1:], str(tmp_path / "out")]
        result = CliRunner().invoke(cli, words)
        assert result.exit_code != 0
        assert all(word in result.output for word in ("a.weight_scale_inv", "b.qweight", "HQQ"))
        assert not (tmp_path / "out").exists()
