"""Activations as training data: sources of rows, shuffled batches with an exact place, batches made ahead."""

from mergelab.activations.store import ActivationFiles, find_activation_files, open_activation_files
from mergelab.activations.stream import ActivationSource, ActivationStream, Batch, Prefetch, Trace

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
