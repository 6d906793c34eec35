"""What the devices of one training mesh tell each other: sums over shards of latents and of tokens.

A step is written once, for the part of the latents and of the batch that one device holds. `Shards` names
the mesh axes it is split over; without a mesh every method is the identity, and the same code is the step of
one device. Gradients are taken inside the part, so each collective states its own transpose: a sum over
shards of a result hands its cotangent to each of them unchanged, and a value that every shard reads sums what
they send back (the conjugate pair of Megatron-LM, arXiv 1909.08053).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax import Array, lax

__all__ = ["ONE_DEVICE", "Shards"]


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _join(x: Array, axis: str) -> Array:
    return lax.psum(x, axis)


_join.defvjp(lambda x, axis: (lax.psum(x, axis), None), lambda axis, _, g: (g,))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _share(x: Array, axis: str) -> Array:
    return x


_share.defvjp(lambda x, axis: (x, None), lambda axis, _, g: (lax.psum(g, axis),))


@dataclass(frozen=True)
class Shards:
    """The mesh axes that split the latents and the tokens of a batch; None where they are whole.

    Attributes:
        latents: axis over which rows of `encoder` and `decoder` are split.
        data: axis over which the tokens of a batch are split.
        sweep: axis of a sweep: several SAEs trained by one vmapped program.
        platform: platform that the program is compiled for, `cpu`, `gpu` or `tpu`; it decides which of
            several equal forms a kernel takes (`mergelab.sae.kernels.dispatch`).
    """

    latents: str | None = None
    data: str | None = None
    sweep: str | None = None
    platform: str = "cpu"

    def join_latents(self, partial_sum: Array) -> Array:
        """Sums what each shard of latents contributes to an output, such as a reconstruction."""
        return partial_sum if self.latents is None else _join(partial_sum, self.latents)

    def share_with_latents(self, value: Array) -> Array:
        """A parameter that every shard of latents reads: its gradient is the sum of theirs."""
        return value if self.latents is None else _share(value, self.latents)

    def sum_latents(self, x: Any) -> Any:
        """Sums numbers over the shards of latents; carries no gradient."""
        x = lax.stop_gradient(x)
        return x if self.latents is None else lax.psum(x, self.latents)

    def sum_data(self, x: Any) -> Any:
        """Sums numbers over the shards of the batch; carries no gradient."""
        x = lax.stop_gradient(x)
        return x if self.data is None else lax.psum(x, self.data)

    def sum_all(self, x: Any) -> Any:
        """Sums numbers over every part of the mesh; carries no gradient."""
        return self.sum_data(self.sum_latents(x))

    def any_data(self, flags: Array) -> Array:
        """Whether a flag is set in any shard of the batch."""
        return flags if self.data is None else lax.pmax(flags.astype("int32"), self.data).astype(bool)

    def most(self, count: Array) -> Array:
        """The largest of a count over all parts and all members of a sweep: one number for all of them."""
        for axis in (self.latents, self.data, self.sweep):
            if axis is not None:
                count = lax.pmax(count, axis)
        return count

    def gather_latents(self, x: Array) -> Array:
        """`[tokens, k]` of each shard of latents side by side: `[tokens, shards * k]`, shard 0 first."""
        return x if self.latents is None else lax.all_gather(x, self.latents, axis=-1, tiled=True)

    def latent_offset(self, n_local: int) -> Array | int:
        """The global index of this shard's first latent."""
        return 0 if self.latents is None else lax.axis_index(self.latents) * n_local

    def num_latent_shards(self) -> int:
        """How many shards the latents are split into."""
        return 1 if self.latents is None else lax.axis_size(self.latents)

    def num_data_shards(self) -> int:
        """How many shards a batch is split into."""
        return 1 if self.data is None else lax.axis_size(self.data)


ONE_DEVICE = Shards()
"""Nothing is split."""
