"""What an abliteration measured, as JSON for programs and as a model card for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from mergelab.abliteration.ablation import Ablation
from mergelab.abliteration.behavior import Behavior
from mergelab.abliteration.decision import RemovalDecision
from mergelab.abliteration.direction_file import DIRECTION_FILE, SavedDirection
from mergelab.abliteration.direction_selection import DirectionSelection
from mergelab.abliteration.findings import Count, findings
from mergelab.abliteration.removal import KeepNorms
from mergelab.abliteration.trials import CHOICES, SearchResult, Trial
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
    "borderline_refusals": "borderline prompts refused (harmless ones that tend to be)",
    "harmful_score": "refusal score of harmful prompts (mean log-odds of a refusing first token)",
    "harmless_score": "refusal score of harmless prompts",
    "borderline_score": "refusal score of borderline prompts",
    "kl": "KL of the first token of harmless answers from the unedited model's (nats)",
    "loss": "cross-entropy on the text (nats per token)",
    "perplexity": "perplexity on the text",
}
_KINDS = ("harmful_refusals", "harmless_refusals", "borderline_refusals")
"""Rates of refusal, in the order in which the sets of prompts are given."""
_SHOWN = 12
"""Trials of a frontier that a card or a screen lists."""


@dataclass(frozen=True)
class Report:
    """Everything that was measured.

    Attributes:
        model: the folder that was edited.
        prompts: harmful, harmless and borderline prompts used to find directions (`found`), to choose
            (`chosen`), and to measure (`measured`).
        decision: what was removed, and how it came to that.
        keep_norms: norms that the matrices kept.
        phrases: what counted as a refusal.
        before: the unedited model, on the prompts left for measuring.
        after: the edited one, on the same.
        facts: what the card says to the hub.
        response_prefix: text after which answers were measured.
        prefix_found: whether that is how all answers of the unedited model begin, and nobody gave it.
        answer_tokens: the most tokens of an answer that were looked through.
        built_in_prompts: whether the prompts are those of the package.
        choose: how the trial was chosen.
        given: the direction that was given in place of one that is found, or None.
    """

    model: str
    prompts: dict[str, list[int]]
    decision: RemovalDecision
    keep_norms: KeepNorms
    phrases: str | Sequence[str]
    before: Behavior
    after: Behavior
    facts: CardFacts = field(default_factory=CardFacts)
    response_prefix: str = ""
    prefix_found: bool = False
    answer_tokens: int = 0
    built_in_prompts: bool = False
    choose: str | int = "lowest-refusals"
    given: SavedDirection | None = None

    @property
    def ablation(self) -> Ablation:
        """What was removed."""
        return self.decision.ablation

    @property
    def selection(self) -> DirectionSelection | None:
        """The chosen direction and every candidate's figures; None of a direction that was given."""
        return self.decision.selection

    @property
    def search(self) -> SearchResult | None:
        """The trials of a search, or None."""
        return self.decision.search

    @property
    def trial(self) -> Trial | None:
        """The trial that was written, or None."""
        return self.decision.trial

    @property
    def direction(self) -> SavedDirection:
        """What was removed, as it is kept beside the model."""
        computed: dict[str, Any] = {"mergelab": __version__, "model": portable_name(self.model)}
        if self.given is not None:
            computed = {**computed, **self.given.computed_from}
        if self.selection is not None:
            chosen = self.selection.chosen
            computed |= {
                "kind": "difference of means, harmful minus harmless",
                "prompts": {"harmful": self.prompts["found"][0], "harmless": self.prompts["found"][1]},
                "built_in_prompts": self.built_in_prompts,
                "position": chosen.position,
                "layer": chosen.layer,
                "response_prefix": self.response_prefix,
            }
        if self.trial is not None:
            computed["trial"] = asdict(self.trial)
        return SavedDirection(self.decision.vector, self.ablation, self.keep_norms, computed)

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        weights = {
            name: np.asarray(getattr(self.ablation, name)).tolist()
            for name in ("embeddings", "attention", "mlp")
        }
        found = {
            "mergelab": __version__,
            "model": portable_name(self.model),
            "prompts": self.prompts,
            "built_in_prompts": self.built_in_prompts,
            "refusal_phrases": [self.phrases] if isinstance(self.phrases, str) else list(self.phrases),
            "answer_tokens": self.answer_tokens,
            "response_prefix": self.response_prefix,
            "response_prefix_found": self.prefix_found,
            "before": self._figures(self.before),
            "after": self._figures(self.after),
            "counts": self._counts(),
            "findings": self.findings(),
            "weights": {**weights, "keep_norms": self.keep_norms},
            "selection": None if self.selection is None else self.selection.to_json(),
            "direction": DIRECTION_FILE,
        }
        if self.given is not None:
            found["given"] = dict(self.given.computed_from)
        if self.search is not None and self.trial is not None:
            found["search"] = {
                "choose": self.choose,
                "chosen": asdict(self.trial),
                **self.search.to_json(),
            }
        return found

    def files(self, name: str) -> dict[str, bytes]:
        """`abliteration.json`, the card and the direction for the output folder of this name."""
        text = json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n"
        return {
            "abliteration.json": text.encode(),
            "README.md": self.card(name).encode(),
            DIRECTION_FILE: self.direction.to_bytes(),
        }

    def card(self, name: str) -> str:
        """The model card: what was done, what was measured before and after, what it does not mean."""
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
            f"On {self._measured()} prompts that were used neither to find the direction nor to choose it"
            f"{'' if self.given is None else ' here'}. Answers of up to {self.answer_tokens} tokens were "
            "looked through for phrases of refusals.",
            "",
            *self.table(),
            "",
            *(f"- {sentence}" for sentence in self.findings()),
            "",
            "## What was done",
            "",
            *self._done(),
            f"- Norms kept: {self.keep_norms or 'none'}.",
            "- All figures, and the weights of each layer: `abliteration.json`; the direction: "
            f"`{DIRECTION_FILE}`.",
            "",
            "## What this means, and what it does not",
            "",
            _CAUTION,
        ]
        return "\n".join(lines)

    def _measured(self) -> str:
        counts = [
            f"{count} {kind}"
            for count, kind in zip(
                self.prompts["measured"], ("harmful", "harmless", "borderline"), strict=False
            )
        ]
        built_in = " built-in" if self.built_in_prompts else ""
        return f"{', '.join(counts[:-1])} and {counts[-1]}{built_in}"

    def _done(self) -> list[str]:
        """What was done, as items of a list."""
        lines = []
        if self.selection is None:
            origin = {} if self.given is None else self.given.computed_from
            said = [
                f"{key}: {json.dumps(origin[key])}" for key in ("model", "kind", "prompts") if key in origin
            ]
            whence = f" (its file says {'; '.join(said)})" if said else ""
            lines.append(
                f"- Direction: given in a file{whence}. Whether it was found on some of the prompts that "
                "measure is not known here."
            )
        else:
            chosen, found, judged = self.selection.chosen, self.prompts["found"], self.prompts["chosen"]
            more = f" and {judged[2]} borderline" if len(judged) > 2 else ""
            lines.append(
                f"- Direction: difference of means over {found[0]} harmful and {found[1]} harmless prompts, "
                f"at token {chosen.position} from the end, before block {chosen.layer}; chosen among "
                f"{len(self.selection.trace)} candidates on {judged[0]} harmful, {judged[1]} harmless{more} "
                "other prompts."
            )
        if self.trial is not None:
            lines.append(self._searched(self.trial))
        if self.response_prefix:
            why = "as all answers of the unedited model begin" if self.prefix_found else "as answers begin"
            lines.append(f"- Every prompt ended with {self.response_prefix!r}, {why}.")
        return lines

    def frontier_table(self) -> list[str]:
        """The trials that no other beats, as lines of a Markdown table; the chosen one has a star."""
        if self.search is None:
            return []
        names = {"refusal": "refusals", "borderline": "borderline refusals", "kl": "KL", "loss": "loss"}
        names = {
            name: label for name, label in names.items() if getattr(self.search.baseline, name) is not None
        }
        lines = [f"| trial | {' | '.join(names.values())} |", "| --- |" + " --- |" * len(names)]
        for trial in self.search.frontier[:_SHOWN]:
            star = " *" if trial is self.trial else ""
            cells = " | ".join(f"{getattr(trial, name):.3g}" for name in names)
            lines.append(f"| {trial.number}{star} | {cells} |")
        return lines

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
        rule = "its number" if isinstance(self.choose, int) else CHOICES[self.choose]
        return (
            f"- Trial {trial.number} of a search of {len(self.search.trials)} over what is removed where, "
            f"taken by {rule}; {len(self.search.frontier)} trials are beaten by no other: {values}."
        )

    @staticmethod
    def _figures(behavior: Behavior) -> dict[str, Any]:
        return asdict(behavior) | {"perplexity": behavior.perplexity}
