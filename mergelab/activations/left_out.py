"""What a rule leaves out of a text, counted: how many tokens, why, and where they stand."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mergelab.activations.model_activations import ModelActivations

__all__ = ["LeftOut", "count_left_out"]


@dataclass
class LeftOut:
    """A count of the tokens that a rule has left out, and why; takes them piece by piece.

    Attributes:
        rows: tokens seen.
        by_place: tokens left out for their position, as special tokens, or as none that are asked for.
        by_norm: tokens left out for their norm alone.
        places: how many of the latter stand at each position of a context, or row of a file.
    """

    rows: int = 0
    by_place: int = 0
    by_norm: int = 0
    places: Counter[int] = field(default_factory=Counter)

    @property
    def kept(self) -> int:
        """How many tokens count."""
        return self.rows - self.by_place - self.by_norm

    def add(
        self,
        kept: np.ndarray,
        by_place: np.ndarray | None = None,
        *,
        first: int = 0,
        context: int | None = None,
    ) -> None:
        """Takes the rows from number `first` on: which count, and which do as far as their place decides."""
        place = np.ones_like(kept) if by_place is None else by_place
        self.rows += len(kept)
        self.by_place += int((~place).sum())
        long = first + np.flatnonzero(place & ~kept)
        self.by_norm += len(long)
        self.places.update((long if context is None else long % context).tolist())

    def where(self) -> str:
        """The places at which most of those left out for their norm stand."""
        shown = ", ".join(str(place) for place, _ in sorted(self.places.most_common(5)))
        return shown + (", ..." if len(self.places) > 5 else "")

    def facts(self) -> dict[str, Any]:
        """The counts as plain JSON data; of places the twenty most frequent."""
        places = {str(place): count for place, count in self.places.most_common(20)}
        return {"rows": self.rows, "by_place": self.by_place, "by_norm": self.by_norm, "places": places}

    def sentence(self, of: str = "position") -> str:
        """What was left out, in words: `97 of 12,288 (96 by place, 1 by norm, at position 2)`."""
        total = self.by_place + self.by_norm
        parts = [f"{self.by_place:,} by place"] if self.by_place else []
        if self.by_norm:
            parts.append(f"{self.by_norm:,} by norm, at {of} {self.where()}")
        return f"{total:,} of {self.rows:,}" + (f" ({'; '.join(parts)})" if parts else "")


def count_left_out(source: ModelActivations, contexts: int | None = None) -> LeftOut:
    """What the source's rule leaves out of its first contexts, of all by default: a pass over them."""
    found, length = LeftOut(), source.tokens.shape[1]
    total = min(len(source.tokens), contexts or len(source.tokens)) * length
    by_place = source.by_place.reshape(-1)
    for start in range(0, total, source.batch * length):
        stop = min(start + source.batch * length, total)
        kept = source.kept_among(source.read_sites(start, stop), start)
        found.add(kept, by_place[start:stop], first=start, context=length)
    return found
