"""Programs compiled for TPU slices that are not there: what each chip holds, does and exchanges."""

from mergelab.topology.chips import Chip, Roofline, chip_of, roofline
from mergelab.topology.compiler import compile_for_topology
from mergelab.topology.report import ChipReport, Collective

__all__ = ["Chip", "ChipReport", "Collective", "Roofline", "chip_of", "compile_for_topology", "roofline"]
