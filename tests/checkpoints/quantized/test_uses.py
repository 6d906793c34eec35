"""Merging, loading, converting, inspecting, adapters and abliteration take quantized models as plain ones."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from mergelab.abliteration.ablation import Ablation
from mergelab.abliteration.write import write_abliterated
from mergelab.checkpoints import open_checkpoint, read_whole, with_lora
from mergelab.cli.main import cli
from mergelab.interp.vectors import unit
from mergelab.merging import extract_lora
from mergelab.models.families import model_from_config
from mergelab.models.load import load_model
from mergelab.sharding import make_mesh
from tests.checkpoints.quantized.test_recorded import RECORDED, folder

NF4, INT8 = "bitsandbytes_nf4", "bitsandbytes_int8"
Q = "model.layers.0.self_attn.q_proj.weight"
BF16 = ml_dtypes.bfloat16


@pytest.fixture
def nf4(tmp_path: Path) -> Path:
    return folder(NF4, tmp_path / "nf4")


def run(*arguments: object) -> str:
    result = CliRunner().invoke(cli, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    return result.stdout


def values(path: Path) -> dict[str, np.ndarray]:
    return {name: read_whole(source) for name, source in open_checkpoint(path).tensors.items()}


def config_of(path: Path) -> dict[str, object]:
    return dict(json.loads((path / "config.json").read_text()))


def test_convert_stores_what_was_dequantized_as_float32_and_the_rest_as_it_is(
    nf4: Path, tmp_path: Path
) -> None:
    run("convert", nf4, tmp_path / "plain")
    stored, wanted = load_file(tmp_path / "plain" / "model.safetensors"), values(nf4)
    assert stored.keys() == wanted.keys()
    for name, array in stored.items():
        assert array.dtype == (
            BF16 if array.shape == (32, 32) and name != Q and "_proj" not in name else np.float32
        )
        assert array.tobytes() == wanted[name].tobytes()
    config = config_of(tmp_path / "plain")
    assert "quantization_config" in RECORDED[NF4]["config"]
    assert "quantization_config" not in config
    assert config["dtype"] == "float32"


def test_convert_stores_the_dtype_it_is_given(nf4: Path, tmp_path: Path) -> None:
    run("convert", nf4, tmp_path / "half", "--dtype", "bfloat16")
    stored, wanted = load_file(tmp_path / "half" / "model.safetensors"), values(nf4)
    assert all(stored[name].tobytes() == wanted[name].astype(BF16).tobytes() for name in wanted)


def test_a_merge_of_two_quantizations_is_that_of_their_values(nf4: Path, tmp_path: Path) -> None:
    int8 = folder(INT8, tmp_path / "int8")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "merge_method: linear\nmodels:\n- {model: nf4, parameters: {weight: 0.25}}\n"
        "- {model: int8, parameters: {weight: 0.75}}\n"
    )
    run("merge", recipe, "--out", tmp_path / "merged")
    stored, one, other = load_file(tmp_path / "merged" / "model.safetensors"), values(nf4), values(int8)
    assert stored.keys() == one.keys()
    wanted = (np.float64(0.25) * one[Q] + np.float64(0.75) * other[Q]).astype(np.float32)
    assert stored[Q].dtype == np.float32
    np.testing.assert_allclose(stored[Q], wanted, rtol=3e-7, atol=1e-8)
    assert np.abs(stored[Q] - one[Q]).max() > 1e-4
    assert stored["model.embed_tokens.weight"].dtype == BF16
    config = config_of(tmp_path / "merged")
    assert "quantization_config" not in config
    assert config["dtype"] == "float32"


def test_passthrough_writes_dequantized_layers(nf4: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "merge_method: passthrough\nslices:\n"
        + "- sources: [{model: nf4, layer_range: [0, 1]}]\n" * 2
        + "dtype: float16\n"
    )
    run("merge", recipe, "--out", tmp_path / "merged")
    stored, one = load_file(tmp_path / "merged" / "model.safetensors"), values(nf4)
    for layer in range(2):
        found = stored[Q.replace(".0.", f".{layer}.")]
        assert found.tobytes() == one[Q].astype(np.float16).tobytes()


def test_a_loaded_model_is_the_plain_one(nf4: Path, tmp_path: Path) -> None:
    save_file(values(nf4), tmp_path / "model.safetensors")
    config = config_of(nf4)
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokens = jnp.array([[1, 5, 9]])
    logits = []
    for path in (nf4, tmp_path):
        model, params = load_model(path, dtype="float32")
        logits.append(np.asarray(model.apply(params, tokens).logits))
    np.testing.assert_array_equal(logits[0], logits[1])
    _, as_stored = load_model(nf4, mesh=make_mesh({"tensor": 2, "fsdp": 4}))
    for name in ("q", "o"):
        kernel = as_stored["blocks_0"]["attn"][name]["kernel"]
        assert len({str(shard.index) for shard in kernel.addressable_shards}) > 1
        np.testing.assert_array_equal(kernel, values(nf4)[Q.replace("q_", f"{name}_")].T)
    assert as_stored["blocks_0"]["attn"]["q"]["kernel"].dtype == jnp.float32
    assert as_stored["embed"]["embedding"].dtype == jnp.bfloat16


def test_inspect_names_the_stored_format_and_the_true_shape(nf4: Path) -> None:
    text = run("inspect", nf4)
    assert "down_proj.weight             float32 [32, 48], stored as nf4 in blocks of 64" in text
    assert "uint8 4.38 kB" in text
    report = json.loads(run("inspect", nf4, "--json"))
    assert report["runs_here"]
    assert report["tensors"][Q] == {"dtype": "float32", "shape": [32, 32], "stored": "nf4 in blocks of 64"}
    assert report["tensors"]["model.norm.weight"] == {"dtype": "float32", "shape": [32]}
    assert report["bytes"] < 10_000


def test_inspect_lists_what_cannot_be_read_as_it_is_stored(tmp_path: Path) -> None:
    tensors = {
        "model.layers.0.mlp.up_proj.W_q": np.zeros((4, 4), np.uint8),
        "model.norm.weight": np.ones(4, np.float32),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    report = json.loads(run("inspect", tmp_path, "--json"))
    assert report["tensors"]["model.layers.0.mlp.up_proj.W_q"] == {"dtype": "uint8", "shape": [4, 4]}
    assert not report["runs_here"]
    assert "HQQ" in report["faults"][0]


def test_an_adapter_is_added_to_dequantized_weights(nf4: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    random = np.random.default_rng(1)
    a, b = random.normal(size=(2, 32)).astype(np.float32), random.normal(size=(32, 2)).astype(np.float32)
    module = f"base_model.model.{Q.removesuffix('.weight')}"
    save_file(
        {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}, adapter / "adapter_model.safetensors"
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    merged = read_whole(with_lora(open_checkpoint(nf4), adapter).tensors[Q])
    np.testing.assert_allclose(merged, values(nf4)[Q] + 2 * (b.astype(np.float64) @ a), rtol=1e-5, atol=1e-5)


def test_an_adapter_is_extracted_against_a_quantized_base(nf4: Path, tmp_path: Path) -> None:
    tuned = values(nf4)
    random = np.random.default_rng(2)
    change = (random.normal(size=(32, 1)) @ random.normal(size=(1, 32))).astype(np.float32)
    tuned[Q] = tuned[Q] + change
    (tmp_path / "tuned").mkdir()
    save_file(tuned, tmp_path / "tuned" / "model.safetensors")
    config = {key: value for key, value in config_of(nf4).items() if key != "quantization_config"}
    (tmp_path / "tuned" / "config.json").write_text(json.dumps(config))
    found = extract_lora(tmp_path / "tuned", nf4, tmp_path / "adapter", rank=1)
    assert list(found.ranks) == [Q.removesuffix(".weight")]
    merged = read_whole(with_lora(open_checkpoint(nf4), tmp_path / "adapter").tensors[Q])
    np.testing.assert_allclose(merged, tuned[Q], atol=1e-5)


def test_abliteration_edits_dequantized_weights(nf4: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(nf4)
    model = model_from_config(checkpoint.config, "config.json").for_tensors(checkpoint.tensors)
    direction = unit(jnp.asarray(np.random.default_rng(3).normal(size=(2, 32)), jnp.float32))
    ablation = Ablation(direction, jnp.float32(0), jnp.ones(1), jnp.ones(1))
    out = write_abliterated(model, checkpoint, tmp_path / "out", ablation)
    stored, before = load_file(out / "model.safetensors"), values(nf4)
    name = "model.layers.0.mlp.down_proj.weight"
    removed = np.asarray(direction)[-1].astype(np.float64)
    np.testing.assert_allclose(
        stored[name], before[name] - np.outer(removed, removed @ before[name]), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(stored[Q], before[Q])
    assert "quantization_config" not in config_of(out)
    assert config_of(out)["dtype"] == "float32"


def test_a_plain_model_and_a_gptq_one_merge_on_dequantized_weights(tmp_path: Path) -> None:
    gptq = open_checkpoint(folder("gptq", tmp_path / "gptq"))
    name = "model.layers.1.mlp.up_proj.weight"
    plain = {n: np.random.default_rng(4).normal(size=t.shape).astype(BF16) for n, t in gptq.tensors.items()}
    (tmp_path / "plain").mkdir()
    save_file(plain, tmp_path / "plain" / "model.safetensors")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "merge_method: linear\nparameters: {weight: 0.5}\nmodels:\n- {model: plain}\n- {model: gptq}\n"
    )
    run("merge", recipe, "--out", tmp_path / "merged")
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert stored.keys() == plain.keys()
    wanted = (plain[name].astype(np.float64) + read_whole(gptq.tensors[name])) / 2
    np.testing.assert_allclose(stored[name], wanted, rtol=3e-7, atol=1e-7)
