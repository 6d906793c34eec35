"""Least times on known chips."""

from __future__ import annotations

import pytest

from mergelab.aot import ChipReport, Collective, chip_of, roofline
from mergelab.errors import MeshError


def test_the_slowest_part_bounds_a_run() -> None:
    chip = chip_of("v5e:4x4")
    report = ChipReport(
        chips=16,
        device="a chip",
        arguments=100,
        outputs=60,
        aliased=50,
        temporaries=7,
        flops=197e12,
        traffic=2 * 0.819e12,
        collectives=(Collective("all-reduce", 2, 10**9), Collective("all-gather", 1, 10**9)),
        seconds=1.0,
    )
    assert report.peak == 117
    bound = roofline(report, chip)
    assert (bound.compute, bound.memory, bound.network) == pytest.approx((1.0, 2.0, 0.01))
    assert bound.seconds == bound.memory


def test_an_unknown_chip_is_named_with_the_known_ones() -> None:
    with pytest.raises(MeshError, match=r"v9z.*v4, v5e, v5p, v6e"):
        chip_of("v9z:2x2")
