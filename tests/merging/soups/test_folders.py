"""Soups of checkpoint folders: streamed averages, running averages on disk, greedy soups that resume."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mergelab.checkpoints.publish import WorkFolder
from mergelab.errors import EvaluationError, OutputError, RecipeError
from mergelab.merging.soups import SoupTrace, uniform_soup
from mergelab.merging.soups.folders import (
    STATE,
    average_checkpoints,
    by_step,
    candidate_names,
    update_average,
)
from mergelab.merging.soups.greedy_folders import greedy_soup_checkpoints, trace_path

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 8,
    "hidden_size": 4,
    "intermediate_size": 4,
    "num_hidden_layers": 0,
    "num_attention_heads": 1,
    "tie_word_embeddings": True,
}
EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"


def write_model(folder: Path, embedding: np.ndarray) -> Path:
    """A Llama checkpoint of no layers."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    weights = {EMBEDDING: embedding, NORM: np.ones(4, embedding.dtype)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def constant(folder: Path, value: float) -> Path:
    return write_model(folder, np.full((8, 4), value, np.float32))


def weights_of(folder: Path) -> np.ndarray:
    return load_file(folder / "model.safetensors")[EMBEDDING]


def closeness(folder: Path) -> float:
    return -abs(float(weights_of(folder).mean()))


@pytest.fixture
def siblings(tmp_path: Path) -> list[Path]:
    """Five bfloat16 checkpoints."""
    rng = np.random.default_rng(0)
    return [
        write_model(tmp_path / f"checkpoint-{n}", rng.normal(size=(8, 4)).astype(ml_dtypes.bfloat16))
        for n in (100, 200, 300, 400, 1000)
    ]


@pytest.fixture
def four(tmp_path: Path) -> dict[str, Path]:
    """Constants whose greedy soup can be worked out by hand: best b, then a helps, c and d do not."""
    values = {"a": -1.5, "b": 1.0, "c": 2.0, "d": 9.0}
    return {name: constant(tmp_path / name, value) for name, value in values.items()}


def exact_mean(folders: list[Path]) -> np.ndarray:
    return np.mean([weights_of(f).astype(np.float64) for f in folders], axis=0)


def test_a_streamed_average_is_the_mean_rounded_once(siblings: list[Path], tmp_path: Path) -> None:
    average_checkpoints(siblings, tmp_path / "out")
    found = weights_of(tmp_path / "out")
    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found, exact_mean(siblings).astype(np.float32).astype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(found, np.asarray(uniform_soup(siblings)[EMBEDDING]))
    assert (found != exact_mean(siblings[1:]).astype(np.float32).astype(ml_dtypes.bfloat16)).any()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["hidden_size"] == 4


def test_a_running_average_on_disk_is_the_mean_of_all_that_came(siblings: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "average"
    for n, sibling in enumerate(siblings, start=1):
        state = update_average([sibling], out)
        assert len(state.checkpoints) == n
        assert weights_of(out).dtype == np.float32
        np.testing.assert_allclose(weights_of(out), exact_mean(siblings[:n]), rtol=0, atol=3e-7)
    together = tmp_path / "together"
    update_average(siblings[:2], together)
    update_average(siblings[2:], together)
    np.testing.assert_allclose(weights_of(together), weights_of(out), rtol=0, atol=3e-7)
    assert not list(tmp_path.glob(".average*"))


def test_an_exponential_average_on_disk_is_its_closed_form(siblings: list[Path], tmp_path: Path) -> None:
    expected = weights_of(siblings[0]).astype(np.float64)
    for sibling in siblings[1:]:
        expected = 0.75 * expected + 0.25 * weights_of(sibling).astype(np.float64)
    for split in (1, 2, 5):
        out = tmp_path / f"split-{split}"
        update_average(siblings[:split], out, decay=0.75)
        if siblings[split:]:
            update_average(siblings[split:], out, decay=0.75)
        np.testing.assert_allclose(weights_of(out), expected, rtol=0, atol=5e-7)


def test_a_running_average_refuses_what_would_spoil_it(siblings: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "average"
    update_average(siblings[:2], out)
    before = weights_of(out)
    with pytest.raises(RecipeError, match=r"checkpoint-200 is in the average .* already"):
        update_average(siblings[1:3], out)
    with pytest.raises(OutputError, match=r"holds a running mean, not an average of decay 0\.5"):
        update_average(siblings[2:], out, decay=0.5)
    with pytest.raises(OutputError, match=f"no readable {STATE}"):
        update_average(siblings[1:], siblings[0])
    with pytest.raises(RecipeError, match="decay is 2"):
        update_average(siblings[2:], out, decay=2.0)
    np.testing.assert_array_equal(weights_of(out), before)


@pytest.mark.parametrize("moment", ["_rename", "_clear_beside"])
def test_a_running_average_interrupted_while_swapping_is_taken_up(
    moment: str, siblings: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "average"
    update_average(siblings[:2], out)
    real = getattr(WorkFolder, moment)

    def killed(work: WorkFolder, *arguments: Any) -> None:
        if work.out == out:
            raise KeyboardInterrupt
        real(work, *arguments)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(WorkFolder, moment, killed)
        update_average(siblings[2:3], out)
    state = update_average(siblings[2:3], out)  # the same command again
    assert len(state.checkpoints) == 3
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    np.testing.assert_allclose(weights_of(out), exact_mean(siblings[:3]), rtol=0, atol=3e-7)


def test_greedy_over_folders(four: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "soup"
    seen: list[str] = []

    def test_evaluate(folder: Path) -> Mapping[str, float]:
        seen.append(folder.name)
        return {"mean": float(weights_of(folder).mean())}

    trace = greedy_soup_checkpoints(list(four.values()), out, closeness, test_evaluate=test_evaluate)
    assert [r.name for r in trace.ranking] == ["b", "a", "c", "d"]
    assert trace.members == ("b", "a")
    np.testing.assert_array_equal(weights_of(out), np.float32(-0.25))
    assert closeness(out) == trace.validation["score"]
    assert trace.test == {"soup": {"mean": -0.25}, "best_single": {"mean": 1.0}, "uniform": {"mean": 2.625}}
    assert seen == ["soup", "b", "uniform"], "test data is seen once the soup stands, and no sooner"
    assert SoupTrace.from_json(trace_path(out).read_text()) == trace
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c", "d", "soup", "soup.trace.json"]
    with pytest.raises(OutputError, match="is not empty"):
        greedy_soup_checkpoints(list(four.values()), out, closeness)
    trace_path(tmp_path / "other").write_text("notes of the user's")
    with pytest.raises(OutputError, match="is not the trace of a greedy soup"):
        greedy_soup_checkpoints(list(four.values()), tmp_path / "other", closeness)
    again = greedy_soup_checkpoints([four["a"]], out, closeness, overwrite=True)
    assert again.members == ("a",)
    np.testing.assert_array_equal(weights_of(out), np.float32(-1.5))


def counting(evaluate: Callable[[Path], float], stop_after: int | None = None) -> tuple[Any, list[str]]:
    """An evaluator that logs its calls and, like a killed run, breaks off after some."""
    calls: list[str] = []

    def call(folder: Path) -> float:
        if len(calls) == stop_after:
            raise KeyboardInterrupt
        calls.append(folder.name)
        return evaluate(folder)

    return call, calls


@pytest.mark.parametrize("stop_after", [0, 1, 4, 5, 6])
def test_an_interrupted_greedy_soup_goes_on_where_it_stopped(
    four: dict[str, Path], tmp_path: Path, stop_after: int
) -> None:
    folders = list(four.values())
    whole = greedy_soup_checkpoints(folders, tmp_path / "whole", closeness)
    interrupted, calls = counting(closeness, stop_after)
    with pytest.raises(KeyboardInterrupt):
        greedy_soup_checkpoints(folders, tmp_path / "soup", interrupted)
    assert not (tmp_path / "soup").exists()
    resumed, more = counting(closeness)
    trace = greedy_soup_checkpoints(folders, tmp_path / "soup", resumed)
    assert trace == whole
    assert len(calls) + len(more) == 7, "four alone and three trials, none of them twice"
    np.testing.assert_array_equal(weights_of(tmp_path / "soup"), weights_of(tmp_path / "whole"))


def test_an_interrupted_soup_of_something_else_is_not_taken_up(four: dict[str, Path], tmp_path: Path) -> None:
    out, folders = tmp_path / "soup", list(four.values())
    with pytest.raises(KeyboardInterrupt):
        greedy_soup_checkpoints(folders, out, counting(closeness, 2)[0], evaluation="eval A")
    with pytest.raises(OutputError, match="different evaluation"):
        greedy_soup_checkpoints(folders, out, closeness, evaluation="eval B")
    shutil.rmtree(four["a"])
    constant(four["a"], 5.0)
    with pytest.raises(OutputError, match="different checkpoints"):
        greedy_soup_checkpoints(folders, out, closeness, evaluation="eval A")
    trace = greedy_soup_checkpoints(folders, out, closeness, evaluation="eval A", overwrite=True)
    assert trace.ranking[-2].name == "a"


def test_rounding_does_not_compound_over_a_greedy_soup(siblings: list[Path], tmp_path: Path) -> None:
    trace = greedy_soup_checkpoints(siblings, tmp_path / "soup", lambda folder: 1.0)
    assert len(trace.members) == 5, "every trial ties, and the paper's rule accepts ties"
    exact = exact_mean(siblings).astype(np.float32).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(weights_of(tmp_path / "soup"), exact)
    members = [weights_of(tmp_path / name) for name in trace.members]
    compounded = members[0]
    for n, member in enumerate(members[1:], start=1):
        compounded = ((compounded.astype(np.float32) * n + member.astype(np.float32)) / (n + 1)).astype(
            exact.dtype
        )
    assert (compounded != exact).any(), "the control, which rounds at every step, should differ"


def test_failures_name_the_trial_and_leave_no_output(four: dict[str, Path], tmp_path: Path) -> None:
    def evaluate(folder: Path) -> float:
        return closeness(folder) if folder.name != "trial" else float("nan")

    with pytest.raises(EvaluationError, match="'score' of candidate 'a' added to the soup of 'b' is nan"):
        greedy_soup_checkpoints(list(four.values()), tmp_path / "soup", evaluate)
    assert not (tmp_path / "soup").exists()


def test_different_architectures_are_told_before_anything_is_evaluated(
    four: dict[str, Path], tmp_path: Path
) -> None:
    wide = write_model(tmp_path / "wide", np.ones((8, 6), np.float32))
    evaluate, calls = counting(closeness)
    with pytest.raises(RecipeError, match="wide"):
        greedy_soup_checkpoints([*four.values(), wide], tmp_path / "soup", evaluate)
    assert calls == []
    assert not list(tmp_path.glob("*soup*"))


def test_names_order_and_repetition(tmp_path: Path) -> None:
    steps = [tmp_path / f"checkpoint-{n}" for n in (1000, 200, 30)]
    assert by_step(steps) == steps[::-1]
    assert by_step([*steps, tmp_path / "final"]) == [*steps, tmp_path / "final"]
    assert list(candidate_names([tmp_path / "x" / "m", tmp_path / "y" / "m"])) == [
        str(tmp_path / "x" / "m"),
        str(tmp_path / "y" / "m"),
    ]
    with pytest.raises(RecipeError, match="given twice"):
        candidate_names([tmp_path, tmp_path / "x" / ".."])
    with pytest.raises(RecipeError, match="at least one"):
        candidate_names([])
    with pytest.raises(RecipeError, match="has '@' in its name"):
        average_checkpoints([tmp_path / "a@b"], tmp_path / "out")


def test_a_damaged_journal_is_refused(four: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / ".soup.stages").mkdir()
    (tmp_path / ".soup.stages" / "journal.json").write_text('{"subject": {}')
    with pytest.raises(OutputError, match="not a readable journal"):
        greedy_soup_checkpoints(list(four.values()), tmp_path / "soup", closeness)
