"""Operators against what their authors' own functions gave, recorded in float64.

`goldens/authors.npz` holds a base and three models of five tensors, and the outputs of: STAR (IBM/STAR,
`merger/STAR.py`), SVC (FusionBench's form, to which the authors' agrees), PCB (duguodong7/pcb-merging,
`PCB_merge`), EMR (harveyhuang18/EMR_Merging, `emr_merge`), LiNeS (wang-kee/LiNeS, `LiNeS_scaling` of the sum)
and OPCM (FusionBench, `merge_linear_weights` in its loop, for every matrix).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mergelab import operators as ops
from tests.merging.streaming.test_stream_jobs import jobs_for, streamed
from tests.slow import slow_except

Tree = dict[str, np.ndarray]

METHODS: dict[str, ops.Merge] = {
    "star_40": ops.star(),
    "svc_1": ops.svc(),
    "svc_0.5": ops.svc(weight=0.3, alpha=0.5),
    "pcb_0.1": ops.pcb(),
    "pcb_0.05": ops.pcb(ratio=0.05),
    "pcb_0.4": ops.pcb(ratio=0.4),
    "emr": ops.emr(),
    "lines_0.7": ops.lines(beta=0.7),
    "opcm_0.5": ops.opcm(),
    "opcm_0.2": ops.opcm(alpha=0.2),
}


@pytest.fixture(scope="module")
def recorded(repository: Path) -> Tree:
    with np.load(repository / "tests" / "goldens" / "authors.npz") as content:
        return dict(content)


def part(recorded: Tree, head: str) -> Tree:
    return {
        key.removeprefix(f"{head}/"): value for key, value in recorded.items() if key.startswith(f"{head}/")
    }


def error(found: Tree, base: Tree, expected: Tree) -> float:
    """The largest difference of task vectors, relative to their largest entry."""
    largest = max(np.abs(e).max() for e in expected.values())
    return float(
        max(np.abs(np.asarray(found[k], np.float64) - base[k] - e).max() for k, e in expected.items())
        / largest
    )


@pytest.mark.parametrize("name", METHODS)
def test_operators_give_what_their_authors_code_gave(recorded: Tree, name: str) -> None:
    base, models = part(recorded, "base"), [part(recorded, f"model{i}") for i in range(3)]
    expected = part(recorded, f"out/{name}")
    assert expected.keys() == base.keys()
    assert error(METHODS[name](models, base), base, expected) < 2e-6
    others = [part(recorded, f"out/{other}") for other in METHODS if other != name]
    assert min(error(other, dict.fromkeys(base, np.float64(0)), expected) for other in others) > 1e-2


@pytest.mark.parametrize("name", slow_except(("opcm_0.5", "pcb_0.4"), METHODS))
def test_streamed_they_give_the_same(recorded: Tree, name: str) -> None:
    base, models = part(recorded, "base"), [part(recorded, f"model{i}") for i in range(3)]
    made = METHODS[name]
    jobs = jobs_for(made, models, base)
    if name.startswith("lines"):
        from dataclasses import replace

        jobs = [replace(job, depth=int(job.name[7]) / 2 if "layers" in job.name else 0.0) for job in jobs]
    assert error(streamed(jobs, threads=2), base, part(recorded, f"out/{name}")) < 2e-6


def test_the_order_of_models_matters_to_opcm_alone_of_these(recorded: Tree) -> None:
    base, models = part(recorded, "base"), [part(recorded, f"model{i}") for i in range(3)]
    assert error(ops.opcm()(models[::-1], base), base, part(recorded, "out/opcm_0.5")) > 1e-2
    for name in ("svc_1", "pcb_0.4"):
        assert error(METHODS[name](models[::-1], base), base, part(recorded, f"out/{name}")) < 2e-6


def test_one_model_merges_to_itself(recorded: Tree) -> None:
    base, model = part(recorded, "base"), part(recorded, "model0")
    for made in (ops.opcm(), ops.svc(), ops.star(eta=1), ops.lines(beta=0)):
        for key in base:
            np.testing.assert_allclose(made([model], base)[key], model[key], atol=2e-6)


def test_any_merge_of_task_vectors_is_scaled_by_depth() -> None:
    rng = np.random.default_rng(0)
    names = ("embed.w", "blocks.0.w", "blocks.1.mlp.w", "blocks.2.w")
    base, *models = ({k: rng.standard_normal((4, 6)).astype(np.float32) for k in names} for _ in range(3))
    plain = ops.ties(weight=1.0, density=0.5, rescale=True)
    scaled = ops.depth_scaled(plain, alpha=0.3, beta=0.6)(models, base)
    for key, factor in zip(names, (0.3, 0.3, 0.6, 0.9), strict=True):
        delta = np.asarray(plain(models, base)[key]) - base[key]
        np.testing.assert_allclose(scaled[key] - base[key], factor * delta, atol=1e-6)


def test_darex_divides_what_dare_keeps_by_its_own_factor() -> None:
    rng = np.random.default_rng(0)
    models = [{"t": rng.standard_normal((50, 60)).astype(np.float32)} for _ in range(2)]
    base = {"t": np.zeros((50, 60), np.float32)}
    dare = ops.dare_linear(weight=1.0, density=0.1, rescale_by="density")(models, base, seed=3)["t"]
    for q in (0.1, 0.25, [0.25, 0.25]):
        found = ops.darex(weight=1.0, density=0.1, q=q)(models, base, seed=3)["t"]
        np.testing.assert_allclose(found, np.asarray(dare) * np.float32(0.1 / np.mean(q)), rtol=1e-5)


@pytest.fixture(scope="module")
def adapters(repository: Path) -> Tree:
    """Factors of three adapters of rank 2, and what KnOTS' and Core Space's own functions made of them."""
    with np.load(repository / "tests" / "goldens" / "adapters_merged.npz") as content:
        return dict(content)


@pytest.mark.parametrize(
    ("made", "key"),
    [
        (ops.knots(), "knots_1.0"),
        (ops.knots(density=34 / 84), "knots_0.4"),  # the authors keep one entry more than the fraction
        (ops.core_space(method="tsv_m"), "core_tsv"),
        (ops.core_space(method="iso_c"), "core_iso"),
    ],
    ids=("knots", "knots_trimmed", "core_tsv", "core_iso"),
)
def test_low_rank_updates_merge_as_their_authors_code_did(adapters: Tree, made: ops.Merge, key: str) -> None:
    deltas = [adapters[f"B{i}"] @ adapters[f"A{i}"] for i in range(3)]
    base, expected = {"w": np.zeros_like(deltas[0])}, {"w": adapters[f"out/{key}"]}
    found = made([{"w": d} for d in deltas], base)
    assert error(found, base, expected) < 2e-6
    assert np.linalg.matrix_rank(found["w"], tol=1e-4) <= 6
    assert error(made([{"w": d} for d in deltas[:2]], base), base, expected) > 1e-2


def test_core_space_trims_among_the_cores_entries_in_bases_of_all_updates(adapters: Tree) -> None:
    deltas = [(adapters[f"B{i}"] @ adapters[f"A{i}"]).astype(np.float64) for i in range(3)]
    left = np.linalg.svd(np.concatenate(deltas, axis=1))[0][:, :6]
    right = np.linalg.svd(np.concatenate(deltas, axis=0))[2][:6]
    cores = [left.T @ d @ right.T for d in deltas]
    kept = [np.where(np.abs(c) >= np.sort(np.abs(c), axis=None)[-18], c, 0) for c in cores]
    sign = np.where(np.sum(kept, axis=0) >= 0, 1, -1)
    agree = [np.where(c * sign > 0, c, 0) for c in kept]
    core = np.sum(agree, axis=0) / np.maximum(np.sum([a != 0 for a in agree], axis=0), 1)
    base = {"w": np.zeros_like(deltas[0], np.float32)}
    found = ops.core_space(density=0.5)([{"w": d.astype(np.float32)} for d in deltas], base)
    assert error(found, base, {"w": left @ core @ right}) < 2e-6
