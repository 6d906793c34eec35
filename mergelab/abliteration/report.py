"""What an abliteration measured, as JSON for programs and as a model card for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from mergelab.abliteration.ablation import Ablation
from mergelab.abliteration.behavior import Behavior
from mergelab.abliteration.direction_selection import DirectionSelection
from mergelab.abliteration.findings import Count, findings
from mergelab.abliteration.removal import KeepNorms
from mergelab.abliteration.trial_search import SearchResult, Trial
from mergelab.checkpoints.model_card import CardFacts, front_matter, portable_name
from mergelab.version import __version__

__all__ = ["Report"]

_CAUTION = """\
The edit removes directions of the residual stream along which this model told the harmful prompts from the
harmless ones. What the model knows is what it knew: nothing was learnt and nothing unlearnt. The figures are
not a measure of what remains: prompts unlike the measured ones may be refused or answered otherwise, warnings
inside answers stay, and what else shared the direction is changed with it. They are of the first tokens of
answers and of phrases, not of whether an answer is right, useful or dangerous.

The model is made for studying what safety training does to weights, and for testing defenses that do not rest
on refusals alone; it is not made to be deployed.
"""
_ROWS = {
    "harmful_refusals": "harmful prompts refused (answers with a refusal phrase)",
    "harmless_refusals": "harmless prompts refused",
    "harmful_score": "refusal score of harmful prompts (mean log-odds of a refusing first token)",
    "harmless_score": "refusal score of harmless prompts",
    "kl": "KL of the first token of harmless answers from the unedited model's (nats)",
    "loss": "cross-entropy on the text (nats per token)",
    "perplexity": "perplexity on the text",
}
_KINDS = ("harmful_refusals", "harmless_refusals")
"""Rates of refusal, in the order in which the two sets of prompts are given."""


@dataclass(frozen=True)
class Report:
    """Everything that was measured.

    Attributes:
        model: the folder that was edited.
        prompts: harmful and harmless prompts used to find directions, to choose, and to measure.
        selection: the chosen direction and every candidate's figures.
        search: the trials of a search, or None.
        trial: the trial that was written, or None.
        ablation: what was removed.
        keep_norms: norms that the matrices kept.
        phrases: what counted as a refusal.
        before: the unedited model, on the prompts left for measuring.
        after: the edited one, on the same.
        facts: what the card says to the hub.
        response_prefix: text after which answers were measured.
    """

    model: str
    prompts: dict[str, tuple[int, int]]
    selection: DirectionSelection
    search: SearchResult | None
    trial: Trial | None
    ablation: Ablation
    keep_norms: KeepNorms
    phrases: Sequence[str]
    before: Behavior
    after: Behavior
    facts: CardFacts = field(default_factory=CardFacts)
    response_prefix: str = ""

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        weights = {
            name: np.asarray(getattr(self.ablation, name)).tolist()
            for name in ("embeddings", "attention", "mlp")
        }
        found = {
            "mergelab": __version__,
            "model": self.model,
            "prompts": {name: list(counts) for name, counts in self.prompts.items()},
            "refusal_phrases": list(self.phrases),
            "response_prefix": self.response_prefix,
            "before": self._figures(self.before),
            "after": self._figures(self.after),
            "counts": self._counts(),
            "findings": self.findings(),
            "weights": {**weights, "keep_norms": self.keep_norms},
            "selection": self.selection.to_json(),
        }
        if self.search is not None and self.trial is not None:
            found["search"] = {
                "chosen": asdict(self.trial),
                "baseline": asdict(self.search.baseline),
                "frontier": [asdict(trial) for trial in self.search.frontier],
                "trials": [asdict(trial) for trial in self.search.trials],
            }
        return found

    def files(self, name: str) -> dict[str, bytes]:
        """`abliteration.json` and `README.md` for the output folder of this name."""
        text = json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n"
        return {"abliteration.json": text.encode(), "README.md": self.card(name).encode()}

    def card(self, name: str) -> str:
        """The model card: what was done, what was measured before and after, what it does not mean."""
        chosen, counts = self.selection.chosen, self.prompts
        lines = [
            *front_matter("transformers", ["mergelab", "abliteration"], self.facts),
            "",
            f"# {name}",
            "",
            f"`{portable_name(self.model)}`, edited with mergelab {__version__}: a direction was taken out "
            "of the matrices that write to the residual stream (abliteration; Arditi et al. 2024, "
            "arXiv:2406.11717).",
            "",
            "## Measured before and after",
            "",
            f"On {counts['measured'][0]} harmful and {counts['measured'][1]} harmless prompts that were used "
            "neither to find the direction nor to choose it.",
            "",
            *self.table(),
            "",
            *(f"- {sentence}" for sentence in self.findings()),
            "",
            "## What was done",
            "",
            f"- Direction: difference of means over {counts['found'][0]} harmful and {counts['found'][1]} "
            f"harmless prompts, at token {chosen.position} from the end, before block {chosen.layer}; chosen "
            f"among {len(self.selection.trace)} candidates on {counts['chosen'][0]} and "
            f"{counts['chosen'][1]} other prompts.",
            *([] if self.trial is None else [self._searched(self.trial)]),
            *(
                [f"- Every prompt ended with {self.response_prefix!r}, as answers begin."]
                if self.response_prefix
                else []
            ),
            f"- Norms kept: {self.keep_norms or 'none'}.",
            "- Every candidate's figures, and the weights of each layer: `abliteration.json`.",
            "",
            "## What this means, and what it does not",
            "",
            _CAUTION,
        ]
        return "\n".join(lines)

    def table(self) -> list[str]:
        """The figures before and after, as lines of a Markdown table."""
        before, after = self._figures(self.before), self._figures(self.after)
        lines = ["| | before | after |", "| --- | --- | --- |"]
        for name, label in _ROWS.items():
            if before[name] is not None:
                cells = [self._cell(name, figures[name]) for figures in (before, after)]
                lines.append(f"| {label} | {cells[0]} | {cells[1]} |")
        return lines

    def findings(self) -> list[str]:
        """What the figures before and after show, in sentences."""
        return findings(self.before, self.after, *self.prompts["measured"])

    def _cell(self, name: str, value: float) -> str:
        return str(self._count(name, value)) if name in _KINDS else f"{value:.4g}"

    def _count(self, name: str, rate: float) -> Count:
        return Count.of(rate, self.prompts["measured"][_KINDS.index(name)])

    def _counts(self) -> dict[str, Any]:
        """Refused prompts before and after, with 95 % intervals of the rates; nothing without answers."""
        found: dict[str, Any] = {}
        for name in _KINDS:
            for when, figures in (("before", self.before), ("after", self.after)):
                if (rate := getattr(figures, name)) is not None:
                    count = self._count(name, rate)
                    found.setdefault(name, {})[when] = {**asdict(count), "interval": list(count.interval)}
        return found

    def _searched(self, trial: Trial) -> str:
        assert self.search is not None
        values = ", ".join(f"{name} {value:.3g}" for name, value in trial.parameters.items())
        return f"- A search of {len(self.search.trials)} trials over what is removed where chose: {values}."

    @staticmethod
    def _figures(behavior: Behavior) -> dict[str, Any]:
        return asdict(behavior) | {"perplexity": behavior.perplexity}
