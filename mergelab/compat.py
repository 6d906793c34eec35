"""What differs between the versions of jax that this library runs on: 0.7.2 (Colab, Kaggle) to 0.12."""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager

import jax

__all__ = ["enable_x64"]


def enable_x64(on: bool) -> AbstractContextManager[None]:
    """Context in which 64-bit dtypes are, or are not, what JAX computes with, as `jax.enable_x64(on)`.

    jax has it at its top level from 0.8 on, and under `jax.experimental` before.
    """
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(on)
    return importlib.import_module("jax.experimental").enable_x64(on)  # by a name that newer stubs lack
