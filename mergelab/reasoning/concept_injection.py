"""A concept put into a model's stream, and whether the model notices: its answer, and what it names.

Lindsey 2025 ("Emergent introspective awareness in large language models"): a vector of a word is added to the
stream while the model is asked whether it detects an injected thought. A vector of any kind may make a model
say yes, so an answer counts against random vectors of the same length and a question whose answer is no.
"""

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
from jaxtyping import Float

from mergelab.activations.batches import batches, pad_prompts
from mergelab.activations.capture import capture
from mergelab.activations.losses import UNEMBEDDED
from mergelab.decoding.generation import generate
from mergelab.decoding.stop import stop_at
from mergelab.errors import SiteError, TokenError
from mergelab.models.model import Model, Params
from mergelab.models.residual_stream import logits_of, require_decoder
from mergelab.text.chat import chat_ids, turn_end_ids
from mergelab.text.tokenizer import Tokenizer

__all__ = ["CONTROL", "QUESTION", "Injections", "concept_vectors", "inject_concepts"]

QUESTION = (
    "I can put a thought into your mind by changing your activations. In half of my trials I do so, and in "
    "half I do not. Do you detect an injected thought? Answer yes or no."
)
CONTROL = "Can a stone read a newspaper? Answer yes or no."
"""A question whose answer is no, whatever is injected."""

ABOUT = "Tell me about {}."


@dataclass(frozen=True)
class Injections:
    """What a model says of concepts that are put into its stream.

    Log-odds are those of yes over no at the first token of the answer.

    Attributes:
        concepts: names of the concepts.
        strengths: multiples of each vector.
        unmoved: log-odds without any vector: of the question, and of the control question.
        odds: float32 `[concepts, strengths]`, with the concept's vector, on the question.
        control_odds: the same on the control question.
        random_odds: float32 `[draws, strengths]`, of random vectors as long as the concepts' are on average,
            on the question.
        random_control_odds: the same on the control question.
        named: float32 `[concepts, strengths]`, log-probability of the concept's own word where the model is
            asked which thought it is, less that without a vector; in nats.
        random_named: the same with random vectors, mean over these.
        texts: answers to the question, `[concepts][strengths]`.
    """

    concepts: tuple[str, ...]
    strengths: tuple[float, ...]
    unmoved: tuple[float, float]
    odds: np.ndarray
    control_odds: np.ndarray
    random_odds: np.ndarray
    random_control_odds: np.ndarray
    named: np.ndarray
    random_named: np.ndarray
    texts: tuple[tuple[str, ...], ...]

    @property
    def noticed(self) -> np.ndarray:
        """`[strengths]`: by how much concepts move yes on the question more than on the control question.

        Beside it `noticed_at_random` says what vectors without a meaning do.
        """
        return _beyond(self.odds, self.control_odds, self.unmoved)

    @property
    def noticed_at_random(self) -> np.ndarray:
        """`[strengths]`: the same of random vectors."""
        return _beyond(self.random_odds, self.random_control_odds, self.unmoved)


def _beyond(odds: np.ndarray, control: np.ndarray, unmoved: tuple[float, float]) -> np.ndarray:
    return ((odds - unmoved[0]) - (control - unmoved[1])).mean(axis=0)


def concept_vectors(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    words: Sequence[str],
    site: str,
    *,
    others: Sequence[str] = ("table", "river", "music", "window", "bread", "paper", "garden", "engine"),
    about: str = ABOUT,
    chat: bool | None = None,
    batch: int = 8,
) -> dict[str, Float[Array, " width"]]:
    """Vectors of words: what a site holds at the end of a prompt about each, less the mean over other words.

    Args:
        model: a decoder.
        params: its parameters.
        tokenizer: its tokenizer.
        words: what the vectors are of.
        site: a stream, such as `blocks.20.resid_post`.
        others: words whose mean is subtracted.
        about: prompt, with `{}` for the word.
        chat: whether prompts are turns of a conversation; where the tokenizer has a template if None.
        batch: prompts in one pass.

    Raises:
        SiteError: the site is not a stream of vectors, or there are no words.
    """
    shape = model.sites().get(site)
    if shape is None or len(shape) != 3 or not words or not others:
        raise SiteError(
            f"vectors of {len(words)} words less the mean of {len(others)} cannot be read at {site!r}; give "
            "at least one of both, and a site [batch, length, width]."
        )
    rows = [_prompt(tokenizer, about.format(word), chat) for word in (*words, *others)]
    tokens, mask = pad_prompts(rows)
    held = capture(model, params, tokens, site, mask=mask, position=-1, batch=batch)[site]
    center = held[len(words) :].mean(axis=0)
    return {word: jnp.asarray(held[n] - center) for n, word in enumerate(words)}


def inject_concepts(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    vectors: Mapping[str, Any],
    site: str,
    *,
    strengths: Sequence[float] = (0.0, 1.0, 2.0, 4.0),
    question: str = QUESTION,
    control: str = CONTROL,
    naming: str = "An injected thought is in your mind. It is about one word. The word is",
    yes: str = "Yes",
    no: str = "No",
    chat: bool | None = None,
    draws: int = 8,
    max_new_tokens: int = 16,
    seed: int = 0,
    batch: int = 8,
) -> Injections:
    """Adds each concept's vector to a stream, at all tokens, and asks whether the model notices.

    Args:
        model: a decoder.
        params: its parameters.
        tokenizer: its tokenizer.
        vectors: vector `[width]` of each concept, such as `concept_vectors` gives; names are words.
        site: stream that they are added to.
        strengths: multiples of the vectors; 0 changes nothing.
        question: what the model is asked.
        control: question whose answer is no.
        naming: beginning of an answer that the concept's word continues; asked behind the question, or as a
            text by itself without `chat`.
        yes: text of the token that says yes.
        no: text of the token that says no.
        chat: whether questions are turns of a conversation; where the tokenizer has a template if None.
        draws: number of random vectors.
        max_new_tokens: largest number of tokens of an answer.
        seed: seed of the random vectors.
        batch: injections in one pass.

    Raises:
        SiteError: the site is not a stream, or a vector does not fit it.
        TokenError: yes, no or a concept has no token.
    """
    require_decoder(model)
    names, moved = tuple(vectors), [np.asarray(vector, np.float32) for vector in vectors.values()]
    shape = model.sites().get(site, ())
    if len(shape) != 3 or not names or any(vector.shape != shape[2:] for vector in moved):
        raise SiteError(
            f"vectors of shapes {sorted({vector.shape for vector in moved})} cannot be added at {site!r}; "
            f"expected one or more of {list(shape[2:])} at a site [batch, length, width]."
        )
    answers = [_first(tokenizer, text) for text in (yes, no)]
    words = [_first(tokenizer, f" {name}") for name in names]
    length = float(np.mean([np.linalg.norm(vector) for vector in moved]))
    drawn = np.random.default_rng(seed).normal(size=(draws, len(moved[0])))
    noise = (drawn / np.linalg.norm(drawn, axis=1, keepdims=True) * length).astype(np.float32)
    every = np.concatenate([np.zeros((1, len(moved[0])), np.float32), np.stack(moved), noise])
    table = np.concatenate([every[:1], *(every[1:] * np.float32(strength) for strength in strengths)])
    asked = [_prompt(tokenizer, text, chat) for text in (question, control)]
    talks = bool(tokenizer.chat_templates) if chat is None else chat
    behind = tokenizer.encode(naming, add_special_tokens=not talks)
    asked.append([*asked[0], *behind] if talks else behind)
    read = [_log_probs(model, params, prompt, table, site, batch) for prompt in asked]
    odds = [one[:, answers[0]] - one[:, answers[1]] for one in read[:2]]
    grids = [one[1:].reshape(len(strengths), -1).T for one in odds]  # [vectors, strengths]
    spoken = (read[2][1:] - read[2][:1])[:, words].reshape(len(strengths), -1, len(names))
    count = len(names)
    own = spoken[:, np.arange(count), np.arange(count)].T
    kept = np.concatenate([np.stack([np.float32(s) * vector for s in strengths]) for vector in moved])
    texts = _answers(model, params, tokenizer, asked[0], kept, site, max_new_tokens, batch)
    told = [tuple(texts[c * len(strengths) : (c + 1) * len(strengths)]) for c in range(count)]
    return Injections(
        names,
        tuple(map(float, strengths)),
        (float(odds[0][0]), float(odds[1][0])),
        grids[0][:count],
        grids[1][:count],
        grids[0][count:],
        grids[1][count:],
        own,
        spoken[:, count:].mean(axis=1).T,
        tuple(told),
    )


def _prompt(tokenizer: Tokenizer, text: str, chat: bool | None) -> list[int]:
    talks = bool(tokenizer.chat_templates) if chat is None else chat
    return chat_ids(tokenizer, [{"role": "user", "content": text}]) if talks else tokenizer.encode(text)


def _first(tokenizer: Tokenizer, text: str) -> int:
    ids = tokenizer.encode(text, add_special_tokens=False)
    if not ids:
        raise TokenError(f"{text!r} has no token in {tokenizer.folder}; give another word.")
    return ids[0]


def _log_probs(
    model: Model, params: Params, prompt: Sequence[int], vectors: np.ndarray, site: str, batch: int
) -> np.ndarray:
    """Log-probabilities behind a prompt with each vector, `[vectors, vocab]`."""
    found = []
    for rows, count in batches(len(vectors), batch):
        tokens = np.repeat(np.asarray(prompt, np.int32)[None], len(rows), axis=0)
        found.append(np.asarray(_injected(model, params, tokens, jnp.asarray(vectors[rows]), site))[:count])
    return np.concatenate(found)


@partial(jax.jit, static_argnames=("model", "site"))
def _injected(model: Model, params: Params, tokens: Array, vectors: Array, site: str) -> Array:
    edit = {site: Partial(_added, vectors)}
    seen = model.apply(params, tokens, edit=edit, capture=UNEMBEDDED, logits=False).captured
    return jax.nn.log_softmax(logits_of(model, params, jnp.asarray(seen[UNEMBEDDED])[:, -1]), axis=-1)


def _added(vectors: Array, x: Array) -> Array:
    return (x.astype(jnp.float32) + vectors[:, None]).astype(x.dtype)


def _answers(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    vectors: np.ndarray,
    site: str,
    max_new_tokens: int,
    batch: int,
) -> list[str]:
    """Texts of the answers with each vector, greedily."""
    found, stop = [], stop_at(turn_end_ids(tokenizer))
    for rows, count in batches(len(vectors), batch):
        tokens = np.repeat(np.asarray(prompt, np.int32)[None], len(rows), axis=0)
        edit = {site: Partial(_added, jnp.asarray(vectors[rows]))}
        made = generate(model, params, tokens, max_new_tokens=max_new_tokens, stop=stop, edit=edit)
        found += [tokenizer.decode(ids) for ids in made.rows()[:count]]
    return found
