"""One store of activations written by several processes: which shards are whose, and what they agree on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from mergelab.activations.left_out import LeftOut
from mergelab.checkpoints.publish import WorkFolder
from mergelab.errors import MeshError
from mergelab.processes.agreement import together
from mergelab.processes.exchange import gathered_facts

__all__ = ["agreed_digest", "journals", "own_journal", "own_pieces", "own_tokens", "write_shards"]

_RECEIPTS = ".receipts-"


def own_journal(work: WorkFolder) -> Path:
    """Where this process notes the shards that it has written."""
    process = jax.process_index()
    return work.path / f"{_RECEIPTS}{process}" if process else work.journal


def journals(work: WorkFolder) -> list[Path]:
    """Where the processes of this run, or of one that was killed, noted their shards."""
    return [work.journal, *sorted(work.path.glob(f"{_RECEIPTS}*"))]


def own_pieces(work: WorkFolder) -> Path:
    """Where this process keeps rows of the shard under way."""
    process = jax.process_index()
    return work.stages / (f"rows-{process}" if process else "rows")


def own_tokens(work: WorkFolder) -> Path:
    """Where this process keeps the tokens of the text while it is read."""
    process = jax.process_index()
    return work.stages / (f"tokens-{process}" if process else "tokens")


def agreed_digest(of_model: Callable[[], str], of_tokens: str) -> str:
    """The digest of a model as process 0 finds it, which alone reads all of it.

    Args:
        of_model: takes it.
        of_tokens: digest of the tokens that this process has, which must be those of all.

    Raises:
        MeshError: a process has other text, or process 0 cannot read the model.
    """
    digest = ""
    with together("reading the model", distributed=jax.process_count() > 1):
        if jax.process_index() == 0:
            digest = of_model()
    told = gathered_facts([digest, of_tokens])
    for process, (_, tokens) in enumerate(told):
        if tokens != of_tokens:
            here = jax.process_index()
            raise MeshError(
                f"processes {here} and {process} have read different text; give all of them the same files."
            )
    return told[0][0]


def write_shards(count: int, write: Callable[[int], LeftOut], left_out: LeftOut) -> None:
    """Writes this process's shards, every n-th of n processes; all finish one before the next.

    Args:
        count: number of shards.
        write: writes the shard of a number, and counts what its rows leave out.
        left_out: is given what the shards of all processes leave out.

    Raises:
        MeshError: a shard failed in another process.
    """
    process, processes = jax.process_index(), jax.process_count()
    mine: list[tuple[int, Any]] = []
    for first in range(0, count, processes):
        with together("writing the activations", distributed=processes > 1):
            if first + process < count:
                found = write(first + process)
                places = list(found.places.items())
                mine.append((first + process, [found.rows, found.by_place, found.by_norm, places]))
    for _, (rows, by_place, by_norm, places) in sorted(one for each in gathered_facts(mine) for one in each):
        left_out.rows += rows
        left_out.by_place += by_place
        left_out.by_norm += by_norm
        left_out.places.update(Counter(dict(places)))
