"""Reads many short runs of one tensor, such as a range of its columns, without opening its file for each."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from mergelab.checkpoints.file_tensor import FileTensor
from mergelab.checkpoints.source import TensorSource
from mergelab.errors import CheckpointError

__all__ = ["read_runs"]


def read_runs(source: TensorSource, starts: Sequence[int] | np.ndarray, out: np.ndarray) -> None:
    """Fills row `i` of `out` with the flat elements of the tensor from `starts[i]` on.

    Args:
        source: the tensor.
        starts: the first element of each run, inside the tensor.
        out: `[runs, length]`, contiguous, of the tensor's dtype.

    Raises:
        CheckpointError: the file is shorter than its header says, has changed, or cannot be read.
    """
    if len(starts) < 2 or not isinstance(source, FileTensor):
        for start, row in zip(starts, out, strict=True):
            source.read_into(int(start), row)
        return
    # The first run goes through the tensor itself, which checks that the file is still the one it was.
    source.read_into(int(starts[0]), out[0])
    width = source.dtype.itemsize
    rows = out.view(np.uint8)
    try:
        file = os.open(source.file.path, os.O_RDONLY)
        try:
            for start, row in zip(starts[1:], rows[1:], strict=True):
                _read_fully(file, source, source.offset + int(start) * width, row.data)
        finally:
            os.close(file)
    except OSError as error:
        raise CheckpointError(
            f"{source.file.path}: reading tensor {source.name!r} failed ({error.strerror}); "
            "check the disk and run again"
        ) from error


def _read_fully(file: int, source: FileTensor, offset: int, out: memoryview) -> None:
    while len(out):
        count = os.preadv(file, [out], offset)
        if not count:
            raise CheckpointError(
                f"{source.file.path}: the file became shorter while tensor {source.name!r} was read; "
                "download or copy it again"
            )
        out, offset = out[count:], offset + count
