"""Verifiers that are learned inside: probes of whether a trace comes right, and their controls.

On traces of other tasks, the stream at the ends of steps is read in the pass that chooses the step's last
token, and labeled by whether the trace's answer is right. Beside the probe stand one fitted to labels dealt
at random over the traces, and a random direction of the same spread: what they reach, any number does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mergelab.activations.capture import capture
from mergelab.checkpoints.publish import publish_file
from mergelab.errors import EvaluationError
from mergelab.interp.probes import Probe, fit_logistic
from mergelab.models.sites import match_sites
from mergelab.reasoning.answers import Extract, extract_answer, reference_answer
from mergelab.reasoning.methods import MethodOptions, attempt
from mergelab.reasoning.readings import How, Reading, probe_reading
from mergelab.reasoning.tasks import Task
from mergelab.reasoning.writer import Writer

__all__ = ["FITTED", "StepRows", "fit_reading", "load_probe", "save_probe", "step_rows"]

FITTED = ("probe", "shuffled", "random")
"""Kinds of fitted readings: the probe, and its two controls."""


@dataclass(frozen=True)
class StepRows:
    """What the model held at the ends of steps.

    Attributes:
        site: the site.
        x: float32 `[rows, width]`.
        right: bool `[rows]`, whether the trace came to the right answer.
        trace: number of each row's trace, int `[rows]`.
    """

    site: str
    x: np.ndarray
    right: np.ndarray
    trace: np.ndarray


def step_rows(
    writer: Writer,
    tasks: Sequence[Task],
    site: str,
    *,
    samples: int = 4,
    answer: str | Extract = "auto",
    seed: int = 0,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> StepRows:
    """Writes traces of tasks, and reads a site at the ends of their steps.

    Args:
        writer: who writes.
        tasks: tasks, none of those that are to be solved.
        site: a site of shape `[batch, length, width]`.
        samples: number of traces of each task.
        answer: how answers are found.
        seed: seed of the draws.
        progress: function that is told how many tasks are done, and of how many.

    Raises:
        SiteError: there is no such site.
    """
    (name,) = match_sites(writer.model.sites(), site)
    plain = replace(writer, readings=())
    options = MethodOptions("vote", samples)
    x, right, number = [], [], []
    count = 0
    for place, task in enumerate(tasks):
        prompt = plain.prompt_ids(task.question)
        key = jax.random.fold_in(jax.random.key(seed), place)
        traces = attempt(plain, prompt, options, key).traces
        rows = [[*prompt, *trace.token_ids][:-1] for trace in traces]
        found = capture(writer.model, writer.params, rows, name, edit=dict(writer.edit) or None)[name]
        for held, trace, row in zip(found, traces, rows, strict=True):
            own = held[len(held) - len(row) :]  # rows are padded on the left
            length = len(trace.token_ids)
            ends = {n for n, token in enumerate(trace.token_ids) if token in writer.step_ids} | {length - 1}
            x.append(own[[len(prompt) - 1 + n for n in sorted(ends)]])
            correct = extract_answer(trace.text, task, answer) == reference_answer(task, answer)
            right += [correct] * len(ends)
            number += [count] * len(ends)
            count += 1
        progress(place + 1, len(tasks))
    return StepRows(name, np.concatenate(x), np.array(right, bool), np.array(number))


def fit_reading(
    rows: StepRows, kind: str = "probe", *, how: How = "last", l2: float = 1.0, seed: int = 0
) -> tuple[Reading, Probe]:
    """A probe of whether a trace comes right, or one of its controls, as a reading.

    Activations are divided by their spread first, so that `l2` means the same at every site.

    Args:
        rows: what it is fitted to.
        kind: `probe`; `shuffled`, fitted to the labels of other traces; or `random`, a random direction whose
            log-odds have the probe's mean and spread.
        how: worth of a trace.
        l2: penalty of the weights.
        seed: seed of the controls.

    Raises:
        EvaluationError: all traces are right, or none.
    """
    share = float(rows.right.mean())
    if not 0 < share < 1:
        which = "all" if share else "none"
        raise EvaluationError(
            f"{which} of the traces that the probe is fitted to are right, so nothing separates them; give "
            "harder or easier tasks, or more of them (--fit-on, --fit-samples)"
        )
    rng = np.random.default_rng(seed)
    spread = float(rows.x.std()) or 1.0
    right = rows.right
    if kind == "shuffled":
        labels = np.array([right[rows.trace == n][0] for n in range(int(rows.trace.max()) + 1)])
        right = rng.permutation(labels)[rows.trace]
    probe = fit_logistic(rows.x / spread, right, l2)
    probe = Probe(probe.weights / spread, probe.bias)
    if kind == "random":
        odds = np.asarray(probe(jnp.asarray(rows.x)))[:, 0]
        weights = rng.standard_normal((rows.x.shape[1], 1)).astype(np.float32)
        own = rows.x @ weights
        weights *= odds.std() / max(float(own.std()), 1e-12)
        shift = odds.mean() - float((rows.x @ weights).mean())
        probe = Probe(jax.numpy.asarray(weights), jax.numpy.asarray([shift], np.float32))
    return probe_reading(probe, rows.site, how, name=f"{kind}:{rows.site}"), probe


def save_probe(path: Path, probe: Probe, site: str) -> None:
    """Writes a probe as a safetensors file that names its site."""
    from safetensors.numpy import save

    tensors = {"weights": np.asarray(probe.weights), "bias": np.asarray(probe.bias)}
    publish_file(path, save(tensors, {"site": site}))


def load_probe(path: Path) -> tuple[Probe, str]:
    """Reads a probe and its site.

    Raises:
        EvaluationError: the file is no probe.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            weights, bias = (np.asarray(file.get_tensor(name), np.float32) for name in ("weights", "bias"))
            site = (file.metadata() or {}).get("site")
    except (OSError, SafetensorError, KeyError) as error:
        raise EvaluationError(
            f"{path} cannot be read as a probe ({error}); give a file of weights and bias"
        ) from None
    if site is None or weights.ndim != 2 or bias.shape != (weights.shape[1],) or weights.shape[1] != 1:
        raise EvaluationError(f"{path} is not a probe of one target that names its site; give another file")
    return Probe(jax.numpy.asarray(weights), jax.numpy.asarray(bias)), site
