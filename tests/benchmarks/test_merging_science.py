"""The merging experiments: exact laws and their controls, the page, and (slow) the order of the operators."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from benchmarks.merging_science import experiments
from benchmarks.science_parts.claims import Claim, claims
from benchmarks.science_parts.eight_tasks import Size, merges, symmetries
from benchmarks.science_parts.identities import identities
from benchmarks.science_parts.networks import permuted
from benchmarks.science_parts.page import page
from mergelab.operators import OPERATORS


def test_laws_hold_and_their_controls_do_not() -> None:
    laws = identities(0)
    assert {law.name.split(":")[0] for law in laws} == {
        "DARE", "SLERP", "Model Stock", "Iso-C", "TSV-M", "RegMean",
    }  # fmt: skip
    for law in laws:
        assert law.distance < law.allowed < law.control, law


def test_symmetries_are_eight_different_images_of_the_square() -> None:
    image = np.arange(64, dtype=np.float32).reshape(1, 8, 8)
    views = np.asarray(symmetries(image))
    assert views.shape == (8, 1, 64)
    assert len({view.tobytes() for view in views}) == 8
    assert (np.sort(views, axis=-1) == np.arange(64)).all()


def test_permuted_networks_have_other_weights_and_the_same_outputs() -> None:
    rng = np.random.default_rng(0)
    trunk = [
        {"kernel": rng.normal(size=(6, 6)).astype(np.float32), "bias": rng.normal(size=6).astype(np.float32)}
        for _ in range(2)
    ]
    head = rng.normal(size=(6, 10)).astype(np.float32)
    other, turned = jax.tree.map(np.asarray, permuted(trunk, head, jax.random.key(0)))

    def outputs(layers: list[dict[str, np.ndarray]], last: np.ndarray) -> np.ndarray:
        x = np.eye(6, dtype=np.float32)
        for layer in layers:
            x = np.maximum(x @ layer["kernel"] + layer["bias"], 0)
        return x @ last

    assert any(not np.array_equal(a["kernel"], b["kernel"]) for a, b in zip(trunk, other, strict=True))
    np.testing.assert_allclose(outputs(other, turned), outputs(trunk, head), rtol=1e-5, atol=1e-5)


def test_every_operator_of_many_models_is_in_the_table() -> None:
    named = {name.split(" ")[0] for name in merges(8)} | {"regmean", "regmean_pp", "fisher"}
    many = {name for name, op in OPERATORS.items() if op.max_models is None}
    # Both are `average` here: `task_arithmetic` with weights of 1/8.
    assert many - named == {"linear", "uniform"}


def made_up_run(gain: float) -> dict[str, object]:
    table = {
        "base": {"plain": 0.5},
        "individual": {"plain": 0.9},
        "average": {"plain": 0.6, "tuned": 0.7, "scale": 2.0},
        "ties": {"plain": 0.4, "tuned": 0.6, "scale": 0.2},
        "task_arithmetic": {"plain": 0.3, "tuned": 0.7, "scale": 0.25},
        "iso_c": {"plain": 0.75, "tuned": 0.75 + gain, "scale": 1.5},
        "tsv_m": {"plain": 0.8, "tuned": 0.8 + gain, "scale": 1.0},
    }
    law = {"name": "L", "distance": 1e-7, "allowed": 1e-5, "control_name": "C", "control": 0.5}
    pairs = {f"{a}_{b}": 0.4 for a in ("siblings", "strangers", "permuted") for b in ("loss", "error")}
    small = {"whole": 0.9, "dare": 0.89, "without_rescaling": 0.8, "distance": 0.1}
    return {
        "identities": [law],
        "connectivity": {**pairs, "permuted_output": 1e-7},
        "eight_tasks": table,
        "dare_small": small,
        "dare_large": {**small, "dare": 0.5},
        "shared_head": table,
    }


def test_page_has_means_spread_and_the_claims_that_fail() -> None:
    runs = [made_up_run(0.0), made_up_run(0.02)]
    results = {
        "machine": {"cores": "2"},
        "size": Size()._asdict(),
        "runs": runs,
        "claims": [claim._asdict() for claim in claims(runs)],
    }
    soup = {
        "best_single": 1.0,
        "greedy": 2.0,
        "uniform": 3.0,
        "ensemble": 4.0,
        "gain": 1.0,
        "wins": 1,
        "seeds": 2,
    }
    text = page(results, {"clean": soup})
    assert "| tsv_m | 80.0 ± 0.0 | 81.0 ± 1.4 | 1, 1 |" in text
    assert "| siblings of one base: loss barrier below 0.05 | -0.35 | 0 | **no** |" in text
    assert "| TSV-M > task arithmetic, both tuned | 0.1 | 0.01 | yes |" in text
    assert "| clean | 1.00 | 2.00 | 3.00 | 4.00 | +1.00 | 1/2 |" in text


def test_a_claim_fails_by_its_worst_seed() -> None:
    assert Claim("x", [0.3, 0.2], 0.2).holds
    assert not Claim("x", [0.3, 0.1], 0.2).holds


@pytest.mark.slow
def test_claims_hold_at_one_seed() -> None:
    found = claims([experiments(0)])
    assert [claim for claim in found if not claim.holds] == []
