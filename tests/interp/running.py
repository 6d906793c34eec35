"""One forward pass, compiled: much cheaper in a test than running it operation by operation."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mergelab.models.model import Model, Params
from mergelab.models.sites import as_partials


@partial(jax.jit, static_argnames=("model", "capture"))
def _run(
    model: Model, params: Params, tokens: jax.Array, mask: Any, edit: Any, capture: tuple[str, ...]
) -> tuple[Any, Any]:
    out = model.apply(params, tokens, mask=mask, edit=edit, capture=capture)
    return out.logits, out.captured


def logits_of(
    model: Model, params: Params, tokens: Any, *, mask: Any = None, edit: Mapping[str, Any] | None = None
) -> np.ndarray:
    """Logits on the host, `[batch, length, vocab]`."""
    return np.asarray(_run(model, params, jnp.asarray(tokens, jnp.int32), mask, as_partials(edit), ())[0])


def sites_of(model: Model, params: Params, tokens: Any, *patterns: str, mask: Any = None) -> dict[str, Any]:
    """What sites hold, on the host."""
    found = _run(model, params, jnp.asarray(tokens, jnp.int32), mask, {}, patterns)[1]
    return {name: np.asarray(value) for name, value in found.items()}
