"""The game of 24 by a tree of thoughts: both orders, and what they give up."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations

import pytest

from mergelab.decoding import tree_of_thought
from mergelab.errors import DecodingError

State = tuple[tuple[Fraction, ...], tuple[str, ...]]


def propose(states: Sequence[State]) -> list[list[State]]:
    """Every way to put two of the numbers together."""
    found = []
    for numbers, said in states:
        new = []
        for i, j in combinations(range(len(numbers)), 2):
            a, b = numbers[i], numbers[j]
            rest = tuple(n for k, n in enumerate(numbers) if k not in (i, j))
            made = [(a + b, f"{a}+{b}"), (a * b, f"{a}*{b}"), (a - b, f"{a}-{b}"), (b - a, f"{b}-{a}")]
            new += [(tuple(sorted((*rest, x))), (*said, how)) for x, how in made]
        found.append(new)
    return found


def worth(states: Sequence[State]) -> list[float]:
    """How close the nearest of the numbers, or of the products of two, comes to 24."""
    scores = []
    for numbers, _ in states:
        near = [*numbers, *(a * b for a, b in combinations(numbers, 2))]
        scores.append(-float(min(abs(n - 24) for n in near)) - 5.0 * (numbers != (24,) and len(numbers) == 1))
    return scores


def solved(state: State) -> bool:
    return state[0] == (Fraction(24),)


ROOT: State = (tuple(map(Fraction, (4, 5, 6, 10))), ())


@pytest.mark.parametrize("order", ["breadth", "depth"])
def test_a_solution_is_found(order: str) -> None:
    found = tree_of_thought(ROOT, propose, worth, depth=3, width=20, order=order, done=solved)  # type: ignore[arg-type]
    numbers, said = found.states[0]
    assert numbers == (24,) and len(said) == 3
    assert found.extended < 24 * (1 + 20 * 12 + 400)
    if order == "depth":
        assert len(found.states) == 1
    # A value that says the opposite does not find it where only two thoughts go on.
    wrong = tree_of_thought(ROOT, propose, lambda s: [-w for w in worth(s)], depth=3, width=2, done=solved)
    assert not solved(wrong.states[0])


def test_states_below_the_bound_and_beyond_the_most_are_given_up() -> None:
    def children(states: Sequence[str]) -> list[list[str]]:
        return [[s + "a", s + "b"] if len(s) < 3 else [] for s in states]

    def count(states: Sequence[str]) -> list[float]:
        return [s.count("a") - 2.0 * s.count("b") for s in states]

    for order in ("breadth", "depth"):
        found = tree_of_thought("", children, count, depth=9, width=9, order=order, below=0.5)  # type: ignore[arg-type]
        assert found.states == ("aaa",), order  # aab is worth 0
        few = tree_of_thought("", children, count, depth=9, width=9, order=order, most=3)  # type: ignore[arg-type]
        assert few.extended == 3
    whole = tree_of_thought("", children, count, depth=2, width=9)
    assert whole.states == ("aa", "ab", "ba", "bb") and whole.scores == (2.0, -1.0, -1.0, -4.0)
    for options in ({"depth": 0}, {"depth": 1, "width": 0}, {"depth": 1, "order": "wide"}):
        with pytest.raises(DecodingError):
            tree_of_thought("", children, count, **options)  # type: ignore[arg-type]
    with pytest.raises(DecodingError, match="NaN"):
        tree_of_thought("", children, lambda s: [float("nan")] * len(s), depth=1)
