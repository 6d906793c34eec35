"""Programs compiled for TPU slices that are not there: what each chip holds, does and exchanges."""

from typing import TYPE_CHECKING

from mergelab.lazy import lazy_names

if TYPE_CHECKING:
    from mergelab.aot.chips import (
        Chip,
        ChipReport,
        Collective,
        Fit,
        Gpu,
        Roofline,
        chip_kind,
        chip_of,
        device_count,
        is_one_chip,
        roofline,
        slices,
    )
    from mergelab.aot.compiler import compile_for_topology

__all__ = [
    "Chip",
    "ChipReport",
    "Collective",
    "Fit",
    "Gpu",
    "Roofline",
    "chip_kind",
    "chip_of",
    "compile_for_topology",
    "device_count",
    "is_one_chip",
    "roofline",
    "slices",
]

__getattr__, __dir__ = lazy_names(__name__)
