"""What an evaluation is: a name, what it needs, and the scores it gives; the table is in `scorecard.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import numpy as np

from mergelab.activations.model_activations import ModelActivations, halves
from mergelab.errors import SAEError
from mergelab.sae.sae import SAE

__all__ = ["Evidence", "Metric", "Options", "Score"]

HELD = 2**27  # numbers of codes or activations that are held at once, at most: half a gigabyte

_KNOWN = {
    "logits": "next-token logits",
    "encoder": "an encoder's embeddings of texts",
    "labels": "labels of tokens",
    "own_labels": "labels of your own (--labels, labels=)",
    "curve": "the loss curve of the model's training",
}  # how error messages name what evaluations need


@dataclass(frozen=True)
class Score:
    """A figure with what it takes to read it.

    Attributes:
        value: the figure.
        unit: its unit; empty for a pure number.
        against: what it is measured against, or which values are perfect and useless.
    """

    value: float
    unit: str
    against: str


@dataclass(frozen=True)
class Evidence:
    """What evaluations work on: a model on a text, and named resources.

    A new kind of evidence is a new name among the resources; nothing that passes evidence on knows the names.
    Today's are `labels` (answers to probing tasks, bool `[contexts, length]` by task), `own_labels` (labeled
    texts, `mergelab.sae.evaluation.own_labels.LabeledContexts`), `curve` (steps and losses of the model's own
    training) and `mask_token` (the token that takes the place of others in explanations; 0 if absent).
    `logits` and `encoder` follow from the model.

    Attributes:
        source: the model and the text, whose first half fits what must be fitted and whose second half is
            judged.
        resources: what else there is, by name.

    Raises:
        SAEError: labels of tokens are not as many as the tokens, or no answers.
    """

    source: ModelActivations
    resources: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wanted, faults = self.source.tokens.shape, []
        for task, label in (self.resources.get("labels") or {}).items():
            found = np.asarray(label)
            if found.shape != wanted:
                faults.append(
                    f"the labels of {task!r} have shape {list(found.shape)}, but the tokens {list(wanted)}; "
                    "give one for each token of each context."
                )
            elif found.dtype != np.bool_:
                faults.append(
                    f"the labels of {task!r} are {found.dtype}; expected bool, yes or no for each token."
                )
        if faults:
            raise SAEError(faults)

    @cached_property
    def _halves(self) -> tuple[ModelActivations, ModelActivations]:
        return halves(self.source)

    @property
    def fit(self) -> ModelActivations:
        """The model and the half of the text that things are fitted on."""
        return self._halves[0]

    @property
    def judge(self) -> ModelActivations:
        """The same model and the half of the text that scores are of."""
        return self._halves[1]

    @property
    def labels(self) -> dict[str, np.ndarray]:
        """Labels of the judged half, bool `[contexts, length]` by task; empty where there are none."""
        start = len(self.fit.tokens)
        return {task: label[start:] for task, label in (self.resources.get("labels") or {}).items()}

    def __contains__(self, name: str) -> bool:
        causal = self.source.model.predicts
        if name in ("logits", "encoder"):
            return causal == (name == "logits")
        return self.resources.get(name) is not None

    def get(self, name: str, default: Any = None) -> Any:
        """A resource, or the default where it is absent."""
        found = self.resources.get(name)
        return default if found is None else found

    def held_contexts(self, width: int) -> int:
        """Number of judged contexts whose rows of this width fit in memory at once."""
        length = self.judge.tokens.shape[1]
        return max(1, min(len(self.judge.tokens), HELD // (length * width)))


@dataclass(frozen=True)
class Options:
    """How evaluations are run.

    Attributes:
        metrics: names of the evaluations to run; None for all defaults that the evidence allows.
        samples: ablations per kind of unit.
        explained: number of latents that are explained.
        seed: seed of every random draw.
        balance: whether both answers to a question weigh the same in the accuracy of probes, however
            frequent each is.
    """

    metrics: Sequence[str] | None = None
    samples: int = 256
    explained: int = 32
    seed: int = 0
    balance: bool = True


Scores = Iterator[tuple[str, float, str]]
"""Names, values and yardsticks."""


@dataclass(frozen=True)
class Metric:
    """An evaluation.

    Attributes:
        name: the evaluation's name, the first part of the names of its scores.
        about: what it measures, in a few words, for `mergelab sae eval --help`.
        units: unit of each score by the score's name, empty for a pure number; a name may end in `*`.
        measure: gives the name, value and yardstick of each score.
        needs: names of the evidence without which it is not available.
        default: whether it runs where nobody names metrics; False for what takes minutes.
    """

    name: str
    about: str
    units: Mapping[str, str]
    measure: Callable[[SAE, Evidence, Options], Scores]
    needs: tuple[str, ...] = ()
    default: bool = True

    def lacking(self, evidence: Evidence) -> str | None:
        """What it needs and the evidence lacks, in words; None if it is available."""
        missing = [name for name in self.needs if name not in evidence]
        return _KNOWN.get(missing[0], missing[0]) if missing else None

    def scores(self, sae: SAE, evidence: Evidence, options: Options) -> dict[str, Score]:
        """Its scores by full name, such as `downstream.delta_ce`.

        Raises:
            SAEError: the evaluation is not available for this SAE or text.
        """
        return {
            f"{self.name}.{part}": Score(value, self._unit(part), against)
            for part, value, against in self.measure(sae, evidence, options)
        }

    def _unit(self, part: str) -> str:
        for name, unit in self.units.items():
            if fnmatchcase(part, name):
                return unit
        raise SAEError(
            f"the metric {self.name!r} gave a score {part!r} whose unit it does not name; its scores are "
            f"{', '.join(self.units)}."
        )
