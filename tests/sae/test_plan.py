"""Training steps compiled ahead of time: here for simulated devices, with libtpu for TPU slices."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import asdict
from typing import Any

import pytest
from click.testing import CliRunner

from mergelab.cli.main import cli
from mergelab.errors import MergelabError, MeshError, SAEError
from mergelab.sae.training.aot import lower_step, plan_step
from mergelab.sae.training.config import load_config
from mergelab.sharding import make_mesh

CONFIG: dict[str, Any] = {
    "sae": {"variant": "topk", "d_in": 32, "n_latents": 256, "k": 4},
    "data": {"kind": "toy"},
    "train": {"batch_size": 64, "tokens": 64000},
}


@pytest.mark.parametrize("options", [{"variant": "topk"}, {"variant": "matryoshka", "prefixes": [64, 256]}])
def test_each_device_holds_its_part_of_the_state(options: dict[str, Any]) -> None:
    config = load_config({**CONFIG, "sae": {**CONFIG["sae"], **options}})
    variant = config.sae.build(32, None)
    # As it travels to the compiler's process: tuples become lists.
    request = json.loads(
        json.dumps(
            {"variant": {"name": variant.name, **asdict(variant)}, "recipe": asdict(config.train.build())}
        )
    )
    lowered = lower_step(make_mesh({"data": 2, "latents": 4}), request)
    arguments = lowered.compile().memory_analysis().argument_size_in_bytes
    latents = 256 // 4
    split = 4 * latents * (32 + 1 + 32) + latents  # four copies of the parameters, and the counters
    whole = 4 * 32 + 2 * 32  # four of b_pre, and two normalizations
    batch = 2 * 64 // 2 * 32
    assert 4 * (split + whole) <= arguments <= 4 * (split + whole + batch) + 1000


def test_what_a_plan_needs_is_named() -> None:
    with pytest.raises(SAEError, match=r"sae\.d_in is missing"):
        plan_step(load_config({**CONFIG, "sae": {"n_latents": 8, "k": 2}}), "v5e:2x4", {"latents": 8})
    with pytest.raises(SAEError, match="mesh is missing"):
        plan_step(load_config(CONFIG), "v5e:2x4")
    with pytest.raises(MeshError, match="'v9z' chips are not known"):
        plan_step(load_config(CONFIG), "v9z:2x4", {"latents": 8})


def test_without_the_compiler_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MergelabError, match=r"mergelab\[tpu-aot\]"):
        plan_step(load_config(CONFIG), "v5e:2x4", {"latents": 8})


@pytest.mark.extra  # tpu-aot
def test_sixteen_million_latents_fit_a_pod() -> None:
    result = CliRunner().invoke(
        cli, ["sae", "plan", "configs/sae/pod-16m.yaml", "--topology", "v5p:4x8x8", "--json"]
    )
    assert result.exit_code == 0, result.output
    plan = json.loads(result.output)
    state = 4 * 4 * plan["parameters"] / 256
    assert plan["report"]["chips"] == 256
    assert state <= plan["report"]["arguments"] < 1.1 * state
    assert plan["peak"] < 24 * 2**30 < plan["chip"]["memory"]
    assert plan["bound_seconds"] > 0


@pytest.mark.extra  # tpu-aot
def test_splitting_latents_divides_memory(tmp_path: Any) -> None:
    config = load_config({**CONFIG, "sae": {"variant": "topk", "d_in": 512, "n_latents": 16384, "k": 32}})
    shared = plan_step(config, "v5e:2x2", {"data": 4})
    split = plan_step(config, "v5e:2x2", {"latents": 4})
    assert split.report.arguments < 0.3 * shared.report.arguments
    assert split.report.peak < 0.5 * shared.report.peak
    text = tmp_path / "sae.yaml"
    text.write_text(json.dumps(config.model_dump(mode="json")))
    shown = CliRunner().invoke(
        cli, ["sae", "plan", str(text), "--topology", "v5e:2x2", "--mesh", "latents=4"]
    )
    assert shown.exit_code == 0 and "a bound, not a measurement" in shown.output
