"""Sentences that say what two sets of figures show: no more than was measured, and how sure it is."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mergelab.abliteration.behavior import Behavior

__all__ = ["Count", "findings", "wilson_interval"]

_Z = 1.959963984540054
"""The 97.5 % quantile of the normal distribution, for intervals of 95 %."""
_SAME_SCORE = 0.01
"""Log-odds that rounding to another order of sums may move."""
_SAME_KL = 1e-5
_DAMAGE = 1.1
"""Factor of perplexity that is called damage; smaller changes are stated and not judged."""


def wilson_interval(count: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a rate that was seen `count` times in `total` trials.

    Raises:
        ValueError: there are no trials, or more hits than trials.

    Reference: Wilson 1927, J. Am. Stat. Assoc. 22, 209-212; without a correction for continuity.

    Example:
        >>> [round(bound, 3) for bound in wilson_interval(0, 5)]
        [0.0, 0.434]
    """
    if not 0 <= count <= total or not total:
        raise ValueError(f"{count} of {total} is not a count")
    rate, spread = count / total, _Z * _Z / total
    center = (rate + spread / 2) / (1 + spread)
    half = _Z * math.sqrt(rate * (1 - rate) / total + spread / (4 * total)) / (1 + spread)
    # At the ends the formula is exact; floating point would leave 1e-17 there.
    return (0.0 if count == 0 else center - half), (1.0 if count == total else center + half)


@dataclass(frozen=True)
class Count:
    """How many prompts of a set were refused.

    Attributes:
        count: those refused.
        total: all of them.
    """

    count: int
    total: int

    @classmethod
    def of(cls, rate: float, total: int) -> Count:
        """The count that a rate over `total` prompts came from."""
        return cls(round(rate * total), total)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the rate."""
        return wilson_interval(self.count, self.total)

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"{self.count / self.total:.1%} ({self.count} of {self.total}; 95 % interval "
            f"{100 * low:.1f} to {100 * high:.1f} %)"
        )


def findings(
    before: Behavior, after: Behavior, harmful: int, harmless: int, borderline: int = 0
) -> list[str]:
    """What the figures show, in sentences; each names the figures that it rests on.

    Args:
        before: the unedited model.
        after: the edited one, on the same prompts.
        harmful: how many harmful prompts were measured.
        harmless: how many harmless ones.
        borderline: how many harmless ones that tend to be refused.
    """
    if not _finite(after) or not _finite(before):
        return ["Figures are not finite numbers: the model is broken, and nothing else can be said of it."]
    total = harmful + harmless + borderline
    if _unchanged(before, after):
        same = f"The edit changed nothing that was measured. {_refusals(before, after, harmful)}".rstrip()
        return [same, *_unfinished(before, after, total)]
    found = [
        _separation(before),
        _refusals(before, after, harmful),
        _score(before, after),
        _harmless(before, after, harmless),
        _borderline(before, after, borderline),
        *_unfinished(before, after, total),
        _divergence(after),
        _perplexity(before, after),
    ]
    return [sentence for sentence in found if sentence]


def _finite(behavior: Behavior) -> bool:
    figures = (behavior.harmful_score, behavior.harmless_score, behavior.kl, behavior.loss or 0.0)
    return all(map(math.isfinite, figures))


def _unchanged(before: Behavior, after: Behavior) -> bool:
    return (
        before.harmful_refusals == after.harmful_refusals
        and before.harmless_refusals == after.harmless_refusals
        and before.borderline_refusals == after.borderline_refusals
        and abs((before.borderline_score or 0.0) - (after.borderline_score or 0.0)) < _SAME_SCORE
        and abs(before.harmful_score - after.harmful_score) < _SAME_SCORE
        and abs(before.harmless_score - after.harmless_score) < _SAME_SCORE
        and after.kl < _SAME_KL
        and abs((before.loss or 0.0) - (after.loss or 0.0)) < _SAME_SCORE / 10
    )


def _refusals(before: Behavior, after: Behavior, total: int) -> str:
    if before.harmful_refusals is None or after.harmful_refusals is None:
        return ""
    was, now = Count.of(before.harmful_refusals, total), Count.of(after.harmful_refusals, total)
    if was.count == now.count == 0:
        return (
            f"{_none_refused(total, 'harmful')}: there was nothing to end, and these prompts do not show "
            "what the edit does to refusals."
        )
    return _change("harmful", was, now)


def _none_refused(total: int, kind: str) -> str:
    if total == 1:
        return f"The one {kind} prompt was refused neither before the edit nor after"
    return f"None of the {total} {kind} prompts was refused before the edit, and none after"


def _separation(before: Behavior) -> str:
    """What a direction is worth where the model told the prompts apart by anything but refusals."""
    harmful, harmless = before.harmful_score, before.harmless_score
    if harmful > harmless:
        return ""
    return (
        f"Before the edit harmful prompts scored no higher than harmless ones ({harmful:.4g} and "
        f"{harmless:.4g}): the model did not seem to refuse them, and nothing here shows that the direction "
        "has to do with refusals."
    )


def _change(kind: str, was: Count, now: Count) -> str:
    """How a count of refusals changed, and how sure that is."""
    if was.count == now.count:
        return f"Refusals of {kind} prompts did not change: {now.count} of {now.total} before and after."
    verb = "fell" if now.count < was.count else "rose"
    sentence = f"Refusals of {kind} prompts {verb} from {was.count} to {now.count} of {now.total}"
    if was.interval[0] <= now.interval[1] and now.interval[0] <= was.interval[1]:
        return f"{sentence}; the 95 % intervals overlap, so that this may be chance."
    if now.count == 0:
        return f"{sentence}; up to {now.interval[1]:.1%} of such prompts may still be (95 % interval)."
    return f"{sentence}."


def _borderline(before: Behavior, after: Behavior, total: int) -> str:
    if before.borderline_refusals is None or after.borderline_refusals is None or not total:
        return ""
    was, now = Count.of(before.borderline_refusals, total), Count.of(after.borderline_refusals, total)
    if was.count == now.count == 0:
        return f"{_none_refused(total, 'borderline')}."
    return _change("borderline", was, now)


def _unfinished(before: Behavior, after: Behavior, total: int) -> list[str]:
    if not before.unfinished and not after.unfinished:
        return []
    return [
        f"{before.unfinished} of {total} answers before the edit and {after.unfinished} after it ended "
        "within their reasoning, so that refusals behind it were not seen; --answer-tokens takes more."
    ]


def _score(before: Behavior, after: Behavior) -> str:
    was, now = before.harmful_score, after.harmful_score
    if abs(now - was) < _SAME_SCORE:
        return f"The refusal score of harmful prompts did not change ({was:.4g} before, {now:.4g} after)."
    if now > was:
        return (
            f"The refusal score of harmful prompts rose from {was:.4g} to {now:.4g}: the edit made a first "
            "token of a refusal likelier, not less likely."
        )
    return f"The refusal score of harmful prompts fell from {was:.4g} to {now:.4g}."


def _harmless(before: Behavior, after: Behavior, total: int) -> str:
    if before.harmless_refusals is None or after.harmless_refusals is None:
        return "No answers were generated, so that refusals in whole answers were not counted."
    was, now = Count.of(before.harmless_refusals, total), Count.of(after.harmless_refusals, total)
    if was.count == now.count:
        return ""
    verb = "fell" if now.count < was.count else "rose"
    return f"Refusals of harmless prompts {verb} from {was.count} to {now.count} of {total}."


def _divergence(after: Behavior) -> str:
    return f"The first token of harmless answers moved by {after.kl:.3g} nats (KL)."


def _perplexity(before: Behavior, after: Behavior) -> str:
    was, now = before.perplexity, after.perplexity
    if was is None or now is None:
        return "No text was given, so that the cost to ordinary text was not measured."
    ratio = now / was
    if abs(ratio - 1) < 0.001:
        return f"Perplexity on the text did not change ({was:.4g} before, {now:.4g} after)."
    sentence = f"Perplexity on the text {'rose' if ratio > 1 else 'fell'} from {was:.4g} to {now:.4g}"
    if ratio >= _DAMAGE:
        return f"{sentence} ({ratio - 1:+.0%}): the edit damaged the model beyond refusals."
    return f"{sentence} ({ratio - 1:+.1%})."
