"""`mergelab inspect` shows a folder's tensors, sites and memory without reading a weight."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from click.testing import CliRunner

from mergelab.aot import ChipReport
from mergelab.cli.main import cli
from mergelab.models import footprint
from mergelab.models.families import model_from_config
from mergelab.sae.training import aot

CONFIG = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tensors = {leaf.hf_name: np.ones(leaf.hf_shape, np.float32) for leaf in model_from_config(CONFIG).table()}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def run(*arguments: object) -> str:
    result = CliRunner().invoke(cli, ["inspect", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_text_groups_what_repeats(folder: Path) -> None:
    text = run(folder, "--sites")
    lines = [line.split() for line in text.splitlines()]
    assert ["family", "llama"] in lines
    assert ["model.layers.*.mlp.up_proj.weight", "float32", "[24,", "16]", "x", "2"] in lines
    assert ["blocks.*.attn.q", "[batch,", "length,", "4,", "4]", "x", "2"] in lines
    assert "model.layers.1.mlp.up_proj.weight  float32 [24, 16]" in run(folder, "--tensors")


def test_json_holds_everything(folder: Path) -> None:
    report = json.loads(run(folder, "--json", "--mesh", "data=1,tensor=8", "--batch", 2, "--length", 8))
    sizes = [int(np.prod(tensor["shape"])) for tensor in report["tensors"].values()]
    assert (report["runs_here"], report["parameters"], report["bytes"]) == (True, sum(sizes), 4 * sum(sizes))
    assert report["sites"]["logits"] == ["batch", "length", 50]
    assert report["config"]["layers"] == 2
    footprint = report["footprint"]
    assert footprint["mesh"] == {"data": 1, "tensor": 8}
    assert footprint["total"] / 8 < footprint["parameters"] < footprint["total"]
    assert footprint["cache"] == 2 * 2 * (2 * 8 * 4 * 4) * 4  # 4 heads are not divided by 8 devices


def test_dtype_halves_the_footprint(folder: Path) -> None:
    stored = json.loads(run(folder, "--json", "--mesh", "tensor=2"))["footprint"]
    half = json.loads(run(folder, "--json", "--mesh", "tensor=2", "--dtype", "bfloat16"))["footprint"]
    assert stored["parameters"] == 2 * half["parameters"]


def test_models_that_cannot_be_run_are_listed_with_the_reason(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | {"model_type": "novel"}))
    text = run(folder)
    assert "novel (cannot be run here)" in text
    assert "fault      " in text and "the supported ones are" in text
    result = CliRunner().invoke(cli, ["inspect", str(folder), "--mesh", "tensor=2"])
    assert (result.exit_code, result.stderr.startswith("error: ")) == (2, True)


@pytest.mark.parametrize("mesh", ["tensor", "tensor=x", "tensor=2,tensor=4", "tensor=0", "=2"])
def test_meshes_are_checked(mesh: str, folder: Path) -> None:
    result = CliRunner().invoke(cli, ["inspect", str(folder), "--mesh", mesh])
    assert result.exit_code == 2
    assert "is not a mesh" in result.stderr


def test_a_topology_needs_a_mesh(folder: Path) -> None:
    result = CliRunner().invoke(cli, ["inspect", str(folder), "--topology", "v5e:4x4"])
    assert result.exit_code == 2
    assert "say with --mesh" in result.stderr


@pytest.mark.parametrize(
    ("step", "sentence"),
    [
        (None, "fits: yes, 3 of 16 GB (model and batch)"),
        (
            4,
            "fits: yes, 10 of 16 GB (model, SAE and batch)",
        ),  # 1 + 4 stay, the step's 5 are more than the pass's 2
        (11, "fits: no, 17 of 16 GB (model, SAE and batch)"),
    ],
)
def test_one_chip_is_said_to_hold_model_sae_and_batch_or_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch, step: int | None, sentence: str
) -> None:
    """What the compiler reports is made up here; tests of the extra ask the compiler."""
    asked = {}

    def compiled(
        program: str, topology: str, mesh: object, request: dict[str, object], **_: object
    ) -> ChipReport:
        asked[program.partition(":")[2]] = topology, mesh, request
        gib = 2**30
        sizes = (1 * gib, gib, 0, gib) if "forward" in program else ((step or 0) * gib, 2 * gib, gib, 4 * gib)
        return ChipReport(1, "TPU v5 lite", *sizes, 1e9, 1e9, (), 0.1)

    for module in (footprint, aot):
        monkeypatch.setattr(module, "compile_for_topology", compiled)
    (folder / "sae.yaml").write_text(
        "sae: {n_latents: 32, k: 2}\n"
        "data: {kind: model, model: m, site: blocks.0.resid_post, text: t, context: 16}\n"
        "train: {batch_size: 60, tokens: 600, seed: 0}\n"
    )
    arguments = [] if step is None else ["--sae", folder / "sae.yaml"]
    assert sentence in run(folder, "--topology", "v5e", *arguments).splitlines()
    found = json.loads(run(folder, "--topology", "v5e", "--json", *arguments))["compiled"]
    assert found["fit"]["memory"] == 16 * 2**30 and found["mesh"] == {"data": 1}
    if step is not None:
        assert (found["batch"], found["length"]) == (4, 16)
        assert asked["lower_step"][:2] == ("v5e", {"data": 1, "latents": 1})
        assert asked["lower_step"][2]["variant"]["d_in"] == 16


def test_an_sae_is_placed_on_chips_that_are_named(folder: Path) -> None:
    result = CliRunner().invoke(cli, ["inspect", str(folder), "--sae", "sae.yaml"])
    assert result.exit_code == 2 and "say with --topology" in result.stderr


def test_an_adapter_is_looked_at_by_itself(tmp_path: Path) -> None:
    config = {
        "peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 4, "lora_alpha": 8,
        "rank_pattern": {"k_proj": 2}, "target_modules": ["q_proj", "k_proj"], "modules_to_save": ["lm_head"],
    }  # fmt: skip
    ranks = {"layers.0.self_attn.q_proj": 4, "layers.1.self_attn.q_proj": 4, "layers.0.self_attn.k_proj": 2}
    tensors = {"base_model.model.lm_head.weight": np.zeros((6, 3), np.float16)}
    for module, rank in ranks.items():
        tensors[f"base_model.model.model.{module}.lora_A.weight"] = np.zeros((rank, 3), np.float16)
        tensors[f"base_model.model.model.{module}.lora_B.weight"] = np.zeros((3, rank), np.float16)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, tmp_path / "adapter_model.safetensors")
    lines = [line.split(maxsplit=1) for line in run(tmp_path).splitlines()]
    found = dict(line for line in lines if len(line) == 2)
    assert (found["base"], found["ranks"], found["scales"]) == ("org/base", "2 to 4", "2 to 4")
    assert found["changes"] == "3 modules: k_proj, q_proj x 2"
    assert found["whole"] == "lm_head.weight"
    report = json.loads(run(tmp_path, "--json"))
    assert report["modules"]["model.layers.0.self_attn.k_proj"] == {"rank": 2, "scale": 4.0}
    assert report["bytes"] == 2 * report["parameters"] == 2 * (18 + 2 * 2 * 12 + 2 * 6)
    refused = CliRunner().invoke(cli, ["inspect", str(tmp_path), "--sites"])
    assert refused.exit_code == 2 and "inspect its base" in refused.output
