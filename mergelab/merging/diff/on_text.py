"""Two models on one text: activations and outputs beside each other, and losses between and around them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mergelab.activations.batches import filled_batches
from mergelab.activations.capture import capture
from mergelab.activations.losses import LOGIT_BYTES, UNEMBEDDED, kl_divergence, summed_loss
from mergelab.activations.model_activations import contexts_of_texts
from mergelab.activations.passes import TokenBatch, passes
from mergelab.checkpoints.source import Checkpoint
from mergelab.checkpoints.text_file import MAX_PROSE, read_text
from mergelab.errors import EvaluationError
from mergelab.models.load import load_model
from mergelab.models.model import Model, Params
from mergelab.models.residual_stream import logits_of
from mergelab.models.streamed import StreamedParams, Streaming, stream_model
from mergelab.models.token_checks import window_length
from mergelab.text.tokenizer import load_tokenizer

__all__ = ["LayerActivations", "TextDiff", "compare_on_text", "linear_cka", "perturbed"]

_TOKENS = 2048
_LENGTH = 128
_ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
_DRAWS = 3
_ACTIVATION_BYTES = 1 << 28
_BATCH = 8


@dataclass(frozen=True)
class LayerActivations:
    """What two models compute behind one block.

    Attributes:
        site: Name of the site.
        relative_change: `|X - Y| / |Y|` over all tokens, of the first model's X and the second's Y.
        cosine: Mean over tokens of the cosine of the two activations.
        cka: Linear CKA of X and Y; 1 where one is a rotation of the other times a number.
    """

    site: str
    relative_change: float
    cosine: float
    cka: float


@dataclass(frozen=True)
class TextDiff:
    """Two models on one text; losses are nats per token.

    Attributes:
        models: Names of the first and the second model.
        tokens: Number of tokens whose activations are compared.
        layers: Activations behind each block that both models have.
        kl: Mean over tokens of `KL(second || first)`, in nats; None for models that predict nothing.
        agreement: Fraction of tokens after which both put the same token first.
        losses: Loss of each of the two.
        line: Losses at `second + a (first - second)`, by a; empty where the parameters differ in shape.
        barrier: Most that the line exceeds the straight line between its ends; None without a line.
        noise: Losses of the second model with random changes in place of the true one: normal, of the same
            norm in each parameter.
        notes: Sentences about what could not be measured.
    """

    models: tuple[str, str]
    tokens: int
    layers: tuple[LayerActivations, ...]
    kl: float | None
    agreement: float | None
    losses: tuple[float, float] | None
    line: tuple[tuple[float, float], ...]
    barrier: float | None
    noise: tuple[float, ...]
    notes: tuple[str, ...] = ()

    @property
    def flatness(self) -> float | None:
        """Mean loss that random changes of the same norm add; None where there are none."""
        if not self.noise or self.losses is None:
            return None
        return float(np.mean(self.noise)) - self.losses[1]

    def as_data(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {
            "line": [{"alpha": alpha, "loss": loss} for alpha, loss in self.line],
            "losses": None if self.losses is None else dict(zip(self.models, self.losses, strict=True)),
            "flatness": self.flatness,
        }


def compare_on_text(
    names: tuple[str, str],
    checkpoints: tuple[Checkpoint, Checkpoint],
    text: Path,
    *,
    tokens: int | None = None,
    seed: int = 0,
    streamed: Streaming | None = None,
) -> TextDiff:
    """Runs two models on a text, in float32; memory is that of three models.

    The first token of each context of 128 is left out of the activations: models park a large vector there
    that would outweigh all others.

    Args:
        names: Names of the models.
        checkpoints: Their open checkpoints.
        text: File of prose, read as one document.
        tokens: Tokens that are read, in whole contexts; 2,048 if None.
        seed: Seed of the random changes.
        streamed: How activations wait, where the weights stay in their files; None to load them.

    Raises:
        EvaluationError: the text is empty, or the models cut it into different tokens.
        CheckpointError: a model cannot be run, or has no tokenizer.
    """
    prose = read_text(text, MAX_PROSE, error=EvaluationError)
    loaded = [_opened(checkpoint, streamed) for checkpoint in checkpoints]
    models, params = [model for model, _ in loaded], [own for _, own in loaded]
    contexts = _contexts(names, checkpoints, models, prose, text)
    contexts = contexts[: max(1, (tokens or _TOKENS) // contexts.shape[1])]
    notes: list[str] = []
    layers = tuple(_layers(models, params, contexts, notes))
    kl = agreement = barrier = None
    losses: tuple[float, float] | None = None
    line: tuple[tuple[float, float], ...] = ()
    noise: tuple[float, ...] = ()
    if not all(model.predicts for model in models):
        notes.append("outputs and losses are not compared: a model predicts no next token")
    else:
        if models[0].config.vocab_size == models[1].config.vocab_size:
            kl, agreement, *both = _outputs(models, params, contexts)
        else:
            notes.append("outputs are not compared: the models have vocabularies of different sizes")
            both = [_loss(m, p, contexts) for m, p in zip(models, params, strict=True)]
        losses = both[0], both[1]
        if _shapes(models[0]) != _shapes(models[1]):
            notes.append("losses between the models are not measured: their parameters differ in shape")
        else:
            between = ((a, _on_line(params[0], params[1], a)) for a in _ALPHAS[1:-1])
            inner = [(a, _loss(models[1], there, contexts)) for a, there in between]
            line = ((0.0, losses[1]), *inner, (1.0, losses[0]))
            barrier = max(loss - (1 - a) * losses[1] - a * losses[0] for a, loss in line)
            keys = jax.random.split(jax.random.key(seed), _DRAWS)
            noise = tuple(_loss(models[1], _perturbed(params[0], params[1], key), contexts) for key in keys)
    count = contexts.size - len(contexts)
    return TextDiff(names, count, layers, kl, agreement, losses, line, barrier, noise, tuple(notes))


def _opened(checkpoint: Checkpoint, streamed: Streaming | None) -> tuple[Model, Params]:
    if streamed is None:
        return load_model(checkpoint, dtype=np.float32)
    return stream_model(checkpoint, dtype=np.float32, **streamed._asdict())


def _contexts(
    names: Sequence[str],
    checkpoints: Sequence[Checkpoint],
    models: Sequence[Model],
    prose: str,
    text: Path,
) -> np.ndarray:
    if not prose.strip():
        raise EvaluationError(f"The text {text} is empty; activations need some text.")
    lengths = [
        window_length(m, None, _LENGTH, place=f"{n}, windows of text")
        for n, m in zip(names, models, strict=True)
    ]
    known = len(load_tokenizer(checkpoints[1].path).encode(prose))
    length = min(*lengths, known)
    if length < 2:
        raise EvaluationError(f"The text {text} has {known} token(s); give at least two.")
    first, second = (contexts_of_texts(checkpoint.path, prose, length) for checkpoint in checkpoints)
    if not np.array_equal(first, second):
        raise EvaluationError(
            f"{names[0]!r} and {names[1]!r} cut the text into different tokens, so that their activations do "
            "not pair up; compare their weights alone, or models of one tokenizer."
        )
    return first


def _layers(
    models: Sequence[Model], params: Sequence[Params], contexts: np.ndarray, notes: list[str]
) -> Iterator[LayerActivations]:
    sites = [site for site in models[0].sites() if site.endswith(".resid_post") and site in models[1].sites()]
    if any(site.endswith(".resid_post") and site not in sites for m in models for site in m.sites()):
        notes.append("activations are compared behind the blocks that both models have")
    width = max(model.config.d_model for model in models)
    at_once = max(1, _ACTIVATION_BYTES // (2 * 4 * contexts.size * width))
    for first in range(0, len(sites), at_once):
        some = sites[first : first + at_once]
        one, other = (
            capture(model, own, contexts, some, batch=_BATCH)
            for model, own in zip(models, params, strict=True)
        )
        for site in some:
            x, y = (found[site][:, 1:].reshape(-1, found[site].shape[-1]) for found in (one, other))
            yield LayerActivations(site, *_compared(x, y), linear_cka(x, y))


def _compared(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    sizes = np.linalg.norm(x, axis=1).astype(np.float64) * np.linalg.norm(y, axis=1)
    cosines = np.einsum("ij,ij->i", x, y, dtype=np.float64) / np.maximum(sizes, 1e-30)
    whole = float(np.linalg.norm(y.astype(np.float64)))
    change = float(np.linalg.norm((x - y).astype(np.float64)))
    return change / whole if whole else 0.0, min(1.0, float(cosines.mean()))


def linear_cka(x: np.ndarray, y: np.ndarray) -> float:
    """`|X'Y|^2 / (|X'X| |Y'Y|)` of centered columns (1905.00414), computed on the smaller side.

    Args:
        x: `[tokens, width]`.
        y: `[tokens, other width]`.
    """
    x, y = (z.astype(np.float64) - z.mean(axis=0, dtype=np.float64) for z in (x, y))
    if len(x) < max(x.shape[1], y.shape[1]):
        k, m = x @ x.T, y @ y.T
        shared, own, other = float(np.vdot(k, m)), float(np.linalg.norm(k)), float(np.linalg.norm(m))
    else:
        shared = float(np.linalg.norm(x.T @ y)) ** 2
        own, other = float(np.linalg.norm(x.T @ x)), float(np.linalg.norm(y.T @ y))
    return min(1.0, shared / (own * other)) if own * other > 0 else 1.0


def _outputs(models: Sequence[Model], params: Sequence[Params], contexts: np.ndarray) -> list[float]:
    """KL and agreement, means over tokens, and the losses of both."""
    size = max(1, LOGIT_BYTES // (2 * 4 * contexts.shape[1] * models[0].config.vocab_size))
    size = min(size, len(contexts))
    totals = np.zeros(4)
    parts = list(filled_batches(size, contexts))
    given = [TokenBatch(rows) for (rows,), _ in parts]
    outer = [one.outer() for one in params if isinstance(one, StreamedParams)]
    hidden = [passes(m, p, given, UNEMBEDDED) for m, p in zip(models, params, strict=True)]
    for (rows,), count in parts:
        if outer:
            last = tuple(jnp.asarray(next(one)[UNEMBEDDED]) for one in hidden)
            found = _output_of_hidden(tuple(models), tuple(outer), last, rows)
        else:
            found = _output_batch(tuple(models), tuple(params), rows)
        totals += [np.asarray(each)[:count].sum(dtype=np.float64) for each in found]
    predicted = contexts.size - len(contexts)
    return (totals / [contexts.size, contexts.size, predicted, predicted]).tolist()


@partial(jax.jit, static_argnames="models")
def _output_batch(models: tuple[Model, ...], params: tuple[Params, ...], rows: Array) -> tuple[Array, ...]:
    def logits(model: Model, own: Params) -> Array:
        found = model.apply(own, rows).logits
        assert found is not None
        return found.astype(jnp.float32)

    first, second = (logits(model, own) for model, own in zip(models, params, strict=True))
    return _compared_logits(first, second, rows)


@partial(jax.jit, static_argnames="models")
def _output_of_hidden(
    models: tuple[Model, ...], params: tuple[Params, ...], hidden: tuple[Array, ...], rows: Array
) -> tuple[Array, ...]:
    """`_output_batch` from what the unembedding of each model reads."""
    first, second = (logits_of(m, p, x) for m, p, x in zip(models, params, hidden, strict=True))
    return _compared_logits(first, second, rows)


def _compared_logits(first: Array, second: Array, rows: Array) -> tuple[Array, ...]:
    def losses(found: Array) -> Array:
        chosen = jnp.take_along_axis(found[:, :-1], rows[:, 1:, None], axis=-1)[..., 0]
        return jax.nn.logsumexp(found[:, :-1], axis=-1) - chosen

    same = jnp.argmax(first, axis=-1) == jnp.argmax(second, axis=-1)
    return kl_divergence(second, first), same, losses(first), losses(second)


def _loss(model: Model, params: Params, contexts: np.ndarray) -> float:
    """Mean loss of the tokens that others precede, in nats."""
    counted = np.ones((len(contexts), contexts.shape[1] - 1), bool)
    return summed_loss(model, params, contexts, counted, batch=min(_BATCH, len(contexts))) / counted.size


def _shapes(model: Model) -> Any:
    return {leaf.path: leaf.shape for leaf in model.table()}


def _on_line(first: Params, second: Params, alpha: float) -> Params:
    """`_between`, of streamed parameters part by part."""
    if isinstance(first, StreamedParams) and isinstance(second, StreamedParams):
        return first.mapped(lambda name, a, b: _between(a, b, alpha), second)
    return _between(first, second, alpha)


def _perturbed(first: Params, second: Params, key: Array) -> Params:
    """`perturbed`, of streamed parameters part by part, whose draws are others."""
    if isinstance(first, StreamedParams) and isinstance(second, StreamedParams):
        places = {name: place for place, name in enumerate(second)}
        return first.mapped(lambda name, a, b: perturbed(a, b, jax.random.fold_in(key, places[name])), second)
    return perturbed(first, second, key)


@jax.jit
def _between(first: Params, second: Params, alpha: float) -> Params:
    return jax.tree.map(lambda a, b: b + alpha * (a - b), first, second)


@jax.jit
def perturbed(first: Params, second: Params, key: Array) -> Params:
    """The second model with a normal change in place of `first - second`, of its norm in each parameter."""
    leaves, tree = jax.tree.flatten(second)
    moved = []
    for number, (a, b) in enumerate(zip(jax.tree.leaves(first), leaves, strict=True)):
        noise = jax.random.normal(jax.random.fold_in(key, number), b.shape, b.dtype)
        size = jnp.linalg.norm((a - b).reshape(-1)) / jnp.maximum(jnp.linalg.norm(noise.reshape(-1)), 1e-30)
        moved.append(b + size * noise)
    return tree.unflatten(moved)
