"""A finished dictionary: what a trained sparse autoencoder is to those who use it, whoever trained it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mergelab.errors import SAEError
from mergelab.sae.layer_norm import layer_norm
from mergelab.sae.sparse.rows import sum_of_rows
from mergelab.sae.sparse.top_k import top_k

__all__ = ["ACTIVATIONS", "LATENT_AXIS", "Dictionary", "DictionaryConfig"]

ACTIVATIONS = ("topk", "batch_topk", "jump_relu", "relu", "gated")
NORMALIZATIONS = ("none", "layer_norm")
LATENT_AXIS = {
    "W_enc": 1, "b_enc": 0, "W_dec": 0, "threshold": 0, "magnitude_scale": 0, "magnitude_bias": 0,
}  # fmt: skip
"""Which axis of an array of a dictionary runs over latents; the others have none."""


@dataclass(frozen=True)
class DictionaryConfig:
    """How the arrays of a dictionary are used.

    Attributes:
        activation: `topk` keeps the k largest pre-activations; `batch_topk` and `jump_relu` those above
            `threshold`; `relu` the positive ones; `gated` decides by one path and measures by another.
        k: latents per token, for `topk`.
        subtract_b_dec: whether `b_dec` is subtracted from the input before it is encoded.
        normalization: `none`, or `layer_norm`: each token loses its mean over the width and is divided by its
            unbiased standard deviation + 1e-5, and the reconstruction is put back (OpenAI's).
        sites: how many activations stand side by side in the input, for a crosscoder.
        metadata: what else is known: `site`, `model`, `model_hash`, training figures. Plain JSON.
    """

    activation: str = "topk"
    k: int | None = None
    subtract_b_dec: bool = False
    normalization: str = "none"
    sites: int = 1
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise SAEError(f"activation is {self.activation!r}; it may be {', '.join(ACTIVATIONS)}.")
        if self.normalization not in NORMALIZATIONS:
            raise SAEError(f"normalization is {self.normalization!r}; it may be {', '.join(NORMALIZATIONS)}.")
        if self.activation == "topk" and (not isinstance(self.k, int) or self.k < 1):
            raise SAEError(f"a top-k dictionary needs k of at least 1, but k is {self.k}.")


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "W_enc", "b_enc", "W_dec", "b_dec", "threshold", "W_skip", "magnitude_scale", "magnitude_bias",
    ],
    meta_fields=["config"],
)  # fmt: skip
@dataclass(frozen=True)
class Dictionary:
    """A sparse dictionary of activations: pure functions of its arrays.

    Attributes:
        W_enc: `[d_in, n]`.
        b_enc: `[n]`.
        W_dec: `[n, d_out]`; a row is the direction a latent writes.
        b_dec: `[d_out]`.
        config: how they are used.
        threshold: `[n]`, for `jump_relu` and `batch_topk`.
        W_skip: `[d_in, d_out]`, added to the output of a skip transcoder.
        magnitude_scale: `[n]`, for `gated`: `exp` of it scales the product that measures.
        magnitude_bias: `[n]`, for `gated`.
    """

    W_enc: Array
    b_enc: Array
    W_dec: Array
    b_dec: Array
    config: DictionaryConfig
    threshold: Array | None = None
    W_skip: Array | None = None
    magnitude_scale: Array | None = None
    magnitude_bias: Array | None = None

    @property
    def d_in(self) -> int:
        """Width of what is read."""
        return self.W_enc.shape[0]

    @property
    def d_out(self) -> int:
        """Width of what is reconstructed."""
        return self.W_dec.shape[1]

    @property
    def n_latents(self) -> int:
        """How many latents there are."""
        return self.W_enc.shape[1]

    def checked(self) -> Dictionary:
        """Returns itself.

        Raises:
            SAEError: an array is missing or has a shape that does not fit the others.
        """
        for name in ("W_enc", "W_dec"):
            if getattr(self, name).ndim != 2:
                raise SAEError(f"{name} has shape {list(getattr(self, name).shape)}; two axes were expected.")
        d, n, out = self.d_in, self.n_latents, self.d_out
        wanted: dict[str, tuple[int, ...]] = {
            "W_enc": (d, n),
            "b_enc": (n,),
            "W_dec": (n, out),
            "b_dec": (out,),
        }
        needs: dict[str, tuple[str, ...]] = {
            "jump_relu": ("threshold",),
            "batch_topk": ("threshold",),
            "gated": ("magnitude_scale", "magnitude_bias"),
        }
        wanted |= {name: (n,) for name in needs.get(self.config.activation, ())}
        if self.W_skip is not None:
            wanted["W_skip"] = (d, out)
        for name, shape in wanted.items():
            value = getattr(self, name)
            if value is None:
                raise SAEError(f"a dictionary with activation {self.config.activation!r} needs {name}.")
            if tuple(value.shape) != shape:
                raise SAEError(f"{name} has shape {list(value.shape)}, but {list(shape)} was expected.")
        if self.config.subtract_b_dec and d != out:
            raise SAEError(f"b_dec of width {out} cannot be subtracted from inputs of width {d}.")
        if self.config.k is not None and self.config.activation == "topk" and self.config.k > n:
            raise SAEError(f"k is {self.config.k}, but the dictionary has only {n} latents.")
        return self

    def _normalized(self, x: Array) -> tuple[Array, Array | None, Array | None]:
        if self.config.normalization == "none":
            return x, None, None
        return layer_norm(x)

    def pre_activations(self, x: Array) -> Array:
        """`[tokens, d_in]` -> `[tokens, n]`: before the activation; the gate's, for `gated`."""
        x, _, _ = self._normalized(x)
        if self.config.subtract_b_dec:
            x = x - self.b_dec[None, :]
        return x @ self.W_enc + self.b_enc[None, :]

    def encode(self, x: Array) -> Array:
        """The codes, dense: `[tokens, d_in]` -> `[tokens, n]`."""
        pre = self.pre_activations(x)
        kind = self.config.activation
        if kind == "topk":
            values, indices = self._chosen(pre)
            rows = jnp.arange(pre.shape[0])[:, None]
            return jnp.zeros_like(pre).at[rows, indices].set(values)
        if kind == "relu":
            return jnp.maximum(pre, 0)
        if kind == "gated":
            assert self.magnitude_scale is not None and self.magnitude_bias is not None
            size = jnp.exp(self.magnitude_scale)[None, :] * (pre - self.b_enc[None, :])
            return jnp.where(pre > 0, jnp.maximum(size + self.magnitude_bias[None, :], 0), 0)
        assert self.threshold is not None
        return jnp.where(pre > self.threshold[None, :], jnp.maximum(pre, 0), 0)

    def _chosen(self, pre: Array) -> tuple[Array, Array]:
        assert self.config.k is not None
        values, indices = top_k(pre, self.config.k)
        return jnp.maximum(values, 0), indices

    def sparse_codes(self, x: Array) -> tuple[Array, Array]:
        """Values and latents of the k active ones: `[tokens, d_in]` -> `[tokens, k]` twice, for `topk`.

        Raises:
            SAEError: the dictionary's activation is not `topk`.
        """
        if self.config.activation != "topk":
            raise SAEError(
                f"only top-k dictionaries have k codes per token; this is {self.config.activation!r}."
            )
        return self._chosen(self.pre_activations(x))

    def decode(self, codes: Array) -> Array:
        """`[tokens, n]` -> `[tokens, d_out]`: without skip path and without undoing a `layer_norm`."""
        return codes @ self.W_dec + self.b_dec[None, :]

    def decode_sparse(self, values: Array, indices: Array) -> Array:
        """Like `decode`, from pairs `[tokens, k]`."""
        return sum_of_rows(values, indices, self.W_dec) + self.b_dec[None, :]

    def reconstruct(self, x: Array, codes: Array) -> Array:
        """What these codes make of `x`: `[tokens, d_in]`, `[tokens, n]` -> `[tokens, d_out]`."""
        normal, mean, scale = self._normalized(x)
        out = self.decode(codes)
        if self.W_skip is not None:
            out = out + normal @ self.W_skip
        return out if mean is None or scale is None else out * scale + mean

    def __call__(self, x: Array) -> Array:
        """The reconstruction: `[tokens, d_in]` -> `[tokens, d_out]`."""
        return self.reconstruct(x, self.encode(x))

    def arrays(self) -> dict[str, Array]:
        """Its arrays by name, those that are there."""
        names = (f for f in self.__dataclass_fields__ if f != "config" and getattr(self, f) is not None)
        return {name: getattr(self, name) for name in names}

    def as_numpy(self) -> dict[str, np.ndarray]:
        """Its arrays by name on the host."""
        return {name: np.asarray(value) for name, value in self.arrays().items()}
