"""A model's forward pass compiled for a TPU slice that is not there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mergelab.aot import ChipReport, compile_for_topology
from mergelab.models.declaration import tree_from_leaves
from mergelab.models.families import model_from_config
from mergelab.models.model import Model
from mergelab.sharding import DEFAULT_RULES, Rules, named_sharding

__all__ = ["compile_forward", "lower_forward"]


def compile_forward(
    model: Model,
    topology: str,
    mesh: Mapping[str, int],
    *,
    batch: int,
    length: int,
    dtype: str = "bfloat16",
    rules: Rules = DEFAULT_RULES,
    timeout: float = 900.0,
) -> ChipReport:
    """Compiles `model.apply` for a TPU topology; needs no TPU. It proves what fits, never how fast it is.

    Args:
        model: the model.
        topology: such as `v5e:4x4`, `v6e:16x16`, `v5p:4x8x8`.
        mesh: the sizes of the mesh's axes; one may be -1.
        batch: sequences in the pass, over all chips.
        length: tokens of each.
        dtype: of parameters and activations.
        rules: logical axis -> mesh axes.
        timeout: seconds after which the compiler is stopped.

    Raises:
        DependencyError: the TPU compiler is not installed.
        MeshError: no such topology, a mesh that does not fit it, or a program that does not fit the chips.
    """
    request = {
        "config": dict(model.hf_config),
        "batch": batch,
        "length": length,
        "dtype": dtype,
        "rules": {name: [to] if isinstance(to, str) else to for name, to in rules.items()},
    }
    return compile_for_topology(f"{__name__}:lower_forward", topology, mesh, request, timeout=timeout)


def lower_forward(mesh: Mesh, request: Mapping[str, Any]) -> jax.stages.Lowered:
    """The forward pass as the compiler's process builds it from a request of `compile_forward`."""
    rules = {name: tuple(to) if to else None for name, to in request["rules"].items()}
    model = model_from_config(request["config"])
    dtype = jnp.dtype(request["dtype"])

    def array(shape: tuple[int, ...], kind: Any, axes: tuple[str | None, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, kind, sharding=named_sharding(mesh, shape, axes, rules))

    params = tree_from_leaves({leaf: array(leaf.shape, dtype, leaf.axes) for leaf in model.table()})
    tokens = array((request["batch"], request["length"]), jnp.int32, ("batch", "length"))

    def forward(params: Any, tokens: jax.Array) -> Any:
        found = model.apply(params, tokens)
        return found.hidden if found.logits is None else found.logits

    return jax.jit(forward).lower(params, tokens)
