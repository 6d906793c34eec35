"""The model that a dictionary belongs to: opened for an evaluation, refused where it is another one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mergelab.checkpoints.digest import weights_sha256
from mergelab.errors import SAEError
from mergelab.sae.dictionary import Dictionary
from mergelab.sae.model_source import DEFAULT_CONTEXT, ModelActivations, open_model_activations

__all__ = ["check_host", "check_reads", "open_host", "trained_context"]


def check_host(dictionary: Dictionary, model: str | Path, *, any_model: bool = False) -> bool:
    """Whether the folder holds the very weights whose activations the dictionary was trained on.

    Args:
        dictionary: its metadata has `model_hash`, the digest of its host's weights, where that is known.
        model: a model folder.
        any_model: accept other weights.

    Returns:
        False where the metadata has no digest, or other weights were accepted.

    Raises:
        SAEError: the weights are others.
        CheckpointError: the folder holds no weights.
    """
    recorded = dictionary.config.metadata.get("model_hash")
    if recorded is None:
        return False
    found = weights_sha256(model)
    if found != recorded and not any_model:
        raise SAEError(
            f"{model}: its weights have SHA-256 {found[:12]}..., but the dictionary belongs to a model with "
            f"{recorded[:12]}...; give that model, or say that any model will do (any_model, --any-model)."
        )
    return found == recorded


def open_host(
    dictionary: Dictionary,
    model: str | Path,
    texts: Sequence[str | Path],
    *,
    site: str | None = None,
    length: int | None = None,
    any_model: bool = False,
    mesh: Any = None,
) -> ModelActivations:
    """Activations of the dictionary's host on text files, at the site it reads.

    Args:
        dictionary: what will read them.
        model: a Hugging Face folder with its tokenizer.
        texts: UTF-8 files.
        site: such as `blocks.8.resid_post`; that of the dictionary's metadata if None.
        length: of a context, in tokens; if None, what the dictionary was trained with, or else 64, and never
            more than the model has positions.
        any_model: accept other weights than the recorded ones.
        mesh: devices to spread the model over.

    Raises:
        SAEError: the weights or the width are not the dictionary's, no site is known, or the text is short.
        TokenError: `length` is more than the model's positions, or a token is beyond its vocabulary.
        SiteError: the model has no such site.
        CheckpointError: the model cannot be read.
    """
    check_host(dictionary, model, any_model=any_model)
    site = site or dictionary.config.metadata.get("site")
    if site is None:
        raise SAEError("the dictionary does not say which site it reads; name it (site, --site).")
    source = open_model_activations(
        model, [site], texts, length=length, default=trained_context(dictionary), mesh=mesh
    )
    check_reads(dictionary, source)
    return source


def trained_context(dictionary: Dictionary) -> int:
    """The tokens in a context of the dictionary's training, where its metadata says so; else 64."""
    metadata = dictionary.config.metadata
    for name in ("context", "context_size"):
        found = metadata.get(name)
        if isinstance(found, int) and not isinstance(found, bool) and found >= 2:
            return found
    return DEFAULT_CONTEXT


def check_reads(dictionary: Dictionary, source: ModelActivations) -> None:
    """Checks that the dictionary reads and reconstructs activations of the source's first site.

    Raises:
        SAEError: it reads or writes another width, or several sites.
    """
    width = source.widths[0]
    if (dictionary.d_in, dictionary.d_out, dictionary.config.sites) != (width, width, 1):
        raise SAEError(
            f"the dictionary maps {dictionary.config.sites} activation(s), {dictionary.d_in} wide in all, to "
            f"{dictionary.d_out}, but site {source.sites[0]!r} is {width} wide; take the site it was trained "
            "on."
        )
