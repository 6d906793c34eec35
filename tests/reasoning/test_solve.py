"""`solve`: a log that is gone on with, results that depend on it alone, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import pytest
from click.testing import CliRunner

import mergelab as ml
from mergelab.errors import DecodingError, EvaluationError, OutputError
from mergelab.models.load import load_model
from mergelab.reasoning import results_of
from mergelab.sharding import MODEL_AXES, make_mesh
from tests.decoding.syllables import syllables
from tests.decoding.tiny import tiny

TASKS = [
    {"prompt": "ba bebi", "answer": "a"},
    {"prompt": "ca ce", "answer": "i"},
    {"prompt": "da", "answer": "o"},
]
OPTIONS: dict[str, Any] = {"samples": 4, "budget": 6, "step": "a", "answer": "regex:[aeiou]$", "seed": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("solve")
    ml.save_model(*tiny("llama"), made / "model", tokenizer=syllables())
    (made / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in TASKS))
    return made


def solved(tasks: Any = TASKS, **options: Any) -> Any:
    return ml.solve(*tiny("llama"), syllables(), tasks=tasks, **{**OPTIONS, **options})


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_run_that_is_cut_off_ends_in_the_same_results(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = solved(out=tmp_path / "out")
    expected = files(tmp_path / "out")
    assert set(expected) == {
        "accuracy.svg", "results.json", "settings.json", "table.txt", "traces.html", "traces.jsonl",
    }  # fmt: skip
    log = expected["traces.jsonl"]
    assert len(log.splitlines()) == 3 * (4 + 1)
    for place in (0, len(log) // 3, len(log) - 1):
        (tmp_path / "out" / "traces.jsonl").write_bytes(log[:place])
        (tmp_path / "out" / "results.json").unlink()
        assert solved(out=tmp_path / "out").results == whole.results
        assert files(tmp_path / "out") == expected
    assert whole.results == solved().results == json.loads(expected["results.json"])

    def never(*_: object) -> None:
        raise AssertionError("a task that is done was attempted")

    monkeypatch.setattr("mergelab.reasoning.solving.attempt", never)
    assert solved(out=tmp_path / "out").results == whole.results  # a finished folder
    with pytest.raises(OutputError, match=r"other settings: seed differ"):
        solved(out=tmp_path / "out", seed=4)
    with pytest.raises(AssertionError, match="was attempted"):
        solved(out=tmp_path / "out", seed=4, overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(OutputError, match="not empty"):
        solved(out=tmp_path / "mine")


def test_figures_are_those_of_the_log(folder: Path) -> None:
    found = solved(method="best-of-n", prices=ml.decoding.Prices(1e6, 2e6))
    results, traces = found.results, found.traces
    right = [sum(trace["correct"] for trace in some) for some in traces]
    assert 0 < sum(right) < 12
    for some in traces:
        for trace in some:
            assert (
                trace["answer"] == trace["text"].strip()[-1]
                and trace["tokens"] == len(trace["token_ids"]) == 6
            )
            assert trace["worth"] == trace["scores"]["logprob"]
            assert trace["worth"] == pytest.approx(2.718281828 ** (trace["log_probability"] / 6), rel=1e-5)
    best = [max(some, key=lambda trace: trace["worth"]) for some in traces]
    assert results["accuracy"]["correct"] == sum(trace["correct"] for trace in best)
    assert results["pass_at_k"]["1"] == pytest.approx(sum(right) / 12)
    assert results["pass_at_k"]["4"] == results["any_correct"]["value"]
    assert results["tokens"] == {"prompt": 3 + 2 + 1, "generated": 72, "per_task": 26.0}
    assert results["cost"]["dollars"] == pytest.approx(6 * 1 + 72 * 2)
    assert [point["samples"] for point in results["curve"]] == [1, 2, 4]
    assert results["curve"][-1]["flops_per_task"] == pytest.approx(results["flops"]["per_task"])
    assert results["curve"][0]["tokens_per_task"] == pytest.approx(2 + 6)
    assert "seconds" not in json.dumps(results)


def made_up(task: int, answers: list[str], worths: list[float], reference: str = "1") -> Any:
    traces = [
        {"answer": a, "correct": a == reference, "worth": w, "scores": {"x": w, "-x": 1 - w}, "tokens": 10}
        for a, w in zip(answers, worths, strict=True)
    ]
    outcome = {"answer": "1", "reference": reference, "correct": True, "prompt_tokens": 5}
    return traces, {**outcome, "generated": 10 * len(traces), "flops": {"prompt": 100.0, "token": 7.0}}


def test_verifiers_are_compared_on_the_same_traces() -> None:
    logged = {
        0: made_up(0, ["1", "2", "2", "2"], [0.9, 0.1, 0.2, 0.1]),
        1: made_up(1, ["2", "1", "1", "3"], [0.3, 0.8, 0.7, 0.2]),
    }
    found = results_of(logged, "weighted-vote")
    assert found["verifiers"]["x"]["best_of_n"]["value"] == found["verifiers"]["x"]["auroc"] == 1.0
    assert found["verifiers"]["-x"]["weighted_vote"]["value"] == 0.0 == found["verifiers"]["-x"]["auroc"]
    # 1 of 1 and 0 of 1 are right with the first trace; with two 0.9 : 0.1 and 0.8 : 0.3.
    assert [point["accuracy"]["value"] for point in found["curve"]] == [0.5, 1.0, 1.0]
    assert results_of(logged, "vote")["curve"][1]["accuracy"]["value"] == 0.5
    assert found["flops"]["total"] == 2 * (100 + 40 * 7) and found["cost"] is None
    assert "pass_at_k" not in results_of(logged, "beam") and len(results_of(logged, "beam")["curve"]) == 1


def test_what_is_wrong_is_said_in_a_sentence() -> None:
    for options, words in (
        ({"samples": 0}, "samples is 0; give 1 or more"),
        ({"budget": 0}, "budget is 0"),
        ({"method": "votes"}, "did you mean 'vote'"),
        ({"branch": 0, "method": "beam"}, "branch is 0"),
        ({"method": "beam", "step": "x"}, "text that ends a step"),
    ):
        with pytest.raises(DecodingError, match=words):
            solved(**options)
    for options, words in (
        ({"tasks": [{"prompt": "ba"}]}, "no 'answer'"),
        ({"answer": "nubmer"}, "did you mean 'number'"),
        ({"verifiers": ["prob:x"]}, "did you mean 'probe'"),
        ({"verifiers": ["probe:blocks.0.resid_post"]}, "--fit-on"),
        ({"verifiers": ["latents:run"]}, "names no latents"),
    ):
        with pytest.raises(EvaluationError, match=words):
            solved(**options)
    with pytest.raises(EvaluationError, match="give all three"):
        ml.solve(tiny("llama")[0], tasks=TASKS)
    with pytest.raises(DecodingError) as caught:
        solved(budget=100)
    assert [fault[:6] for fault in caught.value.faults] == ["task 1", "task 2", "task 3"]
    assert "context of 64 tokens runs out; give at most 62" in str(caught.value)


@pytest.mark.parametrize("method", ["vote", "particles", "force"])
def test_a_mesh_of_eight_devices_changes_no_results(folder: Path, method: str) -> None:
    """Traces are split over `data`, matrices over `tensor`; sums in another order move the last digits."""
    given: dict[str, Any] = {**OPTIONS, "tasks": folder / "tasks.jsonl", "method": method}
    given |= {"verifiers": ["entropy"], "thinking": ml.decoding.Thinking("a", 3, None, "be")}
    mesh = make_mesh({"data": 4, "tensor": 2}, axes=MODEL_AXES)
    one, eight = (ml.solve(folder / "model", **given, mesh=on) for on in (None, mesh))
    assert len(jax.tree.leaves(load_model(folder / "model", mesh=mesh)[1])[0].sharding.device_set) == 8
    exact = ("answer", "correct", "token_ids", "stop", "text")
    for mine, theirs in zip(one.traces, eight.traces, strict=True):
        for first, second in zip(mine, theirs, strict=True):
            assert {name: first[name] for name in exact} == {name: second[name] for name in exact}
            assert first["scores"]["entropy"] == pytest.approx(second["scores"]["entropy"], abs=1e-4)
    for name in ("accuracy", "tokens", "flops", "answered", "curve"):
        assert one.results[name] == eight.results[name]


def test_the_command_solves_and_warns_where_no_answer_is_found(folder: Path, tmp_path: Path) -> None:
    from mergelab.cli.main import cli

    given = ["solve", str(folder / "model"), str(folder / "tasks.jsonl"), "--out", str(tmp_path / "out")]
    given += ["--samples", "4", "--budget", "6", "--seed", "3", "--step", "a"]
    done = CliRunner().invoke(cli, [*given, "--answer", "boxed", "--json"])
    assert done.exit_code == 0, done.output
    assert "no trace gave an answer" in done.stderr
    found = json.loads(done.stdout)
    assert found["accuracy"]["value"] == 0 == found["answered"]
    again = CliRunner().invoke(
        cli, [*given, "--answer", "regex:[aeiou]$", "--overwrite", "--json", "--mesh", "data=1"]
    )
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout) == solved().results
    page = (tmp_path / "out" / "traces.html").read_text()
    assert "ba bebi" in page and "regex" not in page
    for extra, words in (
        (["--think-min", "3"], "--method force"),
        (["--prices", "a"], "not two prices"),
        (["--stop", ""], "is empty"),
    ):
        refused = CliRunner().invoke(cli, [*given, *extra])
        assert refused.exit_code == 2 and words in refused.stderr
