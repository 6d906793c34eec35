"""All evaluations of an SAE in one table, resumable one by one."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mergelab.activations.capture import ModelActivations, halves
from mergelab.checkpoints.json_data import parse_json_object
from mergelab.checkpoints.output_target import disk_errors
from mergelab.checkpoints.text_file import read_bytes
from mergelab.errors import CheckpointError, OutputError, SAEError, did_you_mean
from mergelab.sae.evaluation.controls import control_sae, random_model
from mergelab.sae.evaluation.metric import METRICS, Evidence, Metric, Score
from mergelab.sae.evaluation.settings import differences, settings_of
from mergelab.sae.sae import SAE
from mergelab.sae.splice import anonymous
from mergelab.sae.subject_model import check_reads, check_target

__all__ = [
    "EvaluationJournal",
    "Scorecard",
    "applicable_metrics",
    "control_scorecard",
    "evaluation_key",
    "scorecard",
    "seed_spread",
]


@dataclass(frozen=True)
class Scorecard:
    """What was found of one SAE.

    Attributes:
        scores: by name, such as `downstream.delta_ce`.
        seconds: by metric, its wall time, compilation included.
        settings: of the SAE and its training (`mergelab.sae.evaluation.settings`); None where nobody
            took them down.
    """

    scores: Mapping[str, Score]
    seconds: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] | None = None

    def values(self) -> dict[str, float]:
        """The figures alone."""
        return {name: score.value for name, score in self.scores.items()}


def applicable_metrics(source: ModelActivations, *, labeled: bool) -> tuple[str, ...]:
    """The metrics this model and text allow: some need next-token logits, an encoder or labels of tokens."""
    return tuple(name for name, metric in METRICS.items() if _lacking(metric, source, labeled) is None)


def _lacking(metric: Metric, source: ModelActivations, labeled: bool) -> str | None:
    causal = source.model.family.architecture.causal
    if metric.needs_logits and not causal:
        return "next-token logits"
    if metric.needs_encoder and causal:
        return "an encoder's embeddings of texts"
    return "labels of tokens" if metric.needs_labels and not labeled else None


def scorecard(
    sae: SAE,
    source: ModelActivations,
    *,
    metrics: Sequence[str] | None = None,
    labels: Mapping[str, np.ndarray] | None = None,
    mask_token: int = 0,
    curve: tuple[np.ndarray, np.ndarray] | None = None,
    samples: int = 256,
    explained: int = 32,
    seed: int = 0,
    memory: MutableMapping[str, Scorecard] | None = None,
    progress: Callable[[str], None] = lambda metric: None,
) -> Scorecard:
    """Runs evaluations.

    What must be fitted (explanations) is fitted on the first half of the contexts; every figure is of the
    second half. Of the metrics that nobody asked for by name, one that cannot be had is a row that says why,
    its value NaN.

    Args:
        sae: reads the first of the source's sites, and reconstructs it or, as a transcoder, another.
        source: the SAE's host (`mergelab.sae.subject_model.open_host`) and a text it was not
            trained on.
        metrics: names of `METRICS`; all that apply by default.
        labels: answers to probing tasks, bool `[contexts, length]`, for the contexts of the source.
        mask_token: for explanations, takes the place of a token.
        curve: steps and losses of the host's training, for the compute equivalent.
        samples: ablations per kind of unit.
        explained: latents that are explained.
        seed: of everything drawn.
        memory: metrics that are in it are not run again, and those that are run are put into it; a dict, or a
            file (`mergelab.sae.evaluation.scorecard`).
        progress: is told the name of each metric before it runs.

    Raises:
        SAEError: a metric is unknown, one that was asked for cannot be had of this model and text, or the
            SAE does not fit.
    """
    check_reads(sae, source)
    names = _asked(metrics, source, labels)
    settings = settings_of(sae)
    sae = anonymous(sae)
    fit, judge = halves(source)
    answers = {task: label[len(fit.tokens) :] for task, label in (labels or {}).items()}
    evidence = Evidence(fit, judge, answers, mask_token, curve, samples, explained, seed)
    memory = {} if memory is None else memory
    lacking: dict[str, Scorecard] = {}
    for name in names:
        progress(name)
        if name not in memory:
            started = time.perf_counter()
            try:
                scores = {f"{name}.{part}": score for part, score in METRICS[name].measure(sae, evidence)}
            except SAEError as error:
                if metrics is not None:
                    raise
                lacking[name] = Scorecard({name: Score(float("nan"), "", f"not available: {error}")})
                continue
            memory[name] = Scorecard(scores, {name: time.perf_counter() - started})
    return _joined([lacking.get(name) or memory[name] for name in names], settings)


def _joined(cards: Sequence[Scorecard], settings: Mapping[str, Any]) -> Scorecard:
    scores = {name: score for card in cards for name, score in card.scores.items()}
    seconds = {name: value for card in cards for name, value in card.seconds.items()}
    return Scorecard(scores, seconds, settings)


def _asked(
    metrics: Sequence[str] | None, source: ModelActivations, labels: Mapping[str, np.ndarray] | None
) -> tuple[str, ...]:
    """The metrics to run, each known and possible."""
    if metrics is None:
        return applicable_metrics(source, labeled=labels is not None)
    for name in metrics:
        if name not in METRICS:
            raise SAEError(
                f"there is no metric {name!r}{did_you_mean(name, METRICS)}; known: {', '.join(METRICS)}."
            )
        if needs := _lacking(METRICS[name], source, labels is not None):
            raise SAEError(f"the metric {name!r} needs {needs}, which are not there; leave it away.")
    return tuple(metrics)


def control_scorecard(
    kind: str,
    sae: SAE,
    source: ModelActivations,
    *,
    k: int,
    steps: int = 500,
    metrics: Sequence[str] | None = None,
    labels: Mapping[str, np.ndarray] | None = None,
    mask_token: int = 0,
    samples: int = 256,
    explained: int = 32,
    seed: int = 0,
    memory: MutableMapping[str, Scorecard] | None = None,
) -> Scorecard:
    """The same evaluations of a control (`mergelab.sae.evaluation.controls`), fitted on the first half.

    A random model's SAE is judged on that model: what an evaluation finds there, it does not find
    because the host has learned something.

    Args:
        kind: one of `CONTROLS`.
        sae: what is compared; the control has as many latents.
        source: as for `scorecard`.
        k: the control's active latents per token.
        steps: of its training.
        metrics: as for `scorecard`.
        labels: as for `scorecard`.
        mask_token: as for `scorecard`.
        samples: as for `scorecard`.
        explained: as for `scorecard`.
        seed: of everything drawn.
        memory: as for `scorecard`; if all is in it, no control is made.

    Raises:
        SAEError: as `scorecard` and `control_sae`.
    """
    names = _asked(metrics, source, labels)
    target = None if sae.is_autoencoder else check_target(sae, source)
    if memory is not None and all(name in memory for name in names):
        return _joined([memory[name] for name in names], {"control": kind})
    host = random_model(source, seed) if kind == "random model" else source
    fit, _ = halves(host)
    control = control_sae(kind, fit, n_latents=sae.n_latents, k=k, steps=steps, seed=seed, target_site=target)
    return scorecard(
        control,
        host,
        metrics=metrics,
        labels=labels,
        mask_token=mask_token,
        samples=samples,
        explained=explained,
        seed=seed,
        memory=memory,
    )


def seed_spread(cards: Sequence[Scorecard]) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation (n - 1) of every score over trainings that differ in their seed.

    Args:
        cards: two or more, of the same metrics.

    Raises:
        SAEError: there are fewer than two, their metrics differ, or their SAEs differ in more than
            the seed.
    """
    if len(cards) < 2 or len({tuple(card.scores) for card in cards}) > 1:
        raise SAEError(f"the spread of {len(cards)} scorecards; expected two or more of the same metrics.")
    unlike = differences([card.settings for card in cards if card.settings is not None])
    if unlike:
        raise SAEError(
            f"the SAEs are not seeds of one training, as they differ in {'; '.join(unlike)}; compare "
            "them one by one."
        )
    columns = {name: np.array([card.scores[name].value for card in cards]) for name in cards[0].scores}
    return {name: (float(v.mean()), float(v.std(ddof=1))) for name, v in columns.items()}


_BEGINNING = b'{"key": "'


def evaluation_key(
    sae: SAE, source: ModelActivations, labels: Mapping[str, np.ndarray], *settings: Any
) -> str:
    """SHA-256 of what scores depend on.

    Args:
        sae: that is judged; its metadata does not count.
        source: its tokens and sites count; its weights must be among the settings (`weights_sha256`).
        labels: answers to probing tasks.
        settings: all else, through `repr`.
    """
    config = replace(sae.config, metadata={})
    total = hashlib.sha256(
        repr((source.sites, source.framed, source.tokens.shape, config, settings)).encode()
    )
    for name, array in {"tokens": source.tokens, **labels, **sae.as_numpy()}.items():
        total.update(name.encode())
        total.update(np.ascontiguousarray(array).view(np.uint8).data)
    return total.hexdigest()


class EvaluationJournal(MutableMapping[str, Scorecard]):
    """Scores by metric, of one evaluation among those of a file: the `memory` of `scorecard`.

    Every line of the file is one metric of one evaluation; a last line that a stop has torn is cut off.
    """

    def __init__(self, path: Path, key: str) -> None:
        """Reads what is known.

        Args:
            path: the file, which need not exist.
            key: of the evaluation (`evaluation_key`).

        Raises:
            OutputError: the file cannot be read, or is no journal.
        """
        self.path, self.key = path, key
        self._found: dict[str, Scorecard] = {}
        try:
            lines = read_bytes(path, error=OutputError).splitlines(keepends=True) if path.exists() else []
        except OSError as error:
            raise OutputError(f"{path}: cannot be read ({error.strerror}); choose another file.") from error
        torn = lines.pop() if lines and not lines[-1].endswith(b"\n") else b""
        for number, line in enumerate(lines, 1):
            try:
                entry = parse_json_object(line, "the line")
                if entry["key"] == key:
                    self._found[entry["metric"]] = _card(entry)
            except (CheckpointError, ValueError, KeyError, TypeError) as error:
                raise OutputError(
                    f"{path}, line {number}: is no line of an evaluation's journal; choose another file."
                ) from error
        if torn:
            self._cut_off(torn)

    def _cut_off(self, torn: bytes) -> None:
        """Cuts off a torn last line, if it is the beginning of one of ours and not a text of the user's."""
        if torn[: len(_BEGINNING)] != _BEGINNING[: len(torn)]:
            raise OutputError(
                f"{self.path}: its last line is no line of an evaluation's journal; choose another file."
            )
        with disk_errors(self.path):
            os.truncate(self.path, self.path.stat().st_size - len(torn))

    def __getitem__(self, metric: str) -> Scorecard:
        return self._found[metric]

    def __setitem__(self, metric: str, card: Scorecard) -> None:
        scores = {
            name: asdict(score) | {"value": score.value if np.isfinite(score.value) else repr(score.value)}
            for name, score in card.scores.items()
        }
        entry = {"key": self.key, "metric": metric, "scores": scores, "seconds": dict(card.seconds)}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise OutputError(
                f"{self.path}: cannot be written ({error.strerror}); check the disk."
            ) from error
        self._found[metric] = card

    def __delitem__(self, metric: str) -> None:
        raise OutputError(f"{self.path}: what was found is not taken back; choose another file.")

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


def _card(entry: dict[str, Any]) -> Scorecard:
    scores = {
        name: Score(float(score["value"]), score["unit"], score["against"])
        for name, score in entry["scores"].items()
    }
    return Scorecard(scores, {name: float(value) for name, value in entry["seconds"].items()})
