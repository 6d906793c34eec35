"""What readers and writers of other libraries' files share: biases moved, what does not fit refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from mergelab.checkpoints import TensorSource, read_whole
from mergelab.errors import CheckpointError, NonFiniteError, SAEError
from mergelab.sae.formats.settings import check_tensors
from mergelab.sae.sae import SAE

__all__ = ["arrays_of", "check_finite", "check_sizes", "fold_norm_scaling", "fold_whitening"]
__all__ += ["not_subtracting_b_dec", "refuse", "subtracting_b_dec", "transposed"]


_MATRICES = frozenset(
    (
        "W_enc",
        "W_dec",
        "W_skip",
        "encoder.weight",
        "decoder.weight",
        "encoder_linear.weight",
        "decoder_linear.weight",
        "w_enc",
        "w_dec",
        "affine_skip_connection",
        "matrix",
        "inverse_matrix",
    )
)
"""The tensors of any format that have two axes; the others have one."""


def subtracting_b_dec(sae: SAE) -> SAE:
    """The same SAE in the form that subtracts `b_dec` from its input before it encodes it."""
    if sae.config.subtract_b_dec:
        return sae
    return _shifted(sae, sae.b_dec @ sae.W_enc, subtract_b_dec=True)


def not_subtracting_b_dec(sae: SAE) -> SAE:
    """The same SAE in the form that encodes its input as it is."""
    if not sae.config.subtract_b_dec:
        return sae
    return _shifted(sae, -(sae.b_dec @ sae.W_enc), subtract_b_dec=False)


def _shifted(sae: SAE, by: Array, *, subtract_b_dec: bool) -> SAE:
    """The SAE with biases that make up for a product `x W_enc` that is smaller by `by`, `[n]`."""
    size = sae.magnitude_bias  # of gated SAEs, whose two paths have a bias each
    if size is not None and sae.magnitude_scale is not None:
        size = size + by * jnp.exp(sae.magnitude_scale)
    config = replace(sae.config, subtract_b_dec=subtract_b_dec)
    return replace(sae, b_enc=sae.b_enc + by, magnitude_bias=size, config=config)


def fold_norm_scaling(sae: SAE, factor: float) -> SAE:
    """The SAE of raw activations, made of one whose activations were multiplied by a factor.

    Its codes are the same; what it reconstructs is put back into the scale of what it reads.
    """
    return replace(
        sae,
        W_enc=sae.W_enc * factor,
        W_dec=sae.W_dec / factor,
        b_dec=sae.b_dec / factor,
    )


def fold_whitening(sae: SAE, mean: Array, matrix: Array, inverse: Array) -> SAE:
    """The SAE of raw activations `x`, made of one of `(x - mean) @ matrix`; `inverse` undoes `matrix`."""
    W_enc, subtracts = matrix @ sae.W_enc, sae.config.subtract_b_dec
    # A b_dec that is subtracted will hold the mean itself.
    shift = jnp.zeros_like(sae.b_enc) if subtracts else mean @ W_enc
    whole = _shifted(sae, -shift, subtract_b_dec=subtracts)
    return replace(whole, W_enc=W_enc, W_dec=sae.W_dec @ inverse, b_dec=sae.b_dec @ inverse + mean)


def check_sizes(
    file: Path,
    shapes: Mapping[str, tuple[int, ...]],
    axes: Mapping[str, tuple[str, ...]],
    cfg: Path | None = None,
    said: Mapping[str, tuple[str, Any]] | None = None,
) -> None:
    """Checks that tensors agree with each other and with what the configuration says of their sizes.

    The size that most of them mean is the right one, so that a wrong tensor is blamed and not its neighbors.

    Args:
        file: holds the tensors, for the message.
        shapes: shapes by tensor.
        axes: names of what each axis counts, by tensor, such as `("d_in", "n")`; others are not looked at.
        cfg: the file that says sizes.
        said: key by size, under which `cfg` says it, and its value; None where it does not.

    Raises:
        CheckpointError: names every tensor and key that does not fit.
    """
    told = {size: (key, value) for size, (key, value) in (said or {}).items() if value is not None}
    votes: dict[str, Counter[int]] = {}
    for name, sizes in axes.items():
        if name in shapes and len(shapes[name]) == len(sizes):
            for size, length in zip(sizes, shapes[name], strict=True):
                votes.setdefault(size, Counter())[length] += 1
    for size, (_, value) in told.items():
        if isinstance(value, int) and size in votes:
            votes[size][value] += 1
    right: dict[str, int] = {}
    for size, found in votes.items():
        claimed = told[size][1] if size in told else None
        right[size] = max(found, key=lambda length: (found[length], length == claimed))
    faults = []
    for name, sizes in axes.items():
        wanted = [right.get(size) for size in sizes]
        if name in shapes and list(shapes[name]) != wanted:
            letters = "[" + ", ".join("?" if one is None else str(one) for one in wanted) + "]"
            faults.append(f"{file}: {name} has shape {list(shapes[name])}, where {letters} was expected")
    for size, (key, value) in told.items():
        if size in right and value != right[size]:
            faults.append(f"{cfg}: {key} is {value!r}, but the tensors have {right[size]}")
    if faults:
        raise CheckpointError([f"{fault}; get or write the SAE again" for fault in faults])


def check_finite(file: Path, name: str, values: Array | np.ndarray) -> None:
    """Checks that a tensor holds no NaN and no infinity.

    Raises:
        NonFiniteError: it does; the message has the first place.
    """
    there = jnp.isfinite(values)
    if bool(there.all()):
        return
    place: list[int] = []
    while there.ndim:
        row = int(jnp.argmin(there.reshape(there.shape[0], -1).all(axis=1)))
        place, there, values = [*place, row], there[row], values[row]
    raise NonFiniteError(
        f"{file}: {name}{place} is {float(values)}, where finite weights were expected; get or train the "
        "SAE again"
    )


def arrays_of(
    tensors: Mapping[str, TensorSource], wanted: Mapping[str, bool], path: Path
) -> dict[str, Array]:
    """Tensors by name, in float32.

    Args:
        tensors: tensors of a file.
        wanted: names to read, and whether they must be there.
        path: path of the file, for the message.

    Raises:
        CheckpointError: one that must be there is not, or one holds no floats, or has other axes than its
            name says: two for weights, one for the rest.
        NonFiniteError: one holds NaN or infinity.
    """
    check_tensors(path, tensors, {name: 2 if name in _MATRICES else 1 for name in wanted})
    missing = [name for name, needed in wanted.items() if needed and name not in tensors]
    if missing:
        known = ", ".join(sorted(tensors)[:20])
        names = f"tensor{'s' if len(missing) > 1 else ''} {', '.join(map(repr, missing[:20]))}"
        raise CheckpointError(f"{path}: has no {names}, only {known}; of another format?")
    found = {name: jnp.asarray(read_whole(tensors[name]), jnp.float32) for name in wanted if name in tensors}
    for name, values in found.items():
        check_finite(path, name, values)
    return found


def transposed(array: Array | np.ndarray) -> np.ndarray:
    """The transpose, contiguous, float32."""
    return np.ascontiguousarray(np.asarray(array, np.float32).T)


def refuse(format: str, what: str, others: str) -> SAEError:
    """The error for an SAE that a format cannot express."""
    return SAEError(f"the format {format!r} has no place for {what}; export to {others}.")
