"""What differs between the versions of jax that this library runs on: 0.7.2 (Colab, Kaggle) to 0.12."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import jax

__all__ = ["cluster_facts", "enable_x64", "leave_signals_alone", "register_dataclass"]

T = TypeVar("T")


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


def register_dataclass(
    cls: type[T], data_fields: Sequence[str] | None = None, meta_fields: Sequence[str] | None = None
) -> type[T]:
    """Registration of a dataclass as a pytree, as `jax.tree_util.register_dataclass`; also a decorator.

    With jax's own, from jaxlib 0.10 to 0.12 at least, structures of *different* dataclasses are equal where
    their static fields are, and only their hashes differ. The tables in which `jit` looks up programs ask for
    equality whenever seven bits of two hashes agree: about one call in a hundred of a function that takes
    dataclasses of several types would run the program of another type. Structures of custom nodes compare
    types.

    Args:
        cls: the dataclass.
        data_fields: its children; by default the fields not declared with `field(metadata={"static": True})`.
        meta_fields: its static fields, hashable; by default the others.
    """
    if data_fields is None or meta_fields is None:
        fields: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
        data_fields = [field.name for field in fields if not field.metadata.get("static")]
        meta_fields = [field.name for field in fields if field.metadata.get("static")]
    data, meta = tuple(data_fields), tuple(meta_fields)
    keys = tuple(jax.tree_util.GetAttrKey(name) for name in data)

    def flatten(node: T) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return tuple([getattr(node, name) for name in data]), tuple([getattr(node, name) for name in meta])

    def flatten_with_keys(node: T) -> tuple[tuple[tuple[Any, Any], ...], tuple[Any, ...]]:
        children, static = flatten(node)
        return tuple(zip(keys, children, strict=True)), static

    def unflatten(static: tuple[Any, ...], children: Iterable[Any]) -> T:
        return cls(**dict(zip(data, children, strict=True)), **dict(zip(meta, static, strict=True)))

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls
