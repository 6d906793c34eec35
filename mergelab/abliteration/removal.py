"""A direction removed by one formula: from arrays, at sites, and from a stored tensor as it is read."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial
from jaxtyping import Float

from mergelab.abliteration.ablation import Ablation, unit
from mergelab.checkpoints import TensorSource
from mergelab.checkpoints.file_tensor import check_piece
from mergelab.errors import MergelabError, NonFiniteError
from mergelab.models.model import Model, Params
from mergelab.models.residual_stream import ResidualWriter, writers
from mergelab.models.sites import Edit
from mergelab.models.streamed import StreamedParams
from mergelab.models.table import Leaf, get_leaf, tree_from_leaves

__all__ = [
    "KeepNorms",
    "Removed",
    "ablate",
    "abliterate_params",
    "check_ablation",
    "induce",
    "orthogonalize",
    "without",
    "writer_terms",
]


KeepNorms = Literal["written", "coordinate"] | None
"""Which norms an edited matrix `[in, width]` keeps exactly.

`written` keeps that of each vector `[width]` that one input writes (a token's embedding, a neuron's output):
scaling a vector does not turn it, so that the direction stays removed. `coordinate` keeps that of each
residual coordinate, `[in]`: the rows of a stored `Linear`. Scaling coordinates turns the vectors, and some of
the direction comes back.
"""


def without(x: Any, along: Any, direction: Any, weight: Any) -> Any:
    """`x - weight * along r^T`, the formula of every removal here; of numpy and JAX arrays alike.

    Args:
        x: Vectors `[..., width]`, float32; or some of their coordinates.
        along: Their parts along the direction `r`, `x @ r`, `[...]`.
        direction: `r`, `[width]`, of length 1 (or 0); or the same coordinates of it.
        weight: Share of the part to remove.
    """
    return x - weight * (along[..., None] * direction.reshape((1,) * along.ndim + (-1,)))


def orthogonalize(
    matrix: Float[Array, "*batch width"],
    direction: Float[Array, " width"],
    weight: Float[Array, ""] | float = 1.0,
    *,
    keep_norms: KeepNorms = None,
) -> Float[Array, "*batch width"]:
    """`W - weight * (W r) r^T`: what is left of each vector `[width]` without the direction.

    Args:
        matrix: kernels `[..., in, width]`, tables `[rows, width]` or a bias `[width]`; any float dtype.
        direction: `r`, of length 1 (or 0).
        weight: the share of the direction to remove.
        keep_norms: norms to keep; a bias keeps none.

    Returns:
        The same shape and dtype, computed in float32.

    Reference: Arditi et al. 2024, arXiv:2406.11717, section 4.1.
    """
    before = matrix.astype(jnp.float32)
    along = jnp.einsum("...w,w->...", before, direction, precision="highest")
    after = without(before, along, direction, weight)
    if keep_norms is not None and before.ndim > 1:
        axis = -1 if keep_norms == "written" else -2
        old, new = (jnp.linalg.norm(x, axis=axis, keepdims=True) for x in (before, after))
        # What lay wholly in the direction is gone, and has no norm to keep.
        after = after * jnp.where(new > 1e-6 * old, old / jnp.where(new > 0, new, 1.0), 1.0)
    return after.astype(matrix.dtype)


def writer_terms(
    model: Model, writer: ResidualWriter, ablation: Ablation, gain: Array | np.ndarray | None
) -> tuple[Float[Array, " width"], Float[Array, ""]]:
    """The direction and the weight for one parameter.

    A gain `g` stands between the parameter and the stream in sandwich blocks: what is written is
    `g * y / rms(y)`, which has no part along `r` exactly if `y` has none along `g * r`.

    Args:
        model: the model.
        writer: the parameter.
        ablation: what is removed.
        gain: the stored scale that `writer.gain` names, or None.
    """
    row = 0 if writer.layer is None else writer.layer + 1
    direction = ablation.directions[jnp.int32(row)]  # one gather for all rows, where a number compiles anew
    if gain is not None:
        direction = unit(direction * (jnp.asarray(gain, jnp.float32) + model.config.norm.offset))
    if writer.layer is None:
        return direction, ablation.embeddings
    weights = ablation.attention if writer.component == "attention" else ablation.mlp
    return direction, weights[jnp.int32(writer.layer)]


def check_ablation(model: Model, ablation: Ablation) -> None:
    """Checks that an ablation fits a model.

    Raises:
        MergelabError: it is for another number of layers or another width.
    """
    layers, width = model.config.n_layers, model.config.d_model
    if ablation.directions.shape[-2:] != (layers + 1, width) or ablation.layers != layers:
        raise MergelabError(
            f"the directions have shape {list(ablation.directions.shape)} and the weights are for "
            f"{ablation.layers} layers, but the model has {layers} layers of width {width}; expected "
            f"[{layers + 1}, {width}]."
        )


def abliterate_params(
    model: Model, params: Mapping[str, Any], ablation: Ablation, *, keep_norms: KeepNorms = None
) -> Params:
    """The parameters of a model that cannot write the directions: pure, jittable, on any mesh.

    A tied output embedding is the input embedding, and is edited with it.

    Args:
        model: a decoder.
        params: its parameters.
        ablation: what is removed, and where.
        keep_norms: norms that the matrices keep.

    Returns:
        Parameters of the same dtypes and shardings; leaves that write nothing are the same arrays.

    Raises:
        MergelabError: the model is an encoder, or the ablation does not fit it.
    """
    check_ablation(model, ablation)
    table, writing = model.table(), writers(model)
    if isinstance(params, StreamedParams):

        def edited_part(name: str, part: Any) -> Any:
            arrays = {leaf: get_leaf({name: part}, leaf) for leaf in table if leaf.path[0] == name}
            own = [writer for writer in writing if writer.leaf in arrays]
            return tree_from_leaves(_edited(model, arrays, own, ablation, keep_norms))[name]

        return params.mapped(edited_part)
    arrays = {leaf: get_leaf(params, leaf) for leaf in table}
    return tree_from_leaves(_edited(model, arrays, writing, ablation, keep_norms))


def _edited(
    model: Model,
    arrays: dict[Leaf, Any],
    writing: Sequence[ResidualWriter],
    ablation: Ablation,
    keep_norms: KeepNorms,
) -> dict[Leaf, Any]:
    """Leaves, of which those that write lose the directions; the gain of each is among them."""
    for writer in writing:
        gain = None if writer.gain is None else arrays[writer.gain]
        direction, weight = writer_terms(model, writer, ablation, gain)
        edited = _orthogonalize(arrays[writer.leaf], direction, weight, keep_norms=keep_norms)
        arrays[writer.leaf] = edited
    return arrays


_orthogonalize = jax.jit(orthogonalize, static_argnames="keep_norms")


_SITES = {"attention": "attn", "mlp": "mlp"}


def ablate(model: Model, params: Mapping[str, Any], ablation: Ablation) -> dict[str, Edit]:
    """Edits for `Model.apply` and `generate` that take the directions out of everything that is written.

    Logits equal those of `abliterate_params` up to rounding, except where a tied embedding is edited: as the
    output embedding it loses the direction too, and no site lies between the last norm and the logits. There
    the two differ by `(h . r) (E r)`, `h` being the normalized last stream.

    Args:
        model: a decoder.
        params: its parameters, of which only the gains of sandwich blocks are looked at.
        ablation: what is removed, and where.

    Returns:
        Edits by site; they hold arrays, so that another ablation of the same model compiles nothing anew.

    Raises:
        MergelabError: the model is an encoder, or the ablation does not fit it.
    """
    check_ablation(model, ablation)
    edits: dict[str, Edit] = {}
    for writer in writers(model):
        place = "embed" if writer.layer is None else f"blocks.{writer.layer}.{_SITES[writer.component]}.out"
        if place in edits:
            continue
        gain = None
        if writer.gain is not None:
            streamed = isinstance(params, StreamedParams)
            gain = params.leaf(writer.gain) if streamed else get_leaf(params, writer.gain)
        direction, weight = writer_terms(model, writer, ablation, gain)
        if gain is None:
            edits[place] = Partial(_remove, direction, weight)
        else:
            scale = gain.astype(jnp.float32) + model.config.norm.offset
            edits[place] = Partial(_remove_before_norm, direction, weight, scale)
    return edits


def induce(vectors: Float[Array, "layers width"]) -> dict[str, Edit]:
    """Edits that add `vectors[i]` to the stream before block `i`, at every token.

    With the raw difference of means at one layer, and zeros at the others, harmless prompts are refused
    (Arditi et al. 2024, arXiv:2406.11717, section 3.2).
    """
    vectors = jnp.asarray(vectors, jnp.float32)
    return {f"blocks.{i}.resid_pre": Partial(_add, vectors[i]) for i in range(vectors.shape[0])}


def _add(vector: Array, x: Array) -> Array:
    return (x.astype(jnp.float32) + vector[None, None]).astype(x.dtype)


def _remove(direction: Array, weight: Array, x: Array) -> Array:
    return orthogonalize(x, direction, weight)


def _remove_before_norm(direction: Array, weight: Array, scale: Array, out: Array) -> Array:
    """What the norm of a sandwich block would have made of `y` without the direction.

    `out = scale * u` with `u = y / sqrt(mean(y^2) + eps)`. Taking the direction out of `y` takes it out of
    `u` and changes the root: `(mean(y'^2) + eps) / (mean(y^2) + eps) = mean(u'^2) + 1 - mean(u^2)`, exactly.
    A coordinate of scale 0 is unknown, but has no part in the direction, and cancels in that difference.
    """
    known = (scale != 0)[None, None]
    scale = scale[None, None]
    u = jnp.where(known, out.astype(jnp.float32) / jnp.where(known, scale, 1.0), 0.0)
    edited = orthogonalize(u, direction, weight)
    change = jnp.mean(jnp.square(edited), -1, keepdims=True) - jnp.mean(jnp.square(u), -1, keepdims=True)
    return (scale * edited * jax.lax.rsqrt(1.0 + change)).astype(out.dtype)


_BLOCK = 1 << 22
"""Elements that are worked on at a time, whatever the size of the matrix (a row at least)."""


@dataclass
class _FoundSoFar:
    """What a `Removed` has found so far: sums over all rows, and the block that was read last."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    sums: tuple[np.ndarray, np.ndarray] | None = None
    block: tuple[int, np.ndarray] | None = None


@dataclass(frozen=True, eq=False)
class Removed:
    """A `TensorSource`: a stored tensor less its part along a direction, as `orthogonalize`, rounded once.

    Worked on by whole rows, some megabytes at a time, so that its bytes do not depend on the pieces in which
    it is read. Where a vector that is written lies across the rows of the file (a torch `Linear`,
    `[width, in]`), or norms run over all rows, the tensor is read once or twice before, for the sums.

    Attributes:
        tensor: Matrix `[in, width]` or `[width, in]`, or a bias `[width]`.
        direction: Direction `r`, float32 `[width]`, of length 1 (or 0).
        weight: Share of it to remove.
        axis: Axis of `tensor` that runs over the residual stream.
        keep_norms: Norms that a matrix keeps, as in `orthogonalize`.
        block: Elements to work on at a time.
    """

    tensor: TensorSource
    direction: np.ndarray
    weight: float
    axis: int
    keep_norms: KeepNorms = None
    block: int = _BLOCK
    _held: _FoundSoFar = field(default_factory=_FoundSoFar, repr=False)

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.tensor.dtype

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Fills `out` with flat elements `[start, start + out.size)` of the edited tensor.

        Raises:
            CheckpointError: the tensor cannot be read.
            NonFiniteError: it holds NaN or infinity, or an edited value leaves the range of its dtype.
        """
        rows, columns = self._folded
        check_piece(self, rows * columns, start, out)
        size, stop = self._rows_at_once * columns, start + out.size
        for number in range(start // size, -(-stop // size)):
            low, high = max(start, number * size), min(stop, (number + 1) * size)
            out[low - start : high - start] = self._edited(number)[low - number * size : high - number * size]
        if stop == rows * columns:
            self._held.block = None

    @property
    def _folded(self) -> tuple[int, int]:
        return (1, self.shape[0]) if len(self.shape) == 1 else (self.shape[0], self.shape[1])

    @property
    def _rows_at_once(self) -> int:
        return max(self.block // max(self._folded[1], 1), 1)

    @property
    def _across(self) -> bool:
        return len(self.shape) > 1 and self.axis == 0

    @property
    def _norms(self) -> Literal["none", "of rows", "over rows"]:
        if self.keep_norms is None or len(self.shape) == 1:
            return "none"
        return "over rows" if (self.keep_norms == "written") == self._across else "of rows"

    def _edited(self, number: int) -> np.ndarray:
        """One block of rows, flat, in the tensor's dtype."""
        with self._held.lock:
            if self._held.block is not None and self._held.block[0] == number:
                return self._held.block[1]
            if self._held.sums is None:
                self._held.sums = self._summed()
            along, factor = self._held.sums
        start = number * self._rows_at_once
        x = self._read(start)
        edited = self._without(x, start, along)
        if self._norms == "over rows":
            edited *= factor[None]
        elif self._norms == "of rows":
            edited *= _factor(*(np.linalg.norm(y, axis=1) for y in (x, edited)))[:, None]
        with np.errstate(over="ignore"):
            rounded = edited.astype(self.dtype)
        if not np.isfinite(rounded.astype(np.float32)).all():
            raise NonFiniteError(
                f"tensor {self.name!r} holds NaN, infinity or values its dtype cannot hold once edited; "
                "repair the model, or store it as bfloat16 or float32 first."
            )
        flat = rounded.reshape(-1)
        with self._held.lock:
            self._held.block = number, flat
        return flat

    def _read(self, start: int) -> np.ndarray:
        rows, columns = self._folded
        count = min(self._rows_at_once, rows - start)
        piece = np.empty(count * columns, self.dtype)
        self.tensor.read_into(start * columns, piece)
        return piece.reshape(count, columns).astype(np.float32)

    def _without(self, x: np.ndarray, start: int, along: np.ndarray) -> np.ndarray:
        weight = np.float32(self.weight)
        if self._across:  # the outer product, seen from the other side
            return without(x, self.direction[start : start + len(x)], along.astype(np.float32), weight)
        return without(x, x @ self.direction, self.direction, weight)

    def _summed(self) -> tuple[np.ndarray, np.ndarray]:
        """What needs all rows: the columns' parts along the direction, and what restores their norms."""
        rows, columns = self._folded
        starts = range(0, rows, self._rows_at_once)
        along, old, new = np.zeros(columns), np.zeros(columns), np.zeros(columns)
        if self._across:
            for start in starts:
                x = self._read(start)
                along += self.direction[start : start + len(x)] @ x
        if self._norms == "over rows":
            for start in starts:
                x = self._read(start)
                old += np.square(x, dtype=np.float64).sum(axis=0)
                new += np.square(self._without(x, start, along), dtype=np.float64).sum(axis=0)
        return along, _factor(np.sqrt(old), np.sqrt(new))


def _factor(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """What restores norms; what lay wholly in the direction has none to restore."""
    kept = new > 1e-6 * old
    return np.where(kept, old / np.where(kept, new, 1.0), 1.0).astype(np.float32)
