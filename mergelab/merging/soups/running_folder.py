"""A running or exponential average kept as a checkpoint folder, into which new checkpoints are folded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mergelab.checkpoints.json_data import read_json_object
from mergelab.checkpoints.output_target import disk_errors
from mergelab.checkpoints.publish import WorkFolder
from mergelab.errors import CheckpointError, OutputError, RecipeError
from mergelab.merging.soups.folders import StrPath, average_checkpoints, candidate_names

__all__ = ["RunningFolder", "update_average"]

STATE = "soup_state.json"


@dataclass(frozen=True)
class RunningFolder:
    """What an average on disk is made of, stored beside its weights as `soup_state.json`.

    Attributes:
        checkpoints: the checkpoints folded in so far, oldest first, by absolute path.
        decay: the decay of an exponential average; None for the equal-weight mean.
    """

    checkpoints: tuple[str, ...]
    decay: float | None = None


def update_average(
    checkpoints: Sequence[StrPath], out: StrPath, *, decay: float | None = None, **options: Any
) -> RunningFolder:
    """Folds checkpoints into the average in `out`, starting it if it is not there; they may then be deleted.

    The average is held in float32, so rounding does not compound however many checkpoints are folded in;
    it is an ordinary checkpoint and can be loaded, evaluated or cast at any time. The update is written
    beside `out` and swapped in, so an interruption leaves the old average or the new one.

    Args:
        checkpoints: new model folders, oldest first.
        out: the average.
        decay: None for the mean of all checkpoints ever folded in, `n/(n+1)` of the old and `1/(n+1)` of
            each new one; a number in [0, 1] for an exponential average, started at its first checkpoint.
        options: further options of `mergelab.merge`.

    Returns:
        What the average now consists of; where all of `checkpoints` are in it already, nothing is written.

    Raises:
        RecipeError: `decay` is out of range, or some checkpoints are in the average already and some are not.
        OutputError: `out` is something else than an average of this kind.
    """
    if decay is not None and not 0 <= decay <= 1:
        raise RecipeError(f"decay is {decay}; an exponential average needs a decay within [0, 1].")
    fresh = list(candidate_names(checkpoints).values())
    with WorkFolder(Path(out), inputs=fresh, overwrite=True) as work:
        state = _read(work.out, decay) if _holds_files(work.out) else RunningFolder((), decay)
        known = [path for path in fresh if str(path.resolve()) in state.checkpoints]
        if len(known) == len(fresh):
            return state  # so that a command that was killed at its very end can be given again
        if known:
            raise RecipeError(
                f"Checkpoint {known[0]} is in the average {out} already; fold in each one once."
            )
        work.prepare()
        after = RunningFolder((*state.checkpoints, *(str(path.resolve()) for path in fresh)), decay)
        weights = _weights(len(state.checkpoints), len(fresh), decay)
        paths = [work.out, *fresh] if state.checkpoints else fresh
        kept = {path: weight for path, weight in zip(paths, weights, strict=True) if weight > 0}
        work.clear_stages()
        made = work.stages / work.out.name  # named as its model card shall say
        average_checkpoints(kept, made, dtype="float32", **options)
        text = json.dumps(asdict(after), indent=2) + "\n"
        with disk_errors(work.out):
            (made / STATE).write_text(text, encoding="utf-8")
            work.clear(recreate=False)
            made.rename(work.path)
        work.publish(hashlib.sha256(text.encode()).hexdigest())
    return after


def _holds_files(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _weights(before: int, new: int, decay: float | None) -> list[float]:
    """Weights of the old average (if there is one) and of each new checkpoint."""
    if decay is None:
        return [*([float(before)] if before else []), *[1.0] * new]
    # Without an old average the first new checkpoint takes its place.
    steps = new if before else new - 1
    return [decay**steps, *((1 - decay) * decay ** (steps - i) for i in range(1, steps + 1))]


def _read(out: Path, decay: float | None) -> RunningFolder:
    try:
        data = read_json_object(out / STATE)
        state = RunningFolder(tuple(data["checkpoints"]), data["decay"])
    except (CheckpointError, KeyError, TypeError) as error:
        raise OutputError(
            f"{out} exists and is no running average (no readable {STATE}); choose another output folder."
        ) from error
    if state.decay != decay:
        kinds = ["a running mean" if d is None else f"an average of decay {d}" for d in (state.decay, decay)]
        raise OutputError(f"{out} holds {kinds[0]}, not {kinds[1]}; choose another output folder.")
    return state
