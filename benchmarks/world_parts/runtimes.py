"""Runtimes under which the tests pass."""

from __future__ import annotations

from pathlib import Path

from benchmarks.world_parts.section import Section

__all__ = ["measure"]


def measure(work: Path) -> Section:
    """No rows yet."""
    head = ("runtime", "python", "jax", "passed", "failed")
    return Section("The light tests under the exact pins of each runtime.", head, [])
