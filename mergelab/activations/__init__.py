"""A model run on text or tokens: sites captured, streamed as shuffled rows, stored; losses and sentences."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

# `capture` is also the name of a file.
from mergelab.activations.batches import pad_prompts
from mergelab.activations.capture import Patterns, collect, stream_sites
from mergelab.lazy import lazy_names
from mergelab.models.model import Model, Params
from mergelab.models.sites import Edit

if TYPE_CHECKING:
    from mergelab.activations.batches import bucket_size
    from mergelab.activations.capture import (
        ModelActivations,
        SiteActivations,
        contexts_of_texts,
        cut_contexts,
        halves,
        open_model_activations,
    )
    from mergelab.activations.losses import summed_loss
    from mergelab.activations.sentences import SentenceEncoder, load_sentence_encoder, pool
    from mergelab.activations.store import (
        ActivationFiles,
        find_activation_files,
        open_activation_files,
        write_store,
    )
    from mergelab.activations.stream import ActivationSource, ActivationStream, Batch, Prefetch, Trace

__all__ = [
    "ActivationFiles",
    "ActivationSource",
    "ActivationStream",
    "Batch",
    "ModelActivations",
    "Prefetch",
    "SentenceEncoder",
    "SiteActivations",
    "Trace",
    "bucket_size",
    "capture",
    "collect",
    "contexts_of_texts",
    "cut_contexts",
    "find_activation_files",
    "halves",
    "load_sentence_encoder",
    "open_activation_files",
    "open_model_activations",
    "pad_prompts",
    "pool",
    "stream_sites",
    "summed_loss",
    "write_store",
]

__getattr__, __dir__ = lazy_names(__name__)


def capture(
    model: Model,
    params: Params,
    tokens: Any,
    sites: Patterns,
    *,
    batch: int = 32,
    edit: Mapping[str, Edit] | None = None,
) -> dict[str, np.ndarray]:
    """Runs prompts and keeps what some sites hold, float32 `[batch, length, ...]` by site, on the host.

    Args:
        model: the model.
        params: its parameters, on any mesh.
        tokens: ids `[length]` of one prompt or `[batch, length]` of several; or a list of prompts, of which
            shorter ones are padded on the left.
        sites: names or glob patterns of sites of shape `[batch, length, ...]`.
        batch: prompts in one pass.
        edit: functions by site name or glob pattern, as in `Model.apply`.

    Raises:
        SiteError: a pattern selects nothing, or a site that has no activation for each token.
        TokenError: ids beyond the model's vocabulary, or more tokens than it has positions.
    """
    mask = None
    if isinstance(tokens, list) and tokens and not np.isscalar(tokens[0]):
        tokens, mask = pad_prompts([list(prompt) for prompt in tokens])
    ids = np.atleast_2d(np.asarray(tokens))
    real = np.ones(ids.shape, bool) if mask is None else np.asarray(mask)
    rows = collect(model, params, ids, sites, mask=mask, batch=batch, edit=dict(edit or {}))
    found = {name: np.zeros((*ids.shape, *value.shape[1:]), np.float32) for name, value in rows.items()}
    for name, value in rows.items():
        found[name][real] = value
    return found
