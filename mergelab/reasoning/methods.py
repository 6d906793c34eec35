"""The methods: traces of one prompt, made by sampling, search or forcing, and the answer they come to."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from mergelab.decoding.budget_forcing import Thinking, complete_thinking
from mergelab.decoding.guided_search import FoundStates, guided_beams, guided_trees, particle_filter
from mergelab.decoding.samplers import row_keys
from mergelab.decoding.votes import best_of_n, weighted_vote
from mergelab.errors import DecodingError, did_you_mean, quoted
from mergelab.reasoning.growth import Growth
from mergelab.reasoning.readings import confidence_reading, log_probability_reading, monitor_of
from mergelab.reasoning.writer import Trace, Writer

__all__ = ["METHODS", "Attempt", "Method", "MethodOptions", "attempt", "decide", "draws_independently"]

Method = Literal["best-of-n", "vote", "weighted-vote", "beam", "dvts", "particles", "deepconf", "force"]
METHODS: tuple[str, ...] = get_args(Method)


@dataclass(frozen=True)
class MethodOptions:
    """How a task is attempted.

    Attributes:
        method: `best-of-n`, the trace that the verifier scores highest; `vote`, the answer of most;
            `weighted-vote`, votes that weigh what the verifier says; `beam`, `dvts` and `particles`, searches
            step by step; `deepconf`, a vote of confident traces, the others ended early (2508.15260);
            `force`, a vote of traces that think for a given time (2501.19393).
        samples: number of traces; of a search, those that are looked at side by side.
        verify: worth of a trace, at least 0; None for the first of the writer's readings.
        branch: number of ways in which a search extends each state.
        thinking: how long traces of `force` think.
        keep: fraction of the first traces of `deepconf` that its bound lets pass.
        batch: most traces in one pass.
    """

    method: str = "vote"
    samples: int = 8
    verify: Callable[[Trace], float] | None = None
    branch: int = 4
    thinking: Thinking | None = None
    keep: float = 0.9
    batch: int = 64

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            near = did_you_mean(self.method, METHODS)
            raise DecodingError(
                f"{quoted(self.method)} is not a method{near}; the methods are {', '.join(METHODS)}"
            )
        for name in ("samples", "branch", "batch"):
            value = getattr(self, name)
            if value < 1:
                raise DecodingError(f"the number given as {name} is {value}; give 1 or more")
        if not 0 < self.keep <= 1:
            raise DecodingError(f"the fraction of traces to keep is {self.keep}; give one above 0, up to 1")
        if self.method == "force" and self.thinking is None:
            raise DecodingError("forcing needs the text that ends thinking; give thinking=Thinking(...)")


@dataclass(frozen=True)
class Attempt:
    """What a method made of one prompt.

    Attributes:
        traces: the traces, in the order in which they were drawn; of a search, the best first.
        worths: what each is worth to the method; 0 for those that it drops.
        generated: number of tokens that were generated in all, those of dropped states among them.
    """

    traces: tuple[Trace, ...]
    worths: tuple[float, ...]
    generated: int


def draws_independently(method: str) -> bool:
    """Whether a method's traces are independent draws, so that the first `k` are what `k` would have been."""
    return method in ("best-of-n", "vote", "weighted-vote", "force")


def with_judge(writer: Writer, options: MethodOptions) -> Writer:
    """The writer with the reading that the method judges by, where it has none."""
    if options.method == "deepconf":
        first = writer.readings[:1]
        if not first or first[0].name != "confidence":
            window = max(1, min(2048, writer.budget // 4))
            return replace(writer, readings=(confidence_reading(window=window), *writer.readings))
    return writer if writer.readings else replace(writer, readings=(log_probability_reading(),))


def attempt(writer: Writer, prompt: Sequence[int], options: MethodOptions, key: Any) -> Attempt:
    """Traces of one prompt.

    Args:
        writer: who writes; without readings the model's own log-probability judges.
        prompt: token ids.
        options: the method.
        key: a seed or a key of the draws.

    Raises:
        DecodingError: as of `generate`; or a step, or thinking, has no end.
    """
    writer = with_judge(writer, options)
    verify = options.verify or (lambda trace: trace.scores[writer.readings[0].name])
    if options.method in ("beam", "dvts", "particles"):
        return _searched(writer, prompt, options, key, verify)
    keys = row_keys(key, options.samples)
    if options.method == "force":
        traces, generated = _forced(writer, prompt, options, keys)
    elif options.method == "deepconf":
        return _confident(writer, prompt, options, keys)
    else:
        traces, generated = _sampled(writer, prompt, options, keys)
    return Attempt(tuple(traces), tuple(float(verify(trace)) for trace in traces), generated)


def decide(method: str, answers: Sequence[Hashable | None], worths: Sequence[float]) -> Hashable | None:
    """The answer that traces come to; None where none of them answers.

    Args:
        method: name of the method.
        answers: what each trace answers.
        worths: what each is worth, as in `Attempt.worths`.
    """
    if method == "beam":
        return answers[0]
    if method == "best-of-n":
        return answers[best_of_n(range(len(answers)), lambda n: worths[n])[0]]
    weighs = method in ("weighted-vote", "dvts", "deepconf")
    return weighted_vote(answers, worths if weighs else np.ones(len(answers))).answer


def _sampled(
    writer: Writer, prompt: Sequence[int], options: MethodOptions, keys: Any, **growing: Any
) -> tuple[list[Trace], int]:
    traces, generated = [], 0
    for start in range(0, len(keys), options.batch):
        some = keys[start : start + options.batch]
        growth = Growth(writer, prompt, len(some), some, by_step=False)
        growth.grow(**growing)
        traces += [growth.trace(row) for row in range(len(some))]
        generated += growth.grown
    return traces, generated


def _confident(writer: Writer, prompt: Sequence[int], options: MethodOptions, keys: Any) -> Attempt:
    """DeepConf online: the first quarter sets a bound, and others end where they fall below it."""
    reading, first = writer.readings[0], max(1, math.ceil(options.samples / 4))
    traces, generated = _sampled(writer, prompt, options, keys[:first])
    worths = [trace.scores[reading.name] for trace in traces]
    bound = float(np.quantile(worths, 1 - options.keep))

    def look(growth: Growth) -> None:
        for row in np.flatnonzero(~growth.ended).tolist():
            so_far = growth.trace(row)
            if len(so_far.token_ids) >= reading.window and so_far.scores[reading.name] < bound:
                growth.end(row)

    if len(keys) > first:
        more, tokens = _sampled(writer, prompt, options, keys[first:], look=look)
        traces, generated = [*traces, *more], generated + tokens
    scores = [trace.scores[reading.name] for trace in traces]
    return Attempt(tuple(traces), tuple(s if s >= bound else 0.0 for s in scores), generated)


def _forced(
    writer: Writer, prompt: Sequence[int], options: MethodOptions, keys: Any
) -> tuple[list[Trace], int]:
    assert options.thinking is not None
    monitor, sites = monitor_of(writer.readings)
    traces = []
    for start in range(0, len(keys), options.batch):
        some = keys[start : start + options.batch]
        found = complete_thinking(
            writer.model,
            writer.params,
            writer.tokenizer,
            [prompt],
            options.thinking,
            max_new_tokens=writer.budget,
            sampler=writer.sampler,
            key=some,
            stop_strings=writer.stops,
            end_ids=writer.ends,
            edit=writer.edit,
            samples=len(some),
            log_probs=True,
            capture=sites,
            monitor=monitor,
        )
        for one in found:
            count = len(one.token_ids)
            # Only the sum is kept of log-probabilities; their mean is what counts.
            even = np.full(count, (one.log_probability or 0.0) / max(count, 1), np.float32)
            inside = np.asarray(one.readings, np.float32).reshape(count, -1)
            trace = Trace(one.token_ids, one.text, one.stop, even, inside)
            traces.append(replace(trace, scores=writer.scored(trace)))
    return traces, sum(len(trace.token_ids) for trace in traces)


@dataclass(frozen=True)
class _State:
    """An unfinished text in a search: the row in which it goes on, and what it holds; None at the root."""

    row: int
    trace: Trace | None
    ended: bool


def _searched(
    writer: Writer,
    prompt: Sequence[int],
    options: MethodOptions,
    key: Any,
    verify: Callable[[Trace], float],
) -> Attempt:
    branch = min(options.branch, options.samples)
    wide = options.samples // branch
    rows = options.samples if options.method == "particles" else wide * branch
    growth = Growth(writer, prompt, rows, row_keys(key, rows), by_step=True)

    def extend(states: Sequence[_State]) -> list[_State]:
        growth.fork([state.row for state in states])
        growth.grow()
        return [_State(n, growth.trace(n), bool(growth.ended[n])) for n in range(len(states))]

    def score(states: Sequence[_State]) -> list[float]:
        return [float(verify(state.trace)) for state in states if state.trace is not None]

    root, steps = _State(0, None, False), writer.budget
    found: FoundStates[_State]
    if options.method == "beam":
        found = guided_beams(
            root, extend, score, width=wide, branch=branch, steps=steps, done=lambda s: s.ended
        )
    elif options.method == "dvts":
        found = guided_trees(
            root, extend, score, trees=wide, branch=branch, steps=steps, done=lambda s: s.ended
        )
    else:
        seed = int(np.random.default_rng(_words(key)).integers(2**31))
        found = particle_filter(
            root, extend, score, particles=rows, steps=steps, seed=seed, done=lambda s: s.ended
        )
    traces = tuple(state.trace for state in found.states if state.trace is not None)
    return Attempt(traces, found.scores, growth.grown)


def _words(key: Any) -> list[int]:
    """The bits of a seed or a key, as seeds of numpy."""
    import jax

    if isinstance(key, int):
        return [key & (2**63 - 1)]
    return [int(word) for word in np.asarray(jax.random.key_data(key)).reshape(-1)]
