"""Every layout against a float64 reference written from its description, in shapes rarely written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from mergelab.checkpoints import open_checkpoint, read_whole

E4M3 = ml_dtypes.float8_e4m3fn


def read(tensors: dict[str, np.ndarray], path: Path, **config: object) -> dict[str, np.ndarray]:
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"quantization_config": config} if config else {}))
    return {name: read_whole(source) for name, source in open_checkpoint(path).tensors.items()}


def random_float8(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(E4M3)


def pack(codes: Sequence[Sequence[int]], bits: int) -> np.ndarray:
    """Each row of codes as one number of `bits` per code, lowest first, in words of 32 bits."""
    words = -(-len(codes[0]) * bits // 32)
    numbers = [sum(int(code) << (bits * i) for i, code in enumerate(row)) for row in codes]
    return np.array([[(n >> (32 * w)) & 0xFFFFFFFF for w in range(words)] for n in numbers], np.uint32).view(
        np.int32
    )


@pytest.mark.parametrize(
    ("shape", "config", "block"),
    [
        ((200, 300), {"quant_method": "fp8", "weight_block_size": [128, 128]}, (128, 128)),
        ((200, 300), {}, (128, 128)),
        ((48, 40), {"quant_method": "fp8", "weight_block_size": [32, 16]}, (32, 16)),
        ((192, 128), {"quant_method": "fp8", "weight_block_size": [128, 128]}, (128, 128)),
        ((96, 128), {"quant_method": "fp8", "weight_block_size": [128, 128]}, (48, 32)),  # the grid decides
        ((2, 40, 24), {"quant_method": "fp8", "weight_block_size": [16, 16]}, (16, 16)),
    ],
)
def test_float8_in_blocks_ragged_at_the_end(
    shape: tuple[int, ...], config: dict[str, object], block: tuple[int, int], tmp_path: Path
) -> None:
    codes = random_float8(*shape)
    grid = (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
    scale = np.random.default_rng(1).uniform(0.5, 2, grid).astype(np.float32)
    name = "experts.up_proj" if len(shape) == 3 else "up_proj.weight"
    found = read({name: codes, f"{name}_scale_inv": scale}, tmp_path, **config)[name]
    each = np.repeat(np.repeat(scale, block[0], -2), block[1], -1)[..., : shape[-2], : shape[-1]]
    np.testing.assert_array_equal(found, (codes.astype(np.float64) * each).astype(np.float32))


def test_the_smallest_block_size_that_fits_is_not_taken_for_the_stated_one(tmp_path: Path) -> None:
    codes, scale = random_float8(192, 8), np.array([[1], [2]], np.float32)
    stated = read({"a.weight": codes, "a.weight_scale_inv": scale}, tmp_path, weight_block_size=[128, 8])
    even = read({"a.weight": codes, "a.weight_scale_inv": scale}, tmp_path, weight_block_size=[96, 8])
    assert not np.array_equal(stated["a.weight"], even["a.weight"])


@pytest.mark.parametrize(
    ("suffix", "scale"),
    [
        ("weight_scale", np.full((), 0.25, np.float32)),
        ("weight_scale", np.full(1, 0.25, ml_dtypes.bfloat16)),
        ("weight_scale", np.linspace(0.1, 1, 6, dtype=np.float32)),
        ("weight_scale", np.linspace(0.1, 1, 6, dtype=np.float16)[:, None]),
        ("scale", np.full((1, 1), 3.0, np.float32)),
        ("qscale_weight", np.full((), 0.5, ml_dtypes.bfloat16)),
        ("scale_weight", np.full((), 0.5, np.float32)),
    ],
)
def test_scales_of_a_tensor_or_of_rows_under_every_name(
    suffix: str, scale: np.ndarray, tmp_path: Path
) -> None:
    codes = random_float8(6, 10)
    beside = {"a.input_scale": np.ones(1, np.float32), "attn.k_scale": np.ones(1, np.float32)}
    found = read({"a.weight": codes, f"a.{suffix}": scale, **beside}, tmp_path)
    assert found.keys() == {"a.weight"}
    each = scale.astype(np.float64).reshape(-1, 1)
    np.testing.assert_array_equal(found["a.weight"], (codes.astype(np.float64) * each).astype(np.float32))


def test_one_scale_per_expert(tmp_path: Path) -> None:
    codes, scale = random_float8(3, 4, 6), np.array([1, 2, 4], np.float32)
    found = read({"e.down_proj": codes, "e.down_proj_scale": scale}, tmp_path)["e.down_proj"]
    np.testing.assert_array_equal(found, codes.astype(np.float32) * scale[:, None, None])
    whole = read({"e.down_proj": codes, "e.down_proj_scale": scale[1:2]}, tmp_path)["e.down_proj"]
    np.testing.assert_array_equal(whole, codes.astype(np.float32) * 2)


def test_nvfp4_as_modelopt_stores_it(tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    packed = random.integers(0, 256, (4, 16), dtype=np.uint8)
    scale, outer = random.uniform(1, 9, (4, 2)).astype(E4M3), np.float32(0.011)
    stored = {"a.weight": packed, "a.weight_scale": scale, "a.weight_scale_2": np.array(outer)}
    found = read({**stored, "a.input_scale": np.ones((), np.float32)}, tmp_path, quant_algo="NVFP4")[
        "a.weight"
    ]
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(4, 32)
    plain = np.array([*values, *(-v for v in values)])[codes]
    wanted = plain * np.repeat((scale.astype(np.float32) * outer).astype(np.float64), 16, 1)
    np.testing.assert_array_equal(found, wanted.astype(np.float32))


@pytest.mark.parametrize("bits", range(1, 9))
def test_integers_of_any_width_packed_by_compressed_tensors(bits: int, tmp_path: Path) -> None:
    random = np.random.default_rng(bits)
    codes, zeros = random.integers(0, 2**bits, (5, 96)), random.integers(0, 2**bits, (5, 3))
    scale = random.uniform(0.01, 0.1, (5, 3)).astype(ml_dtypes.bfloat16)
    stored = {
        "a.weight_packed": pack(codes.tolist(), bits),
        "a.weight_scale": scale,
        "a.weight_shape": np.array([5, 96], np.int64),
        "a.weight_zero_point": pack(zeros.T.tolist(), bits).T.copy(),
    }
    found = read(stored, tmp_path)
    assert found.keys() == {"a.weight"}
    wanted = (codes - np.repeat(zeros, 32, 1)) * np.repeat(scale.astype(np.float64), 32, 1)
    np.testing.assert_array_equal(found["a.weight"], wanted.astype(np.float32))


def test_three_bits_that_leave_two_of_each_word_unused(tmp_path: Path) -> None:
    codes = np.random.default_rng(3).integers(0, 8, (4, 64))
    rows = [
        [sum(int(c) << (3 * i) for i, c in enumerate(row[w : w + 10])) for w in range(0, 64, 10)]
        for row in codes
    ]
    stored = {
        "a.weight_packed": np.array(rows, np.int32),
        "a.weight_scale": np.full((4, 1), 0.5, np.float32),
        "a.weight_shape": np.array([4, 64]),
    }
    np.testing.assert_array_equal(read(stored, tmp_path)["a.weight"], (codes - 4) * 0.5)


@pytest.mark.parametrize("used", [True, False])
def test_groups_of_compressed_tensors_by_activation_order(used: bool, tmp_path: Path) -> None:
    random = np.random.default_rng(4)
    codes, scale = random.integers(0, 16, (4, 64)), random.uniform(0.01, 1, (4, 2)).astype(np.float32)
    groups = random.permutation(np.repeat([0, 1], 32)) if used else np.full(64, -1)
    stored = {
        "a.weight_packed": pack(codes.tolist(), 4),
        "a.weight_scale": scale,
        "a.weight_shape": np.array([4, 64]),
        "a.weight_g_idx": groups.astype(np.int32),
        "a.weight_zero_point": random.integers(-8, 8, (4, 2), dtype=np.int8),  # as older versions store them
    }
    place = groups if used else np.repeat([0, 1], 32)
    zeros = stored["a.weight_zero_point"][:, place].astype(np.float64)
    wanted = (codes - 8 - zeros) * scale[:, place].astype(np.float64)
    np.testing.assert_array_equal(read(stored, tmp_path)["a.weight"], wanted.astype(np.float32))


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_with_its_zero_points_less_one_in_the_first_version(
    bits: int, version: str, ordered: bool, tmp_path: Path
) -> None:
    random = np.random.default_rng(bits)
    inputs, out, groups = 96, 32, 3
    codes, zeros = random.integers(0, 2**bits, (inputs, out)), random.integers(0, 2**bits, (groups, out))
    scale = random.uniform(0.01, 0.1, (groups, out)).astype(np.float16)
    place = np.repeat(np.arange(groups), 32) if ordered else random.integers(0, groups, inputs)
    less = (zeros - 1) % 2**bits if version == "gptq" else zeros
    stored = {
        "a.qweight": pack(codes.T.tolist(), bits).T.copy(),
        "a.qzeros": pack(less.tolist(), bits),
        "a.scales": scale,
        "a.bias": np.zeros(out, np.float16),
    }
    stored |= {} if ordered else {"a.g_idx": place.astype(np.int32)}
    found = read(stored, tmp_path, quant_method="gptq", bits=bits, group_size=32, checkpoint_format=version)
    assert found.keys() == {"a.weight", "a.bias"}
    wanted = ((codes - zeros[place]) * scale[place].astype(np.float64)).T
    np.testing.assert_array_equal(found["a.weight"], wanted.astype(np.float32))
    other = "gptq_v2" if version == "gptq" else "gptq"
    wrong = read(stored, tmp_path, quant_method="gptq", checkpoint_format=other)["a.weight"]
    assert not np.array_equal(wrong, wanted.astype(np.float32))


def test_awq_with_eight_codes_of_a_word_out_of_order(tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    inputs, out, groups = 64, 48, 4
    codes, zeros = random.integers(0, 16, (inputs, out)), random.integers(0, 16, (groups, out))
    scale = random.uniform(0.01, 0.1, (groups, out)).astype(np.float16)

    def interleaved(matrix: np.ndarray) -> np.ndarray:
        return matrix.reshape(len(matrix), -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(matrix.shape)

    stored = {
        "a.qweight": pack(interleaved(codes).tolist(), 4),
        "a.qzeros": pack(interleaved(zeros).tolist(), 4),
        "a.scales": scale,
    }
    found = read(stored, tmp_path, quant_method="awq", bits=4, group_size=16, version="gemm")["a.weight"]
    wanted = ((codes - np.repeat(zeros, 16, 0)) * np.repeat(scale.astype(np.float64), 16, 0)).T
    np.testing.assert_array_equal(found, wanted.astype(np.float32))


def test_maxima_of_nf4_that_fill_several_blocks_of_their_own(tmp_path: Path) -> None:
    random = np.random.default_rng(6)
    shape, length, inner = (24, 130), 32, 16
    size = shape[0] * shape[1]
    codes, blocks = random.integers(0, 16, size), -(-size // length)
    table, outer_table = (np.sort(random.normal(size=n)).astype(np.float32) for n in (16, 256))
    maxima, outer = random.integers(0, 256, blocks, dtype=np.uint8), random.uniform(1, 2, -(-blocks // inner))
    state = {
        "quant_type": "nf4", "blocksize": length, "dtype": "bfloat16", "shape": list(shape),
        "nested_blocksize": inner, "nested_dtype": "float32", "nested_offset": 0.75,
    }  # fmt: skip
    stored = {
        "a.weight": (codes[::2] << 4 | codes[1::2]).astype(np.uint8)[:, None],
        "a.weight.absmax": maxima,
        "a.weight.quant_map": table,
        "a.weight.nested_absmax": outer.astype(np.float32),
        "a.weight.nested_quant_map": outer_table,
        "a.weight.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8),
    }
    found = read(stored, tmp_path)
    assert found.keys() == {"a.weight"}
    largest = (
        outer_table[maxima].astype(np.float64) * np.repeat(outer.astype(np.float32), inner)[:blocks] + 0.75
    )
    wanted = table[codes].astype(np.float64) * np.repeat(largest, length)[:size]
    np.testing.assert_allclose(found["a.weight"], wanted.reshape(shape), rtol=3e-7, atol=2e-7)


def test_layers_of_gpt2_are_turned_as_its_plain_checkpoints_store_them(tmp_path: Path) -> None:
    codes, scale = np.arange(-12, 12, dtype=np.int8).reshape(4, 6), np.arange(1, 5, dtype=np.float32)
    stored = {"h.0.attn.c_attn.weight": codes, "h.0.attn.c_attn.SCB": scale}
    stored |= {
        "h.0.attn.c_attn.weight_format": np.array(0, np.uint8),
        "wte.weight": np.ones((3, 4), np.float32),
    }
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    found = open_checkpoint(tmp_path).tensors
    assert found["wte.weight"].shape == (3, 4)
    assert found["h.0.attn.c_attn.weight"].shape == (6, 4)
    wanted = (codes.astype(np.float64) * scale[:, None] / 127).T
    np.testing.assert_allclose(read_whole(found["h.0.attn.c_attn.weight"]), wanted, rtol=3e-7)


def test_exponents_of_mxfp4_reach_from_the_smallest_to_not_a_number(tmp_path: Path) -> None:
    blocks = np.full((1, 1, 3, 16), 0x21, np.uint8)  # 0.5 and 1
    stored = {"e.down_proj_blocks": blocks, "e.down_proj_scales": np.array([[[0, 127, 255]]], np.uint8)}
    found = read(stored, tmp_path)["e.down_proj"]
    assert found.shape == (1, 96, 1)
    np.testing.assert_array_equal(found[0, 32:36, 0], [0.5, 1, 0.5, 1])
    np.testing.assert_array_equal(found[0, :2, 0], np.float32([2.0**-128, 2.0**-127]))
    assert np.isnan(found[0, 64:, 0]).all()
