"""Accelerators of this machine that the installed jax would leave idle, found without importing jax."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path

__all__ = ["idle_accelerator"]

_GPU_FILES = ("dev/nvidia0", "dev/nvidiactl", "dev/dxg")
"""An NVIDIA GPU of its own, in a container, and under WSL."""

_TPU_FILES = ("dev/accel[0-9]*",)
_TPU_VARIABLES = ("TPU_ACCELERATOR_TYPE", "TPU_WORKER_ID", "COLAB_TPU_ADDR")
_GOOGLE, _TPU_CHIPS = "0x1ae0", {"0x0027", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"}
"""PCI vendor, and its devices that are TPUs (v3, v4, v5p, v5e, v6e, 7x); newer ones show as /dev/vfio."""


def idle_accelerator(
    environment: Mapping[str, str] = os.environ,
    root: Path = Path("/"),
    installed: frozenset[str] | None = None,
) -> str | None:
    """A sentence about a GPU or TPU that jax was installed without, with the command that cures it.

    Args:
        environment: Environment variables. A choice of platforms (`JAX_PLATFORMS`) is taken as meant.
        root: Root of the file system.
        installed: Names of the modules by which jax reaches accelerators; looked up if None.

    Returns:
        None where there is no accelerator, or jax can use it.
    """
    if environment.get("JAX_PLATFORMS") or environment.get("JAX_PLATFORM_NAME"):
        return None
    names = ("jax_cuda12_plugin", "jax_cuda13_plugin", "libtpu")
    found = {n for n in names if importlib.util.find_spec(n)} if installed is None else installed
    hidden = environment.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1")
    if not hidden and any((root / file).exists() for file in _GPU_FILES):
        return None if found - {"libtpu"} else _sentence("an NVIDIA GPU", "cuda12")
    if "libtpu" not in found and (any(map(environment.get, _TPU_VARIABLES)) or _has_tpu(root)):
        return _sentence("a TPU", "tpu")
    return None


def _has_tpu(root: Path) -> bool:
    if any(True for pattern in _TPU_FILES for _ in root.glob(pattern)):
        return True
    if not (root / "dev/vfio").exists():
        return False
    for vendor in root.glob("sys/bus/pci/devices/*/vendor"):
        try:
            device = vendor.with_name("device").read_text(encoding="ascii").strip()
            if vendor.read_text(encoding="ascii").strip() == _GOOGLE and device in _TPU_CHIPS:
                return True
        except (OSError, ValueError):
            continue
    return False


def _sentence(what: str, extra: str) -> str:
    import importlib.metadata  # slow to import, and seldom needed

    try:
        version = f"=={importlib.metadata.version('jax')}"
    except importlib.metadata.PackageNotFoundError:  # an installation without its records
        version = ""
    cure = f'pip install "jax[{extra}]{version}"'
    return f"this machine has {what}, but the installed jax computes on the CPU: {cure}"
