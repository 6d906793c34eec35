"""Merges of whole matrices against a float64 reference: in memory, compiled, sharded, streamed from files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from mergelab import operators as ops
from mergelab.errors import OperatorError
from mergelab.merging import Recipe, merge
from mergelab.merging.engine.job import Job
from mergelab.merging.engine.pool import Admission
from tests.merging.recipes import write_model
from tests.merging.streaming.test_stream_jobs import ArraySource, jobs_for, streamed
from tests.slow import slow_except

CASES = ("12x20_T2", "12x20_T3", "20x12_T2", "20x12_T3", "16x16_T2", "16x16_T3")
RECORDED: dict[str, tuple[ops.Merge, str]] = {
    # operator: as it was recorded, under what name
    "tsv_m": (ops.tsv_m(), "tsv_m"),
    "iso_c": (ops.iso_c(), "iso_c"),
    "iso_cts": (ops.iso_cts(), "iso_cts_0.8"),
    "wudi": (ops.wudi(), "wudi_exact"),
    "wudi_gradient": (ops.wudi(solver="gradient", steps=400), "wudi_exact"),
    "magmax": (ops.magmax(), "magmax_0.5"),
    "consensus": (ops.consensus(), "consensus_0.4_2"),
}
OPERATORS: dict[str, Callable[..., ops.Merge]] = {
    "tsv_m": ops.tsv_m,
    "iso_c": ops.iso_c,
    "iso_cts": ops.iso_cts,
    "wudi": ops.wudi,
}
Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def recorded(request: pytest.FixtureRequest, repository: Path) -> Arrays:
    """The reference's inputs and outputs by `CASE/base`, `CASE/models`, `CASE/out/NAME`, ..."""
    file = repository / "tests" / "goldens" / "spectral.npz"
    if not file.is_file():
        file = request.getfixturevalue("goldens") / "spectral.npz"
    with np.load(file) as content:
        return dict(content)


def inputs(recorded: Arrays, case: str) -> tuple[list[Arrays], Arrays]:
    """The models and the base as trees of float32."""
    models = [{"w": m.astype(np.float32)} for m in recorded[f"{case}/models"]]
    return models, {"w": recorded[f"{case}/base"].astype(np.float32)}


def error(found: Any, expected: np.ndarray) -> float:
    """The largest difference, relative to the reference's largest entry."""
    return float(np.abs(np.asarray(found, np.float64) - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("case", slow_except(("12x20_T3", "20x12_T2"), CASES))
@pytest.mark.parametrize("name", RECORDED)
def test_matrices_merge_as_the_reference_does(recorded: Arrays, name: str, case: str) -> None:
    models, base = inputs(recorded, case)
    made, key = RECORDED[name]
    expected = recorded[f"{case}/out/{key}"]
    assert error(made(models, base)["w"], expected) < 1e-6
    other = "tsv_m" if name == "iso_c" else "iso_c"
    assert error(expected, recorded[f"{case}/out/{other}"]) > 1e-2


@pytest.mark.parametrize("case", slow_except(("20x12_T2",), [case for case in CASES if case.endswith("T2")]))
@pytest.mark.parametrize("name", slow_except(("tsv_m", "wudi"), RECORDED))
def test_matrices_merge_as_the_reference_does_compiled_and_sharded(
    recorded: Arrays, name: str, case: str
) -> None:
    models, base = inputs(recorded, case)
    made, key = RECORDED[name]
    expected = recorded[f"{case}/out/{key}"]
    assert error(jax.jit(lambda m, b: made(m, b)["w"])(models, base), expected) < 1e-4
    sharding = NamedSharding(
        Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model")), PartitionSpec("data", "model")
    )
    sharded = made(jax.device_put(models, sharding), jax.device_put(base, sharding))["w"]
    assert sharded.sharding.is_equivalent_to(sharding, 2)
    assert error(sharded, expected) < 1e-6


@pytest.mark.parametrize("name", slow_except(("tsv_m", "iso_cts", "consensus"), RECORDED))
def test_whole_matrices_stream_from_files_to_files(
    recorded: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    trees: list[Arrays] = [{}, {}, {}]
    for case in CASES:
        if case.endswith("T2"):
            models, base = inputs(recorded, case)
            for tree, one in zip(trees, (base, *models), strict=True):
                tree[f"model.layers.{len(tree)}.w"] = one["w"]
    for tree, folder in zip(trees, ("base", "a", "b"), strict=True):
        write_model(tmp_path / folder, tree)
    gradient = name == "wudi_gradient"
    recipe = Recipe(
        merge_method="wudi" if gradient else name,
        base_model="base",
        models=[{"model": "a"}, {"model": "b"}],
        parameters={"solver": "gradient", "steps": 400} if gradient else {},
    )
    merge(recipe, "out", memory=0, threads=2)
    written = load_file(tmp_path / "out" / "model.safetensors")
    cases = [case for case in CASES if case.endswith("T2")]
    for case, tensor in zip(cases, (written[name] for name in sorted(written)), strict=True):
        assert error(tensor, recorded[f"{case}/out/{RECORDED[name][1]}"]) < 1e-6


@pytest.mark.parametrize("name", slow_except(("tsv_m", "iso_c"), OPERATORS))
def test_lambda_may_be_swept_in_one_program(name: str) -> None:
    rng = np.random.default_rng(0)
    base, *models = ({"w": rng.standard_normal((6, 9)).astype(np.float32)} for _ in range(3))
    swept = jax.vmap(lambda s: OPERATORS[name](lambda_=s)(models, base)["w"])(jnp.float32([0.0, 1.0, 2.0]))
    np.testing.assert_array_equal(swept[0], base["w"])
    np.testing.assert_allclose(swept[2] - base["w"], 2 * (swept[1] - base["w"]), atol=1e-5)
    assert error(swept[1], np.asarray(OPERATORS[name]()(models, base)["w"])) < 1e-5


@pytest.mark.parametrize("name", OPERATORS)
def test_tensors_that_are_no_matrices_take_the_mean_of_the_task_vectors(name: str) -> None:
    rng = np.random.default_rng(0)
    shapes = {"norm": (5,), "scalar": (), "experts": (2, 3, 4)}
    base, *models = ({k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()} for _ in "abc")
    found = OPERATORS[name](lambda_=0.5)(models, base)
    for key in shapes:
        expected = base[key] + 0.5 * np.mean([m[key] - base[key] for m in models], axis=0)
        np.testing.assert_allclose(found[key], expected, rtol=1e-5, atol=1e-6)


def test_a_matrix_with_fewer_rows_than_tasks_has_no_direction_for_each_and_is_averaged() -> None:
    rng = np.random.default_rng(0)
    base, *models = ({"w": rng.standard_normal((2, 9)).astype(np.float32)} for _ in range(4))
    mean = np.mean([m["w"] for m in models], axis=0)
    np.testing.assert_allclose(ops.tsv_m()(models, base)["w"], mean, rtol=1e-5, atol=1e-6)


def test_what_two_tasks_share_is_added_once_and_what_is_not_there_adds_nothing() -> None:
    """Directions of equal or absent task vectors are not a choice of LAPACK's."""
    rng = np.random.default_rng(0)
    base, delta = (rng.standard_normal((8, 12)).astype(np.float32) for _ in range(2))
    left, singular, right = np.linalg.svd(delta.astype(np.float64), full_matrices=False)
    leading = (left[:, :4] * singular[:4]) @ right[:4]
    same = ops.tsv_m()([{"w": base + delta}] * 2, {"w": base})["w"]
    np.testing.assert_allclose(same - base, leading, atol=1e-5)
    alone = ops.tsv_m()([{"w": base + delta}, {"w": base}], {"w": base})["w"]
    np.testing.assert_allclose(alone - base, leading, atol=1e-5)
    line = np.outer(np.arange(8), np.arange(12)).astype(np.float32)
    flat = ops.iso_c()([{"w": line}], {"w": 0 * line})["w"]
    np.testing.assert_allclose(flat, line / 8, atol=1e-5)


def test_iso_cts_shares_out_all_directions_and_never_more_than_there_are() -> None:
    for rank in range(1, 20):
        for models in range(1, 9):
            for fraction in (0.0, 0.3, 0.8, 1.0):
                made = ops.CommonAndTaskSpecific(common_space_fraction=fraction)
                common, own = made.shares(rank, models)
                assert common + own * models == rank and common >= 0 and own >= 0
    rng = np.random.default_rng(0)
    base, *models = ({"w": rng.standard_normal((6, 9)).astype(np.float32)} for _ in range(4))
    flat = np.linalg.svd(ops.iso_cts()(models, base)["w"] - base["w"], compute_uv=False)
    np.testing.assert_allclose(flat, flat[0], rtol=1e-5)
    alone = ops.iso_cts(common_space_fraction=1)(models, base)["w"]
    np.testing.assert_allclose(alone, ops.iso_c()(models, base)["w"], atol=1e-6)
    with pytest.raises(OperatorError, match="plain number under jit"):
        jax.jit(lambda f: ops.iso_cts(common_space_fraction=f)(models, base))(0.5)


def interference(merged: np.ndarray, deltas: list[np.ndarray]) -> float:
    """What WUDI minimizes, in float64."""
    wide = [d.astype(np.float64) for d in deltas]
    return sum(float(np.sum(np.square((merged - d) @ d.T)) / np.sum(d * d)) for d in wide)


@pytest.mark.parametrize("solver", ["exact", "gradient"])
def test_wudi_is_the_least_interference_whatever_the_scale_and_nearest_to_the_sum(solver: Any) -> None:
    rng = np.random.default_rng(0)
    deltas = [rng.standard_normal((5, 30)).astype(np.float32) for _ in range(3)]  # 15 of 30 directions
    base = {"w": np.zeros((5, 30), np.float32)}
    made = ops.wudi(solver=solver)
    found = np.asarray(made([{"w": d} for d in deltas], base)["w"], np.float64)
    total = np.sum(deltas, axis=0)
    assert interference(found, deltas) < 1e-9 * interference(total, deltas)
    unread = np.linalg.svd(np.concatenate(deltas))[2][15:]
    np.testing.assert_allclose(found @ unread.T, 0, atol=1e-5)  # as the sum, which reads nothing there
    small = made([{"w": d * np.float32(2**-20)} for d in deltas], base)["w"]
    np.testing.assert_allclose(small * 2.0**20, found, atol=1e-5)
    few = ops.wudi(solver="gradient", steps=2)([{"w": d} for d in deltas], base)["w"]
    assert interference(found, deltas) < interference(np.asarray(few), deltas) < interference(total, deltas)


def test_one_program_serves_all_matrices_of_a_shape_whatever_they_are_called() -> None:
    from mergelab.operators.algebra import merge_block

    rng = np.random.default_rng(0)
    base, *models = ({f"w{i}": rng.standard_normal((7, 5)) for i in range(3)} for _ in range(3))
    ops.iso_c()([{"w0": m["w0"]} for m in models], {"w0": base["w0"]})
    compiled = merge_block._cache_size()  # pyright: ignore[reportFunctionMemberAccess]
    ops.iso_c()(models, base)
    assert merge_block._cache_size() == compiled  # pyright: ignore[reportFunctionMemberAccess]


def test_whole_tensors_are_counted_with_their_workspace_and_admitted_to_the_budget() -> None:
    def job(merge: ops.Merge, side: int) -> Job:
        arrays = [np.zeros((side, side), np.float32) for _ in range(3)]
        sources = [ArraySource("w", a) for a in arrays]
        return Job("w", (side, side), np.dtype(np.float32), tuple(sources[:2]), sources[2], merge)

    small, large = job(ops.tsv_m(), 8), job(ops.tsv_m(), 80)
    assert job(ops.ties(weight=1), 80).bytes_whole == 0
    assert large.bytes_whole == 100 * small.bytes_whole > 3 * large.bytes_in
    admission = Admission(memory=large.bytes_whole, threads=2)
    order: list[str] = []

    def second() -> None:
        with admission.admitted(small):
            order.append("small")

    from threading import Thread

    with admission.admitted(large):
        waiting = Thread(target=second)
        waiting.start()
        waiting.join(0.05)
        order.append("large")
    waiting.join()
    assert order == ["large", "small"]
    with admission.admitted(small):  # and both fit a larger budget's side by side
        second()
    assert order[-1] == "small"


@pytest.mark.parametrize("name", ["iso_cts", "knots", "svc", "tsv_m", "wudi"])
def test_a_kernel_is_merged_as_the_weight_that_it_is_the_transpose_of(name: str) -> None:
    rng = np.random.default_rng(0)
    base = rng.standard_normal((12, 20), np.float32)
    models = [base + 0.3 * rng.standard_normal((12, 20), np.float32) for _ in range(3)]
    merge = ops.OPERATORS[name]()
    found = merge([{"q": {"weight": m}} for m in models], {"q": {"weight": base}})["q"]["weight"]
    kernels = merge([{"q": {"kernel": m.T}} for m in models], {"q": {"kernel": base.T}})["q"]["kernel"]
    np.testing.assert_allclose(kernels.T, found, rtol=0, atol=1e-5)
    (job,) = jobs_for(merge, [{"w": m.T.copy()} for m in models], {"w": base.T.copy()})
    read = streamed([dataclasses.replace(job, reads=0)])["w"]  # as GPT-2's table says of its files
    np.testing.assert_allclose(read.T, found, rtol=0, atol=1e-5)


def test_the_plan_states_what_whole_tensors_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for i, folder in enumerate(("base", "a", "b")):
        write_model(tmp_path / folder, width=64, seed=i)
    fields: dict[str, Any] = {"base_model": "base", "models": [{"model": "a"}, {"model": "b"}]}
    whole = merge(Recipe(merge_method="tsv_m", **fields), "whole").plan
    blocks = merge(Recipe(merge_method="ram", **fields), "blocks").plan
    assert whole.memory_estimate(0) - blocks.memory_estimate(0) == max(j.bytes_whole for j in whole.jobs) > 0


def test_composed_with_stages_it_streams_what_it_gives_in_memory() -> None:
    merge = ops.chain(ops.Trim(0.5), ops.Drop(0.7), ops.TaskSingularVectors())
    rng = np.random.default_rng(1)
    base, *models = ({"w": rng.standard_normal((30, 50)).astype(np.float32)} for _ in range(4))
    found = streamed(jobs_for(merge, models, base), seed=2, threads=2)["w"]
    np.testing.assert_allclose(found, merge(models, base, seed=2)["w"], atol=1e-5)
    assert np.abs(found - np.asarray(merge(models, base, seed=3)["w"])).max() > 1e-2
