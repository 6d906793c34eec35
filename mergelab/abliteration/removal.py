"""A direction removed: from arrays, at sites, and from stored matrices block by block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial
from jaxtyping import Float

from mergelab.abliteration.ablation import Ablation, unit
from mergelab.checkpoints import TensorSource
from mergelab.errors import MergelabError, NonFiniteError
from mergelab.models.model import Model, Params
from mergelab.models.residual_stream import ResidualWriter, writers
from mergelab.models.sites import Edit
from mergelab.models.table import get_leaf, tree_from_leaves

__all__ = [
    "BLOCK",
    "KeepNorms",
    "ablate",
    "abliterate_params",
    "check_ablation",
    "edited_blocks",
    "induce",
    "orthogonalize",
    "writer_terms",
]


KeepNorms = Literal["written", "coordinate"] | None
"""Which norms an edited matrix `[in, width]` keeps exactly.

`written` keeps that of each vector `[width]` that one input writes (a token's embedding, a neuron's output):
scaling a vector does not turn it, so that the direction stays removed. `coordinate` keeps that of each
residual coordinate, `[in]`: the rows of a stored `Linear`. Scaling coordinates turns the vectors, and some of
the direction comes back.
"""


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
    after = before - weight * jnp.tensordot(along, direction, 0)
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
    arrays = {leaf: get_leaf(params, leaf) for leaf in model.table()}
    for writer in writers(model):
        gain = None if writer.gain is None else arrays[writer.gain]
        direction, weight = writer_terms(model, writer, ablation, gain)
        edited = _orthogonalize(arrays[writer.leaf], direction, weight, keep_norms=keep_norms)
        arrays[writer.leaf] = edited
    return tree_from_leaves(arrays)


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
        gain = None if writer.gain is None else get_leaf(params, writer.gain)
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


def _without(direction: Array, weight: Array, x: Array) -> Array:
    along = jnp.einsum("blw,w->bl", x, direction, precision="highest")
    return x - weight * jnp.tensordot(along, direction, 0)


def _remove(direction: Array, weight: Array, x: Array) -> Array:
    return _without(direction, weight, x.astype(jnp.float32)).astype(x.dtype)


def _remove_before_norm(direction: Array, weight: Array, scale: Array, out: Array) -> Array:
    """What the norm of a sandwich block would have made of `y` without the direction.

    `out = scale * u` with `u = y / sqrt(mean(y^2) + eps)`. Taking the direction out of `y` takes it out of
    `u` and changes the root: `(mean(y'^2) + eps) / (mean(y^2) + eps) = mean(u'^2) + 1 - mean(u^2)`, exactly.
    A coordinate of scale 0 is unknown, but has no part in the direction, and cancels in that difference.
    """
    known = (scale != 0)[None, None]
    scale = scale[None, None]
    u = jnp.where(known, out.astype(jnp.float32) / jnp.where(known, scale, 1.0), 0.0)
    edited = _without(direction, weight, u)
    change = jnp.mean(jnp.square(edited), -1, keepdims=True) - jnp.mean(jnp.square(u), -1, keepdims=True)
    return (scale * edited * jax.lax.rsqrt(1.0 + change)).astype(out.dtype)


BLOCK = 1 << 22
"""Elements that are worked on at a time, whatever the size of the matrix (a row at least)."""


def edited_blocks(
    source: TensorSource,
    direction: np.ndarray,
    weight: float,
    *,
    axis: int,
    keep_norms: KeepNorms = None,
    block: int = BLOCK,
) -> Iterator[tuple[int, np.ndarray]]:
    """The pieces of the edited matrix, in order: what `orthogonalize` makes of it, rounded once.

    Where a vector that is written lies across the rows of the file (a torch `Linear`, `[width, in]`), or
    norms run over all rows, the matrix is read twice or thrice: for the sums, and to edit.

    Args:
        source: `[in, width]`, `[width, in]`, or a bias `[width]`.
        direction: float32 `[width]`, of length 1 (or 0).
        weight: the share of it to remove.
        axis: the axis of `source` that runs over the residual stream.
        keep_norms: as in `orthogonalize`.
        block: elements to work on at a time.

    Yields:
        The first element, and the flat elements from there on, in the source's dtype.

    Raises:
        NonFiniteError: the matrix holds NaN or infinity, or an edited value leaves the range of its dtype.
    """
    if len(source.shape) == 1:
        rows, columns, axis, keep_norms = 1, source.shape[0], 1, None
    else:
        rows, columns = source.shape
    step = max(block // max(columns, 1), 1)
    ranges = [(start, min(start + step, rows)) for start in range(0, rows, step)]
    across = axis == 0
    along = np.zeros(columns)
    old, new = np.zeros(columns), np.zeros(columns)

    def read(start: int, stop: int) -> np.ndarray:
        piece = np.empty((stop - start) * columns, source.dtype)
        source.read_into(start * columns, piece)
        return piece.reshape(stop - start, columns).astype(np.float32)

    def without(x: np.ndarray, start: int, stop: int) -> np.ndarray:
        if across:
            return x - np.float32(weight) * np.outer(direction[start:stop], along.astype(np.float32))
        return x - np.float32(weight) * np.outer(x @ direction, direction)

    over_rows = keep_norms == ("written" if across else "coordinate")
    if across:
        for start, stop in ranges:
            along += direction[start:stop] @ read(start, stop)
    if over_rows:
        for start, stop in ranges:
            x = read(start, stop)
            old += np.square(x, dtype=np.float64).sum(axis=0)
            new += np.square(without(x, start, stop), dtype=np.float64).sum(axis=0)
    for start, stop in ranges:
        x = read(start, stop)
        edited = without(x, start, stop)
        if over_rows:
            edited *= _factor(np.sqrt(old), np.sqrt(new))[None]
        elif keep_norms is not None:
            edited *= _factor(*(np.linalg.norm(y, axis=1) for y in (x, edited)))[:, None]
        with np.errstate(over="ignore"):
            rounded = edited.astype(source.dtype)
        if not np.isfinite(rounded.astype(np.float32)).all():
            raise NonFiniteError(
                f"tensor {source.name!r} holds NaN, infinity or values its dtype cannot hold once edited; "
                "repair the model, or store it as bfloat16 or float32 first."
            )
        yield start * columns, rounded.reshape(-1)


def _factor(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """What restores norms; what lay wholly in the direction has none to restore."""
    kept = new > 1e-6 * old
    return np.where(kept, old / np.where(kept, new, 1.0), 1.0).astype(np.float32)
