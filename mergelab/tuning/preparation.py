"""A model, its text and settings turned into a fine-tuning that can run, and what it ends in."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mergelab.checkpoints.dtypes import dtype_from_name, is_float
from mergelab.errors import TuningError
from mergelab.models.model import Model, Params
from mergelab.models.residual_stream import require_decoder
from mergelab.tuning.contexts import Rows, steps_of
from mergelab.tuning.lora import Factors, find_factors, init_factors, with_factors
from mergelab.tuning.objective import TokenLoss
from mergelab.tuning.optimizers import Optimizer
from mergelab.tuning.settings import TuningSettings
from mergelab.tuning.steps import StepState, begin
from mergelab.tuning.training import Tuning, check_batch, mesh_of, on_mesh

__all__ = ["check_teacher", "prepare", "tuned_params"]


def check_teacher(model: Model, teacher: Model) -> None:
    """Checks that two models predict the same tokens.

    Raises:
        TuningError: their vocabularies differ in size.
        SiteError: the teacher is an encoder.
    """
    require_decoder(teacher)
    mine, other = model.config.vocab_size, teacher.config.vocab_size
    if mine != other:
        raise TuningError(
            f"the teacher has a vocabulary of {other:,} tokens and the model one of {mine:,}; give a teacher "
            "with the model's tokenizer."
        )


def prepare(
    model: Model,
    params: Params,
    learned: Rows,
    judged: Rows | None,
    settings: TuningSettings,
    teacher: tuple[Model, Params] | None = None,
) -> tuple[Tuning, StepState]:
    """A fine-tuning and the state before its first step, which holds copies of what is trained.

    Raises:
        TuningError: a target of LoRA or the dtype is none, or the teacher has another vocabulary.
        MeshError: the devices cannot share a batch.
        SiteError: a model is an encoder.
    """
    require_decoder(model)
    mesh = mesh_of(params)
    check_batch(mesh, settings.batch)
    if learned.counted is not None and not learned.counted[:, 1:].any():
        raise TuningError("no token of the text counts: its conversations have no assistant turn.")
    fixed: dict[str, Any] = {}
    kind = None if settings.dtype is None else _dtype(settings.dtype)
    if teacher is not None:
        check_teacher(model, teacher[0])
        fixed["teacher"] = _as(teacher[1], kind)
    factors: Factors | None = None
    kinds: tuple[str, ...] | None = None
    if settings.lora is not None:
        factors = find_factors(model, settings.lora)
        trained: Any = on_mesh(init_factors(factors, settings.seed), mesh)
        fixed["params"] = _as(params, kind)
    else:
        trained = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), params)
        kinds = tuple(str(kind or leaf.dtype) for leaf in jax.tree.leaves(params))
        kinds = None if set(kinds) == {"float32"} else kinds
    loss = TokenLoss(model, kinds, factors, None if teacher is None else teacher[0], settings.kl)
    steps = steps_of(learned, settings)
    optimizer = Optimizer(
        steps,
        settings.peak,
        min(round(settings.warmup * steps), steps - 1),
        settings.weight_decay,
        settings.clip_norm,
        settings.beta2,
        settings.optimizer,
    )
    state = on_mesh(begin(trained, optimizer), mesh)
    return Tuning(loss, optimizer, settings, learned, judged, fixed, mesh), state


def _dtype(name: str) -> np.dtype[Any]:
    found = dtype_from_name(name)
    if not is_float(found):
        raise TuningError(f"dtype is {name!r}, but a model computes in a float type, such as bfloat16.")
    return found


def _as(params: Params, kind: np.dtype[Any] | None) -> Params:
    return params if kind is None else jax.tree.map(lambda leaf: leaf.astype(kind), params)


def tuned_params(tuning: Tuning, params: Params, trained: Any) -> Params:
    """What was learned as parameters, in the dtypes of those it began with.

    Args:
        tuning: the fine-tuning.
        params: parameters before it.
        trained: what it trained.
    """
    if tuning.factors is not None:
        return jax.jit(partial(with_factors, tuning.factors))(params, trained)
    return jax.tree.map(lambda new, old: new.astype(old.dtype), trained, params)
