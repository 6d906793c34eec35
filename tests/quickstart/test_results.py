"""Retained gains and the verdict say what the numbers say, also when merging does not help."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mergelab.quickstart.results import Results, bits_per_byte_of, changes, score_models, verdict

DOMAINS = ("code", "prose")
SINGLES = {
    "base": {"code": 2.0, "prose": 3.0},
    "code": {"code": 1.0, "prose": 3.5},
    "prose": {"code": 2.5, "prose": 2.6},
}


def test_retained_gain_is_one_for_the_specialist_and_zero_for_the_base() -> None:
    scores = {s.name: s for s in score_models({**SINGLES, "m": {"code": 1.25, "prose": 3.2}}, DOMAINS)}
    assert scores["base"].retained == {"code": 0.0, "prose": 0.0}
    assert scores["code"].retained["code"] == scores["prose"].retained["prose"] == 1.0
    assert scores["m"].retained == {"code": pytest.approx(0.75), "prose": pytest.approx(-0.5)}
    assert [s.kind for s in scores.values()] == ["base", "specialist", "specialist", "merge"]
    assert scores["m"].mean == pytest.approx(2.225)


def test_a_specialist_that_learnt_nothing_leaves_no_gain_to_retain() -> None:
    bits = {**SINGLES, "prose": {"code": 2.5, "prose": 3.0}, "m": {"code": 1.0, "prose": 1.0}}
    assert score_models(bits, DOMAINS)[-1].retained["prose"] is None
    assert "none (the specialist gained nothing)" in " ".join(verdict(score_models(bits, DOMAINS), DOMAINS))


def test_the_verdict_names_what_helped_and_what_hurt() -> None:
    bits = {**SINGLES, "good": {"code": 1.2, "prose": 2.7}, "bad": {"code": 2.6, "prose": 3.1}}
    first, second, third, fourth = verdict(score_models(bits, DOMAINS), DOMAINS)
    assert first == (
        "1 of 2 merges beat the base model on the mean of the 2 domains (good 1.950 against 2.500); "
        "bad 2.850 did not."
    )
    assert second == "The best single model on the mean is code (2.250 bits per byte); 1 of 2 merges beat it."
    assert (
        third == "The best merge, good, keeps this much of each specialist's gain: 80% of code, 75% of prose."
    )
    assert fourth == "On its own domain every specialist beats every merge."


def test_the_verdict_does_not_praise_merges_that_lose() -> None:
    bits = {**SINGLES, "bad": {"code": 2.6, "prose": 2.5}}
    first, second, third, fourth = verdict(score_models(bits, DOMAINS), DOMAINS)
    assert first.startswith("0 of 1 merges beat the base")
    assert second.endswith("; none of the 1 merges beats it.")
    assert third == "Merging did not pay here: code alone is better on the mean than every merge."
    assert fourth == "On prose a merge beats the specialist in its own domain."


def test_results_are_plain_json() -> None:
    scores = score_models({**SINGLES, "m": {"code": 1.0, "prose": 2.0}}, DOMAINS)
    results = Results(DOMAINS, scores, ("So.",), {"seed": "0"}, {"train": 1.5})
    data = json.loads(json.dumps(results.to_dict()))
    assert data["scores"][-1] == {
        "name": "m",
        "kind": "merge",
        "bits": {"code": 1.0, "prose": 2.0},
        "retained": {"code": 1.0, "prose": pytest.approx(2.5)},
        "change": None,
        "mean": 1.5,
    }


def test_an_interval_is_that_of_the_documents_and_tells_what_differs_from_what_may_not() -> None:
    draw = np.random.default_rng(0)
    sizes = {d: [100] * 40 for d in DOMAINS}
    base = {d: draw.normal(300, 30, 40).tolist() for d in DOMAINS}
    better = {
        d: [bits - 10 + x for bits, x in zip(base[d], draw.normal(0, 5, 40), strict=True)] for d in DOMAINS
    }
    alike = {d: [bits + x for bits, x in zip(base[d], draw.normal(0, 5, 40), strict=True)] for d in DOMAINS}
    documents = {"base": base, "code": base, "prose": base, "better": better, "alike": alike}
    bits, found = bits_per_byte_of(documents, sizes), changes(documents, sizes)
    assert bits["better"]["code"] == pytest.approx(sum(better["code"]) / 4000)
    assert found["code"].value == 0 and found["code"].interval == (0, 0) and "base" not in found
    low, high = found["better"].interval or (0, 0)
    assert low < found["better"].value < high < 0
    assert found["better"].value == pytest.approx(-0.1, abs=0.02)
    # The mean of two domains: a deviation of 5 bits in 100 bytes, 40 documents each.
    assert high - low == pytest.approx(2 * 1.96 * 0.05 / 80**0.5, rel=0.3)
    scores = score_models(bits, DOMAINS, found)
    assert scores[0].change is None and scores[3].change == found["better"].to_dict()
    assert "1 of 2 merges are better than the base, 0 worse, and 1 not" in " ".join(verdict(scores, DOMAINS))
