"""What the quickstart found: every model's score on every domain, and what follows from the numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from mergelab.verdict.bootstrap import Difference, difference, resampled_sums

__all__ = ["ModelScore", "Results", "bits_per_byte_of", "changes", "retained_gain", "score_models", "verdict"]

Kind = Literal["base", "specialist", "merge"]


@dataclass(frozen=True)
class ModelScore:
    """One model's held-out scores.

    Attributes:
        name: the model's folder name.
        kind: what it is.
        bits: bits per byte by domain, lower is better.
        retained: fraction kept of each domain, `(base - model) / (base - specialist)`: 1 is as good as that
            domain's specialist, 0 as good as the base, negative is worse; None where the specialist gained
            nothing.
        change: mean minus the base's, in bits per byte, with a paired interval over held-out documents (see
            `changes`): `value`, `interval` and `p`; None of the base.
    """

    name: str
    kind: Kind
    bits: Mapping[str, float]
    retained: Mapping[str, float | None]
    change: Mapping[str, Any] | None = None

    @property
    def mean(self) -> float:
        """Mean bits per byte over the domains."""
        return sum(self.bits.values()) / len(self.bits)


@dataclass(frozen=True)
class Results:
    """Everything a report shows.

    Attributes:
        domains: the columns, in order.
        scores: the base, the specialists (named after their domains), the merges.
        verdict: sentences computed from the scores.
        facts: where the numbers come from: text sizes, model size, versions, seed.
        seconds: wall time of each stage when it last ran.
        features: figures of the base model's autoencoder on held-out text, and some of its latents.
    """

    domains: tuple[str, ...]
    scores: tuple[ModelScore, ...]
    verdict: tuple[str, ...]
    facts: Mapping[str, str]
    seconds: Mapping[str, float]
    features: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `results.json`."""
        scores = [asdict(score) | {"mean": score.mean} for score in self.scores]
        return asdict(self) | {"scores": scores}


def score_models(
    bits: Mapping[str, Mapping[str, float]],
    domains: Sequence[str],
    changed: Mapping[str, Difference] | None = None,
) -> tuple[ModelScore, ...]:
    """Scores from bits per byte by model and domain; models are the base, the domains', then merges.

    Args:
        bits: bits per byte by model and domain.
        domains: the columns, in order.
        changed: what `changes` found; None where the documents' own bits are not known.
    """
    kinds: dict[str, Kind] = {"base": "base", **dict.fromkeys(domains, "specialist")}
    return tuple(
        ModelScore(
            name,
            kinds.get(name, "merge"),
            dict(row),
            retained_gain(row, bits, domains),
            None if name == "base" or not changed else changed[name].to_dict(),
        )
        for name, row in bits.items()
    )


def bits_per_byte_of(
    documents: Mapping[str, Mapping[str, Sequence[float]]], sizes: Mapping[str, Sequence[int]]
) -> dict[str, dict[str, float]]:
    """Bits per byte by model and domain, from the bits of each document and its UTF-8 bytes."""
    return {
        model: {domain: sum(bits) / sum(sizes[domain]) for domain, bits in row.items()}
        for model, row in documents.items()
    }


def changes(
    documents: Mapping[str, Mapping[str, Sequence[float]]], sizes: Mapping[str, Sequence[int]]
) -> dict[str, Difference]:
    """How far each model's mean over the domains is from the base's, with an interval of 95 %.

    Documents are drawn anew within their domain, the same ones for all models. That is the spread over texts
    of one run: another seed trains other models.

    Args:
        documents: bits by model, domain and document; one model is `base`.
        sizes: UTF-8 bytes by domain and document.
    """
    models, ratios = [*documents], []
    for seed, (domain, num_bytes) in enumerate(sizes.items()):
        columns = [documents[model][domain] for model in models]
        sums = resampled_sums(np.array([*columns, num_bytes], np.float64).T, seed=seed)
        ratios.append(sums[:, :-1] / sums[:, -1:])
    means = np.mean(ratios, axis=0)
    whole, base, units = np.ones(len(means)), means[:, models.index("base")], min(map(len, sizes.values()))
    return {
        model: difference((base, whole), (means[:, n], whole), units)
        for n, model in enumerate(models)
        if model != "base"
    }


def retained_gain(
    row: Mapping[str, float], bits: Mapping[str, Mapping[str, float]], domains: Sequence[str]
) -> dict[str, float | None]:
    """How much of each specialist's gain over the base a model keeps."""
    gains = {d: bits["base"][d] - bits[d][d] for d in domains}
    return {d: (bits["base"][d] - row[d]) / gains[d] if gains[d] > 0 else None for d in domains}


def verdict(scores: Sequence[ModelScore], domains: Sequence[str]) -> tuple[str, ...]:
    """Says, from the numbers alone, which merges helped, which hurt, and what they are worth."""
    base = next(s for s in scores if s.kind == "base")
    specialists = {s.name: s for s in scores if s.kind == "specialist"}
    merges = sorted((s for s in scores if s.kind == "merge"), key=lambda s: s.mean)
    single = min((base, *specialists.values()), key=lambda s: s.mean)
    best = merges[0]
    better = [s for s in merges if s.mean < base.mean]
    worse = [s for s in merges if s.mean >= base.mean]
    sentences = [
        f"{len(better)} of {len(merges)} merges beat the base model on the mean of the {len(domains)} domains"
        + (f" ({_named(better)} against {base.mean:.3f})" if better else "")
        + (f"; {_named(worse)} did not." if worse else "."),
        f"The best single model on the mean is {single.name} ({single.mean:.3f} bits per byte); "
        f"{_beaten_by(merges, single.mean)}.",
    ]
    if best.mean < single.mean:
        kept = ", ".join(f"{_percent(best.retained[d])} of {d}" for d in domains)
        sentences.append(f"The best merge, {best.name}, keeps this much of each specialist's gain: {kept}.")
    else:
        sentences.append(
            f"Merging did not pay here: {single.name} alone is better on the mean than every merge."
        )
    sentences += _sure(merges)
    beaten = [d for d in domains if any(s.bits[d] < specialists[d].bits[d] for s in merges)]
    sentences.append(
        f"On {_list(beaten)} a merge beats the specialist in its own domain."
        if beaten
        else "On its own domain every specialist beats every merge."
    )
    return tuple(sentences)


def _sure(merges: Sequence[ModelScore]) -> list[str]:
    """What the intervals say, if there are any: better, worse, or not to be told apart from the base."""
    ends = [merge.change["interval"] for merge in merges if merge.change and merge.change["interval"]]
    if not ends:
        return []
    better, worse = sum(high < 0 for _, high in ends), sum(low > 0 for low, _ in ends)
    return [
        f"By the intervals of 95 % over held-out documents, {better} of {len(ends)} merges are better than "
        f"the base, {worse} worse, and {len(ends) - better - worse} not to be told apart from it."
    ]


def _named(scores: Sequence[ModelScore]) -> str:
    return _list([f"{s.name} {s.mean:.3f}" for s in scores])


def _list(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def _beaten_by(merges: Sequence[ModelScore], limit: float) -> str:
    count = sum(s.mean < limit for s in merges)
    return (
        f"{count} of {len(merges)} merges beat it" if count else f"none of the {len(merges)} merges beats it"
    )


def _percent(fraction: float | None) -> str:
    return "none (the specialist gained nothing)" if fraction is None else f"{fraction:.0%}"
