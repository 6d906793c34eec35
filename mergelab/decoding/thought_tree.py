"""Tree of thought (Yao et al., arXiv:2305.10601): thoughts are proposed, valued, and searched either way.

What a thought is, which may follow a state and what states are worth come in as functions, which take many
states at once, so that a model may read them as one batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

from mergelab.decoding.guided_search import FoundStates
from mergelab.decoding.transforms import require

__all__ = ["tree_of_thought"]

S = TypeVar("S")
Propose = Callable[[Sequence[S]], Sequence[Sequence[S]]]
"""For each state those that may follow it, as many as there are; none ends it."""


def tree_of_thought(
    root: S,
    propose: Propose[S],
    value: Callable[[Sequence[S]], Sequence[float]],
    *,
    depth: int,
    width: int = 5,
    order: Literal["breadth", "depth"] = "breadth",
    below: float = -math.inf,
    most: int = 10_000,
    done: Callable[[S], bool] = lambda _: False,
) -> FoundStates[S]:
    """Searches a tree of thoughts.

    By breadth the best `width` states of each level go on, and those that are done compete as they are. By
    depth the most promising thought is followed first, a state that is worth less than `below` is given up,
    and the search ends with the first state that is done.

    Args:
        root: the state to begin with.
        propose: thoughts that may follow each state, as new states.
        value: worth of states; a judgment by samples, by votes or by a verifier.
        depth: most thoughts behind the root.
        width: number of states of a level that go on; by depth, thoughts of a state that are tried.
        order: breadth or depth first.
        below: worth below which a state is given up.
        most: most states that are valued; the search ends there with what it has.
        done: whether a state is a solution; one that nothing follows is at its end, too.

    Returns:
        States at the end, the best first; of a search by depth the solution that was found alone, or else
        the best of the states at an end.

    Raises:
        DecodingError: a number is not positive, a value is NaN, or there are not as many as there are states.
    """
    for name, number in (("depth", depth), ("width", width), ("most", most)):
        require(f"tree_of_thought({name})", number, number >= 1, "at least 1")
    require("tree_of_thought(order)", order, order in ("breadth", "depth"), "breadth or depth")
    valued = 0

    def grow(states: Sequence[S]) -> list[list[tuple[S, float]]]:
        """What follows each state, with its worth, the best first."""
        nonlocal valued
        following = [list(some) for some in propose(states)]
        require(
            "propose", len(following), len(following) == len(states), f"thoughts for {len(states)} states"
        )
        cut, room = [], most - valued
        for some in following:
            cut.append(some[: max(room, 0)])
            room -= len(cut[-1])
        flat = [state for some in cut for state in some]
        worths = [float(worth) for worth in value(flat)] if flat else []
        require("value", len(worths), len(worths) == len(flat), f"one for each of {len(flat)} states")
        require("value", worths[:8], not any(map(math.isnan, worths)), "numbers that are not NaN")
        valued += len(flat)
        pairs = iter(zip(flat, worths, strict=True))
        ranked = [[next(pairs) for _ in some] for some in cut]
        return [sorted(some, key=lambda pair: -pair[1]) for some in ranked]

    search = _by_breadth if order == "breadth" else _by_depth
    found = search(root, grow, depth, width, below, done, lambda: valued >= most)
    found = sorted(found, key=lambda pair: -pair[1])
    return FoundStates(tuple(state for state, _ in found), tuple(worth for _, worth in found), valued)


Pairs = list[tuple[S, float]]


def _by_breadth(
    root: S,
    grow: Callable[[Sequence[S]], list[Pairs[S]]],
    depth: int,
    width: int,
    below: float,
    done: Callable[[S], bool],
    exhausted: Callable[[], bool],
) -> Pairs[S]:
    level: Pairs[S] = [(root, -math.inf)]
    for _ in range(depth):
        live = [pair for pair in level if not done(pair[0])]
        if not live or exhausted():
            break
        kept = [pair for pair in level if done(pair[0])]
        followed = grow([state for state, _ in live])
        kept += [pair for pair, some in zip(live, followed, strict=True) if not some]
        new = [pair for some in followed for pair in some if pair[1] >= below]
        level = sorted([*kept, *new], key=lambda pair: -pair[1])[:width]
        if not new:
            break
    return level


def _by_depth(
    root: S,
    grow: Callable[[Sequence[S]], list[Pairs[S]]],
    depth: int,
    width: int,
    below: float,
    done: Callable[[S], bool],
    exhausted: Callable[[], bool],
) -> Pairs[S]:
    ends: Pairs[S] = []
    waiting: list[tuple[S, float, int]] = [(root, -math.inf, 0)]
    while waiting:
        state, worth, level = waiting.pop()
        if done(state):
            return [(state, worth)]
        if level == depth or exhausted():
            ends.append((state, worth))
            continue
        (followed,) = grow([state])
        good = [pair for pair in followed[:width] if pair[1] >= below]
        if not followed:
            ends.append((state, worth))
        waiting += [(new, its, level + 1) for new, its in reversed(good)]
    return ends
