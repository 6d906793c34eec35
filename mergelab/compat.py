"""What differs between the versions of jax that this library runs on: 0.7.2 (Colab, Kaggle) to 0.12."""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager

import jax

__all__ = ["cluster_facts", "enable_x64", "leave_signals_alone"]


def enable_x64(on: bool) -> AbstractContextManager[None]:
    """Context in which 64-bit dtypes are, or are not, what JAX computes with, as `jax.enable_x64(on)`.

    jax has it at its top level from 0.8 on, and under `jax.experimental` before.
    """
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(on)
    return importlib.import_module("jax.experimental").enable_x64(on)  # by a name that newer stubs lack


def leave_signals_alone() -> None:
    """Keeps `jax.distributed.initialize` from taking SIGTERM, where jax has a switch for it (from 0.8 on)."""
    if hasattr(jax.config, "jax_enable_preemption_service"):
        jax.config.update("jax_enable_preemption_service", False)


def cluster_facts(timeout: int) -> tuple[str | None, int | None, int | None, tuple[int, ...] | None]:
    """What Slurm, Open MPI, Kubernetes or a TPU pod says: address, processes, this process, its devices.

    All None where there is no such cluster. jax asks them within `jax.distributed.initialize`, which has no
    public part that only asks.

    Args:
        timeout: seconds to wait for the name of process 0's machine to be known.
    """
    clusters = importlib.import_module("jax._src.clusters")
    address, processes, process, devices = clusters.ClusterEnv.auto_detect_unset_distributed_params(
        None, None, None, None, None, timeout
    )
    return address, processes, process, None if devices is None else tuple(devices)
