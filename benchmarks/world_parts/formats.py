"""Formats of weights that are read, each with its error against a reference that mergelab did not write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.world_parts import gguf_files, quantized_files
from benchmarks.world_parts.section import Place, Section

__all__ = ["FORMATS", "measure"]

Row = Sequence[str]

FORMATS: list[Callable[[Path], Sequence[Row]]] = [
    gguf_files.blocks_of_every_type,
    gguf_files.smollm_against_transformers,
    quantized_files.recorded_files,
]
"""Functions that take a scratch folder and return rows: format, reference, tensors, largest difference."""


def measure(place: Place) -> Section:
    """The rows of every format."""
    rows = [row for function in FORMATS for row in function(place.work)]
    note = "The largest absolute difference between the weights as mergelab reads them and the reference's."
    return Section(note, ("format", "reference", "tensors compared", "largest difference"), rows)
