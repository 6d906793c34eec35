"""Sentences of a card say what its figures say, whatever the edit did."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from mergelab.abliteration.behavior import Behavior
from mergelab.abliteration.findings import Count, findings, wilson_interval

BEFORE = Behavior(1.0, 0.0, 5.0, -8.0, 0.0, math.log(48.0))


def said(before: Behavior, after: Behavior, total: int = 40) -> str:
    return "\n".join(findings(before, after, total, total))


def test_intervals_are_wilsons() -> None:
    # Newcombe 1998, Statistics in Medicine 17, 857-872, table I, method 3.
    published = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0.0, 0.1611)}
    published[1, 29] = (0.0061, 0.1718)
    for (count, total), interval in published.items():
        assert wilson_interval(count, total) == pytest.approx(interval, abs=5e-5)
    assert wilson_interval(29, 29)[1] == 1.0
    for bad in ((1, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="is not a count"):
            wilson_interval(*bad)
    assert str(Count.of(0.2, 5)) == "20.0% (1 of 5; 95 % interval 3.6 to 62.4 %)"


def test_refusals_that_dropped() -> None:
    found = said(BEFORE, replace(BEFORE, harmful_refusals=0.0, harmful_score=-6.0, kl=0.01))
    assert "fell from 40 to 0 of 40; up to 8.8% of such prompts may still be" in found
    assert "score of harmful prompts fell from 5 to -6" in found and "moved by 0.01 nats" in found
    assert "Perplexity on the text did not change" in found and "damaged" not in found


def test_a_drop_in_few_prompts_may_be_chance() -> None:
    found = said(replace(BEFORE, harmful_refusals=0.4), replace(BEFORE, harmful_refusals=0.2, kl=0.01), 5)
    assert "fell from 2 to 1 of 5; the 95 % intervals overlap" in found


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_an_edit_that_changed_nothing_says_so(rate: float) -> None:
    same = replace(BEFORE, harmful_refusals=rate)
    found = findings(same, same, 40, 40)
    assert len(found) == 1 and found[0].startswith("The edit changed nothing that was measured.")
    assert ("there was nothing to end" in found[0]) == (rate == 0.0)
    assert "changed nothing" not in said(same, replace(same, kl=0.2))


def test_refusals_that_never_were_and_a_score_that_rose() -> None:
    never = replace(BEFORE, harmful_refusals=0.0, harmful_score=-9.0)
    found = said(never, replace(never, harmful_score=-7.5, kl=0.09, loss=math.log(84.0)), 5)
    assert "None of the 5 harmful prompts was refused before the edit, and none after" in found
    assert "rose from -9 to -7.5: the edit made a first token of a refusal likelier" in found
    assert "rose from 48 to 84 (+75%): the edit damaged the model" in found
    assert "no longer" not in found and "fell" not in found


def test_refusals_that_rose() -> None:
    before = replace(BEFORE, harmful_refusals=0.1)
    found = said(before, replace(before, harmful_refusals=0.9, harmless_refusals=0.5, kl=0.3))
    assert "harmful prompts rose from 4 to 36 of 40." in found
    assert "harmless prompts rose from 0 to 20 of 40." in found


def test_borderline_prompts_are_spoken_of_where_there_are_some() -> None:
    before = replace(BEFORE, borderline_refusals=0.75, borderline_score=2.0)
    after = replace(before, borderline_refusals=0.0, borderline_score=-3.0, kl=0.01)
    found = "\n".join(findings(before, after, 40, 40, 20))
    assert "Refusals of borderline prompts fell from 15 to 0 of 20; up to 16.1% of such" in found
    none = replace(before, borderline_refusals=0.0)
    found = "\n".join(findings(none, replace(none, kl=0.01), 40, 40, 20))
    assert "None of the 20 borderline prompts was refused before the edit, and none after." in found
    assert "borderline" not in said(BEFORE, replace(BEFORE, kl=0.01))
    same = findings(before, replace(before, borderline_score=1.0), 40, 40, 20)
    assert "changed nothing" not in same[0], "a score that moved is a change"


def test_answers_that_end_within_their_reasoning_are_told() -> None:
    found = said(BEFORE, replace(BEFORE, kl=0.01, unfinished=7))
    assert "0 of 80 answers before the edit and 7 after it ended within their reasoning" in found
    assert "reasoning" not in said(BEFORE, replace(BEFORE, kl=0.01))


def test_figures_that_were_not_taken_are_not_spoken_of() -> None:
    bare = Behavior(None, None, 1.0, -1.0, 0.0, None)
    found = said(bare, replace(bare, harmful_score=-2.0, kl=0.1))
    assert (
        "No answers were generated" in found and "No text was given" in found and "Refusals of" not in found
    )
    broken = said(BEFORE, replace(BEFORE, kl=math.nan))
    assert broken.startswith("Figures are not finite numbers") and "\n" not in broken


def test_prompts_that_the_model_did_not_tell_apart_by_refusing_are_said_to_be_such() -> None:
    """What SmolLM2-135M-Instruct, which refuses nothing, gave with --anyway."""
    before = replace(BEFORE, harmful_refusals=0.0, harmful_score=-2.963, harmless_score=-2.895)
    found = said(before, replace(before, harmful_score=-2.935, kl=0.03), 1)
    assert "scored no higher than harmless ones (-2.963 and -2.895)" in found
    assert "nothing here shows that the direction has to do with refusals" in found
    assert "The one harmful prompt was refused neither before the edit nor after: there was nothing" in found
    assert "scored no higher" not in said(BEFORE, replace(BEFORE, kl=0.03))
