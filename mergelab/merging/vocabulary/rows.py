"""Which rows of which models fill each model's embedding, once it is ordered by the merged vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

__all__ = ["ZERO", "Row", "RowMap", "row_map"]

Row = tuple[tuple[str, int], ...]
"""A row to fill in: the mean of these (model, row)s; one is that row itself, none is zeros."""

ZERO: Row = ()


@dataclass(frozen=True)
class RowMap:
    """Where the rows of one model's re-ordered embedding come from.

    Attributes:
        model: the model; `index` counts rows of its embedding.
        index: int64[rows]: the model's own row for each output row, or -1.
        elsewhere: rows for the output rows whose index is -1.
        padding: rows from this one on are the mean of all before it (as mergekit fills them).
    """

    model: str
    index: np.ndarray
    elsewhere: Mapping[int, Row]
    padding: int

    def is_identity(self, rows: int) -> bool:
        """Whether a tensor of this many rows is left as it is."""
        return (
            rows == self.index.size == self.padding
            and not self.elsewhere
            and bool(np.array_equal(self.index, np.arange(rows)))
        )


def default_row(owners: Mapping[str, int], base: str | None) -> Row:
    """The row a model without a token takes: of the only owner, else the base, else the mean over owners.

    Args:
        owners: the models that have the token, and its row in each.
        base: the base model, if there is one.
    """
    if base is not None and base in owners:
        return ((base, owners[base]),)
    return tuple(owners.items())


def row_map(
    model: str,
    vocabulary: Mapping[str, int],
    output: Mapping[str, int],
    defaults: Mapping[str, Row],
    forced: frozenset[str],
    *,
    kept_rows: int,
    size: int,
) -> RowMap:
    """Lays out one model's rows in the order of the output vocabulary.

    Args:
        model: the model's name.
        vocabulary: its tokens and their rows.
        output: the output vocabulary: token -> output row.
        defaults: the row for a token that the model lacks; for forced tokens, also where it has it.
        forced: tokens whose own row is not used.
        kept_rows: output rows past the vocabulary, below this number, keep the model's own rows.
        size: the number of output rows.
    """
    named = max(output.values(), default=-1) + 1
    first_padding = max(named, kept_rows)
    index = np.full(size, -1, np.int64)
    index[named:first_padding] = np.arange(named, first_padding)
    elsewhere: dict[int, Row] = {}
    unused = np.ones(named, bool)
    for token, output_row in output.items():
        unused[output_row] = False
        own = vocabulary.get(token)
        if own is not None and token not in forced:
            index[output_row] = own
            continue
        row = defaults[token]
        if len(row) == 1 and row[0][0] == model:
            index[output_row] = row[0][1]
        else:
            elsewhere[output_row] = row
    if kept_rows:
        index[:named][unused] = np.flatnonzero(unused)
    else:
        elsewhere |= dict.fromkeys(np.flatnonzero(unused).tolist(), ZERO)
    return RowMap(model, index, elsewhere, first_padding)
