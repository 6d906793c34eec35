"""Least times on known chips."""

from __future__ import annotations

import importlib.util

import pytest

from mergelab.aot import (
    ChipReport,
    Collective,
    Fit,
    chip_of,
    compile_for_topology,
    device_count,
    is_one_chip,
    roofline,
    slices,
)
from mergelab.aot.chips import slice_name
from mergelab.errors import DependencyError, MeshError


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


def test_memory_is_counted_as_vendors_do() -> None:
    memory = chip_of("v5e").memory
    assert str(Fit(2**30 + 2**29, memory)) == "fits: yes, 1.5 of 16 GB"
    assert str(Fit(memory, memory)) == "fits: yes, 16 of 16 GB"
    assert str(Fit(memory + 2**30, memory)) == "fits: no, 17 of 16 GB"


@pytest.mark.parametrize(
    ("topology", "one"),
    [
        ("v5e", True),
        ("v5p", True),
        ("v5e:1x1", True),
        ("v5e:1x2", False),
        ("v5p:2x2x4", False),
        ("v6e:16x16", False),
        ("h100", True),
        ("H100x8", False),
    ],
)
def test_one_chip_is_told_from_slices(topology: str, one: bool) -> None:
    assert is_one_chip(topology) is one


def test_gpus_are_counted() -> None:
    assert (slice_name("H100x8"), slice_name("h200:1")) == ("h100:8", "h200:1")
    assert (device_count("h100:16"), slices("h100", 16)) == (
        16,
        ["h100:1", "h100:2", "h100:4", "h100:8", "h100:16"],
    )
    assert (gpu := chip_of("h100:8").gpu) is not None and gpu.capability == (9, 0)
    for wrong in ("h100:2x4", "h100:0", "h100:12"):
        with pytest.raises(MeshError, match="give a number of GPUs"):
            slice_name(wrong)


def test_without_the_plugin_of_gpus_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DependencyError, match=r"mergelab\[cuda12\]"):
        compile_for_topology("a:b", "h100:8", {"tensor": -1}, {})
