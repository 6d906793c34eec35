"""Which tokens count: by place, by id, by norm; streams that pass over the others, exactly and for ever."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergelab.activations.kept import (
    DEFAULT_RULE,
    EVERY_TOKEN,
    KeptRows,
    TokenRule,
    median_norm,
    row_norms,
    sampled_norms,
)
from mergelab.activations.left_out import LeftOut
from mergelab.activations.stored_tokens import kept_of_rows
from mergelab.activations.stream import ActivationStream, Batch
from mergelab.errors import SAEError
from mergelab.sae.toy import ToyGroundTruth


@dataclass(frozen=True)
class Rows:
    """Row `i` is `[i, 1]`, or a hundred thousand times the first such row where `long` says so."""

    long: np.ndarray

    @property
    def rows(self) -> int:
        return len(self.long)

    @property
    def d_in(self) -> int:
        return 2

    def read(self, start: int, stop: int) -> np.ndarray:
        numbers = np.arange(start, stop, dtype=np.float32)
        rows = np.stack([numbers, np.ones_like(numbers)], axis=1)
        return np.where(self.long[start:stop, None], np.float32(1e8), rows)


def test_places_and_ids() -> None:
    tokens = np.array([[5, 0, 6, 7], [0, 8, 9, 9]])
    assert TokenRule(1, True, None).by_place(tokens, (0, 9)).astype(int).tolist() == [
        [0, 0, 1, 1],
        [0, 1, 0, 0],
    ]
    assert TokenRule(2, False, None).by_place(tokens, (0, 9)).astype(int).tolist() == [[0, 0, 1, 1]] * 2
    counted = np.array([[1, 1, 1, 0], [1, 1, 1, 1]], bool)
    assert EVERY_TOKEN.by_place(tokens, (0,), counted).tolist() == counted.tolist()


def test_a_limit_is_so_many_medians_of_the_rows_that_are_not_zero() -> None:
    assert DEFAULT_RULE.norm_limit(median_norm(np.array([0.0, 0, 0, 1, 2, 3]))) == 20
    assert DEFAULT_RULE.norm_limit(median_norm(np.zeros(5))) == math.inf
    assert EVERY_TOKEN.norm_limit(7.0) == math.inf
    assert row_norms(np.full((1, 4), 1e38, np.float32))[0] == pytest.approx(2e38)  # no overflow


def test_a_rule_is_plain_data_and_the_strictest_of_several_is_in_no_order() -> None:
    rules = [TokenRule(4, False, None), TokenRule(0, True, 50.0), TokenRule(1, False, 20.0)]
    assert all(TokenRule.of_facts(rule.facts()) == rule for rule in rules)
    wanted = TokenRule(4, True, 20.0)
    assert rules[0].strictest(*rules[1:]) == wanted == rules[2].strictest(rules[0], None, rules[1])
    for odd in (
        None,
        {},
        {**rules[0].facts(), "skip_positions": "x"},
        {**rules[0].facts(), "max_norm_multiple": 0.1},
    ):
        assert TokenRule.of_facts(odd) is None
    for bad in ({"skip_positions": -1}, {"max_norm_multiple": 1.0}, {"max_norm_multiple": math.inf}):
        with pytest.raises(SAEError, match=next(iter(bad))):
            TokenRule(**bad)


@dataclass(frozen=True)
class Held:
    """Rows of an array."""

    array: np.ndarray

    @property
    def rows(self) -> int:
        return len(self.array)

    @property
    def d_in(self) -> int:
        return self.array.shape[1]

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.array[start:stop]


@pytest.mark.parametrize("unit", [False, True])
def test_toys_and_rows_of_one_length_lose_none(unit: bool) -> None:
    x = ToyGroundTruth(d_in=32, n_features=64, l0=6, rows=8192).read(0, 8192)
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) if unit else x
    kept = kept_of_rows(Held(x), DEFAULT_RULE)
    assert kept.short_enough(x, x).all() and kept.limit < math.inf
    plain, same = (ActivationStream(Held(x), 512, seed=1, kept=one) for one in (None, kept))
    for _ in range(40):  # more than an epoch
        one, other = next(plain), next(same)
        assert (one.input == other.input).all() and (one.rows == other.rows).all()
    longer = np.concatenate([x, 1000 * x[:1] + 1])
    assert not kept.short_enough(longer, longer)[-1]  # the control


def _drawn(stream: ActivationStream, batches: int) -> list[Batch]:
    return [next(stream) for _ in range(batches)]


@given(
    rows=st.integers(300, 5000), context=st.sampled_from([2, 16, 100]), batch=st.sampled_from([64, 96, 128]),
    seed=st.integers(0, 9),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_an_epoch_has_every_row_that_counts_by_place_once_and_no_other(
    rows: int, context: int, batch: int, seed: int
) -> None:
    counted = np.arange(rows) % context != 0
    kept = KeptRows(lambda start, stop: counted[start:stop])
    stream = ActivationStream(Rows(np.zeros(rows, bool)), batch, seed=seed, buffer_rows=2048, kept=kept)
    assert stream.rows == counted.sum()
    seen = np.concatenate([b.rows for b in _drawn(stream, stream.rows // batch)])
    assert counted[seen].all() and len(np.unique(seen)) == len(seen)
    missing = stream.rows - len(seen)
    groups = -(-stream.rows // 2048)
    assert missing < batch + groups * stream.lanes


@given(rows=st.integers(400, 4000), part=st.floats(0, 0.3), seed=st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_long_rows_are_replaced_by_others_of_their_lane_and_a_resumed_stream_goes_on(
    rows: int, part: float, seed: int
) -> None:
    long = np.random.default_rng(seed).random(rows) < part
    kept = KeptRows(limit=1e6)
    source = Rows(long)

    def stream() -> ActivationStream:
        return ActivationStream(source, 64, seed=seed, buffer_rows=1024, kept=kept)

    whole = _drawn(stream(), 2 * rows // 64)
    assert all(not long[batch.rows].any() and batch.input.shape == (64, 2) for batch in whole)
    assert all((batch.input[:, 0] == batch.rows).all() for batch in whole)
    first = stream()
    _drawn(first, 3)
    again = ActivationStream(source, 64, seed=seed, buffer_rows=1024, kept=KeptRows(limit=math.inf))
    again.restore(first.state())  # the limit is that of the beginning
    assert (next(again).rows == whole[3].rows).all()
    processes = [
        ActivationStream(source, 64, seed=seed, buffer_rows=1024, kept=kept, part=part, readers=4)
        for part in np.arange(64).reshape(4, 16)
    ]
    for batch in whole[:5]:
        assert (np.concatenate([next(one).rows for one in processes]) == batch.rows).all()


def test_a_stretch_of_long_rows_takes_the_next_lanes_and_nothing_but_long_rows_is_refused() -> None:
    long = np.arange(1024) < 400  # the first 25 of 64 lanes
    stream = ActivationStream(Rows(long), 64, kept=KeptRows(limit=1e6))
    for batch in _drawn(stream, 16):
        assert not long[batch.rows].any()
    with pytest.raises(SAEError, match=r"rows 0 to 1023: none .*max_norm_multiple"):
        next(ActivationStream(Rows(np.ones(1024, bool)), 64, kept=KeptRows(limit=1e6)))


def test_targets_of_long_norm_are_left_out_too() -> None:
    long = np.arange(2048) % 50 == 0
    stream = ActivationStream(
        Rows(np.zeros(2048, bool)), 64, target=Rows(long), kept=KeptRows(target_limit=1e6)
    )
    for batch in _drawn(stream, 32):
        assert not long[batch.rows].any() and (batch.target == batch.input).all()


def test_batches_larger_than_what_counts_are_refused() -> None:
    counted = np.arange(100) % 2 == 0
    kept = KeptRows(lambda start, stop: counted[start:stop])
    with pytest.raises(SAEError, match="1 to the 50 rows of 100 that count"):
        ActivationStream(Rows(np.zeros(100, bool)), 64, kept=kept)


def test_a_sample_of_norms_is_spread_over_all_rows() -> None:
    x = np.zeros((100_000, 1), np.float32)
    x[:, 0] = np.arange(1, 100_001)
    found = sampled_norms(len(x), lambda start, stop: x[start:stop])
    assert len(found) == 4096 and np.median(found) == pytest.approx(50_000, rel=0.02)
    odd = sampled_norms(len(x), lambda a, b: x[a:b], lambda a, b: np.arange(a, b) % 2 == 1)
    assert (odd % 2 == 0).all()


def test_what_is_left_out_is_told_with_its_places() -> None:
    found = LeftOut()
    kept, place = np.ones(32, bool), np.ones(32, bool)
    place[::8] = kept[::8] = False
    kept[10] = kept[17] = False
    found.add(kept, place, first=0, context=8)
    assert (found.rows, found.kept, found.by_place, found.by_norm) == (32, 26, 4, 2)
    assert found.sentence() == "6 of 32 (4 by place; 2 by norm, at position 1, 2)"
    assert found.facts()["places"] == {"2": 1, "1": 1}
