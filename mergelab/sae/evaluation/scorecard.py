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

from mergelab.activations.model_activations import ModelActivations
from mergelab.checkpoints.json_data import parse_json_object
from mergelab.checkpoints.output_target import disk_errors
from mergelab.checkpoints.text_file import read_bytes
from mergelab.errors import CheckpointError, OutputError, SAEError, did_you_mean
from mergelab.sae.evaluation.absorption import METRIC as ABSORPTION
from mergelab.sae.evaluation.controls import control_sae, random_model
from mergelab.sae.evaluation.downstream import METRIC as DOWNSTREAM
from mergelab.sae.evaluation.explanation_loss import METRIC as EXPLANATIONS
from mergelab.sae.evaluation.metric import Evidence, Metric, Options, Score
from mergelab.sae.evaluation.own_labels import METRIC as LABELS
from mergelab.sae.evaluation.probing import METRIC as PROBING
from mergelab.sae.evaluation.progressive import METRIC as PROGRESSIVE
from mergelab.sae.evaluation.reconstruction import METRIC as RECONSTRUCTION
from mergelab.sae.evaluation.settings import differences, settings_of
from mergelab.sae.evaluation.sparse_coding import METRIC as AMORTIZATION_GAP
from mergelab.sae.evaluation.sparsity import METRIC as SPARSITY
from mergelab.sae.evaluation.text_embeddings import METRIC as EMBEDDINGS
from mergelab.sae.evaluation.training_curve import LossCurve
from mergelab.sae.sae import SAE
from mergelab.sae.splice import anonymous
from mergelab.sae.subject_model import check_reads, check_target

__all__ = [
    "METRICS",
    "EvaluationJournal",
    "Scorecard",
    "applicable_metrics",
    "check_metrics",
    "control_scorecard",
    "evaluation_key",
    "scorecard",
    "seed_spread",
]

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        RECONSTRUCTION,
        DOWNSTREAM,
        EMBEDDINGS,
        PROBING,
        LABELS,
        ABSORPTION,
        SPARSITY,
        EXPLANATIONS,
        PROGRESSIVE,
        AMORTIZATION_GAP,
    )
}
"""Evaluations by name, in the order a scorecard runs them; a new one is added here."""


@dataclass(frozen=True)
class Scorecard:
    """What was found of one SAE.

    Attributes:
        scores: scores by name, such as `downstream.delta_ce`.
        seconds: wall time of each metric, compilation included.
        settings: settings of the SAE and its training (`mergelab.sae.evaluation.settings`); None where nobody
            took them down.
    """

    scores: Mapping[str, Score]
    seconds: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] | None = None

    def values(self) -> dict[str, float]:
        """The figures alone."""
        return {name: score.value for name, score in self.scores.items()}


def applicable_metrics(evidence: Evidence) -> tuple[str, ...]:
    """The default metrics that the evidence allows: some need next-token logits, an encoder or labels."""
    return tuple(
        name for name, metric in METRICS.items() if metric.default and metric.lacking(evidence) is None
    )


def scorecard(
    sae: SAE,
    evidence: Evidence | ModelActivations,
    options: Options = Options(),  # noqa: B008 - frozen
    *,
    memory: MutableMapping[str, Scorecard] | None = None,
    progress: Callable[[str], None] = lambda metric: None,
) -> Scorecard:
    """Runs evaluations.

    What must be fitted (explanations) is fitted on the first half of the contexts; every figure is of the
    second half. A metric that is not available for the SAE, its model or the text is a row that says why, its
    value NaN; the others run all the same.

    Args:
        sae: SAE that reads the first of the source's sites, and reconstructs it or, as a transcoder, another.
        evidence: the SAE's model on a text it was not trained on (`open_subject_model`), with what else
            evaluations need; activations alone are evidence without resources.
        options: metrics to run, and how.
        memory: known metrics, which are not run again and to which those that are run are added: a dict, or a
            file (`EvaluationJournal`).
        progress: function of the name of each metric, called before it runs.

    Raises:
        SAEError: a metric is unknown, none of those that were asked for is available for this model and text,
            or the SAE does not fit.
    """
    evidence = _evidence(evidence)
    check_reads(sae, evidence.source)
    names = _asked(evidence, options)
    settings = settings_of(sae)
    sae = anonymous(sae)
    evidence.judge  # noqa: B018 - a text too short to be halved is refused before any work
    memory = {} if memory is None else memory
    lacking: dict[str, Scorecard] = {}
    faults: list[str] = []
    for name in names:
        progress(name)
        if name not in memory:
            started = time.perf_counter()
            try:
                if needs := METRICS[name].lacking(evidence):
                    raise SAEError(
                        f"the metric {name!r} needs {needs}, which is not available here; omit it."
                    )
                scores = METRICS[name].scores(sae, evidence, options)
            except SAEError as error:
                lacking[name] = Scorecard({name: Score(float("nan"), "", f"not available: {error}")})
                faults.append(str(error))
                continue
            memory[name] = Scorecard(scores, {name: time.perf_counter() - started})
    if faults and len(faults) == len(names):
        raise SAEError(faults)
    return _joined([lacking.get(name) or memory[name] for name in names], settings)


def _evidence(given: Evidence | ModelActivations) -> Evidence:
    return given if isinstance(given, Evidence) else Evidence(given)


def _joined(cards: Sequence[Scorecard], settings: Mapping[str, Any]) -> Scorecard:
    scores = {name: score for card in cards for name, score in card.scores.items()}
    seconds = {name: value for card in cards for name, value in card.seconds.items()}
    return Scorecard(scores, seconds, settings)


def _asked(evidence: Evidence, options: Options) -> tuple[str, ...]:
    """The metrics to run, each known."""
    check_metrics(options.metrics)
    return applicable_metrics(evidence) if options.metrics is None else tuple(options.metrics)


def check_metrics(names: Sequence[str] | None) -> None:
    """Checks that there are metrics of these names; None names none.

    Raises:
        SAEError: there is none of a name, or no name is given.
    """
    if names is not None and not names:
        raise SAEError(f"no metric was named; known: {', '.join(METRICS)}.")
    for name in names or ():
        if name not in METRICS:
            raise SAEError(
                f"there is no metric {name!r}{did_you_mean(name, METRICS)}; known: {', '.join(METRICS)}."
            )


def control_scorecard(
    kind: str,
    sae: SAE,
    evidence: Evidence | ModelActivations,
    options: Options = Options(),  # noqa: B008 - frozen
    *,
    k: int,
    steps: int = 500,
    memory: MutableMapping[str, Scorecard] | None = None,
) -> Scorecard:
    """The same evaluations of a control (`mergelab.sae.evaluation.controls`), fitted on the first half.

    A random model's SAE is judged on that model: what an evaluation finds there, it does not find
    because the model has learned something.

    Args:
        kind: one of `CONTROLS`.
        sae: SAE that is compared; the control has as many latents.
        evidence: same as for `scorecard`; a random model has no loss curve.
        options: same as for `scorecard`.
        k: the control's active latents per token.
        steps: number of training steps of the control.
        memory: same as for `scorecard`; if all is in it, no control is made.

    Raises:
        SAEError: as `scorecard` and `control_sae`.
    """
    evidence = _evidence(evidence)
    names = _asked(evidence, options)
    source, seed = evidence.source, options.seed
    target = None if sae.is_autoencoder else check_target(sae, source)
    if memory is not None and all(name in memory for name in names):
        return _joined([memory[name] for name in names], {"control": kind})
    resources = dict(evidence.resources)
    if kind == "random model":
        source = random_model(source, seed)
        resources.pop("curve", None)  # of another model's training
    evidence = Evidence(source, resources)
    control = control_sae(
        kind, evidence.fit, n_latents=sae.n_latents, k=k, steps=steps, seed=seed, target_site=target
    )
    return scorecard(control, evidence, options, memory=memory)


def seed_spread(cards: Sequence[Scorecard]) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation (n - 1) of every score over trainings that differ in their seed.

    Args:
        cards: two or more scorecards of the same metrics.

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
    sae: SAE, evidence: Evidence | ModelActivations, options: Options, weights: str, *settings: Any
) -> str:
    """SHA-256 of what scores depend on.

    Args:
        sae: SAE that is judged; its metadata does not count.
        evidence: its tokens, sites and resources count; the token that masks belongs to the model.
        options: all count but the metrics, as each is a line of its own.
        weights: digest of the model's weights (`weights_sha256`).
        settings: all else, through `repr`.
    """
    evidence = _evidence(evidence)
    source = evidence.source
    config = replace(sae.config, metadata={})
    numbers = replace(options, metrics=None, seed=0)
    known = {"labels", "own_labels", "curve", "mask_token"}
    other = {name: value for name, value in evidence.resources.items() if name not in known}
    more = (() if numbers == Options() else (numbers,)) + ((other,) if other else ())
    if "own_labels" in evidence:
        more = (*more, evidence.get("own_labels").identity())
    curve = evidence.get("curve")
    curve = curve.identity() if isinstance(curve, LossCurve) else curve
    facts = (weights, options.seed, curve, *settings, *more)
    rule = (source.rule, source.special_ids)
    shown = repr((source.sites, source.framed, source.tokens.shape, rule, config, facts))
    total = hashlib.sha256(shown.encode())
    labels: Mapping[str, np.ndarray] = evidence.get("labels", {})
    counted = {} if source.counted is None else {"counted": source.counted}
    for name, array in {"tokens": source.tokens, **counted, **labels, **sae.as_numpy()}.items():
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
            key: key of the evaluation (`evaluation_key`).

        Raises:
            OutputError: the file cannot be read, or is not a journal.
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
                    f"{path}, line {number}: is not a line of an evaluation's journal; choose another file."
                ) from error
        if torn:
            self._cut_off(torn)

    def _cut_off(self, torn: bytes) -> None:
        """Cuts off a torn last line, if it is the beginning of one of ours and not a text of the user's."""
        if torn[: len(_BEGINNING)] != _BEGINNING[: len(torn)]:
            raise OutputError(
                f"{self.path}: its last line is not a line of an evaluation's journal; choose another file."
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
