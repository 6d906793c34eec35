"""What latents have become in a wider dictionary of the same site, and what those children are active on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mergelab.activations.capture import ModelActivations
from mergelab.errors import SAEError
from mergelab.sae.dictionary import Dictionary
from mergelab.sae.evaluation.examples import survey
from mergelab.sae.evaluation.host import check_reads
from mergelab.sae.evaluation.matching import feature_splits

__all__ = ["Child", "hierarchy"]


@dataclass(frozen=True)
class Child:
    """A latent of the wider dictionary.

    Attributes:
        latent: its number there.
        cosine: of what it writes with what its parent writes.
        tokens: the tokens it is most active on, each once, the strongest first.
    """

    latent: int
    cosine: float
    tokens: tuple[int, ...]


def hierarchy(
    narrow: Dictionary,
    wide: Dictionary,
    source: ModelActivations,
    latents: Sequence[int] | np.ndarray,
    *,
    threshold: float = 0.5,
    most: int = 6,
    examples: int = 4,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[int, tuple[Child, ...]]:
    """The children of latents (`feature_splits`), in one pass of the wider dictionary over a text.

    Args:
        narrow: a dictionary.
        wide: another that reads the first of the source's sites, with more latents.
        source: model and text.
        latents: of the narrow one.
        threshold: least cosine of parent and child.
        most: children of a latent, the most alike ones.
        examples: contexts whose strongest token is taken.
        progress: is told contexts done and contexts in all.

    Returns:
        By latent; those without a child are left away.

    Raises:
        SAEError: the wide dictionary does not fit the site, or the two read or write different ones.
    """
    check_reads(wide, source)
    for what in ("reads", "writes"):
        one, other = getattr(narrow.config, what), getattr(wide.config, what)
        if one is not None and other is not None and one != other:
            raise SAEError(
                f"the wider dictionary {what} {', '.join(other)}, but the other {', '.join(one)}; give "
                "one of the same sites."
            )
    splits = feature_splits(narrow, wide, threshold=threshold)
    chosen = {int(latent): splits[int(latent)][:most] for latent in latents if int(latent) in splits}
    wanted = sorted({child for children in chosen.values() for child in children})
    seen = survey(wide, source, count=examples, latents=wanted, progress=progress).examples
    up, down = _unit(np.asarray(narrow.W_dec)), _unit(np.asarray(wide.W_dec))
    return {
        latent: tuple(
            Child(
                child,
                float(up[latent] @ down[child]),
                tuple(dict.fromkeys(e.tokens[int(np.argmax(e.codes))] for e in seen[child])),
            )
            for child in children
        )
        for latent, children in chosen.items()
    }


def _unit(rows: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1)
