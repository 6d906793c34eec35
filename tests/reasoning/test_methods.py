"""Traces are what the model writes alone, whatever they were forked from, and readings what it holds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mergelab.decoding import Temperature, Thinking, complete, sample
from mergelab.interp.probes import Probe
from mergelab.models.residual_stream import readout
from mergelab.reasoning import (
    Growth,
    MethodOptions,
    Task,
    Writer,
    attempt,
    confidence_reading,
    decide,
    entropy_reading,
    fit_reading,
    lens_reading,
    log_probability_reading,
    pass_costs,
    probe_reading,
    step_rows,
)
from tests.decoding.syllables import syllables
from tests.decoding.tiny import tiny

SITE = "blocks.0.resid_post"
PROMPT = [3, 14, 15, 9]
BUDGET = 8


@pytest.fixture(scope="module")
def writer() -> Writer:
    model, params = tiny("llama")
    weights = jnp.asarray(0.1 * np.random.default_rng(0).standard_normal((24, 1)), jnp.float32)
    readings = (
        probe_reading(Probe(weights, jnp.asarray([0.3])), SITE),
        entropy_reading(),
        lens_reading(model, params, SITE),
        log_probability_reading(),
    )
    return Writer(model, params, syllables(), BUDGET, sample(Temperature(2.0)), readings, step="a")


@pytest.fixture(scope="module")
def whole(writer: Writer) -> Any:
    """Logits, streams and the lens of one pass over a text, padded to one length."""

    @jax.jit
    def run(tokens: jax.Array) -> Any:
        out = writer.model.apply(writer.params, tokens, capture=[SITE])
        return out.logits, out.captured[SITE], readout(writer.model, writer.params, out.captured[SITE])

    def padded(text: list[int]) -> list[np.ndarray]:
        return [np.asarray(x)[0] for x in run(np.asarray([text + [0] * (16 - len(text))], np.int32))]

    return padded


def attempted(writer: Writer, method: str, **options: Any) -> Any:
    thinking = Thinking("ru", 3, 5, "ba")
    return attempt(writer, PROMPT, MethodOptions(method, 4, branch=2, thinking=thinking, **options), 5)


@pytest.mark.parametrize("method", ["vote", "beam", "particles", "force"])
def test_every_trace_is_what_one_pass_over_its_text_says(writer: Writer, whole: Any, method: str) -> None:
    done = attempted(writer, method)
    assert len(done.traces) == (2 if method == "beam" else 4)
    read = writer.readings[0].read
    assert read is not None
    for trace in done.traces:
        text, new = [*PROMPT, *trace.token_ids], list(trace.token_ids)
        places = np.arange(len(PROMPT) - 1, len(text) - 1)
        logits, stream, lens = (x[places].astype(np.float64) for x in whole(text))
        log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        own = log_probs[np.arange(len(new)), new]
        told = np.full(len(new), own.mean()) if method == "force" else own
        np.testing.assert_allclose(trace.log_probs, told, atol=2e-4)
        odds = stream @ np.asarray(read.args[0].weights, np.float64)[:, 0] + 0.3
        entropy = (np.exp(log_probs) * log_probs).sum(axis=1)
        settled = np.exp(lens)[np.arange(len(new)), logits.argmax(axis=1)] / np.exp(lens).sum(axis=1)
        expected = np.stack([1 / (1 + np.exp(-odds)), entropy, settled], axis=1)
        np.testing.assert_allclose(trace.readings, expected, atol=1e-3)
        assert np.abs(trace.readings[1:] - expected[:-1]).max() > 0.05  # of another token
        assert trace.scores[f"probe:{SITE}"] == pytest.approx(float(trace.readings[-1, 0]))
        assert trace.scores["logprob"] == pytest.approx(np.exp(own.mean()), rel=1e-3)
    assert done.generated >= sum(len(trace.token_ids) for trace in done.traces[:1])


def test_samples_are_those_of_complete(writer: Writer) -> None:
    done = attempted(writer, "vote")
    assert [t.token_ids for t in attempted(writer, "vote").traces] == [t.token_ids for t in done.traces]
    found = complete(
        writer.model, writer.params, writer.tokenizer, [PROMPT], max_new_tokens=BUDGET,
        sampler=writer.sampler, key=5, samples=4,
    )  # fmt: skip
    assert [trace.token_ids for trace in done.traces] == [one.token_ids for one in found]
    assert [trace.text for trace in done.traces] == [one.text for one in found]


def test_forks_go_on_from_their_rows_in_ways_of_their_own(writer: Writer) -> None:
    growth = Growth(writer, PROMPT, 4, 5, by_step=True)
    growth.grow()
    before = [growth.trace(row).token_ids for row in range(4)]
    assert all(new[-1] in writer.step_ids or len(new) == BUDGET for new in before)
    going = [row for row in range(4) if len(before[row]) < BUDGET]
    taken = [going[0], going[0], going[-1]]
    growth.fork(taken)
    assert growth.ended.tolist() == [False, False, False, True]
    growth.grow()
    after = [growth.trace(row).token_ids for row in range(3)]
    for new, source in zip(after, taken, strict=True):
        assert new[: len(before[source])] == before[source] and len(new) > len(before[source])
    assert after[0] != after[1]


def test_a_bound_ends_a_trace_in_the_pass_that_exceeds_it(writer: Writer) -> None:
    free = attempted(writer, "vote").traces
    column = np.concatenate([trace.readings[:, 0] for trace in free])
    bound = float(np.quantile(column, 0.7))
    first = replace(writer.readings[0], above=bound)
    ended = attempted(replace(writer, readings=(first, *writer.readings[1:])), "vote").traces
    assert "monitor" in {trace.stop for trace in ended}
    for plain, trace in zip(free, ended, strict=True):
        over = np.flatnonzero(plain.readings[:, 0] > bound)
        assert len(trace.token_ids) == (over[0] + 1 if len(over) else BUDGET)
        assert trace.token_ids == plain.token_ids[: len(trace.token_ids)]


def test_strings_end_traces(writer: Writer) -> None:
    found = attempted(replace(writer, stops=("o",)), "vote").traces
    assert "string" in {trace.stop for trace in found}
    assert all("o" not in trace.text for trace in found)


def test_deepconf_drops_what_is_less_sure_than_its_first_traces(writer: Writer) -> None:
    sure = replace(writer, readings=(confidence_reading(k=5, window=2),))
    done = attempt(sure, PROMPT, MethodOptions("deepconf", 8, keep=0.5), 1)
    scores = [trace.scores["confidence"] for trace in done.traces]
    bound = float(np.quantile(scores[:2], 0.5))
    assert [worth > 0 for worth in done.worths] == [score >= bound for score in scores]
    assert 0.0 in done.worths


@pytest.mark.parametrize(
    ("method", "answer"),
    [("vote", "b"), ("weighted-vote", "a"), ("best-of-n", "a"), ("beam", "b")],
    ids=["vote", "weighted", "best", "beam"],
)
def test_an_answer_is_decided(method: str, answer: str) -> None:
    assert decide(method, ["b", "b", "a", None], [0.1, 0.1, 0.9, 0.3]) == answer
    assert decide(method, [None], [0.5]) is None


def test_a_probe_of_traces_that_come_right_and_its_controls(writer: Writer) -> None:
    """Traces are right by the vowel before their last syllable, which the site holds at their ends."""
    tasks = [Task(text, "yes") for text in ("ba be", "ca ce", "da de", "fa fe", "ga ge", "ha he")]

    def right(text: str) -> str:
        return "yes" if text.replace(" ", "")[-3] in "ae" else "no"

    rows = step_rows(replace(writer, readings=()), tasks, SITE, samples=4, answer=right, seed=1)
    assert rows.x.shape[1] == 24 and 0.1 < rows.right.mean() < 0.9 and rows.trace.max() == 23
    last = np.r_[np.flatnonzero(np.diff(rows.trace)), len(rows.trace) - 1]
    at_end = replace(rows, x=rows.x[last], right=rows.right[last], trace=rows.trace[last])
    scores, spreads = {}, {}
    for kind in ("probe", "shuffled", "random"):
        reading, probe = fit_reading(at_end, kind, l2=0.1)
        assert reading.name == f"{kind}:{SITE}"
        odds = np.asarray(probe(at_end.x))[:, 0]
        scores[kind] = float((odds[at_end.right][:, None] > odds[~at_end.right][None]).mean())
        spreads[kind] = float(odds.mean()), float(odds.std())
    assert spreads["random"] == pytest.approx(spreads["probe"], rel=1e-2)
    assert scores["probe"] > 0.95 > scores["random"] and scores["probe"] > scores["shuffled"]


def test_operations_are_those_that_the_compiled_program_states(writer: Writer) -> None:
    lowered, compiled = (
        pass_costs(writer.model, writer.params, 6, BUDGET, rows=4, compiled=c) for c in (False, True)
    )
    assert lowered.token == pytest.approx(compiled.token, rel=0.1)
    assert lowered.prompt == pytest.approx(compiled.prompt, rel=0.1)
    weights = sum(x.size for x in jax.tree.leaves(writer.params) if x.ndim >= 2)
    assert 1.5 * weights < lowered.token < 8 * weights
    assert lowered.of(10) == lowered.prompt + 10 * lowered.token
