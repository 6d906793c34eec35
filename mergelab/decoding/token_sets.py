"""Texts made likelier, or barred, token by token: `promote`, `ban_texts`; and rows that begin differently."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int

from mergelab.decoding.transforms import History, Logits, require, transform
from mergelab.text.tokenizer import Tokenizer

__all__ = ["BanTexts", "FirstTokens", "Promote", "ban_texts", "ban_texts_of", "promote", "promote_texts"]

_ANY = -1  # left of the tokens of a sequence shorter than the longest


@transform
class Promote:
    """Adds to the logit of a token where those before it in its sequence were just generated; `promote`.

    Attributes:
        sequences: int32 `[entries, width]`, what comes before the token and the token, aligned right.
        strengths: float32 `[entries]`.
    """

    sequences: ArrayLike
    strengths: ArrayLike

    def __call__(self, logits: Logits, history: History) -> Logits:
        wanted = jnp.asarray(self.sequences, jnp.int32)
        before, token = wanted[:, :-1], wanted[:, -1]
        latest = _latest(history, before.shape[1])
        matched = ((before[None] == latest[:, None]) | (before[None] == _ANY)).all(axis=2)
        added = jnp.where(matched, jnp.asarray(self.strengths, logits.dtype)[None], 0)
        return logits.at[:, token].add(added)


@transform
class BanTexts:
    """Forbids every token that would complete one of some texts in what a row generates; `ban_texts`.

    Attributes:
        following: int16 `[states, vocab]`, how much of the texts the row's end matches after each token.
        completes: bool `[states, vocab]`, whether that token completes a text.
        reach: int32 `[reach]`, of as many tokens as the texts can lie across; only its size counts.
    """

    following: ArrayLike
    completes: ArrayLike
    reach: ArrayLike

    def __call__(self, logits: Logits, history: History) -> Logits:
        following = jnp.asarray(self.following)
        latest = _latest(history, np.shape(self.reach)[0])

        def read(state: Int[Array, " batch"], token: Int[Array, " batch"]) -> tuple[Array, None]:
            after = following[state, jnp.maximum(token, 0)].astype(jnp.int32)
            return jnp.where(token >= 0, after, 0), None

        state, _ = jax.lax.scan(read, jnp.zeros(logits.shape[0], jnp.int32), latest.T)
        barred: Bool[Array, "batch vocab"] = jnp.asarray(self.completes)[state]
        return jnp.where(barred, -jnp.inf, logits)


@transform
class FirstTokens:
    """Lets each row begin with another one of the likeliest tokens: that of its rank, the likeliest being 0.

    Attributes:
        ranks: int32 `[batch]`.
    """

    ranks: ArrayLike

    def __call__(self, logits: Logits, history: History) -> Logits:
        order = jnp.argsort(-logits, axis=-1)
        chosen = jnp.take_along_axis(order, jnp.asarray(self.ranks, jnp.int32)[:, None], axis=1)
        others = jnp.arange(logits.shape[1], dtype=chosen.dtype)[None] != chosen
        return jnp.where((history.generated == 0)[:, None] & others, -jnp.inf, logits)


def _latest(history: History, count: int) -> Int[Array, "batch count"]:
    """The latest generated tokens of each row, -1 where there are none."""
    columns = history.generated[:, None] - count + jnp.arange(count, dtype=jnp.int32)[None]
    if history.tokens is None:
        return jnp.full(columns.shape, -2, jnp.int32)
    taken = jnp.take_along_axis(history.tokens, jnp.maximum(columns, 0), axis=1)
    return jnp.where(columns >= 0, taken, -2)


def promote(sequences: Iterable[Sequence[int]], strengths: float | Iterable[float]) -> Promote:
    """Adds to the logits of token sequences, each token once those before it have been generated.

    Args:
        sequences: token ids of each text, such as those of " Wait".
        strengths: what is added to each logit; one for all, or one for each sequence. Negative ones demote.

    Raises:
        DecodingError: a sequence is empty, an id is negative, a strength is not finite, or there are not as
            many strengths.
    """
    sequences = [tuple(sequence) for sequence in sequences]
    given = [strengths] * len(sequences) if isinstance(strengths, int | float) else list(strengths)
    require("promote(strengths)", given, len(given) == len(sequences), "one strength for each sequence")
    for sequence in sequences:
        good = len(sequence) > 0 and all(token >= 0 for token in sequence)
        require("promote", list(sequence), good, "sequences of at least one token id")
    require("promote(strengths)", given, bool(np.isfinite(given).all()), "finite numbers")
    width = max(map(len, sequences), default=1)
    parts: dict[tuple[int, ...], float] = {}
    for sequence, strength in zip(sequences, given, strict=True):
        for count in range(1, len(sequence) + 1):
            parts[sequence[:count]] = parts.get(sequence[:count], 0.0) + float(strength)
    rows = [[_ANY] * (width - len(part)) + list(part) for part in parts]
    entries = np.array(rows, np.int32).reshape(len(parts), width)
    return Promote(entries, np.array(list(parts.values()), np.float32))


def ban_texts(texts: str | Sequence[str], pieces: Sequence[bytes], vocab_size: int) -> BanTexts:
    """Forbids texts, however they are spelled in tokens: none of them is in what a row generates.

    Tokens are read byte by byte, and those that would complete a text are barred.

    Args:
        texts: texts to bar.
        pieces: bytes of each token, by id (`Tokenizer.piece_bytes`).
        vocab_size: size of the model's vocabulary, whose further ids have no bytes.

    Raises:
        DecodingError: a text is empty.
    """
    texts = [texts] if isinstance(texts, str) else texts
    for text in texts:
        require("ban_texts", text, bool(text), "texts that are not empty")
    step, ends = _automaton([text.encode() for text in texts])
    pieces = list(pieces[:vocab_size])
    following = np.repeat(np.arange(len(step), dtype=np.int16)[:, None], vocab_size, axis=1)
    completes = np.zeros(following.shape, np.bool_)
    lengths = np.array([len(piece) for piece in pieces], np.int64)
    starts, joined = np.cumsum(lengths) - lengths, np.frombuffer(b"".join(pieces), np.uint8)
    for place in range(int(lengths.max(initial=0))):
        tokens = np.flatnonzero(lengths > place)
        after = step[following[:, tokens], joined[starts[tokens] + place][None]]
        following[:, tokens] = after
        completes[:, tokens] |= ends[after]
    reach = max((len(text.encode()) for text in texts), default=1)
    return BanTexts(following, completes, np.zeros(reach, np.int32))


def _automaton(texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Where each byte leads from each beginning of the texts (Aho, Corasick), and where one is complete."""
    prefixes = sorted({text[:count] for text in texts for count in range(len(text) + 1)} | {b""})
    number = {prefix: n for n, prefix in enumerate(prefixes)}  # the empty one is 0
    step = np.zeros((len(prefixes), 256), np.int32)
    for prefix, state in number.items():
        for byte in range(256):
            read = prefix + bytes([byte])
            step[state, byte] = next(
                number[read[cut:]] for cut in range(len(read) + 1) if read[cut:] in number
            )
    ends = np.array([any(prefix.endswith(text) for text in texts) for prefix in prefixes])
    return step, ends


def promote_texts(tokenizer: Tokenizer, strengths: dict[str, float]) -> Promote:
    """`promote` of the usual tokens of texts.

    Raises:
        DecodingError: a text is empty, or a strength is not finite.
    """
    sequences = [tokenizer.encode(text, add_special_tokens=False) for text in strengths]
    return promote(sequences, list(strengths.values()))


def ban_texts_of(tokenizer: Tokenizer, texts: str | Sequence[str], vocab_size: int) -> BanTexts:
    """`ban_texts` with the tokens of a tokenizer.

    Raises:
        DecodingError: a text is empty.
    """
    count = min(tokenizer.vocab_size, vocab_size)
    return ban_texts(texts, [tokenizer.piece_bytes(token) for token in range(count)], vocab_size)
