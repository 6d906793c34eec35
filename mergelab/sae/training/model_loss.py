"""The subject model's losses with the SAE spliced in, while the SAE is trained: `train.model_loss_every`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mergelab.activations import ActivationFiles
from mergelab.activations.kept import DEFAULT_RULE, KeptRows
from mergelab.activations.lane_rows import LaneRows
from mergelab.activations.model_activations import ModelActivations, SiteActivations
from mergelab.activations.stored_tokens import first_contexts
from mergelab.checkpoints.folder import weights_sha256
from mergelab.checkpoints.locations import exists, local_path
from mergelab.errors import SAEError
from mergelab.models.load import load_model
from mergelab.models.residual_stream import require_decoder
from mergelab.processes.agreement import together
from mergelab.sae.sae import SAE, sae_shardings
from mergelab.sae.spliced_losses import Downstream, evaluate_downstream
from mergelab.sae.training.config import TrainConfig, TrainingRecipe
from mergelab.sae.training.data import TrainingRows, store_facts
from mergelab.sae.training.finish import finished_sae
from mergelab.sae.training.state import TrainState
from mergelab.sae.variants import Variant

__all__ = ["ModelLoss", "hold_out"]

_TOKENS = 4096
"""Tokens that are held out, in whole contexts."""

_SHARE = 10
"""The held-out contexts are at most one of so many."""

_KEY = "train.model_loss_every"


def hold_out(settings: TrainConfig, data: TrainingRows) -> tuple[TrainingRows, ModelActivations | None]:
    """The rows that are trained on, and the first contexts of the data, which are not, in their model.

    The first ones, so that a run that is made longer keeps them. Where no losses are asked for all rows are
    trained on, and there is no model.

    Raises:
        SAEError: the data does not say of which model and tokens it is, the model is not there or another
            one, or it predicts no tokens.
        CheckpointError: the model cannot be read.
    """
    if not settings.train.model_loss_every:
        return data, None
    if isinstance(data.source, SiteActivations):
        source = data.source.of
        source = source.contexts(slice(_contexts(*source.tokens.shape)))
        rows = source.rows
    elif isinstance(data.source, ActivationFiles):
        source, rows = _of_store(settings, data.source, data.kept)
    elif isinstance(data.source, LaneRows):
        raise SAEError(
            f"{_KEY} is {settings.train.model_loss_every}, but processes that share a text keep none of it "
            "back; omit it, or collect the activations first (`mergelab activations`) and train on those."
        )
    else:
        raise SAEError(
            f"{_KEY} is {settings.train.model_loss_every}, but the activations come from no model whose "
            "losses could be taken; omit it."
        )
    require_decoder(source.model)
    if rows >= data.source.rows:
        raise SAEError(f"{_KEY} holds out all of {data.source.rows} rows; give more data, or omit it.")
    return data._replace(kept=_after(data.kept, rows)), source


def _contexts(contexts: int, length: int) -> int:
    """How many contexts are held out."""
    return max(1, min(_TOKENS // length, contexts // _SHARE))


def _after(kept: KeptRows, rows: int) -> KeptRows:
    """The rows that count, without those before a number."""
    before = kept.by_place

    def by_place(start: int, stop: int) -> np.ndarray:
        later = np.arange(start, stop) >= rows
        return later if before is None else later & before(start, stop)

    return replace(kept, by_place=by_place)


def _of_store(settings: TrainConfig, files: ActivationFiles, kept: KeptRows) -> tuple[ModelActivations, int]:
    """The first contexts of stored activations in their model, and the rows up to their end."""
    section = settings.data
    found = first_contexts(files, lambda contexts, length: _contexts(contexts, length))
    site = store_facts(section.path or "").get("site")
    sites = [site]
    if section.target_path is not None:
        sites.append(store_facts(section.target_path).get("site"))
    if found is None or None in sites:
        raise SAEError(
            f"{_KEY} is {settings.train.model_loss_every}, but the files do not say of which model and "
            "tokens they are, as a folder of `mergelab activations` does; omit it, or collect such a folder."
        )
    folder, digest = section.model or str(found.facts.get("model")), found.facts.get("model_sha256")
    if section.model is None and not exists(Path(folder)):
        raise SAEError(
            f"{_KEY}: the model of the stored activations, {folder}, is not there; say where it is "
            "(data.model)."
        )
    path = local_path(folder)
    if weights_sha256(path) != digest:
        raise SAEError(
            f"{_KEY}: the weights in {folder} are not those whose activations were stored; name the folder "
            "that has them (data.model)."
        )
    model, params = load_model(path)
    source = ModelActivations(
        model,
        params,
        found.tokens,
        tuple(str(one) for one in sites),
        rule=kept.rule or DEFAULT_RULE,
        special_ids=found.special_ids,
        counted=found.counted,
    )
    return source, found.rows


@dataclass
class ModelLoss:
    """Losses on held-out contexts, of the SAE as it would be if the training ended.

    Attributes:
        every: steps between two.
        source: the model on the held-out contexts.
        variant: what is trained.
        recipe: the training recipe.
        metadata: what the SAE says of its sites.
        mesh: mesh of the training; None for one device.
    """

    every: int
    source: ModelActivations
    variant: Variant
    recipe: TrainingRecipe
    metadata: Mapping[str, Any]
    mesh: Mesh | None
    _known: Downstream | None = None

    def __post_init__(self) -> None:
        finish = partial(finished_sae, self.variant, self.recipe, metadata=dict(self.metadata))
        self._finish = finish
        self._jitted: Any = None
        self._distributed = jax.process_count() > 1

    def due(self, step: int) -> bool:
        """Whether the losses of this step are asked for; those of the last one are, too."""
        return step % self.every == 0 or step == self.recipe.steps

    def begin(self, state: TrainState) -> str:
        """Takes the losses that no SAE decides, and says them in a line."""
        self._measure(state)
        if self._known is None:  # known to process 0 alone
            return ""
        found, contexts = self._known, len(self.source.tokens)
        return (
            f"model losses: on the first {contexts:,} contexts ({found.tokens:,} predicted tokens), which "
            f"are not trained on, every {self.every:,} steps; the model's own {found.ce:.4f} nats, "
            f"{found.ce_mean:.4f} with the mean in place of the site, {found.ce_zero:.4f} with zeros"
        )

    def figures(self, state: TrainState) -> dict[str, float]:
        """What is logged of a step, in nats per predicted token; in process 0, nothing in others.

        `ce` is the model's own cross-entropy, `ce_spliced` that with the reconstruction in place of the
        site, `ce_zero` and `ce_mean` those with zero and with the mean there, `delta_ce` what the
        reconstruction costs, `kl` the divergence it makes, `recovered_zero` and `recovered_mean` the part of
        an ablation's cost that it saves.
        """
        found = self._measure(state)
        if found is None:
            return {}
        names = (
            "ce",
            "ce_spliced",
            "ce_zero",
            "ce_mean",
            "delta_ce",
            "kl",
            "recovered_zero",
            "recovered_mean",
        )
        values = {name: getattr(found, name) for name in names}
        return {name: value for name, value in values.items() if np.isfinite(value)}

    def _measure(self, state: TrainState) -> Downstream | None:
        sae = self._gathered(state)
        found = None
        with together("the model's losses", distributed=self._distributed):
            if jax.process_index() == 0:
                found = evaluate_downstream(sae, self.source, known=self._known)
        if self._known is None:
            self._known = found
        return found

    def _gathered(self, state: TrainState) -> SAE:
        """The SAE, whole, where the model's parameters are computed with; the state stays where it lies."""
        needed = replace(state, mean={}, square={})
        if self._jitted is None:
            shardings = None
            if self.mesh is not None:
                shardings = sae_shardings(jax.eval_shape(self._finish, needed), self.mesh)
            self._jitted = jax.jit(self._finish, out_shardings=shardings)
        sae: SAE = self._jitted(needed)
        if self.mesh is None:
            return sae
        return jax.tree.map(lambda array: jnp.asarray(_whole(array)), sae)


def _whole(array: jax.Array) -> np.ndarray:
    """All of an array on the host, in every process."""
    if array.is_fully_addressable:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
