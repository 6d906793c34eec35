"""A trial is taken by a rule or its number; a journal replays a search, and is not taken for another's."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from mergelab.abliteration.search_journal import SearchJournal
from mergelab.abliteration.trials import CHOICES, SearchResult, Trial, check_choice, frontier
from mergelab.errors import CheckpointError, MergelabError, OutputError, SearchError

BASELINE = Trial({}, 1.0, 0.0, 2.0)
FIGURES = [(0.9, 0.001, 2.0), (0.4, 0.02, 2.1), (0.1, 0.05, 2.9), (0.05, 0.3, 2.0), (0.0, math.nan, 2.0)]


def result(figures: list[tuple[float, float, float]] = FIGURES) -> SearchResult:
    trials = tuple(Trial({"x": float(n)}, *row, number=n) for n, row in enumerate(figures, 1))
    return SearchResult(trials, frontier(trials), BASELINE)


def test_each_rule_takes_its_trial() -> None:
    found = {rule: result().choose(rule, max_kl=0.1).number for rule in CHOICES}
    assert found == {"lowest-refusals": 3, "lowest-kl": 2, "balanced": 2}
    assert (
        result().choose("lowest-refusals", max_kl=0.5).number == 4 == result().choose("4", max_kl=0.0).number
    )
    assert result().best(0.1).number == 3
    assert [trial.number for trial in result().frontier] == [
        4,
        3,
        2,
        1,
    ]  # one that is not finite beats nothing


def test_borderline_refusals_count_too() -> None:
    trials = (Trial({}, 0.1, 0.01, None, 0.9, 1), Trial({}, 0.3, 0.01, None, 0.1, 2))
    found = SearchResult(trials, frontier(trials), Trial({}, 1.0, 0.0, None, 0.9))
    assert found.choose("lowest-refusals", 0.1).number == 2 and len(found.frontier) == 2
    assert found.choose("lowest-kl", 0.1).number == 2


def test_a_search_that_fails_says_how_many_trials_failed_what() -> None:
    with pytest.raises(
        SearchError, match=r"of 5 trials 4 have a KL above 0.0001, 1 have a figure that"
    ) as caught:
        result().choose("balanced", max_kl=0.0001)
    assert "the least KL is 0.001, of trial 1 with refusals of 0.9" in str(caught.value)
    assert caught.value.trace["failed"] == {"a KL above 0.0001": 4, "a figure that is not finite": 1}
    trials = caught.value.trace["trials"]
    assert isinstance(trials, list) and [trial["refusal"] for trial in trials] == [row[0] for row in FIGURES]
    with pytest.raises(
        SearchError, match=r"none of 1 trials within the KL of 0.01 halves the refusals"
    ) as caught:
        result().choose("lowest-kl", max_kl=0.01)
    assert caught.value.trace["baseline"] == {
        "parameters": {}, "refusal": 1.0, "kl": 0.0, "loss": 2.0, "borderline": None, "number": 0,
    }  # fmt: skip


@pytest.mark.parametrize("choice", ["best", "0", 0, -1, "-1", "", "1.5", "9" * 50, "²"])
def test_what_chooses_nothing_is_refused(choice: str | int) -> None:
    with pytest.raises(
        MergelabError, match="chooses no trial; give lowest-refusals, lowest-kl, balanced, or"
    ):
        check_choice(choice)


def test_a_number_beyond_the_trials_is_refused() -> None:
    with pytest.raises(MergelabError, match=r"trial 6 .* made 5; .* of the frontier: 4, 3, 2, 1"):
        result().choose(6, 0.1)


IDENTITY = {"the model": "a", "the prompts": "b"}


def journal(path: Path, **options: bool) -> SearchJournal:
    return SearchJournal(path, IDENTITY, **options)


def filled(path: Path) -> Path:
    first = journal(path)
    assert not path.exists()
    first.record_selection({"chosen": 1})
    first.record([[0.0, 1.0], [2.0, 3.0]], [[0.5, math.nan], [0.25, 1.0]])
    return path


def test_a_journal_is_read_as_it_was_written(tmp_path: Path) -> None:
    found = journal(filled(tmp_path / "j.jsonl"))
    assert found.selection == {"chosen": 1}
    first = found.row(0, [0.0, 1.0], 2)
    assert first is not None and first[0] == 0.5 and math.isnan(first[1])
    assert found.row(1, [2.0, 3.0], 2) == [0.25, 1.0] and found.row(2, [0.0, 0.0], 2) is None
    for point, count in (([2.0, 3.1], 2), ([2.0], 2), ([2.0, 3.0], 3)):
        with pytest.raises(CheckpointError, match="line 4 is damaged"):
            found.row(1, point, count)


def test_a_torn_line_is_dropped_and_gone_on_from(tmp_path: Path) -> None:
    path = filled(tmp_path / "j.jsonl")
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        found = journal(path)
        assert len(found.rows) == max(whole[:cut].count(b"\n") - 2, 0)
        found.record([[4.0, 5.0]], [[0.1, 0.2]])
        assert journal(path).rows[-1] == ([4.0, 5.0], [0.1, 0.2])


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    path = filled(tmp_path / "j.jsonl")
    before = path.read_bytes()
    other = {**IDENTITY, "the prompts": "c"}
    with pytest.raises(OutputError, match=r"of another search: the prompts differ; .* --overwrite"):
        SearchJournal(path, other)
    replaced = SearchJournal(path, other, overwrite=True)
    assert replaced.selection is None and not replaced.rows and path.read_bytes() == before
    replaced.record([[1.0]], [[1.0]])
    assert (
        json.loads(path.read_text().splitlines()[0])["identity"] == other
        and len(path.read_text().splitlines()) == 2
    )
    for content in ("my notes\n", '{"kind": "something else"}\n', "my notes"):
        path.write_text(content)
        with pytest.raises((OutputError, CheckpointError)):
            journal(path, overwrite=True)
        assert path.read_text() == content
    path.write_bytes(before.replace(b'"figures": [0.5', b'"figures": ["x"'))
    with pytest.raises(CheckpointError, match="line 3 is damaged"):
        journal(path)
