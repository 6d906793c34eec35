"""An SAE from an array: the training of `train` without its run folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float
from numpy.typing import ArrayLike

from mergelab.activations import Prefetch
from mergelab.activations.kept import DEFAULT_RULE
from mergelab.activations.stored_tokens import kept_of_rows
from mergelab.errors import NonFiniteError, SAEError
from mergelab.sae.formats.detect import save_sae
from mergelab.sae.sae import SAE
from mergelab.sae.training.config import TrainConfig, TrainSection, load_config
from mergelab.sae.training.data import TrainingRows, told_of_tokens
from mergelab.sae.training.divergence import DivergenceGuard
from mergelab.sae.training.model_loss import hold_out
from mergelab.sae.training.start import start_training
from mergelab.sae.training.step import Metrics, make_step
from mergelab.sae.training.trainer import Progress, finish_training, train
from mergelab.sharding import make_mesh

__all__ = ["train_sae"]

_STEPS = 1000
_BATCH = 1024
_LOG_EVERY = 50

Config = TrainConfig | Mapping[str, Any] | str | Path
Rows = Float[np.ndarray, "rows width"] | Float[Array, "rows width"]


@dataclass(frozen=True)
class _ArrayRows:
    """An array `[rows, d_in]` of any float dtype as a source of float32 rows."""

    array: np.ndarray

    @classmethod
    def checked(cls, given: ArrayLike, place: str) -> _ArrayRows:
        array = np.asarray(given)
        if array.ndim != 2 or not array.size or not jnp.issubdtype(array.dtype, jnp.floating):
            raise SAEError(
                f"{place} is {array.dtype} of shape {list(array.shape)}; expected floats of shape [rows, "
                "width], one activation in a row."
            )
        found = cls(array)
        for start in range(0, len(array), 65_536):
            finite = np.isfinite(found.read(start, start + 65_536)).all(axis=1)
            if not finite.all():
                row = start + int(np.argmin(finite))
                raise NonFiniteError(
                    f"{place}: row {row} is NaN or infinite in float32; remove it or scale it down."
                )
        return found

    @property
    def rows(self) -> int:
        return self.array.shape[0]

    @property
    def d_in(self) -> int:
        return self.array.shape[1]

    def read(self, start: int, stop: int) -> np.ndarray:
        with np.errstate(over="ignore"):  # becomes infinity, which the check reports
            return np.asarray(self.array[start:stop], np.float32)


def train_sae(
    data: Rows | Config,
    out: str | Path | None = None,
    *,
    targets: Rows | None = None,
    mesh: Mesh | Mapping[str, int] | None = None,
    metadata: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> SAE:
    """Trains a sparse autoencoder on activations in memory, or as a configuration says.

    On the same rows and settings, an array gives the SAE that `mergelab sae train` finds, bit for bit.

        sae = train_sae(activations, n_latents=4096, k=32, tokens=2_000_000, batch_size=4096, lr=1e-3)

    Args:
        data: activations `[rows, d_in]`, a numpy or JAX array of any float dtype; or a configuration, as
            `mergelab sae train` takes it: a YAML file, a mapping, or a `TrainConfig`.
        out: folder of the run. A configuration's holds checkpoints and metrics and can be resumed by
            `train`; of an array, the finished SAE is written to `OUT/final`. Nothing is kept on disk if None.
        targets: `[rows, d_out]`, what a transcoder reconstructs, row by row.
        mesh: devices along the axes `data` and `latents`: sizes, or a mesh. One device if None.
        metadata: facts kept in the SAE, such as `{"site": "blocks.8.resid_post"}`.
        progress: called with steps done, steps in all, and the metrics of a logged step.
        options: fields of the configuration's sections `sae` (`variant`, `n_latents`, `k`, ...) and `train`
            (`tokens`, `batch_size`, `lr`, `seed`, ...); they win over `data`'s. `steps` stands for `tokens`.
            `max_norm_multiple` is that of the section `data`: rows longer than so many medians (10) are left
            out; None for no limit.
            An array is trained on for 1,000 steps of 1,024 rows by default, or as many rows as it has.

    Raises:
        SAEError: an option is unknown or out of range, the array is not `[rows, width]`, has fewer rows than
            a batch, or the training diverged.
        NonFiniteError: a row is NaN or infinite.
        OutputError: `out` holds a run already, or cannot be written.
    """
    if isinstance(data, str | Path | Mapping | TrainConfig):
        if targets is not None:
            raise SAEError("targets were given with a configuration; name them there (data.target_path).")
        config = _with_options(load_config(data).model_dump(exclude_unset=True), options, mesh, metadata)
        if out is not None:
            return train(config, out, progress=progress).sae
        with TemporaryDirectory() as folder:
            return train(config, Path(folder) / "run", progress=progress).sae
    source = _ArrayRows.checked(data, "the array")
    target = None if targets is None else _ArrayRows.checked(targets, "the array of targets")
    rows = min(_BATCH, source.rows)
    usual = {"batch_size": rows, "tokens": _STEPS * options.get("batch_size", rows)}
    start: dict[str, Any] = {"sae": {}, "data": {"kind": "files"}, "train": usual}
    settings = load_config(_with_options(start, options, mesh, metadata))
    devices = mesh if isinstance(mesh, Mesh) else None if mesh is None else make_mesh(mesh)
    kept = kept_of_rows(source, settings.data.rule(), target)
    sae = _train(TrainingRows(source, target, kept), settings, devices, progress)
    if out is not None:
        save_sae(sae, Path(out) / "final")
    return sae


def _with_options(
    config: dict[str, Any],
    options: Mapping[str, Any],
    mesh: Mesh | Mapping[str, int] | None,
    metadata: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The configuration with keyword arguments sorted into its sections."""
    trained = {
        name: value for name, value in options.items() if name in {*TrainSection.model_fields, "steps"}
    }
    section = {**config["train"], **trained}
    if "steps" in section:
        section["tokens"] = section.pop("steps") * section["batch_size"]
    taken = {name: options[name] for name in DEFAULT_RULE.facts() if name in options}
    named = {name: value for name, value in options.items() if name not in {*trained, *taken}}
    data = {**config["data"], **taken}
    changed = {**config, "sae": {**config["sae"], **named}, "data": data, "train": section}
    if mesh is not None:
        changed["mesh"] = dict(mesh.shape) if isinstance(mesh, Mesh) else dict(mesh)
    if metadata is not None:
        changed["metadata"] = {**config.get("metadata", {}), **metadata}
    return changed


def _train(
    data: TrainingRows,
    settings: TrainConfig,
    mesh: Mesh | None,
    progress: Progress | None,
) -> SAE:
    hold_out(settings, data)  # which has no model to take losses of
    start = start_training(settings, data, mesh)
    variant, recipe = start.variant, start.recipe
    state, overview = start.begin()
    step = make_step(variant, recipe, mesh)
    summary: dict[str, float] = {}
    guard: DivergenceGuard | None = None
    first: Metrics = {}
    with Prefetch(start.stream, start.place) as batches:
        for number in range(1, recipe.steps + 1):
            state, metrics = step(state, *next(batches))
            first = first or metrics
            if number % _LOG_EVERY == 0 or number == recipe.steps:
                summary = {name: float(np.asarray(value)) for name, value in metrics.items()}
                guard = guard or DivergenceGuard(float(np.asarray(first["nmse"])))
                if guard.diverged(summary):
                    raise SAEError(
                        f"the training diverged at step {number} (loss {summary['loss']:.4g}, nmse "
                        f"{summary['nmse']:.4g}); begin again with a lower lr, or with clip."
                    )
                if progress is not None:
                    progress(number, recipe.steps, summary)
    told = settings.model_dump(mode="json", include={"sae", "train"}, exclude_defaults=True)
    training = {name: summary[name] for name in ("nmse", "l0", "dead_fraction") if name in summary}
    known = {
        **told_of_tokens(data.kept),
        **settings.metadata,
        "variant": variant.name,
        "training": training,
        "rows": overview.facts(),
        "settings": told,
    }
    return finish_training(variant, recipe, state, known, mesh)
