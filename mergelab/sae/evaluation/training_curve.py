"""The loss curve of a model's own training, from its checkpoints: what a loss is worth in compute."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mergelab.activations.losses import UNEMBEDDED, token_losses
from mergelab.activations.model_activations import ModelActivations
from mergelab.errors import SAEError
from mergelab.models.load import load_model
from mergelab.models.model import Model
from mergelab.models.residual_stream import require_decoder
from mergelab.sae.splice import token_batches
from mergelab.sae.spliced_losses import predicted_tokens

__all__ = [
    "LossCurve",
    "checkpoint_folders",
    "compute_equivalent",
    "loss_curve",
    "open_loss_curve",
]

_COARSE = 9  # checkpoints that are always measured, evenly spread over the logarithm of the step


def compute_equivalent(steps: np.ndarray, losses: np.ndarray, loss: float) -> float:
    """The fraction of a model's training after which it had this loss (arXiv 2406.04093, section 4.1).

    The curve is what the model's own checkpoints lose on the same text. It is made monotone by leaving out
    points that do not improve on all before them, and interpolated linearly in the logarithm of the step.

    Args:
        steps: `[points]`, rising, above 0.
        losses: `[points]`, in the unit of `loss`.
        loss: loss of the model with the SAE spliced in.

    Returns:
        Fraction from 0 to 1 of the last step; 1 where the loss is at least as good as the curve's best,
        NaN where it is above its first.

    Raises:
        SAEError: the curve has fewer than two points, or its steps do not rise from above 0.
    """
    steps, losses = np.asarray(steps, np.float64), np.asarray(losses, np.float64)
    if len(steps) < 2 or steps.shape != losses.shape or steps[0] <= 0 or (np.diff(steps) <= 0).any():
        raise SAEError(
            f"the curve has {len(steps)} steps and {len(losses)} losses; expected two or more of each, steps "
            "rising from above 0."
        )
    if loss > losses[0]:
        return float("nan")
    best = np.minimum.accumulate(losses)
    kept = np.concatenate([[True], best[1:] < best[:-1]])
    if loss <= best[-1]:
        return 1.0
    # np.interp wants rising abscissae: losses fall along the curve.
    log_step = np.interp(loss, losses[kept][::-1], np.log(steps[kept])[::-1])
    return float(np.exp(log_step) / steps[-1])


def checkpoint_folders(folder: Path) -> dict[int, Path]:
    """Checkpoints by training step, rising: the subfolders that are named by a number.

    Raises:
        SAEError: there are fewer than two.
    """
    found = {int(path.name): path for path in folder.iterdir() if path.is_dir() and path.name.isdecimal()}
    if len(found) < 2:
        raise SAEError(
            f"{folder}: holds {len(found)} folders named by a training step; expected two or more, such as "
            "10, 100 and 1000, each a model's folder."
        )
    return dict(sorted(found.items()))


@dataclass(frozen=True, eq=False)
class LossCurve:
    """Losses of a model's checkpoints on one text, each measured when it is first needed.

    Attributes:
        folders: each checkpoint by its training step, rising.
        source: the finished model and the text.
        mesh: devices to spread the checkpoints over, one at a time.
        measured: losses in nats per predicted token by step, as far as they are known.
    """

    folders: Mapping[int, Path]
    source: ModelActivations = field(repr=False)
    mesh: Any = field(default=None, repr=False)
    measured: dict[int, float] = field(default_factory=dict, repr=False)

    def around(self, loss: float) -> tuple[np.ndarray, np.ndarray]:
        """The points that it takes to say where the curve reaches a loss.

        A few checkpoints are measured first. Where their losses fall throughout, the gap in which the loss
        lies is halved until its ends are neighbors: 15 of 500 checkpoints. Where they rise somewhere, all are
        measured.

        Returns:
            Steps, rising, and losses, float64 `[points]` each.

        Raises:
            SAEError: a checkpoint is of another shape.
            CheckpointError: one cannot be read.
        """
        steps = list(self.folders)
        places = np.linspace(np.log(max(steps[0], 1)), np.log(steps[-1]), _COARSE)
        nearest = np.searchsorted(np.log(np.maximum(steps, 1)), places - 1e-9)
        coarse = sorted({0, len(steps) - 1, *nearest.clip(0, len(steps) - 1).tolist()})
        falling = self._fall(coarse)
        if falling and self._at(coarse[0]) >= loss > self._at(coarse[-1]):
            above = max(place for place in coarse if self._at(place) >= loss)
            below = min(place for place in coarse if place > above)
            while falling and below - above > 1:
                middle = (above + below) // 2
                falling = self._fall([above, middle, below])
                above, below = (middle, below) if self._at(middle) >= loss else (above, middle)
        return self.points() if falling else self.whole()

    def whole(self) -> tuple[np.ndarray, np.ndarray]:
        """Every point, as `around` gives them; errors are the same."""
        for place in range(len(self.folders)):
            self._at(place)
        return self.points()

    def identity(self) -> list[tuple[int, str, int, int]]:
        """What tells these checkpoints from others without reading them: their files' sizes and times."""
        files = ((step, file) for step, folder in self.folders.items() for file in sorted(folder.iterdir()))
        return [(step, file.name, file.stat().st_size, file.stat().st_mtime_ns) for step, file in files]

    def points(self) -> tuple[np.ndarray, np.ndarray]:
        """The points that were measured so far, as `around` gives them."""
        known = sorted(self.measured.items())
        return np.array([step for step, _ in known], np.float64), np.array([loss for _, loss in known])

    def _fall(self, places: list[int]) -> bool:
        losses = [self._at(place) for place in places]
        return all(later <= earlier for earlier, later in itertools.pairwise(losses))

    def _at(self, place: int) -> float:
        """The loss of the checkpoint at a place in the order of steps."""
        step = list(self.folders)[place]
        if step not in self.measured:
            self.measured[step] = self._measure(self.folders[step])
        return self.measured[step]

    def _measure(self, path: Path) -> float:
        source, total = self.source, 0.0
        model, params = load_model(path, mesh=self.mesh)
        if model != source.model:
            raise SAEError(f"{path}: holds a model of another shape than the SAE's; give its checkpoints.")
        weights = predicted_tokens(source)
        passes = zip(
            token_batches(source.tokens, source.batch), token_batches(weights, source.batch), strict=True
        )
        for (tokens, real), (weight, _) in passes:
            found = _losses(params, tokens, weight, model=source.model)
            total += float(np.asarray(found, np.float64)[:real].sum())
        return total / int(weights.sum())


def open_loss_curve(folder: Path, source: ModelActivations, *, mesh: Any = None) -> LossCurve:
    """The loss curve of a training, none of whose checkpoints has been run yet.

    Args:
        folder: holds a model's folder per training step (`checkpoint_folders`).
        source: the finished model and the text; use the half that judges (`mergelab.activations.halves`).
        mesh: devices to spread the checkpoints over, one at a time.

    Raises:
        SAEError: there are no checkpoints, or the model predicts no tokens.
    """
    require_decoder(source.model)
    return LossCurve(checkpoint_folders(folder), source, mesh)


def loss_curve(folder: Path, source: ModelActivations, *, mesh: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """Cross-entropy of every checkpoint on the source's contexts, as `evaluate_downstream` takes it.

    Args:
        folder: same as for `open_loss_curve`.
        source: same as for `open_loss_curve`.
        mesh: same as for `open_loss_curve`.

    Returns:
        Steps and losses in nats per predicted token, float64 `[checkpoints]` each.

    Raises:
        SAEError: there are no checkpoints, one is of another shape, or the model predicts no tokens.
        CheckpointError: one cannot be read.
    """
    return open_loss_curve(folder, source, mesh=mesh).whole()


@partial(jax.jit, static_argnames="model")
def _losses(params: Any, tokens: Array, weight: Array, *, model: Model) -> Array:
    """Sums over each context, `[batch]`."""
    hidden = model.apply(params, tokens, capture=[UNEMBEDDED], logits=False).captured[UNEMBEDDED]
    found, _ = token_losses(model, params, hidden[None, :, :-1], tokens[:, 1:])
    return (found[0] * weight.astype(jnp.float32)).sum(axis=1)
