"""Latents over prompts: over several, the growing growing_prefixes of one, or one with a word replaced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from mergelab.activations.capture import capture
from mergelab.checkpoints.locations import local_path
from mergelab.errors import SAEError
from mergelab.models.load import load_model
from mergelab.models.model import Model, Params
from mergelab.report.tables import markdown_table
from mergelab.sae.formats.detect import load_sae
from mergelab.sae.sae import SAE, at_sites
from mergelab.sae.splice import encode
from mergelab.text.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["LatentTable", "growing_prefixes", "latent_table", "word_variants"]


@dataclass(frozen=True)
class LatentTable:
    """Codes of some latents at one token of each prompt.

    Attributes:
        prompts: the prompts, in order.
        pieces: the token of each prompt at which codes were read, as text.
        latents: int64 `[latents]`, numbers of the latents, those that tell the prompts apart most first.
        codes: float32 `[prompts, latents]`.
    """

    prompts: tuple[str, ...]
    pieces: tuple[str, ...]
    latents: np.ndarray
    codes: np.ndarray

    def records(self) -> list[dict[str, Any]]:
        """A dict for each prompt and latent, ready for JSON or a data frame."""
        return [
            {"prompt": prompt, "token": piece, "latent": int(latent), "code": float(code)}
            for prompt, piece, row in zip(self.prompts, self.pieces, self.codes, strict=True)
            for latent, code in zip(self.latents, row, strict=True)
        ]

    def markdown(self) -> str:
        """A table with a row for each prompt and a column for each latent; a latent that is off is blank."""
        rows = [
            [repr(prompt), repr(piece), *(f"{code:.3g}" if code else "" for code in row)]
            for prompt, piece, row in zip(self.prompts, self.pieces, self.codes, strict=True)
        ]
        return markdown_table(["prompt", "token", *map(str, self.latents)], rows)

    def figure(self) -> Figure:
        """The table as a heat map."""
        from mergelab.report.heatmap import heatmap_figure

        columns = [str(latent) for latent in self.latents]
        return heatmap_figure(
            self.codes, self.prompts, columns, title="latents over prompts", scale="activation"
        )


def latent_table(
    sae: SAE | str | Path,
    model: Model | str | Path,
    prompts: str | Sequence[str],
    params: Params | None = None,
    tokenizer: Tokenizer | None = None,
    *,
    latents: int | Sequence[int] = 16,
    position: int = -1,
    site: str | None = None,
) -> LatentTable:
    """What an SAE's latents do on prompts.

        latent_table(sae, "path/to/model", ["The cat sat", "The dog sat"]).figure()
        latent_table(sae, model, growing_prefixes("The cat sat on the mat"), params, tokenizer)
        latent_table(sae, model, word_variants("The {} sat", ["cat", "dog", "king"]), params, tokenizer)

    Args:
        sae: the SAE, or its folder.
        model: the subject model with `params` and `tokenizer`, or its folder.
        prompts: texts, each read with the special tokens that the tokenizer adds; one text is one prompt.
        params: parameters of the model.
        tokenizer: tokenizer of the model.
        latents: numbers of latents, or how many to choose: those whose codes differ most between the prompts,
            or are largest where there is one prompt.
        position: the token of each prompt at which codes are read; -1 is the last.
        site: the site that the SAE reads; the one that it says if None.

    Raises:
        SAEError: there are no prompts, the SAE does not say its site, does not fit it, or has no such latent.
        SiteError: the model has no such site, or a prompt has no token at the position.
        CheckpointError: a folder cannot be read.
    """
    sae = at_sites(sae if isinstance(sae, SAE) else load_sae(sae), site, None)
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts:
        raise SAEError("latent_table was given no prompts; give it at least one.")
    if not isinstance(model, Model):
        folder = local_path(model)
        tokenizer = tokenizer or load_tokenizer(folder)
        model, params = load_model(folder)
    if params is None or tokenizer is None:
        raise SAEError("a model was given without its params or tokenizer; give both, or the model's folder.")
    reads = sae.config.reads
    if reads is None or len(reads) != 1:
        raise SAEError("the SAE does not say which one site it reads; name it (site=).")
    ids = [tokenizer.encode(text) for text in texts]
    rows = capture(model, params, ids, [reads[0]], position=position)[reads[0]]
    if rows.shape[1] != sae.d_in:
        raise SAEError(
            f"{reads[0]} is {rows.shape[1]} wide, but the SAE reads {sae.d_in}; name its site (site=)."
        )
    codes = np.asarray(encode(sae, jnp.asarray(rows)))
    chosen = _chosen(codes, latents)
    pieces = tuple(tokenizer.shown_piece(tokens[position]) for tokens in ids)
    return LatentTable(tuple(texts), pieces, chosen, codes[:, chosen])


def _chosen(codes: np.ndarray, latents: int | Sequence[int]) -> np.ndarray:
    count = codes.shape[1]
    if isinstance(latents, int):
        spread = np.abs(codes[0]) if len(codes) == 1 else codes.max(axis=0) - codes.min(axis=0)
        order = np.argsort(-spread, kind="stable")[: max(latents, 0)]
        return order[spread[order] > 0]
    chosen = np.asarray(latents, np.int64)
    wrong = chosen[(chosen < 0) | (chosen >= count)]
    if chosen.ndim != 1 or wrong.size:
        named = f"latent {wrong[0]}" if wrong.size else f"latents of shape {list(chosen.shape)}"
        raise SAEError(f"{named} was asked for; the SAE has latents 0 to {count - 1}.")
    return chosen


def growing_prefixes(text: str) -> list[str]:
    """The growing beginnings of a text, word by word: `["The", "The cat", "The cat sat"]`."""
    words = text.split(" ")
    return [" ".join(words[: end + 1]) for end in range(len(words)) if words[end]]


def word_variants(template: str, words: Sequence[str]) -> list[str]:
    """A text with each of the words at its `{}`: `["The cat sat", "The dog sat"]`.

    Raises:
        SAEError: the template has no `{}`.
    """
    if "{}" not in template:
        raise SAEError(f"the template {template!r} has no {{}}; put it where the words go.")
    return [template.replace("{}", word) for word in words]
