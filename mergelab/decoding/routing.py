"""Which model answers which kind of request, and when another is asked: the cheapest way to an accuracy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from mergelab.decoding.transforms import require
from mergelab.errors import DecodingError

__all__ = ["Route", "Routing", "Tier", "Verifier", "cheapest_routing", "route_of"]


@dataclass(frozen=True)
class Tier:
    """A way to answer: a model, or a method on one.

    Attributes:
        name: what it is called.
        cost: dollars of an answer.
        accuracy: probability that the answer is right, for each kind of request.
    """

    name: str
    cost: float
    accuracy: tuple[float, ...]

    def __post_init__(self) -> None:
        require(f"Tier({self.name}, cost)", self.cost, 0 <= self.cost < math.inf, "0 or more dollars")
        inside = all(0 <= p <= 1 for p in self.accuracy)
        require(f"Tier({self.name}, accuracy)", self.accuracy, inside, "probabilities")


@dataclass(frozen=True)
class Verifier:
    """What decides whether an answer is given out, or the next tier is asked.

    Attributes:
        accepts: probability that a right answer is given out.
        rejects: probability that a wrong answer is not.
        cost: dollars of a check.
    """

    accepts: float = 1.0
    rejects: float = 1.0
    cost: float = 0.0

    def __post_init__(self) -> None:
        for name in ("accepts", "rejects"):
            require(f"Verifier({name})", getattr(self, name), 0 <= getattr(self, name) <= 1, "a probability")
        require("Verifier(cost)", self.cost, 0 <= self.cost < math.inf, "0 or more dollars")


@dataclass(frozen=True)
class Route:
    """Tiers that are asked one after the other for one kind of request.

    Attributes:
        tiers: their names; each is asked if the answer before was rejected, and the last is not checked.
        cost: expected dollars of a request.
        accuracy: probability that what is given out is right.
    """

    tiers: tuple[str, ...]
    cost: float
    accuracy: float


@dataclass(frozen=True)
class Routing:
    """A route for each kind of request.

    Attributes:
        routes: the routes.
        cost: expected dollars of a request of any kind.
        accuracy: probability that its answer is right.
    """

    routes: tuple[Route, ...]
    cost: float
    accuracy: float


def route_of(tiers: Sequence[Tier], kind: int, verifier: Verifier) -> Route:
    """What comes of asking these tiers in this order; tiers are right or wrong independently of each other.

    Raises:
        DecodingError: there are no tiers.
    """
    require("route_of(tiers)", len(tiers), len(tiers) >= 1, "at least one tier")
    reached, cost, right = 1.0, 0.0, 0.0
    for number, tier in enumerate(tiers):
        p, last = tier.accuracy[kind], number == len(tiers) - 1
        cost += reached * (tier.cost + (0.0 if last else verifier.cost))
        right += reached * p * (1.0 if last else verifier.accepts)
        reached *= p * (1 - verifier.accepts) + (1 - p) * verifier.rejects
    return Route(tuple(tier.name for tier in tiers), cost, right)


def cheapest_routing(
    tiers: Sequence[Tier],
    floor: float,
    *,
    shares: Sequence[float] = (1.0,),
    verifier: Verifier | None = None,
) -> Routing:
    """The routes of least expected cost whose accuracy over all requests is at least `floor`.

    For each kind every order of some of the tiers is tried, and kinds are joined so that only routings that
    none other beats in both cost and accuracy are kept: the result is the best there is.

    Args:
        tiers: ways to answer, at most 6, each with an accuracy for each kind.
        floor: least accuracy.
        shares: shares of the kinds of requests, which add up to 1.
        verifier: what decides about escalation; a perfect one, which costs nothing, if None. `Verifier(1, 0)`
            never escalates.

    Raises:
        DecodingError: tiers or shares that do not fit, or an accuracy that none reaches.
    """
    verifier = verifier or Verifier()
    require("cheapest_routing(tiers)", len(tiers), 1 <= len(tiers) <= 6, "1 to 6 tiers")
    require("cheapest_routing(floor)", floor, 0 <= floor <= 1, "a probability")
    adds_up = all(share >= 0 for share in shares) and math.isclose(sum(shares), 1.0, abs_tol=1e-9)
    require("cheapest_routing(shares)", list(shares), adds_up, "shares that add up to 1")
    for tier in tiers:
        fits = len(tier.accuracy) == len(shares)
        require(f"Tier({tier.name}, accuracy)", tier.accuracy, fits, f"one for each of {len(shares)} kinds")
    best = [Routing((), 0.0, 0.0)]
    for kind, share in enumerate(shares):
        orders = (
            order for count in range(1, len(tiers) + 1) for order in itertools.permutations(tiers, count)
        )
        routes = _unbeaten([Routing((one,), one.cost, one.accuracy) for one in (
            route_of(order, kind, verifier) for order in orders
        )])  # fmt: skip
        best = _unbeaten(
            [
                Routing(
                    (*done.routes, *more.routes),
                    done.cost + share * more.cost,
                    done.accuracy + share * more.accuracy,
                )
                for done in best
                for more in routes
            ]
        )
    enough = [routing for routing in best if routing.accuracy >= floor - 1e-12]
    if not enough:
        raise DecodingError(
            f"no routing of these tiers is right with probability {floor:g}; the best reaches "
            f"{max(routing.accuracy for routing in best):.4g}."
        )
    return enough[0]


def _unbeaten(routings: Sequence[Routing]) -> list[Routing]:
    """Those of which none other costs as little and is right as often, the cheapest first."""
    kept: list[Routing] = []
    for one in sorted(routings, key=lambda routing: (routing.cost, -routing.accuracy)):
        if not kept or one.accuracy > kept[-1].accuracy + 1e-15:
            kept.append(one)
    return kept
