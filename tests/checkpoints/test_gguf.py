"""GGUF files: every type of tensor, every family, damaged files, and what commands make of them."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner

import mergelab as ml
from mergelab.checkpoints import open_checkpoint, read_whole
from mergelab.checkpoints.gguf.tensors import KINDS
from mergelab.checkpoints.gguf.write import write_gguf
from mergelab.cli.main import cli
from mergelab.errors import CheckpointError, DependencyError, NonFiniteError, OutputError
from tests.checkpoints.gguf_blocks import decode

ROWS, WIDTH = 6, 512
QUANTIZED = [kind for kind in KINDS.values() if kind.elements > 1]
NUMBER = {kind.name: number for number, kind in KINDS.items()}
HALVES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}
"""Bytes of a block at which a float16 scale begins, where that is not its beginning."""


def write(path: Path, metadata: dict[str, Any], tensors: dict[str, tuple[np.ndarray, Any]]) -> Path:
    """A file of the gguf package's own writer; tensors are arrays, or bytes of blocks, with their type."""
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if isinstance(value, str) and key != "general.architecture":
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


LLAMA: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 1,
    "llama.context_length": 64,
    "llama.embedding_length": WIDTH,
    "llama.feed_forward_length": ROWS,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 4,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 10000.0,
}


def blocks(kind: str, rows: int, width: int, seed: int = 0) -> np.ndarray:
    """Random blocks with scales of ordinary size, uint8 `[rows, bytes of a row]`."""
    rng, known = np.random.default_rng(seed), KINDS[NUMBER[kind]]
    raw = rng.integers(0, 256, (rows * width // known.elements, known.nbytes), dtype=np.uint8)
    usual = (0, 2) if kind in ("Q4_1", "Q5_1", "Q4_K", "Q5_K") else (0,)
    for at in HALVES.get(kind, usual):
        scales = rng.uniform(-0.1, 0.1, len(raw)).astype(np.float16)
        raw[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
def test_quantized_blocks_are_read_as_the_format_says(kind: Any, tmp_path: Path) -> None:
    raw = blocks(kind.name, ROWS, WIDTH)
    path = write(
        tmp_path / "m.gguf",
        LLAMA,
        {"blk.0.ffn_up.weight": (raw, gguf.GGMLQuantizationType[kind.name])},
    )
    source = open_checkpoint(path).tensors["model.layers.0.mlp.up_proj.weight"]
    assert (source.shape, source.dtype) == ((ROWS, WIDTH), np.float32)
    found = read_whole(source)
    package = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind.name])
    assert np.array_equal(found.view(np.uint32), package.view(np.uint32))
    one_by_one = [x for block in raw.reshape(-1, kind.nbytes) for x in decode(kind.name, block.tobytes())]
    np.testing.assert_allclose(found.reshape(-1), one_by_one, rtol=1e-5, atol=1e-6)
    for start, count in ((0, 1), (1, 40), (31, 2), (255, 700), (ROWS * WIDTH - 5, 5)):
        piece = np.empty(count, np.float32)
        source.read_into(start, piece)
        assert np.array_equal(piece, package.reshape(-1)[start : start + count])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=str)
def test_plain_tensors_keep_their_type_and_bytes(dtype: Any, tmp_path: Path) -> None:
    values = np.random.default_rng(1).normal(size=(ROWS, WIDTH)).astype(dtype)
    kind = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[str(np.dtype(dtype))]
    raw = values.view(np.uint8) if kind == "BF16" else values
    path = write(
        tmp_path / "m.gguf",
        LLAMA,
        {
            "blk.0.ffn_up.weight": (raw, gguf.GGMLQuantizationType[kind]),
            "output_norm.weight": (np.ones(WIDTH, np.float32), None),
        },
    )
    opened = open_checkpoint(path)
    found = read_whole(opened.tensors["model.layers.0.mlp.up_proj.weight"])
    assert found.dtype == dtype and found.tobytes() == values.tobytes()
    assert opened.config["torch_dtype"] == str(np.dtype(dtype))


def test_quantized_tensors_without_the_package_name_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    types = gguf.GGMLQuantizationType
    path = write(
        tmp_path / "m.gguf",
        LLAMA,
        {
            "blk.0.ffn_up.weight": (blocks("Q5_0", ROWS, WIDTH), types.Q5_0),
            "blk.0.ffn_down.weight": (blocks("Q8_0", ROWS, WIDTH), types.Q8_0),
            "blk.0.ffn_gate.weight": (np.ones((ROWS, WIDTH), np.float32), types.F32),
        },
    )
    monkeypatch.setitem(sys.modules, "gguf.quants", None)
    tensors = open_checkpoint(path).tensors
    assert (read_whole(tensors["model.layers.0.mlp.gate_proj.weight"]) == 1).all()
    read_whole(tensors["model.layers.0.mlp.down_proj.weight"])  # a plain kind, which needs no package
    with pytest.raises(DependencyError, match=r"pip install 'mergelab\[gguf\]'"):
        read_whole(tensors["model.layers.0.mlp.up_proj.weight"])


def test_unknown_types_are_refused_all_by_name(tmp_path: Path) -> None:
    bad = np.zeros((ROWS, WIDTH // 256 * 66), np.uint8)
    tensors = {
        "blk.0.ffn_up.weight": (bad, gguf.GGMLQuantizationType.IQ2_XXS),
        "blk.0.ffn_gate.weight": (bad, gguf.GGMLQuantizationType.IQ2_XXS),
        "blk.0.ffn_down.weight": (np.zeros((ROWS, WIDTH), np.float64), None),
    }
    with pytest.raises(CheckpointError) as refused:
        open_checkpoint(write(tmp_path / "m.gguf", LLAMA, tensors))
    assert "2 tensors of the type IQ2_XXS" in str(refused.value) and "type F64" in str(refused.value)
    assert "'blk.0.ffn_up.weight'" in str(refused.value) and "Q6_K" in str(refused.value)


# Families.

BASE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
GEMMA = {**BASE, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.125 * i for i in range(8)],
    "long_factor": [2.0 + 0.25 * i for i in range(8)],
    "original_max_position_embeddings": 32,
    "attention_factor": 1.25,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**BASE, "model_type": "llama"},
    "llama, tied": {**BASE, "model_type": "llama", "tie_word_embeddings": True, "head_dim": 32},
    "llama3": {**BASE, "model_type": "llama", "rope_theta": 500000.0, "rope_scaling": LLAMA3},
    "llama, longrope": {**BASE, "model_type": "llama", "rope_scaling": LONGROPE},
    "llama, biases": {**BASE, "model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mixtral": {**BASE, "model_type": "mixtral", "num_local_experts": 4, "sliding_window": None},
    "qwen2": {**BASE, "model_type": "qwen2"},
    "qwen2, yarn": {
        **BASE,
        "model_type": "qwen2",
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    },
    "qwen3": {**BASE, "model_type": "qwen3", "head_dim": 32},
    "gemma2": {**GEMMA, "model_type": "gemma2"},
    "gemma3": {
        **GEMMA,
        "model_type": "gemma3_text",
        "rope_theta": 1e6,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "phi3": {**BASE, "model_type": "phi3", "original_max_position_embeddings": 32, "rope_scaling": LONGROPE},
    "gpt2": {"model_type": "gpt2", "vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4},
    "gpt_neox": {**BASE, "model_type": "gpt_neox", "rotary_pct": 0.5},
    "olmo2": {**BASE, "model_type": "olmo2", "rope_theta": 500000.0},
    "granite": {
        **BASE,
        "model_type": "granite",
        "attention_multiplier": 0.25,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 8.0,
    },
    "starcoder2": {**BASE, "model_type": "starcoder2", "sliding_window": 16},
    "phi": {**BASE, "model_type": "phi", "partial_rotary_factor": 0.5},
    "stablelm": {**BASE, "model_type": "stablelm", "use_qkv_bias": True, "use_parallel_residual": True},
    "cohere": {**BASE, "model_type": "cohere", "logit_scale": 0.25, "rope_theta": 75000.0},
    "cohere, normalized heads": {**BASE, "model_type": "cohere", "use_qk_norm": True, "rope_theta": 75000.0},
    "glm4": {**BASE, "model_type": "glm4", "head_dim": 32},
    "qwen3_moe": {
        **BASE,
        "model_type": "qwen3_moe",
        "head_dim": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    "bloom": {"model_type": "bloom", "vocab_size": 96, "hidden_size": 64, "n_layer": 2, "n_head": 4},
}
for _name in ("gpt_neox",):
    for _field in ("num_key_value_heads", "rms_norm_eps"):
        FAMILIES[_name].pop(_field)
for _name in ("starcoder2", "phi", "stablelm", "cohere", "cohere, normalized heads"):
    FAMILIES[_name].pop("rms_norm_eps")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of tiny models with random weights, by family."""
    made: dict[str, Path] = {}
    root = tmp_path_factory.mktemp("families")

    def folder(name: str) -> Path:
        if name not in made:
            model = ml.model_from_config(FAMILIES[name])
            rng = np.random.default_rng(len(made))
            params: dict[str, Any] = {}
            for leaf in model.table():  # norms and biases among them: a lost shift or order is seen
                place = params
                for key in leaf.path[:-1]:
                    place = place.setdefault(key, {})
                place[leaf.path[-1]] = rng.normal(0.3, 0.2, leaf.shape).astype(np.float32)
            made[name] = ml.save_model(model, params, root / str(len(made)))
        return made[name]

    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_comes_back_from_a_gguf_file(
    name: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, path = folders(name), tmp_path / "m.gguf"
    write_gguf(open_checkpoint(folder), path)
    before, after = open_checkpoint(folder), open_checkpoint(path)
    assert set(before.tensors) == set(after.tensors)
    atol = 1.2e-7 if "gemma" in name else 0.0  # (w + 1) - 1
    for tensor, source in after.tensors.items():
        np.testing.assert_allclose(read_whole(source), read_whole(before.tensors[tensor]), rtol=0, atol=atol)
    # What is computed is decided by these alone: widths, windows, rotations, scales, caps, ties.
    old, new = (ml.model_from_config(opened.config).config for opened in (before, after))
    assert new == old
    assert ml.load_model(path)[0].config == old


def test_names_and_layouts_are_those_of_llama_cpp(folders: Callable[[str], Path], tmp_path: Path) -> None:
    architectures = {"llama": "LLAMA", "mixtral": "LLAMA", "gemma3": "GEMMA3", "phi3": "PHI3"}
    architectures |= {"gpt2": "GPT2", "gpt_neox": "GPTNEOX", "qwen3": "QWEN3"}
    architectures |= {"olmo2": "OLMO2", "granite": "GRANITE", "starcoder2": "STARCODER2", "phi": "PHI2"}
    architectures |= {"stablelm": "STABLELM", "cohere": "COMMAND_R", "glm4": "GLM4", "bloom": "BLOOM"}
    architectures |= {"qwen3_moe": "QWEN3MOE"}
    for name, architecture in architectures.items():
        path = tmp_path / f"{name}.gguf"
        write_gguf(open_checkpoint(folders(name)), path)
        reader = gguf.GGUFReader(path)
        known = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture], 2)
        for tensor, source in open_checkpoint(folders(name)).tensors.items():
            stem, _, ending = tensor.rpartition(".")
            if ".experts." in stem:  # the package knows the merged name alone
                layer, which = stem.split(".")[2], stem.split(".")[-1]
                place = (
                    "layers.{}.feed_forward.experts.{}"
                    if name == "mixtral"
                    else "model.layers.{}.mlp.experts.{}"
                )
                stem = place.format(layer, which)
            found = known.get_name(stem) or known.get_name(stem.removeprefix("transformer."))
            assert found in {t.name.rpartition(".")[0] for t in reader.tensors}, tensor
            assert f".{ending}" in (".weight", ".bias") and source.shape
        values = {tensor.name: np.asarray(tensor.data) for tensor in reader.tensors}
        theirs = {t: read_whole(s) for t, s in open_checkpoint(folders(name)).tensors.items()}
        if name == "llama":  # neighboring rows are the pairs that are rotated
            ours = theirs["model.layers.1.self_attn.k_proj.weight"].reshape(2, 2, 8, 64)
            assert np.array_equal(values["blk.1.attn_k.weight"].reshape(2, 8, 2, 64), ours.swapaxes(1, 2))
        if name == "gemma3":
            ours = theirs["model.layers.0.self_attn.q_norm.weight"]
            assert np.array_equal(values["blk.0.attn_q_norm.weight"], ours + np.float32(1))
        if name == "gpt2":
            assert np.array_equal(values["blk.0.ffn_up.weight"], theirs["transformer.h.0.mlp.c_fc.weight"].T)
        if name == "gpt_neox":
            ours = theirs["gpt_neox.layers.0.attention.query_key_value.bias"].reshape(4, 3, 16)
            assert np.array_equal(values["blk.0.attn_qkv.bias"].reshape(3, 4, 16), ours.swapaxes(0, 1))
        if name == "mixtral":
            ours = theirs["model.layers.0.block_sparse_moe.experts.3.w2.weight"]
            assert np.array_equal(values["blk.0.ffn_down_exps.weight"][3], ours)


def test_matrices_are_written_in_the_dtype_asked_for(folders: Callable[[str], Path], tmp_path: Path) -> None:
    source = open_checkpoint(folders("llama"))
    whole = read_whole(source.tensors["model.layers.0.mlp.up_proj.weight"])
    for dtype, kind, error in (("float16", "F16", 5e-4), ("bfloat16", "BF16", 4e-3), ("q8_0", "Q8_0", 5e-3)):
        path = tmp_path / f"{dtype}.gguf"
        write_gguf(source, path, dtype=dtype)  # type: ignore[arg-type]
        types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
        assert types["blk.0.ffn_up.weight"] == kind and types["blk.0.attn_norm.weight"] == "F32"
        found = read_whole(open_checkpoint(path).tensors["model.layers.0.mlp.up_proj.weight"])
        assert 0 < np.abs(found.astype(np.float32) - whole).max() < error * np.abs(whole).max() * 2


def test_a_value_beyond_float16_is_refused_and_nothing_is_left(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    model, params = ml.load_model(folders("llama"))
    params["blocks_0"]["mlp"]["up"]["kernel"] *= 1e6
    folder = ml.save_model(model, params, tmp_path / "large")
    with pytest.raises(NonFiniteError, match="up_proj"):
        write_gguf(open_checkpoint(folder), tmp_path / "m.gguf", dtype="float16")
    assert [entry.name for entry in tmp_path.iterdir()] == ["large"]


def test_a_file_that_is_there_is_replaced_only_when_asked(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"mine")
    with pytest.raises(OutputError, match="is there already"):
        write_gguf(open_checkpoint(folders("qwen2")), path)
    assert path.read_bytes() == b"mine"
    write_gguf(open_checkpoint(folders("qwen2")), path, overwrite=True)
    assert open_checkpoint(path).config["model_type"] == "qwen2"


# Damage.


@pytest.fixture(scope="module")
def sound(folders: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("sound") / "m.gguf"
    write_gguf(open_checkpoint(folders("llama")), path, dtype="q8_0")
    return path.read_bytes()


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.001, 0.01, 0.02, 0.3, 0.9, 0.9999])
def test_a_truncated_file_is_one_sentence(share: float, sound: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(sound[: int(len(sound) * share)])
    with pytest.raises(CheckpointError) as refused:
        open_checkpoint(path)
    assert str(path) in str(refused.value) and len(refused.value.faults) == 1


def test_no_damage_to_the_header_is_more_than_a_refusal(sound: bytes, tmp_path: Path) -> None:
    path, rng = tmp_path / "m.gguf", np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(sound)
        for place in rng.integers(0, 3000, 3):
            damaged[place] = int(rng.integers(0, 256))
        path.write_bytes(damaged)
        try:
            open_checkpoint(path)
        except CheckpointError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (0, b"GGML", "does not begin as a GGUF file"),
        (4, struct.pack("<I", 1), "version 1"),
        (4, struct.pack(">I", 3), "big-endian"),
        (8, struct.pack("<Q", 2**60), "more than any genuine one"),
        (16, struct.pack("<Q", 2**40), "more than any genuine one"),
        (24, struct.pack("<Q", 2**50), "has a string of"),
    ],
)
def test_a_hostile_header_is_refused_at_once(
    place: int, value: bytes, words: str, sound: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(sound[:place] + value + sound[place + len(value) :])
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "tensors", "words"),
    [
        ({"general.architecture": "mamba"}, {}, "architecture 'mamba'.*but GGUF files are read of llama"),
        ({"general.architecture": "clip"}, {}, "the picture encoder"),
        ({"llama.attention.head_count": "four"}, {}, "head_count = 'four', but expected a whole number"),
        ({"llama.rope.scaling.type": "new"}, {}, "scaling.type = 'new'"),
        ({}, {"blk.0.ssm_a": np.zeros(4, np.float32)}, "'blk.0.ssm_a', which is not known"),
        ({}, {"blk.0.attn_q.weight": np.zeros((3, 32), np.float32)}, "4 heads do not share evenly"),
        ({"split.count": 2}, {}, "one of the 2 files of a split model"),
    ],
)
def test_what_cannot_be_a_model_is_said(
    change: dict[str, Any], tensors: dict[str, np.ndarray], words: str, tmp_path: Path
) -> None:
    given = {name: (array, None) for name, array in tensors.items()}
    given["output_norm.weight"] = (np.ones(8, np.float32), None)
    path = write(tmp_path / "m.gguf", {**LLAMA, **change}, given)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(path)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    metadata = {key: value for key, value in LLAMA.items() if "block_count" not in key}
    path = write(tmp_path / "m.gguf", metadata, {"output_norm.weight": (np.ones(8, np.float32), None)})
    with pytest.raises(CheckpointError, match=r"lacks llama\.block_count"):
        open_checkpoint(path)


def test_a_split_model_is_opened_by_any_of_its_files(folders: Callable[[str], Path], tmp_path: Path) -> None:
    whole = tmp_path / "whole.gguf"
    write_gguf(open_checkpoint(folders("qwen2")), whole)
    reader = gguf.GGUFReader(whole)
    metadata = {
        key: field.contents() for key, field in reader.fields.items() if not key.startswith(("GGUF", "tok"))
    }
    half = len(reader.tensors) // 2
    for number, part in enumerate((reader.tensors[:half], reader.tensors[half:]), 1):
        given = {t.name: (np.asarray(t.data), None) for t in part}
        kept = metadata if number == 1 else {"general.architecture": "qwen2"}
        write(tmp_path / f"m-{number:05d}-of-00002.gguf", {**kept, "split.count": 2}, given)
    first, second = (tmp_path / f"m-{n:05d}-of-00002.gguf" for n in (1, 2))
    for path in (first, second):
        assert set(open_checkpoint(path).tensors) == set(open_checkpoint(whole).tensors)
    assert len(ml.checkpoints.weights_sha256(first)) == 64
    second.unlink()
    with pytest.raises(CheckpointError, match=r"m-00002-of-00002\.gguf is missing"):
        open_checkpoint(first)


def test_a_folder_of_gguf_files_says_to_name_one(folders: Callable[[str], Path], tmp_path: Path) -> None:
    write_gguf(open_checkpoint(folders("qwen2")), tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match=r"name one, such as .*m\.gguf"):
        open_checkpoint(tmp_path)


# Commands.


def run(*arguments: object) -> str:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_commands_take_gguf_files_as_models(folders: Callable[[str], Path], tmp_path: Path) -> None:
    model, other = tmp_path / "m.gguf", tmp_path / "other.gguf"
    run("convert", folders("llama"), model, "--to", "gguf")
    doubled = {**ml.load_model(folders("llama"))[1]}
    doubled["embed"] = {"embedding": doubled["embed"]["embedding"] * 2}
    ml.save_model(ml.load_model(model)[0], doubled, tmp_path / "doubled")
    run("convert", tmp_path / "doubled", other, "--to", "gguf", "--dtype", "float16")
    assert "llama" in run("inspect", model)
    recipe = tmp_path / "recipe.yml"
    models = [f"  - {{model: {path}, parameters: {{weight: 0.5}}}}\n" for path in (model, other)]
    recipe.write_text("merge_method: linear\ndtype: float32\nmodels:\n" + "".join(models))
    run("merge", recipe, "-o", tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config and config["torch_dtype"] == "float32"
    found = ml.load_model(tmp_path / "merged")[1]["embed"]["embedding"]
    wanted = ml.load_model(model)[1]["embed"]["embedding"]
    np.testing.assert_allclose(found, np.asarray(wanted) * 1.5, rtol=2e-3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["s3://bucket/m.gguf", "--to", "gguf"], "a GGUF file is written to this machine"),
        (["m.gguf", "--to", "gguf", "--mesh", "data=1"], "takes no --mesh"),
        (["out", "--to", "gguf"], "choose out.gguf"),
        (["out", "--dtype", "q8_0"], "add --to gguf"),
    ],
)
def test_what_convert_cannot_do_with_gguf_is_said(
    arguments: list[str], words: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    result = CliRunner().invoke(cli, ["convert", str(folders("qwen2")), *arguments])
    assert result.exit_code == 2 and words in result.output


def test_quantized_weights_become_float32_and_others_stay(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    run("convert", folders("llama"), tmp_path / "q.gguf", "--to", "gguf", "--dtype", "q8_0")
    run("convert", folders("llama"), tmp_path / "h.gguf", "--to", "gguf", "--dtype", "float16")
    for name, dtype in (("q", np.float32), ("h", np.float16)):
        run("convert", tmp_path / f"{name}.gguf", tmp_path / name)
        tensors = open_checkpoint(tmp_path / name).tensors
        assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == dtype
        assert tensors["model.norm.weight"].dtype == np.float32
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert "quantization_config" not in config
