"""Activations as training data: sources of rows, shuffled batches with an exact place, batches made ahead."""

from mergelab.activations.files import ActivationFiles, find_activation_files, open_activation_files
from mergelab.activations.prefetch import Prefetch, Trace
from mergelab.activations.source import ActivationSource
from mergelab.activations.stream import ActivationStream, Batch

__all__ = [
    "ActivationFiles",
    "ActivationSource",
    "ActivationStream",
    "Batch",
    "Prefetch",
    "Trace",
    "find_activation_files",
    "open_activation_files",
]
