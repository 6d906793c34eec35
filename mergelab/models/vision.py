"""Models of images: patches and a class token in, one vector per patch out, as in ViT and CLIP.

Where a model of text reads token ids, these read pixel values `[batch, channels, height, width]`, normalized
as the model's `preprocessor_config.json` says. A patch is a token: position 0 is the class token, then come
the patches row by row.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from mergelab.models.derived import param
from mergelab.models.layers.block import AnyBlock, Pass, Stream
from mergelab.models.layers.dense import Embed, Linear
from mergelab.models.layers.norms import Norm, NormKind
from mergelab.models.model import Architecture
from mergelab.models.sites import Tap
from mergelab.models.stack import Stack

__all__ = ["VISION", "Vision", "VisionConfig", "VisionTower", "look"]


@dataclass(frozen=True)
class VisionConfig(Stack):
    """A model of images: its blocks, and what stands around them.

    Attributes:
        d_model: residual width.
        image: channels, height and width of the images that are read in place of tokens.
        patch: height and width of a patch; what is left of an image at its lower and right edge is not read.
        blocks: what each layer is made of.
        patch_bias: whether the projection of patches has a bias.
        entrance_norm: norm of what enters the first block, or None (CLIP has one).
        final_norm: norm of the last block's output, or None (ViT has one).
        pooler: whether the class token's last state passes a further layer and tanh (site `pooled`).
        pooled_norm: norm of the class token's last state (site `pooled`), or None (CLIP has one).
        projection: width that the normalized class token is projected to (site `embedding`); 0 for none.
    """

    d_model: int
    image: tuple[int, int, int]
    patch: tuple[int, int]
    blocks: tuple[AnyBlock, ...]
    patch_bias: bool = True
    entrance_norm: NormKind | None = None
    final_norm: NormKind | None = field(default_factory=lambda: NormKind("layer", 1e-12))
    pooler: bool = False
    pooled_norm: NormKind | None = None
    projection: int = 0

    @property
    def max_length(self) -> int:
        """The class token and the patches of an image."""
        _, height, width = self.image
        return 1 + (height // self.patch[0]) * (width // self.patch[1])

    @property
    def vocab_size(self) -> int:
        """Number of token ids: none, images are read in their place."""
        return 0

    @property
    def token_types(self) -> int:
        """Size of the table of segments: there is none."""
        return 0

    @property
    def learned_positions(self) -> bool:
        """Positions are a table of embeddings."""
        return True

    @property
    def skips_padding(self) -> bool:
        """Whether positions count some tokens only: an image has no padding."""
        return False


class Vision(nn.Module):
    """Transformer over the patches of an image: pixel values in, one vector per patch out."""

    config: VisionConfig

    def example(self, batch: int, length: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Shapes of the images and of the positions of a call; an image has one length only."""
        images = jax.ShapeDtypeStruct((batch, *self.config.image), jnp.float32)
        return images, jax.ShapeDtypeStruct((batch, self.config.max_length), jnp.int32)

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "batch channels tall wide"],
        positions: Int[Array, "batch length"],
        mask: None,
        cache: None,
        tap: Tap,
        token_types: None = None,
    ) -> tuple[None, Stream | None, None]:
        """Returns `(None, the last hidden state [batch, 1 + patches, width], None)`, as an encoder does.

        Args:
            images: pixel values.
            positions: positions of the class token and the patches.
            mask: None; an image has no padding.
            cache: None; patches are seen all at once.
            tap: what to do at the sites.
            token_types: None; an image has no segments.
        """
        hidden, _ = look(self.config, images, positions, tap)
        return None, hidden, None


class VisionTower(nn.Module):
    """The same beside another tower: returns what `look` returns."""

    config: VisionConfig

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "batch channels tall wide"],
        positions: Int[Array, "batch length"],
        tap: Tap,
    ) -> tuple[Stream | None, Float[Array, "batch features"] | None]:
        return look(self.config, images, positions, tap)


def look(
    c: VisionConfig,
    images: Float[Array, "batch channels tall wide"],
    positions: Int[Array, "batch length"],
    tap: Tap,
) -> tuple[Stream | None, Float[Array, "batch features"] | None]:
    """The last hidden state, and the projected class token; makes modules in the scope of its caller."""
    x = PatchEmbed(c, name="embed")(images)
    x = x + Embed(c.max_length, c.d_model, name="positions")(positions)
    if c.entrance_norm is not None:
        x = Norm(c.entrance_norm, name="entrance_norm")(x, tap, "entrance_norm")
    x = tap("embed", x)
    shared = Pass(positions, None, None, tap, causal=False)
    for i, spec in enumerate(c.blocks):
        if tap.done:
            return None, None
        x, _ = spec.module(i, 1.0, f"blocks_{i}")(x, shared)
    if tap.done:
        return None, None
    if c.final_norm is not None:
        x = Norm(c.final_norm, name="final_norm")(x, tap, "final_norm")
    first, embedding = x[:, :1], None
    if c.pooler:
        # Its two sides cannot be split along one mesh axis: the inputs are.
        pooled = Linear(c.d_model, ("embed", None), bias=True, name="pooler")(first)
        tap("pooled", jnp.tanh(pooled[:, 0]))
    if c.pooled_norm is not None:
        pooled = tap("pooled", Norm(c.pooled_norm, name="pooled_norm")(first)[:, 0])
        if c.projection:
            project = Linear(c.projection, ("embed", None), name="projection")
            embedding = tap("embedding", project(pooled[:, None])[:, 0])
    return x, embedding


class PatchEmbed(nn.Module):
    """Patches, flattened (channel, row, column), times one kernel; before them the class token.

    That is a convolution whose stride is the size of its kernel.
    """

    config: VisionConfig

    @nn.compact
    def __call__(self, images: Float[Array, "batch channels tall wide"]) -> Stream:
        c, (tall, wide), (channels, height, width) = self.config, self.config.patch, self.config.image
        rows, columns = height // tall, width // wide
        kept = images[:, :, : rows * tall, : columns * wide]
        cut = kept.reshape(len(images), channels, rows, tall, columns, wide).transpose(0, 2, 4, 1, 3, 5)
        patches = cut.reshape(len(images), rows * columns, channels * tall * wide)
        size, initial = patches.shape[-1], nn.initializers.lecun_normal()
        kernel = jnp.asarray(param(self, "kernel", initial, (size, c.d_model), (None, "embed")))
        x = patches.astype(kernel.dtype) @ kernel
        if c.patch_bias:
            bias = jnp.asarray(param(self, "bias", nn.initializers.zeros, (c.d_model,), ("embed",)))
            x = x + bias[None, None]
        first = jnp.asarray(param(self, "first", nn.initializers.normal(0.02), (c.d_model,), ("embed",)))
        first = jnp.broadcast_to(first[None, None].astype(x.dtype), (len(images), 1, c.d_model))
        return jnp.concatenate([first, x], axis=1)


VISION = Architecture(Vision, causal=False)
