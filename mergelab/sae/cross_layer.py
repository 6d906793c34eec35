"""Cross-layer transcoders and crosscoders: latents of each layer, which write to several; read from files.

Latent j of layer i is `f(x_i . W_enc_i[:, j] + b_enc_i[j])`, with ReLU or JumpReLU for f, and layer t
becomes `sum_i codes_i @ W_dec_i[:, t] + x_t @ W_skip_t + b_dec_t`. Published ones have decoders of 100 GB
and more, so weights stay in their files: encoders are read in blocks, of decoders the rows of latents that
are active. Everything is computed on the host, in float32.

Source: Lindsey et al. 2024 (crosscoders), Ameisen et al. 2025 (circuit tracing), transformer-circuits.pub.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mergelab.checkpoints.source import TensorSource
from mergelab.errors import NonFiniteError, SAEError
from mergelab.sae.sae import SAE, SAEConfig

__all__ = ["CrossLayerTranscoder", "LayerWeights"]

_BLOCK = 1 << 24
"""Elements of a matrix that are read at once: 64 MB in float32."""


@dataclass(frozen=True)
class LayerWeights:
    """Weights of the latents that read one layer.

    Attributes:
        path: file of the encoder, for messages.
        W_enc: `[n, d]`; `[d, n]` where `inputs_first`.
        b_enc: `[n]`.
        b_dec: `[d]`, of what this layer's place in the output is.
        W_dec: `[n, targets, d]`: what each latent writes to layer `first`, `first + 1`, ....
        first: the first layer that is written.
        threshold: `[n]` of JumpReLU; None for ReLU.
        W_skip: `[d, d]`, from this layer's input to its output; None where there is none.
        inputs_first: which axis of `W_enc` comes first.
    """

    path: Path
    W_enc: TensorSource
    b_enc: np.ndarray
    b_dec: np.ndarray
    W_dec: TensorSource
    first: int
    threshold: np.ndarray | None = None
    W_skip: TensorSource | None = None
    inputs_first: bool = False

    @property
    def targets(self) -> range:
        """The layers that are written."""
        return range(self.first, self.first + self.W_dec.shape[1])

    def codes(self, x: np.ndarray) -> np.ndarray:
        """`[tokens, d]` -> `[tokens, n]`."""
        pre = np.tile(self.b_enc, (len(x), 1))
        for rows, block in self._blocks(self.W_enc):
            if self.inputs_first:
                pre += x[:, rows] @ block
            else:
                pre[:, rows] += x @ block.T
        active = np.maximum(pre, 0)
        return active if self.threshold is None else np.where(pre > self.threshold, active, 0)

    def encoder_rows(self, latents: np.ndarray) -> np.ndarray:
        """`[k, d]`: what some latents read."""
        if not self.inputs_first:
            return self.rows(self.W_enc, latents)
        columns = [block[:, latents] for _, block in self._blocks(self.W_enc)]
        return np.ascontiguousarray(np.concatenate(columns).T)

    def decoder_rows(self, latents: np.ndarray) -> np.ndarray:
        """`[k, targets, d]`: what some latents write."""
        return self.rows(self.W_dec, latents)

    def written(self, codes: np.ndarray) -> np.ndarray:
        """`[tokens, n]` -> `[tokens, targets, d]`, without a bias; reads the rows of active latents."""
        total = np.zeros((len(codes), *self.W_dec.shape[1:]), np.float32)
        active = np.flatnonzero(codes.any(axis=0))
        width = math.prod(self.W_dec.shape[1:])
        step = max(_BLOCK // max(width, 1), 1)
        for start in range(0, len(active), step):
            chosen = active[start : start + step]
            rows = self.decoder_rows(chosen).reshape(len(chosen), width)
            total += (codes[:, chosen] @ rows).reshape(total.shape)
        return total

    def skipped(self, x: np.ndarray) -> np.ndarray | None:
        """`[tokens, d]` -> what the skip path adds to this layer's output; None without one."""
        if self.W_skip is None:
            return None
        parts = (x[:, rows] @ block for rows, block in self._blocks(self.W_skip))
        return sum(parts, np.zeros((len(x), self.W_skip.shape[1]), np.float32))

    def _blocks(self, source: TensorSource) -> Iterator[tuple[slice, np.ndarray]]:
        """Rows of a matrix, block by block."""
        count, width = source.shape
        step = max(_BLOCK // max(width, 1), 1)
        for start in range(0, count, step):
            stop = min(start + step, count)
            yield slice(start, stop), self._read(source, start, stop)

    def rows(self, source: TensorSource, wanted: np.ndarray) -> np.ndarray:
        """Some rows of one of its tensors, each run of neighbors by one read."""
        wanted = np.asarray(wanted, np.int64).reshape(-1)
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < source.shape[0]):
            raise SAEError(f"latents {wanted.min()} to {wanted.max()} were asked for of {source.shape[0]}.")
        out = np.empty((len(wanted), *source.shape[1:]), np.float32)
        for run in np.split(np.arange(len(wanted)), np.flatnonzero(np.diff(wanted) != 1) + 1):
            if run.size:
                first = int(wanted[run[0]])
                out[run] = self._read(source, first, first + len(run))
        return out

    def _read(self, source: TensorSource, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop`, in float32, known to be finite."""
        width = math.prod(source.shape[1:])
        flat = np.empty((stop - start) * width, source.dtype)
        source.read_into(start * width, flat)
        rows = flat.astype(np.float32).reshape(stop - start, *source.shape[1:])
        if not np.isfinite(rows).all():
            first, *place = (int(i) for i in np.argwhere(~np.isfinite(rows))[0])
            raise NonFiniteError(
                f"{self.path}: {source.name}{[start + first, *place]} is not finite, where finite weights "
                "were expected; get it again"
            )
        return rows


@dataclass(frozen=True, repr=False)
class CrossLayerTranscoder:
    """A cross-layer transcoder, or a crosscoder of several layers, whose weights stay in their files.

    Attributes:
        layers: weights by layer, in forward order.
        reads: the site that each layer's latents read; None where it is not known.
        writes: the site of each layer's output; None where it is not known.
        metadata: everything else that is known.
    """

    layers: tuple[LayerWeights, ...]
    reads: tuple[str, ...] | None = None
    writes: tuple[str, ...] | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @property
    def n_latents(self) -> int:
        """Number of latents of one layer."""
        return len(self.layers[0].b_enc)

    @property
    def d_model(self) -> int:
        """Width of an activation."""
        return len(self.layers[0].b_dec)

    @property
    def is_crosscoder(self) -> bool:
        """Whether it writes the activations it reads."""
        return self.reads is not None and self.reads == self.writes

    def __repr__(self) -> str:
        kind = "crosscoder" if self.is_crosscoder else "cross-layer transcoder"
        return f"<{kind}: {self.n_layers} layers of {self.n_latents} latents, {self.d_model} wide>"

    def encode(self, x: Any) -> np.ndarray:
        """`[layers, tokens, d]` -> codes `[layers, tokens, n]`.

        Raises:
            SAEError: the activations have another shape.
            NonFiniteError: a weight is NaN or infinite.
        """
        x = self._checked("activations", x, self.d_model)
        return np.stack([layer.codes(one) for layer, one in zip(self.layers, x, strict=True)])

    def decode(self, codes: Any, x: Any = None) -> np.ndarray:
        """Codes `[layers, tokens, n]` -> `[layers, tokens, d]`.

        Args:
            codes: codes by layer.
            x: activations that were read, `[layers, tokens, d]`; needed where there is a skip path.

        Raises:
            SAEError: a shape is another, or `x` is missing.
            NonFiniteError: a weight is NaN or infinite.
        """
        codes = self._checked("codes", codes, self.n_latents)
        out = np.stack([np.tile(layer.b_dec, (codes.shape[1], 1)) for layer in self.layers])
        for layer, one in zip(self.layers, codes, strict=True):
            out[layer.targets.start : layer.targets.stop] += layer.written(one).transpose(1, 0, 2)
        if any(layer.W_skip is not None for layer in self.layers):
            if x is None:
                raise SAEError("it has a skip path, which reads the activations; give them too (x).")
            for i, (layer, one) in enumerate(
                zip(self.layers, self._checked("activations", x, self.d_model), strict=True)
            ):
                added = layer.skipped(one)
                out[i] += 0 if added is None else added
        return out

    def __call__(self, x: Any) -> np.ndarray:
        """The output: `[layers, tokens, d]` -> `[layers, tokens, d]`."""
        return self.decode(self.encode(x), x)

    def encoder(self, layer: int, latents: Sequence[int]) -> np.ndarray:
        """`[k, d]`: the directions that some latents of a layer read."""
        return self._layer(layer).encoder_rows(np.asarray(latents))

    def decoder(self, layer: int, latents: Sequence[int]) -> np.ndarray:
        """`[k, targets, d]`: what some latents write to the layers `layers[layer].targets`."""
        return self._layer(layer).decoder_rows(np.asarray(latents))

    def transcoder(self, layer: int, target: int | None = None) -> SAE:
        """The latents of one layer as a transcoder in memory.

        Args:
            layer: layer that is read.
            target: layer whose share is written, with that layer's bias and, of its own layer, the skip path;
                if None the sum over all targets, which is what the latents write to the residual stream, not
                what any layer puts out: it has no named target and cannot be judged as a reconstruction.

        Raises:
            SAEError: there is no such layer, or it is not written.
        """
        own = self._layer(layer)
        if target is not None and target not in own.targets:
            raise SAEError(
                f"layer {layer} writes {own.targets.start} to {own.targets.stop - 1}, not {target}."
            )
        parts = []
        step = max(_BLOCK // max(math.prod(own.W_dec.shape[1:]), 1), 1)
        for start in range(0, self.n_latents, step):
            rows = own.decoder_rows(np.arange(start, min(start + step, self.n_latents)))
            parts.append(rows.sum(axis=1) if target is None else rows[:, target - own.first])
        skip = None if own.W_skip is None or target not in (None, layer) else own.W_skip
        metadata = dict(self.metadata) | ({"decoder": "sum over all targets"} if target is None else {})
        config = SAEConfig(
            "relu" if own.threshold is None else "jump_relu",
            reads=None if self.reads is None else (self.reads[layer],),
            writes=None if self.writes is None or target is None else (self.writes[target],),
            metadata=metadata,
            transcoder=None
            if self.reads is not None and self.writes is not None and target is not None
            else True,
        )
        bias = own.b_dec if target is None else self.layers[target].b_dec
        return SAE(
            W_enc=jnp.asarray(own.encoder_rows(np.arange(self.n_latents)).T),
            b_enc=jnp.asarray(own.b_enc),
            W_dec=jnp.asarray(np.concatenate(parts)),
            b_dec=jnp.asarray(bias),
            threshold=None if own.threshold is None else jnp.asarray(own.threshold),
            W_skip=None if skip is None else jnp.asarray(own.rows(skip, np.arange(self.d_model))),
            config=config,
        ).checked()

    def crosscoder(self) -> SAE:
        """All of it as one SAE of the layers side by side, its matrices filled up with zeros.

        It takes `layers` times the memory of the encoders, and every evaluation takes it.
        """
        layers, d, n = self.n_layers, self.d_model, self.n_latents
        W_enc = np.zeros((layers * d, layers * n), np.float32)
        W_dec = np.zeros((layers * n, layers, d), np.float32)
        W_skip = np.zeros((layers * d, layers * d), np.float32)
        every = np.arange(n)
        for i, layer in enumerate(self.layers):
            rows, latents = slice(i * d, (i + 1) * d), slice(i * n, (i + 1) * n)
            W_enc[rows, latents] = layer.encoder_rows(every).T
            W_dec[latents, layer.targets.start : layer.targets.stop] = layer.decoder_rows(every)
            if layer.W_skip is not None:
                W_skip[rows, rows] = layer.rows(layer.W_skip, np.arange(d))
        thresholds = [layer.threshold for layer in self.layers]
        jumps = any(one is not None for one in thresholds)
        cut = [np.zeros(n, np.float32) if one is None else one for one in thresholds]
        config = SAEConfig(
            "jump_relu" if jumps else "relu",
            sites=layers,
            reads=self.reads,
            writes=self.writes,
            transcoder=None if self.reads is not None and self.writes is not None else True,
            metadata=dict(self.metadata),
        )
        return SAE(
            W_enc=jnp.asarray(W_enc),
            b_enc=jnp.asarray(np.concatenate([layer.b_enc for layer in self.layers])),
            W_dec=jnp.asarray(W_dec.reshape(layers * n, layers * d)),
            b_dec=jnp.asarray(np.concatenate([layer.b_dec for layer in self.layers])),
            threshold=jnp.asarray(np.concatenate(cut)) if jumps else None,
            W_skip=jnp.asarray(W_skip) if W_skip.any() else None,
            config=config,
        ).checked()

    def _layer(self, layer: int) -> LayerWeights:
        if not 0 <= layer < self.n_layers:
            raise SAEError(f"there is no layer {layer}; it has {self.n_layers}.")
        return self.layers[layer]

    def _checked(self, what: str, value: Any, width: int) -> np.ndarray:
        value = np.asarray(value, np.float32)
        if value.ndim != 3 or value.shape[0] != self.n_layers or value.shape[2] != width:
            raise SAEError(
                f"the {what} have shape {list(value.shape)}, but [layers, tokens, width] = "
                f"[{self.n_layers}, tokens, {width}] was expected."
            )
        return value
