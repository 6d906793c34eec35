"""Small safetensors files written whole, whose failure is what the operating system said."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

__all__ = ["write_tensors"]

_CODE = re.compile(r"os error (\d+)")


def write_tensors(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays to a safetensors file.

    Raises:
        OSError: the file system refuses; safetensors itself raises an error of its own.
    """
    try:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)
    except SafetensorError as error:
        code = _CODE.search(str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
