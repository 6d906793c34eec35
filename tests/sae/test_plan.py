"""Training steps compiled ahead of time: here for simulated devices, with libtpu for TPU slices."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from click.testing import CliRunner

from mergelab.aot.chips import ChipReport, chip_of, roofline
from mergelab.aot.worker import asked_for, products
from mergelab.cli.main import cli
from mergelab.errors import MergelabError, MeshError, SAEError
from mergelab.sae.training import aot
from mergelab.sae.training.aot import held_bytes, lower_step, plan_step, shapes_of
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
    with pytest.raises(MeshError, match=r"'v5e:3x5' names no slice"):
        plan_step(load_config(CONFIG), "v5e:3x5", {"latents": 8})
    with pytest.raises(
        MeshError, match=r"'tensor' .*over which nothing is split; the axes here are data and"
    ):
        plan_step(load_config(CONFIG), "v5e:2x4", {"tensor": 8})
    with pytest.raises(MeshError, match=r"cannot be laid over 8 chips of v7x:2x2x1: it takes 4"):
        plan_step(load_config(CONFIG), "v7x:2x2x1", {"data": 4})
    # What a training would refuse, in its sentences, and both at once.
    with pytest.raises(SAEError) as raised:
        plan_step(
            load_config(CONFIG, ["train.batch_size=65", "sae.n_latents=250"]),
            "v5e:4x4",
            {"data": 4, "latents": -1},
        )
    assert raised.value.faults == (
        "train.batch_size is 65, which 4 devices cannot share; change one.",
        "250 latents cannot be split over 4 devices; choose a number that divides.",
    )


def test_state_and_batch_by_arithmetic_are_those_of_the_compiled_step() -> None:
    config = load_config(CONFIG)
    sizes = {"data": 2, "latents": 4}
    variant, recipe, shapes = shapes_of(config, None)
    held = held_bytes(variant, recipe, shapes, sizes)
    request = {"variant": {"name": variant.name, **asdict(variant)}, "recipe": asdict(recipe)}
    arguments = lower_step(make_mesh(sizes), request).compile().memory_analysis().argument_size_in_bytes
    # The inputs of an autoencoder are its targets too, which the compiler on a CPU sees.
    assert held.state < arguments <= held.state + held.batch


WIDE = {**CONFIG, "sae": {"variant": "topk", "d_in": 4096, "n_latents": 131072, "k": 64}}


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, int]]]:
    """Stands for the compiler: temporaries are three quarters of the state and split as it is."""
    asked: list[tuple[str, dict[str, int]]] = []

    def compile_for_topology(_: str, topology: str, mesh: dict[str, int], *__: Any, **___: Any) -> ChipReport:
        asked.append((topology, dict(mesh)))
        chips, latents = mesh["data"] * mesh["latents"], mesh["latents"]
        state = 17 * 2**30 // latents
        room = chip_of(topology).usable
        sizes = (state, state, state, 3 * state // 4)
        fits = 7 * state // 4 <= room
        return ChipReport(chips, "TPU", *sizes, 8e12 / chips, 1e9, (), 0.1, fits=fits)

    monkeypatch.setattr(aot, "compile_for_topology", compile_for_topology)
    return asked


def test_where_a_step_does_not_fit_the_smallest_slice_that_holds_it_is_found(
    compiled: list[tuple[str, dict[str, int]]], tmp_path: Path
) -> None:
    config = tmp_path / "sae.yaml"
    config.write_text(json.dumps(WIDE))
    arguments = ["sae", "plan", str(config), "--topology", "v5e:2x2", "--mesh"]
    # Every chip would hold the whole state: the compiler is not asked.
    told = CliRunner().invoke(cli, [*arguments, "data=-1"])
    assert told.exit_code == 0 and "RESOURCE" not in told.output
    assert "  state              16 GB\n" in told.stdout and "not compiled: no room for them" in told.stdout
    assert "fits: no, 16 of 16 GB" in told.stdout
    assert "that holds it: --topology v5e:2x2 --mesh data=1,latents=4 (7.44 GB of 16 GB on" in told.stdout
    assert compiled == [("v5e:2x2", {"data": 1, "latents": 4})]
    # Half of it would find room, but not with what the step needs besides.
    found = json.loads(CliRunner().invoke(cli, [*arguments, "data=2,latents=2", "--json"]).stdout)
    assert found["fits"] is True
    tight = [*arguments[:4], "v5e", "--set", "sae.n_latents=65536", "--json"]
    found = json.loads(CliRunner().invoke(cli, tight).stdout)
    assert found["fits"] is False and found["report"]["temporaries"] > 0
    assert (found["smallest"]["topology"], found["smallest"]["mesh"]) == (
        "v5e:2x2",
        {"data": 1, "latents": 4},
    )
    none = CliRunner().invoke(cli, [*arguments, "data=4", "--most", "1"])
    assert "no slice of up to 1 chips of v5e was found that holds it" in none.stdout


@pytest.mark.usefixtures("compiled")
def test_meshes_of_a_kind_of_chip_are_listed_by_time(tmp_path: Path) -> None:
    config = tmp_path / "sae.yaml"
    config.write_text(json.dumps(WIDE))
    shown = CliRunner().invoke(cli, ["sae", "plan", str(config), "--chips", "v5e", "--most", "8"])
    assert shown.exit_code == 0, shown.output
    rows = [line.split("  ") for line in shown.stdout.splitlines()]
    assert [cell.strip() for cell in rows[0] if cell] == [
        *("slice", "mesh", "GB a chip", "ms a step", "tokens/s", "bound by")
    ]
    assert [[cell for cell in row if cell][:2] for row in rows[1:-1]] == [
        ["v5e:2x4", "data=1,latents=8"],
        ["v5e:2x4", "data=2,latents=4"],
        ["v5e:2x4", "data=4,latents=2"],
        ["v5e:2x2", "data=1,latents=4"],
        ["v5e:2x2", "data=2,latents=2"],
    ]
    both = CliRunner().invoke(cli, ["sae", "plan", str(config), "--chips", "v5e", "--topology", "v5e"])
    assert both.exit_code == 2 and "say for which chips" in both.stderr


def test_a_float32_product_takes_the_passes_of_its_precision() -> None:
    def lowered(dtype: Any, precision: Any) -> str:
        x = jax.ShapeDtypeStruct((8, 4), dtype)
        return jax.jit(lambda a: jnp.matmul(a, a.T, precision=precision)).lower(x).as_text()

    assert products(lowered(jnp.float32, None)) == (1.0, 1.0)
    assert products(lowered(jnp.float32, "highest")) == (1.0, 6.0)
    assert products(lowered(jnp.float32, "high")) == (1.0, 3.0)
    assert products(lowered(jnp.bfloat16, "highest")) == (0.0, 1.0)
    report = ChipReport(1, "TPU", 0, 0, 0, 0, 197e12, 1.0, (), 0.1, float32=1.0, passes=6.0)
    assert roofline(report, chip_of("v5e")).compute == pytest.approx(6.0)


def test_what_a_compiler_asked_for_is_read_from_its_error() -> None:
    long = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in space hbm. Used 48.79G "
        "of 15.75G hbm. Exceeded by 33.04G.\n\nTotal hbm usage >= 49.04G:\n    reserved 258.00M\n"
        "    program 40.00G\n    arguments 8.79G"
    )
    assert asked_for(long) == 40 * 2**30
    assert asked_for("INVALID_ARGUMENT: no such layout") is None


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
