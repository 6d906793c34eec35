"""The losses of a model's own checkpoints on the text that judges: what a compute equivalent is read from."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mergelab.activations.capture import ModelActivations
from mergelab.errors import SAEError
from mergelab.models.load import load_model
from mergelab.models.model import Model
from mergelab.sae.evaluation.downstream import require_logits
from mergelab.sae.evaluation.passes import passes

__all__ = ["checkpoint_folders", "loss_curve"]


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


def loss_curve(folder: Path, source: ModelActivations, *, mesh: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """Cross-entropy of every checkpoint on the source's contexts, as `evaluate_downstream` takes it.

    Args:
        folder: holds a model's folder per training step (`checkpoint_folders`).
        source: the finished model and the text; use the half that judges (`scorecard.halves`).
        mesh: devices to spread the checkpoints over, one at a time.

    Returns:
        Steps and losses in nats per predicted token, float64 `[checkpoints]` each.

    Raises:
        SAEError: there are no checkpoints, one is of another shape, or the model predicts no tokens.
        CheckpointError: one cannot be read.
    """
    require_logits(source)
    folders = checkpoint_folders(folder)
    losses = []
    for path in folders.values():
        model, params = load_model(path, mesh=mesh)
        if model != source.model:
            raise SAEError(
                f"{path}: holds a model of another shape than the dictionary's; give its checkpoints."
            )
        total = 0.0
        for tokens, real in passes(source.tokens, source.batch):
            total += float(np.asarray(_losses(params, tokens, model=source.model), np.float64)[:real].sum())
        losses.append(total / (len(source.tokens) * (source.tokens.shape[1] - 1)))
    return np.array(list(folders), np.float64), np.array(losses)


@partial(jax.jit, static_argnames="model")
def _losses(params: Any, tokens: Array, *, model: Model) -> Array:
    """Sums over each context, `[batch]`."""
    out = model.apply(params, tokens).logits
    assert out is not None
    logp = jax.nn.log_softmax(out[:, :-1])
    return -jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1)[..., 0].sum(axis=1)
