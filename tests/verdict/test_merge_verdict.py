"""The sentence about a merge: what it claims, and what `mergelab merge --judge` prints and writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import mergelab as ml
from mergelab.cli.main import cli
from mergelab.verdict import Evaluation, TextScores, verdict_of
from tests.verdict.conftest import RECIPE

UNITS = 40
SIZE = np.random.default_rng(0).integers(100, 400, UNITS).astype(float)
NOISE = np.random.default_rng(1).normal(0, 0.02, UNITS)


def scored(name: str, bits_per_byte: float, noise: float = 0.0) -> Evaluation:
    nats = (bits_per_byte + noise * NOISE) * SIZE * np.log(2)
    return Evaluation(name, TextScores(nats, SIZE / 5, SIZE / 4, SIZE, 512))


def test_a_merge_that_helps_is_said_to_with_its_interval() -> None:
    found = verdict_of([scored("A", 1.3), scored("B", 1.2)], [scored("m", 1.18, 1.0)], [scored("base", 1.4)])
    assert found.beats and found.parent == "B" and found.difference.value < 0
    assert found.difference.interval is not None and found.difference.p is not None
    low, high = found.difference.interval
    assert found.sentence == (
        f"the merge beats its best parent B by {-found.difference.value:.4f} bits per byte "
        f"[{-high:.4f}, {-low:.4f}] (p = {found.difference.p:.2g})"
    )
    assert 0.01 < -high < -found.difference.value < -low < 0.03


@pytest.mark.parametrize(("merge", "said"), [(1.25, "0.0500 bits per byte worse ["), (1.2, "equal in bits")])
def test_a_merge_that_does_not_help_is_not_praised(merge: float, said: str) -> None:
    found = verdict_of([scored("A", 1.3), scored("B", 1.2)], [scored("m", merge), scored("n", 1.6)])
    assert not found.beats
    assert found.sentence.startswith("no merge beats parent B on held-out text (p = ")
    assert f"the best merge m is {said}" in found.sentence


def test_a_gain_within_chance_is_no_gain_and_a_better_base_is_told() -> None:
    # Units move by 0.2 either way: half a standard error of their mean is nothing.
    found = verdict_of([scored("B", 1.2)], [scored("m", 1.197, 10.0)], [scored("base", 1.1)])
    value = found.difference.value
    assert value == pytest.approx(-0.003 + 10 * (NOISE @ SIZE) / SIZE.sum()) and abs(value) < 0.06
    assert not found.beats and "no merge beats parent B" in found.sentence
    assert found.sentence.endswith(")") and "; nor does it beat the base base (p = " in found.sentence
    winner = verdict_of([scored("B", 1.2)], [scored("m", 1.15, 0.1)], [scored("base", 1.1)])
    assert winner.beats and "; it does not beat the base base (p = " in winner.sentence


def test_what_was_not_measured_has_no_verdict() -> None:
    with pytest.raises(ml.errors.EvaluationError, match="measured on text"):
        verdict_of([Evaluation("A")], [scored("m", 1.0)])
    shorter = TextScores(*(np.ones(3) for _ in range(4)), 512)
    with pytest.raises(ml.errors.EvaluationError, match="on different text"):
        verdict_of([scored("A", 1.0)], [Evaluation("m", shorter)])


def test_the_command_judges_prints_and_keeps_the_sentence(here: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    options = ["--judge", "docs.jsonl"]
    (tmp_path / "stages.yaml").write_text(
        f"name: half\n{RECIPE}---\n{RECIPE.replace('model: other', 'model: half')}"
    )
    done = CliRunner().invoke(
        cli, ["merge", str(tmp_path / "stages.yaml"), "--out", str(out), *options, "--json"]
    )
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["verdict"]
    # The models of all stages are parents, and results of stages are not.
    assert [model["model"] for model in found["models"]] == ["one", "other", "the merge"]
    by_hand = ml.compare_models(["one", "other", out], text=here / "docs.jsonl")
    best = min(by_hand.evaluations[:2], key=lambda e: e.to_dict()["bits_per_byte"]["value"])
    assert found["best_parent"] == best.name
    bits = [one.to_dict()["bits_per_byte"]["value"] for one in (best, by_hand.evaluations[2])]
    assert found["difference"]["value"] == pytest.approx(bits[1] - bits[0], abs=1e-12)
    card = (out / "README.md").read_text()
    assert card.count("## Verdict") == 1 and found["sentence"] in card and "## Recipe" in card
    again = CliRunner().invoke(cli, ["merge", "r.yaml", "--out", str(out), "--overwrite", *options])
    assert again.exit_code == 0 and again.stdout.splitlines()[-1].startswith(
        ("no merge beats", "the merge beats")
    )
    once_more = CliRunner().invoke(cli, ["merge", "r.yaml", "--out", str(out), "--resume", *options])
    assert once_more.exit_code == 0 and (out / "README.md").read_text().count("## Verdict") == 1


def test_what_cannot_be_judged_is_not_merged(here: Path, tmp_path: Path) -> None:
    for text, said in (("missing.txt", "does not exist"), (str(tmp_path / "empty.txt"), "no text in it")):
        (tmp_path / "empty.txt").write_text("\n")
        done = CliRunner().invoke(cli, ["merge", "r.yaml", "--out", str(tmp_path / "out"), "--judge", text])
        assert done.exit_code == 2 and said in done.stderr and not (tmp_path / "out").exists()
    done = CliRunner().invoke(cli, ["merge", "r.yaml", "--dry-run", "--judge", "t.txt"])
    assert done.exit_code == 2 and "--judge" in done.stderr
