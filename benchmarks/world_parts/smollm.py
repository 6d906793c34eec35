"""SmolLM2-135M-Instruct: forward, generation and merges beside `transformers` and mergekit, in one run."""

from __future__ import annotations

from pathlib import Path

from benchmarks.world_parts.section import Section

__all__ = ["measure"]


def measure(work: Path) -> Section:
    """No rows yet."""
    head = ("what", "mergelab", "other library", "ratio")
    return Section("The same weights, prompts and dtypes in one run; medians.", head, [])
