"""Programs compiled for TPU slices that are not there: what each chip holds, does and exchanges."""

from typing import TYPE_CHECKING

from mergelab.lazy import lazy_names

if TYPE_CHECKING:
    from mergelab.aot.chips import (
        Chip,
        ChipReport,
        Collective,
        Fit,
        Roofline,
        chip_of,
        is_one_chip,
        roofline,
    )
    from mergelab.aot.compiler import compile_for_topology

__all__ = [
    "Chip",
    "ChipReport",
    "Collective",
    "Fit",
    "Roofline",
    "chip_of",
    "compile_for_topology",
    "is_one_chip",
    "roofline",
]

__getattr__, __dir__ = lazy_names(__name__)
