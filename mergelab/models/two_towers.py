"""Models of a tower for text and one for images that meet in one space, as in CLIP (arXiv:2103.00020)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from mergelab.models.derived import Derived, derive, param
from mergelab.models.encoder import ENCODER, Encoder, EncoderConfig
from mergelab.models.layers.dense import Linear
from mergelab.models.model import Architecture
from mergelab.models.sites import Tap
from mergelab.models.vision import VISION, VisionConfig, VisionTower

__all__ = ["TWO_TOWERS", "TwoTowers", "TwoTowersConfig"]

_TOWERS = ("text", "vision")


@dataclass(frozen=True)
class TwoTowersConfig:
    """A tower for text, one for images, and the space in which they meet.

    Attributes:
        text: the tower for text.
        vision: the tower for images; its `projection` is the width of the common space.
        end: the token whose state stands for a text, at its first place; None for the largest id.
    """

    text: EncoderConfig
    vision: VisionConfig
    end: int | None = None

    @property
    def reads_both(self) -> bool:
        """Whether a pair of tokens and images is read: always."""
        return True

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.text.vocab_size

    @property
    def d_model(self) -> int:
        """Width of the common space."""
        return self.vision.projection

    @property
    def max_length(self) -> int:
        """Positions of the tower for text."""
        return self.text.max_length

    @property
    def learned_positions(self) -> bool:
        """Positions are a table of embeddings."""
        return True

    @property
    def skips_padding(self) -> bool:
        """Whether positions count real tokens alone: CLIP's count all."""
        return False

    @property
    def token_types(self) -> int:
        """Size of the table of segments: there is none."""
        return 0

    @property
    def n_layers(self) -> int:
        """Blocks of the deeper tower."""
        return max(self.text.n_layers, self.vision.n_layers)

    @property
    def n_heads(self) -> int:
        """Heads of the tower for text."""
        return self.text.n_heads

    @property
    def least_tensors(self) -> int:
        """Number of tensors that the files of such a model hold at least."""
        return self.text.n_layers + self.vision.n_layers


class Within(Tap):
    """The tap of a tower: its sites are known to the whole model under the tower's name.

    Args:
        tap: the model's.
        tower: the tower's name.
    """

    def __init__(self, tap: Tap, tower: str) -> None:
        self._whole, self._prefix = tap, f"{tower}."

    def __call__(self, site: str, value: jax.Array) -> jax.Array:
        return self._whole(self._prefix + site, value)

    def uses(self, site: str) -> bool:
        return self._whole.uses(self._prefix + site)

    def edits(self, site: str) -> bool:
        return self._whole.edits(self._prefix + site)

    @property
    def done(self) -> bool:
        return self._whole.done


class TwoTowers(nn.Module):
    """Tokens and images in; how well each image fits each text out."""

    config: TwoTowersConfig

    def example(self, batch: int, length: int) -> tuple[Any, Any]:
        """Shapes of tokens and images, and of the tokens' positions."""
        tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
        return (tokens, jax.ShapeDtypeStruct((batch, *self.config.vision.image), jnp.float32)), tokens

    @nn.compact
    def __call__(
        self,
        read: tuple[Int[Array, "texts length"] | None, Float[Array, "images channels tall wide"] | None],
        positions: Int[Array, "texts length"] | None,
        mask: Bool[Array, "texts length"] | None,
        cache: None,
        tap: Tap,
        token_types: None = None,
    ) -> tuple[Float[Array, "images texts"] | None, None, None]:
        """Returns the logits `exp(scale) * cos(image, text)`, float32, or None without one of the two.

        The sites `text.embedding` and `vision.embedding` hold the vectors before they are normalized.

        Args:
            read: token ids and pixel values; None for what is not there.
            positions: positions of the tokens.
            mask: False for padding tokens; None if there is none.
            cache: None; texts are read at once.
            tap: what to do at the sites.
            token_types: None; there are no segments.
        """
        c, (tokens, images) = self.config, read
        words = pictures = None
        if tokens is not None:
            assert positions is not None, "tokens have positions"
            text = Within(tap, "text")
            _, hidden, _ = Encoder(c.text, name="text")(tokens, positions, mask, None, text)
            if hidden is not None:
                ends = jnp.argmax(tokens if c.end is None else tokens == c.end, axis=1)
                pooled = text("pooled", jnp.take_along_axis(hidden, ends[:, None, None], axis=1)[:, 0])
                project = Linear(c.vision.projection, ("embed", None), name="text_projection")
                words = text("embedding", project(pooled[:, None])[:, 0])
        if images is not None and not tap.done:
            steps = jnp.arange(c.vision.max_length, dtype=jnp.int32)
            places = jnp.broadcast_to(steps[None], (len(images), len(steps)))
            _, pictures = VisionTower(c.vision, name="vision")(images, places, Within(tap, "vision"))
        scale = jnp.asarray(param(self, "logit_scale", nn.initializers.constant(2.6592), (), ()))
        if words is None or pictures is None or tap.done:
            return None, None, None
        cosines = _normalized(pictures) @ _normalized(words).T
        return tap("logits", jnp.exp(scale.astype(jnp.float32)) * cosines), None, None


def _normalized(x: Float[Array, "batch features"]) -> Float[Array, "batch features"]:
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


class _Architecture(Architecture):
    def derived(self, config: TwoTowersConfig) -> Derived:
        """Parameters and sites, each tower's at the cost of one block of each kind."""
        small = replace(config, text=config.text.one_of_each()[0], vision=config.vision.one_of_each()[0])
        own = derive(TwoTowers(small))
        towers = {"text": ENCODER.derived(config.text), "vision": VISION.derived(config.vision)}
        parameters = {
            (tower, *path): parameter
            for tower, found in towers.items()
            for path, parameter in found.parameters.items()
        }
        parameters |= {path: found for path, found in own.parameters.items() if path[0] not in _TOWERS}
        sites: dict[str, Any] = {}
        for tower, found in towers.items():
            sites |= {f"{tower}.{site}": shape for site, shape in found.sites.items()}
            late = [site for site in own.sites if site.startswith(f"{tower}.") and ".blocks." not in site]
            sites |= {site: own.sites[site] for site in late if site not in sites}
        return Derived(parameters, sites | {"logits": own.sites["logits"]})


TWO_TOWERS = _Architecture(TwoTowers, causal=False)
