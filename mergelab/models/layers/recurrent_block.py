"""Blocks whose tokens are mixed by a recurrence, and a feed-forward layer where there is one."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from flax import linen as nn

from mergelab.models.cache import Kept, Recurrent, State, empty_layer
from mergelab.models.layers.block import Pass, Stream
from mergelab.models.layers.experts import MixtureOfExperts
from mergelab.models.layers.mlp import MLP, MLPSpec
from mergelab.models.layers.norms import Norm, NormKind
from mergelab.models.layers.routing import Experts

__all__ = ["MixerSpec", "RecurrentBlock", "RecurrentBlockSpec"]


@runtime_checkable
class MixerSpec(Protocol):
    """What a block asks of the description of a recurrent layer: a frozen, hashable dataclass.

    Its module is called with the normalized stream, False for padding (or None), the layer's state, a tap and
    the name of its sites, and returns what is added to the stream and the state after the last token.
    """

    @property
    def kept(self) -> Recurrent:
        """What a cache keeps of each row."""
        ...

    def outline(self) -> MixerSpec:
        """The same without what changes neither parameters nor sites."""
        ...

    def module(self, gain: float, name: str) -> nn.Module:
        """The flax module; `gain` is the initial gain of what it adds to the stream."""
        ...


@dataclass(frozen=True)
class RecurrentBlockSpec:
    """A recurrent layer and a feed-forward layer, each of which reads a norm of the stream and adds to it.

    Attributes:
        mixer: the recurrent layer.
        mlp: the feed-forward layer, or a mixture of experts in its place; None where there is none (Mamba).
        norm: the norms before the two.
    """

    mixer: MixerSpec
    mlp: MLPSpec | Experts | None = None
    norm: NormKind = field(default_factory=NormKind)

    @property
    def kept(self) -> Kept:
        """See `AnyBlock`."""
        return self.mixer.kept

    @property
    def tensors(self) -> int:
        """See `AnyBlock`."""
        return self.mlp.count if isinstance(self.mlp, Experts) else 1

    def outline(self) -> RecurrentBlockSpec:
        """See `AnyBlock`."""
        mlp = self.mlp.outline() if isinstance(self.mlp, Experts) else self.mlp
        return replace(self, mixer=self.mixer.outline(), mlp=mlp)

    def module(self, layer: int, gain: float, name: str) -> RecurrentBlock:
        """See `AnyBlock`."""
        return RecurrentBlock(self, layer, gain, name=name)


class RecurrentBlock(nn.Module):
    """One block, as a `RecurrentBlockSpec` describes it: sites `mixer.*` where others have `attn.*`."""

    spec: RecurrentBlockSpec
    layer: int
    gain: float = 1.0

    @nn.compact
    def __call__(self, x: Stream, shared: Pass) -> tuple[Stream, State]:
        spec, tap, site = self.spec, shared.tap, f"blocks.{self.layer}"
        x = tap(f"{site}.resid_pre", x)
        if shared.cache is None:
            state = empty_layer(spec.kept, x.shape[0], 0, x.dtype)
        else:
            state = shared.cache.state(self.layer)
        mixer: Any = spec.mixer.module(self.gain, "mixer")
        normed = Norm(spec.norm, name="mixer_norm")(x, tap, f"{site}.mixer_norm")
        added, (window, memory) = mixer(normed, shared.mask, state, tap, f"{site}.mixer")
        kept = window.astype(state[0].dtype), memory.astype(jnp.float32)
        if tap.done:
            return x, kept
        if spec.mlp is None:
            return tap(f"{site}.resid_post", x + added), kept
        x = tap(f"{site}.resid_mid", x + added)
        normed = Norm(spec.norm, name="mlp_norm")(x, tap, f"{site}.mlp_norm")
        kind: Any = MixtureOfExperts if isinstance(spec.mlp, Experts) else MLP
        fed = kind(spec.mlp, initial_gain=self.gain, name="mlp")(normed, tap, f"{site}.mlp")
        return tap(f"{site}.resid_post", x + fed), kept
