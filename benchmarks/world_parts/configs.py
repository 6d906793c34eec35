"""Published `config.json` files: which families load, and which are refused with a true sentence."""

from __future__ import annotations

from pathlib import Path

from benchmarks.world_parts.section import Section

__all__ = ["measure"]


def measure(work: Path) -> Section:
    """No rows yet."""
    head = ("model type", "configs", "accepted", "refused as expected")
    return Section("Every config as published, against what is expected of it.", head, [])
