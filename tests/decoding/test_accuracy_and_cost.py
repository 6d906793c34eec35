"""Closed forms against enumeration, and the check sums that were worked out by hand."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergelab.decoding import (
    Prices,
    Tier,
    Usage,
    Verifier,
    accuracy_interval,
    adaptive_vote,
    best_of_n_kl,
    cheapest_routing,
    correct_answers_for,
    escalation_saving,
    expected_votes,
    fit_log_compute,
    majority_accuracy,
    mixed_cost,
    pass_at_k,
    pass_at_k_interval,
    retry_failures,
    route_of,
    vote_confidence,
    vote_is_decided,
)
from mergelab.errors import DecodingError


def binomial(n: int, k: int, p: float) -> float:
    return math.comb(n, k) * p**k * (1 - p) ** (n - k)


def test_pass_at_k_is_unbiased_and_the_naive_estimate_is_not() -> None:
    mean = sum(binomial(20, c, 0.3) * pass_at_k(20, c, 5) for c in range(21))
    naive = sum(binomial(20, c, 0.3) * (1 - (1 - c / 20) ** 5) for c in range(21))
    assert mean == pytest.approx(1 - 0.7**5, abs=1e-12)
    assert (round(mean, 5), round(naive, 4)) == (0.83193, 0.7958)
    for n, c, k in ((10, 3, 4), (7, 0, 3), (7, 7, 1), (6, 5, 6)):
        assert pass_at_k(n, c, k) == pytest.approx(1 - math.comb(n - c, k) / math.comb(n, k), abs=1e-12)
    assert isinstance(pass_at_k(4, 2, 1), float)
    assert pass_at_k(10**6, 1, 1) == pytest.approx(1e-6)


def test_intervals_hold_as_often_as_they_say() -> None:
    for p, k in ((0.3, 1), (0.3, 5), (0.02, 5), (0.9, 3)):
        truth = 1 - (1 - p) ** k
        bounds = [pass_at_k_interval(20, c, k, confidence=0.9) for c in range(21)]
        held = sum(binomial(20, c, p) for c, (low, high) in enumerate(bounds) if low <= truth <= high)
        assert held >= 0.9
        assert all(low <= pass_at_k(20, c, k) <= high for c, (low, high) in enumerate(bounds))
    low, high = accuracy_interval(7, 20)
    assert (low, high) == pytest.approx((0.1539, 0.5922), abs=1e-4)  # of published tables
    assert accuracy_interval(0, 5)[0] == 0 and accuracy_interval(5, 5)[1] == 1


def test_majorities() -> None:
    for n, p in itertools.product((1, 2, 3, 6, 7), (0.0, 0.35, 0.6, 1.0)):
        won = 0.0
        for votes in itertools.product((0, 1), repeat=n):
            ahead = 2 * sum(votes) - n
            chance = math.prod(p if vote else 1 - p for vote in votes)
            won += chance * (1 if ahead > 0 else 0.5 if ahead == 0 else 0)
        assert majority_accuracy(p, n) == pytest.approx(won, abs=1e-12)
    assert majority_accuracy(0.6, 3) == pytest.approx(0.648)
    assert majority_accuracy(0.6, 11) == pytest.approx(0.7535, abs=1e-4)
    assert majority_accuracy(0.6, 51) == pytest.approx(0.92647, abs=1e-5)
    assert majority_accuracy(0.4, 51) == pytest.approx(0.0735, abs=1e-4)
    assert best_of_n_kl(1) == 0 and best_of_n_kl(4) == pytest.approx(math.log(4) - 0.75)


@given(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=12))
def test_a_vote_that_stops_when_it_is_decided_has_the_winner_of_all_votes(answers: list[str | None]) -> None:
    found = adaptive_vote(iter(answers), len(answers))
    counts = Counter(answer for answer in answers if answer is not None)
    if found.answer is None:
        assert not counts or found.used < len(answers)
    if not counts:
        return
    first, second = ([count for _, count in counts.most_common()] + [0])[:2]
    if first > second:
        assert found.answer == counts.most_common()[0][0]
    assert found.used <= len(answers)
    assert found.used == len(answers) or vote_is_decided(found.counts, len(answers) - found.used)


def test_votes_that_agree_are_few() -> None:
    assert adaptive_vote(["a"] * 9, 9).used == 5
    assert adaptive_vote(["a"] * 40, 40, confidence=0.95).used == 4  # 1 - 2**-5 = 0.969
    assert vote_confidence({"a": 3}) == pytest.approx(1 - 0.5**4)
    assert vote_confidence({}) == pytest.approx(0.5)
    mean = sum(
        math.prod(0.7 if vote else 0.3 for vote in votes) * adaptive_vote(votes, 5).used
        for votes in itertools.product((1, 0), repeat=5)
    )
    assert expected_votes(0.7, 5) == pytest.approx(mean, abs=1e-12)


def test_costs_are_those_worked_out_by_hand() -> None:
    thinking = Usage(prompt=15, reasoning=2847, answer=20)
    assert Prices(15, 60).of(thinking) == pytest.approx(0.172245)
    plain = Prices(10, 30).of(Usage(15, 0, 20))
    assert Prices(15, 60).of(thinking) / plain == pytest.approx(229.7, abs=0.05)
    assert correct_answers_for(100, 1, 0.68) == pytest.approx(68)
    assert correct_answers_for(100, 10, 0.92) == pytest.approx(9.2)
    again = retry_failures(100, 0.68, 1)
    assert (again.correct, again.cost, again.retries) == pytest.approx((89.76, 132, 32))
    assert again.needs_verifier
    # A million requests, 95 % of them at a cent and 5 % at $1.72, come to $95,500 a month.
    assert mixed_cost(1_000_000, [(0.95, 0.01), (0.05, 1.72)]) == pytest.approx(95_500)
    assert escalation_saving(1_000_000, 0.35, 0.15, 5, cost=95_500) == pytest.approx(904_500)


def test_the_cheapest_routing_is_that_of_an_exhaustive_search() -> None:
    tiers = [Tier("small", 1, (0.9, 0.3)), Tier("middle", 3, (0.93, 0.6)), Tier("large", 10, (0.95, 0.9))]
    shares, verifier = (0.7, 0.3), Verifier(accepts=0.9, rejects=0.8, cost=0.2)
    orders = [order for n in (1, 2, 3) for order in itertools.permutations(tiers, n)]
    every = [[route_of(order, kind, verifier) for order in orders] for kind in (0, 1)]
    for floor in (0.5, 0.8, 0.9, 0.93):
        best = min(
            sum(share * route.cost for share, route in zip(shares, pair, strict=True))
            for pair in itertools.product(*every)
            if sum(share * route.accuracy for share, route in zip(shares, pair, strict=True)) >= floor
        )
        found = cheapest_routing(tiers, floor, shares=shares, verifier=verifier)
        assert found.cost == pytest.approx(best) and found.accuracy >= floor - 1e-9
    # Hard requests are not put to the small tier first, as easy ones are.
    assert [route.tiers[0] for route in found.routes] == ["small", "middle"]
    with pytest.raises(DecodingError, match=r"probability 0\.9999; the best reaches 0\.9"):
        cheapest_routing(tiers, 0.9999, shares=shares, verifier=verifier)


def test_escalation_is_worked_out_draw_by_draw() -> None:
    tiers, verifier = [Tier("a", 1, (0.6,)), Tier("b", 5, (0.9,))], Verifier(0.8, 0.7, 0.5)
    found = route_of(tiers, 0, verifier)
    cost = right = 0.0
    for a, b in itertools.product((1, 0), repeat=2):
        chance = (0.6 if a else 0.4) * (0.9 if b else 0.1)
        given_out = 0.8 if a else 1 - 0.7
        right += chance * (given_out * a + (1 - given_out) * b)
        cost += chance * (1.5 + (1 - given_out) * 5)
    assert (found.cost, found.accuracy) == pytest.approx((cost, right))
    assert found.tiers == ("a", "b")
    # Retrying failures is the route that asks one tier twice, with a perfect verifier.
    twice = route_of([Tier("a", 1, (0.68,))] * 2, 0, Verifier())
    assert (100 * twice.accuracy, 100 * twice.cost) == pytest.approx((89.76, 132))


def test_log_compute_fits() -> None:
    compute = np.array([1, 2, 4, 8, 16])
    exact = fit_log_compute(compute, 0.1 + 0.05 * np.log2(compute))
    assert (exact.intercept, exact.per_doubling, exact.r_squared) == pytest.approx((0.1, 0.05, 1.0))
    assert exact.at(32) == pytest.approx(0.35) and exact.at(2.0**40) == 1.0
    assert exact.compute_for(0.35) == pytest.approx(32)
    noisy = fit_log_compute(compute, [0.1, 0.2, 0.2, 0.3, 0.25])
    slope, intercept = np.polyfit(np.log2(compute), [0.1, 0.2, 0.2, 0.3, 0.25], 1)
    assert (noisy.intercept, noisy.per_doubling) == pytest.approx((intercept, slope))
    assert noisy.standard_error > 0 and noisy.r_squared < 1
    assert fit_log_compute([1, 2], [0.5, 0.4]).compute_for(0.9) == math.inf


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pass_at_k(0, 0, 1), "at least 1 attempt"),
        (lambda: pass_at_k(5, 6, 1), "0 to the 5 attempts"),
        (lambda: pass_at_k(5, 1, 6), "1 to the 5 attempts"),
        (lambda: pass_at_k_interval(5, 1, 1, confidence=1), "between 0 and 1"),
        (lambda: majority_accuracy(1.2, 3), "a probability"),
        (lambda: majority_accuracy(0.2, 0), "at least 1 vote"),
        (lambda: adaptive_vote([], 0), "at least 1 vote"),
        (lambda: Usage(-1), "0 or more tokens"),
        (lambda: Prices(-1, 2), "0 or more dollars"),
        (lambda: mixed_cost(10, [(0.5, 1)]), "add up to 1"),
        (lambda: cheapest_routing([Tier("a", 1, (0.5, 0.5))], 0.1), "one for each of 1 kinds"),
        (lambda: fit_log_compute([1, 1], [0.1, 0.2]), "two different ones"),
        (lambda: fit_log_compute([0, 1], [0.1, 0.2]), "positive"),
    ],
    ids=range(13),
)
def test_numbers_that_mean_nothing_are_refused(call: object, message: str) -> None:
    with pytest.raises(DecodingError, match=message):
        call()  # type: ignore[operator]
