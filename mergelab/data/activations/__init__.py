"""Activations as training data: sources of rows, shuffled batches with an exact place, batches made ahead."""

from mergelab.data.activations.files import ActivationFiles, find_activation_files, open_activation_files
from mergelab.data.activations.prefetch import Prefetch, Trace
from mergelab.data.activations.source import ActivationSource
from mergelab.data.activations.stream import ActivationStream, Batch

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
