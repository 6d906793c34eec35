"""Ending against going on, token by token: log-odds of the end over words such as "Wait"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial

from mergelab.activations.batches import batches, map_pieces
from mergelab.activations.capture import check_prompts
from mergelab.activations.losses import LOGIT_BYTES, UNEMBEDDED
from mergelab.decoding.monitors import Monitor, monitor
from mergelab.errors import TokenError
from mergelab.models.model import Model, Params
from mergelab.models.residual_stream import logits_of, require_decoder

__all__ = ["EndingOdds", "odds_monitor", "read_ending_odds"]


@dataclass(frozen=True)
class EndingOdds:
    """What a model holds of ending, behind each token of a text.

    Attributes:
        end: float32 `[texts, length]`, log-probability that one of the ends follows, in nats.
        other: the same of the other tokens ("Wait").
    """

    end: np.ndarray
    other: np.ndarray

    @property
    def log_odds(self) -> np.ndarray:
        """`log P(end) - log P(other)`: above 0 where ending is likelier."""
        return self.end - self.other


def read_ending_odds(
    model: Model,
    params: Params,
    tokens: Any,
    ends: Sequence[int],
    others: Sequence[int],
    *,
    mask: Any = None,
    batch: int = 8,
) -> EndingOdds:
    """Probabilities of ending and of going on behind every token of texts; 256 MB of logits at a time.

    Args:
        model: a decoder.
        params: its parameters, on any mesh.
        tokens: int `[texts, length]`, or texts of any lengths, which are padded on the left.
        ends: ids of tokens that end a text, or a thought.
        others: ids of tokens that go on (" Wait", " Hmm").
        mask: True for real tokens; what is read at padding has no meaning.
        batch: texts in one pass.

    Raises:
        TokenError: there are no ends or others, or an id is beyond the vocabulary.
        SiteError: the model predicts no next tokens, or the shapes differ.
    """
    require_decoder(model)
    kinds = _groups(model.config.vocab_size, ends, others)
    tokens, real = check_prompts(model, tokens, mask)
    found = []
    for rows, count in batches(len(tokens), batch):
        read = _read(model, params, tokens[rows], real[rows], jnp.asarray(kinds))
        found.append(np.asarray(read)[:count])
    both = np.concatenate(found)
    return EndingOdds(both[..., 0], both[..., 1])


@partial(jax.jit, static_argnames="model")
def _read(model: Model, params: Params, tokens: Array, mask: Array, kinds: Array) -> Array:
    """Log-probabilities of both groups, `[batch, length, 2]`."""
    seen = model.apply(params, tokens, mask=mask, capture=UNEMBEDDED, logits=False).captured
    hidden = jnp.asarray(seen[UNEMBEDDED])

    def one(normed: Array) -> Array:
        return _grouped(logits_of(model, params, normed), kinds)

    rows = hidden.reshape(-1, hidden.shape[-1])
    found = map_pieces(one, rows, max(1, LOGIT_BYTES // (4 * model.config.vocab_size)))
    return found.reshape(*tokens.shape, 2)


def odds_monitor(
    ends: Sequence[int], others: Sequence[int], vocabulary: int, *, above: float | None = None
) -> Monitor:
    """Log-odds of ending over going on as the reading of every step of a generation.

    `generate(stop=stop_at(monitor=odds_monitor(...)), capture="logits")` keeps them in `readings`: the trace
    of a decision while it is made. They are the model's own, before temperature and other transforms.

    Args:
        ends: ids of tokens that end a text, or a thought.
        others: ids of tokens that go on.
        vocabulary: size of the vocabulary.
        above: log-odds that end a row; they are only recorded if None.

    Raises:
        TokenError: there are no ends or others, or an id is beyond the vocabulary.
        DecodingError: the bound is not a number.
    """
    return monitor(Partial(_odds, jnp.asarray(_groups(vocabulary, ends, others))), above=above)


def _odds(kinds: Array, captured: Mapping[str, Array]) -> Array:
    both = _grouped(captured["logits"].astype(jnp.float32), kinds)
    return both[..., :1] - both[..., 1:]


def _grouped(logits: Array, kinds: Array) -> Array:
    """Log-probabilities of the two groups of tokens, `[..., vocab]` -> `[..., 2]`."""
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    groups = kinds.reshape(*(1,) * (logits.ndim - 1), *kinds.shape)
    return jax.nn.logsumexp(jnp.where(groups, log_probs[..., None, :], -jnp.inf), axis=-1)


def _groups(vocabulary: int, ends: Sequence[int], others: Sequence[int]) -> np.ndarray:
    """Which tokens are in each group, bool `[2, vocab]`."""
    found = np.zeros((2, vocabulary), bool)
    for row, (name, ids) in enumerate((("ends", ends), ("others", others))):
        wrong = [token for token in ids if not 0 <= token < vocabulary]
        if not len(ids) or wrong:
            raise TokenError(
                f"{name} are {list(ids)}; give ids of at least one token, below {vocabulary:,} each."
            )
        found[row, list(ids)] = True
    if (both := np.flatnonzero(found.all(axis=0))).size:
        raise TokenError(f"token {both[0]} is among ends and others; an end cannot also go on.")
    return found
