"""How well activations are rebuilt from codes, and how sparse those are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from mergelab.activations.left_out import LeftOut
from mergelab.activations.model_activations import ModelActivations
from mergelab.errors import SAEError
from mergelab.sae.activation_functions import is_active
from mergelab.sae.evaluation.metric import Evidence, Metric, Options, Scores
from mergelab.sae.sae import SAE
from mergelab.sae.splice import encode_and_reconstruct, read_pairs
from mergelab.sae.subject_model import check_target

__all__ = [
    "DENSITY_EDGES",
    "Coder",
    "Densities",
    "KeptReconstruction",
    "Reconstruction",
    "Totals",
    "densities",
    "density_histogram",
    "evaluate_reconstruction",
    "kept_reconstruction",
    "kept_reconstruction_on_model",
    "reconstruction_on_model",
]


Codes = np.ndarray | tuple[np.ndarray, np.ndarray]
"""Dense `[rows, n_latents]`, or sparse: values and indices, both `[rows, k]`. Above 0 is active."""


class Coder(Protocol):
    """Anything that encodes to dense codes `[rows, n_latents]` and decodes them, such as an SAE."""

    def encode(self, x: Any, /) -> Any: ...

    def decode(self, codes: Any, /) -> Any: ...


@dataclass(frozen=True)
class Reconstruction:
    """What an evaluation found.

    Attributes:
        rows: how many activations were seen.
        mse: mean squared error per coordinate.
        nmse: mean squared error over that of the best constant, which is the mean of the same rows: 1 is as
            good as knowing nothing of a row, 0 is exact.
        explained_variance: 1 - variance of the error over variance of the activations, both summed over
            coordinates: a constant error costs nothing here.
        l0: latents active in an average row.
        alive: fraction of the latents active in at least one of the rows.
        cosine: mean cosine of a row and its reconstruction; a pair with a zero vector in it counts 0.
        l2_ratio: mean of the norm of a reconstruction over that of its row, rows of norm 0 left out.
        relative_bias: `E |x_hat|^2 / E (x_hat . x)`, the relative reconstruction bias of arXiv 2404.16014:
            below 1 where reconstructions are too short (shrinkage). NaN where nothing is reconstructed.
        densities: `[n_latents]`, float64: fraction of the rows in which each latent is active.
    """

    rows: int
    mse: float
    nmse: float
    explained_variance: float
    l0: float
    alive: float
    cosine: float
    l2_ratio: float
    relative_bias: float
    densities: np.ndarray

    def scalars(self) -> dict[str, float]:
        """All figures but `densities`, ready for JSON."""
        return {part.name: getattr(self, part.name) for part in fields(self) if part.name != "densities"}


@dataclass(frozen=True)
class Totals:
    """Sums over the rows seen so far; adding a batch gives new ones.

    Attributes:
        origin: `[d]`, the mean of the first batch; sums of `x` are taken about it, so that a mean much larger
            than the spread costs no digits.
        rows: rows seen.
        x: `[d]`, sum of `x - origin`.
        square: sum of `|x - origin|^2`.
        error: `[d]`, sum of `x - x_hat`.
        error_square: sum of `|x - x_hat|^2`.
        cosine: sum of cosines.
        ratio: sum of ratios of norms.
        ratios: rows that have one.
        out_square: sum of `|x_hat|^2`.
        product: sum of `x . x_hat`.
        active: `[n_latents]`, int64, rows in which each latent is active.
    """

    origin: np.ndarray
    rows: int
    x: np.ndarray
    square: float
    error: np.ndarray
    error_square: float
    cosine: float
    ratio: float
    ratios: int
    out_square: float
    product: float
    active: np.ndarray

    @classmethod
    def zero(cls, first: Any, n_latents: int) -> Totals:
        """Empty sums; `first [rows, d]` is the first batch of targets, whose mean is the origin."""
        origin = np.asarray(first, np.float64).mean(axis=0)
        none, active = np.zeros(len(origin)), np.zeros(n_latents, np.int64)
        return cls(origin, 0, none, 0.0, none, 0.0, 0.0, 0.0, 0, 0.0, 0.0, active)

    def add(self, x: Any, x_hat: Any, codes: Any) -> Totals:
        """Adds a batch.

        Args:
            x: `[rows, d]`, what is to be reconstructed.
            x_hat: `[rows, d]`.
            codes: dense `[rows, n_latents]`, or a tuple of values and indices `[rows, k]`.

        Raises:
            SAEError: shapes do not fit together.
        """
        x, out = np.asarray(x, np.float64), np.asarray(x_hat, np.float64)
        if x.shape != out.shape or x.ndim != 2 or x.shape[1] != len(self.origin):
            raise SAEError(
                f"activations of shape {list(x.shape)} and reconstructions of shape {list(out.shape)} do not "
                f"fit together; expected [rows, {len(self.origin)}] for both."
            )
        centered, error = x - self.origin, x - out
        norm, out_norm = np.linalg.norm(x, axis=1), np.linalg.norm(out, axis=1)
        dot, norms = (x * out).sum(axis=1), norm * out_norm
        return Totals(
            origin=self.origin,
            rows=self.rows + len(x),
            x=self.x + centered.sum(axis=0),
            square=self.square + float((centered * centered).sum()),
            error=self.error + error.sum(axis=0),
            error_square=self.error_square + float((error * error).sum()),
            cosine=self.cosine + float((dot[norms > 0] / norms[norms > 0]).sum()),
            ratio=self.ratio + float((out_norm[norm > 0] / norm[norm > 0]).sum()),
            ratios=self.ratios + int((norm > 0).sum()),
            out_square=self.out_square + float((out_norm * out_norm).sum()),
            product=self.product + float(dot.sum()),
            active=self.active + _active(codes, len(x), len(self.active)),
        )

    def joined(self, other: Totals) -> Totals:
        """Sums over the rows of both, which have one origin."""
        parts = {part.name: getattr(self, part.name) + getattr(other, part.name) for part in fields(self)}
        return Totals(**{**parts, "origin": self.origin})

    def result(self) -> Reconstruction:
        """The figures.

        Raises:
            SAEError: no rows were added, or they do not vary.
        """
        spread = self.square - float(self.x @ self.x) / max(self.rows, 1)
        if not spread > 0:
            raise SAEError(
                f"the {self.rows} activations evaluated on do not vary, so errors have no scale; "
                "give more rows."
            )
        varying = self.error_square - float(self.error @ self.error) / self.rows
        return Reconstruction(
            rows=self.rows,
            mse=self.error_square / (self.rows * len(self.origin)),
            nmse=self.error_square / spread,
            explained_variance=1 - varying / spread,
            l0=float(self.active.sum()) / self.rows,
            alive=float((self.active > 0).mean()),
            cosine=self.cosine / self.rows,
            l2_ratio=self.ratio / max(self.ratios, 1),
            relative_bias=self.out_square / self.product if self.product else float("nan"),
            densities=self.active / self.rows,
        )


def evaluate_reconstruction(
    coder: Coder, batches: Iterable[Any], targets: Iterable[Any] | None = None
) -> Reconstruction:
    """Encodes and decodes batches `[rows, d_in]` of any lengths.

    Args:
        coder: what to evaluate.
        batches: activations.
        targets: `[rows, d_out]` for each batch, where they are not the activations themselves (a transcoder).

    Raises:
        SAEError: there are no batches, they do not vary, or targets are missing or too many.
    """
    if targets is None and isinstance(coder, SAE) and not coder.is_autoencoder:
        raise SAEError(
            f"the SAE is a transcoder ({coder.mapping()}), so it is not to be compared with what it "
            "reads; give the targets."
        )
    totals: Totals | None = None
    pairs = ((batch, batch) for batch in batches) if targets is None else zip(batches, targets, strict=True)
    for batch, target in pairs:
        codes = coder.encode(batch)
        if totals is None:
            totals = Totals.zero(target, codes.shape[1])
        # A skip path and a normalization belong to an SAE's reconstruction, not to its decoder.
        whole = isinstance(coder, SAE)
        out = coder.reconstruct(batch, codes) if whole else coder.decode(codes)
        totals = totals.add(target, out, codes)
    if totals is None:
        raise SAEError("there are no activations to evaluate on; give at least one batch.")
    return totals.result()


def density_histogram(densities: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, int]:
    """Counts latents by the logarithm to base 10 of their density; those never active are counted apart.

    Args:
        densities: `[n_latents]`, from 0 to 1.
        edges: `[bins + 1]`, rising, such as `np.arange(-6, 0.5, 0.5)`; what lies outside falls in the
            bins at the ends.

    Returns:
        Counts `[bins]`, int64, and how many latents were never active.
    """
    active = densities[densities > 0]
    counts, _ = np.histogram(np.clip(np.log10(active), edges[0], edges[-1]), edges)
    return counts, len(densities) - len(active)


def _active(codes: Any, rows: int, n_latents: int) -> np.ndarray:
    if isinstance(codes, tuple):
        values, indices = (np.asarray(part) for part in codes)
        if values.shape != indices.shape or len(values) != rows:
            raise SAEError(
                f"sparse codes have values of shape {list(values.shape)} and indices of shape "
                f"{list(indices.shape)}; expected [{rows}, k] for both."
            )
        return np.bincount(indices[is_active(values)], minlength=n_latents).astype(np.int64)
    codes = np.asarray(codes)
    if codes.shape != (rows, n_latents):
        raise SAEError(f"codes have shape {list(codes.shape)}; expected [{rows}, {n_latents}].")
    return is_active(codes).sum(axis=0)


DENSITY_EDGES = np.arange(-7.0, 0.5, 0.5)
"""Bins of the density histogram: logarithms to base 10 of the fraction of tokens a latent is active on."""


@dataclass(frozen=True)
class KeptReconstruction:
    """What an evaluation found of the rows that count, and of all.

    Attributes:
        kept: figures of the rows that count.
        every: the same of all rows; None where all count.
        left_out: what does not count.
    """

    kept: Reconstruction
    every: Reconstruction | None
    left_out: LeftOut


def kept_reconstruction(
    sae: SAE,
    pieces: Iterable[tuple[Any, Any, np.ndarray, np.ndarray]],
    *,
    rows: int,
    context: int | None = None,
) -> KeptReconstruction:
    """Encodes and reconstructs pieces of rows, with sums in float64.

    Args:
        sae: SAE that is judged.
        pieces: rows `[n, d_in]`, their targets, which of them count, and which do as far as their place
            decides (bool `[n]`), in order.
        rows: number that pieces are filled up to, for one shape.
        context: tokens in a context, where rows are tokens of contexts.

    Raises:
        SAEError: no row counts, or those that do not vary.
    """
    left_out = LeftOut()
    sums: tuple[Totals, Totals] | None = None
    for x, y, kept, by_place in pieces:
        left_out.add(kept, by_place, first=left_out.rows, context=context)
        filled = np.pad(x, ((0, rows - len(x)), (0, 0)))  # one shape, one program
        codes, out = (np.asarray(part)[: len(x)] for part in encode_and_reconstruct(sae, jnp.asarray(filled)))
        if sums is None:
            zero = Totals.zero(y[kept] if kept.any() else y, sae.n_latents)
            sums = zero, zero
        if kept.all():
            sums = sums[0].add(y, out, codes), sums[1]
        else:
            sums = (
                sums[0].add(y[kept], out[kept], codes[kept]),
                sums[1].add(y[~kept], out[~kept], codes[~kept]),
            )
    if sums is None or not sums[0].rows:
        raise SAEError(
            f"none of the {left_out.rows} tokens counts by the rule for tokens (skip_positions, "
            "skip_special, max_norm_multiple); relax it, or give more."
        )
    every = sums[0].joined(sums[1]).result() if sums[1].rows else None
    return KeptReconstruction(sums[0].result(), every, left_out)


def reconstruction_on_model(
    sae: SAE, source: ModelActivations, *, contexts: int | None = None
) -> Reconstruction:
    """The figures of `kept_reconstruction_on_model` of the tokens that count."""
    return kept_reconstruction_on_model(sae, source, contexts=contexts).kept


def kept_reconstruction_on_model(
    sae: SAE, source: ModelActivations, *, contexts: int | None = None
) -> KeptReconstruction:
    """Encodes the source's first site and reconstructs what the SAE writes, with sums in float64.

    Args:
        sae: SAE that reads it; figures are of the site it writes (`check_target`).
        source: model and text.
        contexts: number of contexts to use, from the start; all by default.

    Raises:
        SAEError: the SAE does not fit the sites, or their activations do not vary.
    """
    length, by_place = source.tokens.shape[1], source.by_place.reshape(-1)

    def pieces() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        start = 0
        for x, y, kept in read_pairs(sae, source, contexts):
            yield x, y, kept, by_place[start : start + len(x)]
            start += len(x)

    return kept_reconstruction(sae, pieces(), rows=source.batch * length, context=length)


@dataclass(frozen=True)
class Densities:
    """How often latents are active.

    Attributes:
        counts: `[bins]`, latents by `log10` of their density, in the bins of `DENSITY_EDGES`.
        silent: latents active on no token.
        median: `log10` of the median density of those active at all; NaN if none is.
        dense: latents active on more than a tenth of the tokens.
    """

    counts: np.ndarray
    silent: int
    median: float
    dense: int


def densities(part_of_tokens: np.ndarray) -> Densities:
    """Sums up `Reconstruction.densities` `[n_latents]`."""
    counts, silent = density_histogram(part_of_tokens, DENSITY_EDGES)
    active = part_of_tokens[part_of_tokens > 0]
    median = float(np.median(np.log10(active))) if len(active) else float("nan")
    return Densities(counts, silent, median, int((part_of_tokens > 0.1).sum()))


def _scores(sae: SAE, evidence: Evidence, options: Options) -> Scores:
    both = kept_reconstruction_on_model(sae, evidence.judge)
    found, every = both.kept, both.every
    spread = densities(found.densities)
    written = check_target(sae, evidence.judge)
    taken = "" if sae.target_known else ", taken for what it writes as the SAE does not say it"
    yield "nmse", found.nmse, f"squared error of {written} over that of its mean; 0 exact, 1 useless{taken}"
    yield "explained_variance", found.explained_variance, "1 exact, 0 useless"
    yield "cosine", found.cosine, "of a row and its reconstruction; 1 exact"
    yield "l2_ratio", found.l2_ratio, "norm of reconstruction over norm of row; below 1 shrinks"
    yield "relative_bias", found.relative_bias, "below 1 shrinks (2404.16014)"
    yield "l0", found.l0, f"of {sae.n_latents}"
    yield "alive", found.alive, f"fraction of the latents active in {found.rows} tokens"
    yield "median_density", spread.median, "latents that are active"
    if every is not None:
        left_out = 1 - both.left_out.kept / both.left_out.rows
        yield "left_out", left_out, f"tokens that do not count: {both.left_out.sentence()}"
        yield "nmse_all", every.nmse, "nmse with those included"
        yield "explained_variance_all", every.explained_variance, "with those included"
        yield "alive_all", every.alive, "with those included"
    yield "dense", spread.dense / sae.n_latents, "fraction of the latents on over 10 % of tokens"


METRIC = Metric(
    name="reconstruction",
    about="error, bias and sparsity of the reconstruction",
    units={
        "nmse": "",
        "explained_variance": "",
        "cosine": "",
        "l2_ratio": "",
        "relative_bias": "",
        "l0": "latents / token",
        "alive": "",
        "median_density": "log10 of a fraction of tokens",
        "left_out": "",
        "nmse_all": "",
        "explained_variance_all": "",
        "alive_all": "",
        "dense": "",
    },
    measure=_scores,
)
