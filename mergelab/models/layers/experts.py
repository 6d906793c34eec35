"""The layer of a mixture of experts: those that each token chooses, and shared ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float, Int

from mergelab.models.derived import param
from mergelab.models.layers.bfloat16_bits import StackedBits
from mergelab.models.layers.dense import Linear, matmul, scaled
from mergelab.models.layers.grouped import combine, gather, in_blocks, in_rows, products, rows_of_a_block
from mergelab.models.layers.mlp import ACTIVATIONS, MLP, MLPSpec
from mergelab.models.layers.norms import Norm, NormKind
from mergelab.models.layers.routing import Experts, choose, spread
from mergelab.models.sites import Tap
from mergelab.sharding import mesh_of

__all__ = ["MixtureOfExperts", "chosen_experts", "every_expert"]


Kernels = dict[str, Any]
"""`gate`, `up` and `down`, `[experts, in, out]`, and their biases `[experts, out]` as `gate_bias`, ..."""


def _gated(spec: Experts, pre: Array, up: Array) -> Array:
    if spec.limit is not None:
        pre, up = jnp.minimum(pre, spec.limit), jnp.clip(up, -spec.limit, spec.limit) + 1
    return ACTIVATIONS[spec.activation](pre) * up


def every_expert(
    x: Float[Array, "batch length width"],
    kernels: Kernels,
    weights: Float[Array, "batch length experts"],
    spec: Experts,
    at: Callable[[str, Array], Array] = lambda name, value: value,
) -> Float[Array, "batch length width"]:
    """The weighted sum of what all experts make of every token: the plain form, and the one with sites.

    Args:
        x: the vectors.
        kernels: the experts.
        weights: the weight of each expert, of `x`'s dtype.
        spec: the mixture.
        at: called with `pre` and `post`, and what enters the activation and the output projection.
    """
    wide = {name: k.wide() if isinstance(k, StackedBits) else k for name, k in kernels.items()}

    def biased(name: str, y: Array) -> Array:
        y = y * weights[..., None] if spec.weigh_input else y
        return y + wide[f"{name}_bias"][None, None] if spec.bias else y

    pre = at("pre", biased("gate", jnp.einsum("blw,ewh->bleh", x, wide["gate"])))
    post = _gated(spec, pre, biased("up", jnp.einsum("blw,ewh->bleh", x, wide["up"])))
    if spec.weigh_input:  # an expert without weight reads zeros
        weights = (weights != 0).astype(x.dtype)
    out = jnp.einsum("bleh,ehw,ble->blw", at("post", post), wide["down"], weights)
    return out + jnp.einsum("ew,ble->blw", wide["down_bias"], weights) if spec.bias else out


def chosen_experts(
    x: Float[Array, "batch length width"],
    kernels: Kernels,
    weights: Float[Array, "batch length chosen"],
    indices: Int[Array, "batch length chosen"],
    spec: Experts,
) -> Float[Array, "batch length width"]:
    """The same sum, of products with the chosen experts alone.

    Where the experts lie on a mesh, each device computes those that it holds, for the rows of the batch that
    it holds, and one sum follows over the axis of experts, that named `expert`, else `tensor`. If the axis
    does not divide the experts, it divides the neurons of each.
    """
    mesh = None if isinstance(kernels["gate"], StackedBits) else mesh_of(kernels["gate"])
    if mesh is None or mesh.size == 1 or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return _chosen(x, kernels, weights, indices, spec, spec.count).astype(x.dtype)
    axis = next((name for name in ("expert", "tensor") if mesh.shape.get(name, 1) > 1), None)
    devices = mesh.shape[axis] if axis else 1
    by_neuron = spec.count % devices > 0
    if by_neuron and spec.hidden % devices:
        axis, devices, by_neuron = None, 1, False
    batch = tuple(name for name in ("data", "fsdp") if name in mesh.shape)
    if x.shape[0] % math.prod(mesh.shape[name] for name in batch):
        batch = ()
    rows = PartitionSpec(batch)
    places = {name: PartitionSpec(axis) for name in kernels}
    if by_neuron:
        inward, outward = ("gate", "up", "gate_bias", "up_bias"), ("down",)
        places = {name: PartitionSpec() for name in kernels}
        places |= {
            name: PartitionSpec(*[None] * (kernels[name].ndim - 1), axis)
            for name in inward
            if name in kernels
        }
        places |= {name: PartitionSpec(None, axis) for name in outward}

    def part(x: Array, kernels: Kernels, weights: Array, indices: Array) -> Array:
        if axis is None:
            return _chosen(x, kernels, weights, indices, spec, spec.count)
        place, count = jax.lax.axis_index(axis), spec.count
        if by_neuron:
            if spec.bias:  # of what is summed, one device adds the bias
                kernels = kernels | {"down_bias": kernels["down_bias"] * (place == 0).astype(x.dtype)}
        else:
            count = spec.count // devices
            indices = indices - place * count
            indices = jnp.where((indices >= 0) & (indices < count), indices, count)
        return jax.lax.psum(_chosen(x, kernels, weights, indices, spec, count), axis)

    specs = (rows, places, rows, rows)
    whole = jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)
    return whole(x, kernels, weights, indices).astype(x.dtype)


def _chosen(x: Array, kernels: Kernels, weights: Array, indices: Array, spec: Experts, count: int) -> Array:
    """What `count` experts make of the tokens that chose them, float32; others have the number `count`."""
    flat, chosen = x.reshape(-1, x.shape[-1]), indices.shape[-1]
    rows = rows_of_a_block(len(flat) * chosen, spec.count)
    blocks = in_blocks(indices.reshape(-1, chosen), count, rows)

    def project(name: str, y: Array) -> Array:
        y = products(y, kernels[name], blocks)
        return y + kernels[f"{name}_bias"][blocks.owner][:, None] if spec.bias else y

    own, weights = gather(flat, blocks), weights.reshape(-1, chosen)
    if spec.weigh_input:
        own = own * in_rows(weights, blocks)[..., None].astype(own.dtype)
        weights = jnp.ones_like(weights)
    post = _gated(spec, project("gate", own), project("up", own))
    return combine(project("down", post), blocks, weights).reshape(x.shape)


class MixtureOfExperts(nn.Module):
    """Gated experts with stacked kernels `[experts, in, out]`, combined by the router's weights.

    Each token is multiplied with the experts it has chosen alone. Where a pass asks for what goes on inside
    the experts, or edits the weights, every expert sees every token instead: the same sums, at
    `experts / chosen` times the arithmetic.

    Sites, under the name it is called with: `input`, `router` (the weights, `[batch, length, experts]`),
    `pre` and `post` (`[batch, length, experts, hidden]`), those of a shared layer (`shared.pre`), `out`.

    Attributes:
        spec: its shape and settings.
        out_norm: norm of the output, or None.
        initial_gain: gain of the output projections' initial weights.
        out_scale: what the output is multiplied with before it is added to the stream (Granite).
    """

    spec: Experts
    out_norm: NormKind | None = None
    initial_gain: float = 1.0
    out_scale: float = 1.0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length width"],
        tap: Tap,
        site: str,
        routed: Float[Array, "batch length width"] | None = None,
    ) -> Float[Array, "batch length width"]:
        """Returns what is added to the stream; `routed` is what the router reads, where that is not `x`."""
        x = tap(f"{site}.input", x)
        routed = x if routed is None else routed
        width, spec = x.shape[-1], self.spec
        router = param(self, "router", nn.initializers.lecun_normal(), (width, spec.count), ("embed", None))
        bias, correction = (
            param(self, name, nn.initializers.zeros, (spec.count,), (None,)) if has else None
            for name, has in (("router_bias", spec.router_bias), ("correction", spec.correction))
        )
        kernels = self._kernels(width)
        if spec.precise:
            logits = matmul(routed.astype(jnp.float32), router.astype(jnp.float32))
        else:
            logits = matmul(routed, router).astype(jnp.float32)
        logits = logits if bias is None else logits + bias.astype(jnp.float32)[None, None]
        correction = None if correction is None else correction.astype(jnp.float32)
        weights, indices = choose(logits, spec, correction)
        if spec.expert_scale:
            scale = param(self, "expert_scale", nn.initializers.ones, (spec.count,), (None,))
            weights = weights * scale.astype(jnp.float32)[indices]
        every = tap(f"{site}.router", spread(weights, indices, spec.count))
        if tap.edits(f"{site}.router") or tap.uses(f"{site}.pre") or tap.uses(f"{site}.post"):
            found = every_expert(
                x, kernels, every.astype(x.dtype), spec, lambda name, value: tap(f"{site}.{name}", value)
            )
        else:
            found = chosen_experts(x, kernels, weights, indices, spec)
        if spec.shared:
            shared = MLP(MLPSpec(spec.shared, spec.activation), name="shared")(x, tap, f"{site}.shared")
            if spec.shared_gate:
                shared = shared * jax.nn.sigmoid(Linear(1, ("embed", None), name="shared_gate")(x))
            found = found + shared
        if self.out_norm is not None:
            found = Norm(self.out_norm, name="out_norm")(found)
        return tap(f"{site}.out", scaled(found, self.out_scale))

    def _kernels(self, width: int) -> Kernels:
        spec = self.spec
        stacked = nn.initializers.variance_scaling(1.0, "fan_in", "normal", batch_axis=0)
        output = nn.initializers.variance_scaling(self.initial_gain**2, "fan_in", "normal", batch_axis=0)
        inward, outward = (spec.count, width, spec.hidden), (spec.count, spec.hidden, width)
        kernels: Kernels = {
            "gate": param(self, "gate", stacked, inward, ("experts", "embed", "mlp")),
            "up": param(self, "up", stacked, inward, ("experts", "embed", "mlp")),
            "down": param(self, "down", output, outward, ("experts", "mlp", "embed")),
        }
        if spec.bias:
            for name, axis in (("gate", "mlp"), ("up", "mlp"), ("down", "embed")):
                shape = (spec.count, kernels[name].shape[2])
                kernels[f"{name}_bias"] = param(
                    self, f"{name}_bias", nn.initializers.zeros, shape, ("experts", axis)
                )
        return kernels
