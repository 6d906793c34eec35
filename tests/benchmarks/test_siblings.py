"""The benchmark of siblings merges by operators that exist, and its page states what the scores say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.sibling_page import kept_gains, page
from benchmarks.sibling_texts import DOMAINS, write_texts
from benchmarks.siblings import MERGEKIT, MERGES, PAGE, RESULTS
from mergelab.operators import OPERATORS

SIZES = [100.0, 120.0, 90.0, 110.0]


def scores(**bits: float) -> dict[str, Any]:
    """Bits per byte by domain, the same for every passage."""
    return {d: {"bits": (bits[d] * np.array(SIZES)).tolist(), "bytes": SIZES} for d in ("a", "b")}


def run() -> dict[str, Any]:
    cost = {"seconds": 1.0, "memory": 1e8}
    return {
        "model": "m",
        "machine": {"cores": 2},
        "busy": False,
        "left_out": ["fisher"],
        "settings": {"tokens": 10, "lr": 1e-4, "held_out": 4, "train": 9},
        "finetune": {"a": cost, "b": cost},
        "parents": {
            "base": {"scores": scores(a=2.0, b=3.0)},
            "a": {"scores": scores(a=1.0, b=3.0)},
            "b": {"scores": scores(a=2.0, b=2.5)},
        },
        "merges": {
            "half": {"scores": scores(a=1.5, b=2.75), **cost},
            "both": {"scores": scores(a=1.0, b=2.5), **cost, "mergekit_seconds": 4.0, "mergekit_memory": 3e8},
        },
    }


def test_kept_gains_are_the_mean_part_of_the_specialists_gains() -> None:
    gains = {name: gain.value for name, gain in kept_gains(run()).items()}
    assert gains == pytest.approx({"base": 0, "a": 0.5, "b": 0.5, "half": 0.5, "both": 1})


def test_the_page_ranks_merges_and_says_which_beat_the_best_parent() -> None:
    text = page(run())
    assert text.index("| both | 1.00 ") < text.index("| half | 0.50 ")
    assert "the best parent is a; 1 of 2 merges beat" in text
    assert "| 1.0 | 100 | 4.0 | 300 |" in text
    assert "| 100 | 300 |" in page(run() | {"busy": True}), "seconds of a busy machine are left out"
    worse = run()
    worse["merges"]["both"]["scores"] = scores(a=2.0, b=2.9)
    assert "No merge beats the best parent (a) on all texts together" in page(worse)


def test_every_merge_names_an_operator_with_its_required_parameters() -> None:
    assert {method for method, _, _ in MERGES.values()} >= MERGEKIT
    for method, each, shared in MERGES.values():
        declared = OPERATORS[method].parameters
        given = {*each, *shared}
        assert given <= {p.name for p in declared}
        assert {p.name for p in declared if p.required} <= given


def test_texts_to_learn_and_to_judge_share_no_file(tmp_path: Path) -> None:
    found = write_texts(tmp_path, train=8000, held_out=5)
    assert tuple(found) == DOMAINS
    for domain, files in found.items():
        learned, judged = ([json.loads(line)["text"] for line in f.read_text().splitlines()] for f in files)
        assert len(judged) == 5 and sum(map(len, learned)) >= 8000
        if domain != "licenses":  # which repeat one another
            assert not any(passage in text for passage in judged for text in learned)


def test_the_page_is_that_of_the_recorded_run() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(json.loads(RESULTS.read_text(encoding="utf-8")))
