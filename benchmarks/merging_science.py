"""What merging does and does not do: small experiments with seeds, their spread, and where it fails.

    python -m benchmarks.merging_science --work DIR [--seeds 3] [--publish]

Exact laws of operators, paths between networks, eight tasks in one network by every operator, the limits of
DARE, and a head that all tasks share. Everything is trained on scikit-learn's digits in a few CPU minutes a
seed; each seed is kept in the folder when it is done.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import describe
from benchmarks.science_parts.claims import claims
from benchmarks.science_parts.connectivity import connectivity
from benchmarks.science_parts.dare_limits import dare
from benchmarks.science_parts.eight_tasks import SHARED, Size, family, scores
from benchmarks.science_parts.identities import identities
from benchmarks.science_parts.page import page

__all__ = ["experiments", "main"]

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results" / "merging_science.json"
PAGE = FOLDER / "merging_science.md"
SOUP = FOLDER / "results" / "digits_soup.json"
LARGE_RATE = 5e-3
"""The learning rate of the specialists whose task vectors are large."""


def experiments(seed: int, size: Size = Size()) -> dict[str, Any]:  # noqa: B008
    """All experiments at one seed, as plain data."""
    specialists = family(seed, size)
    return {
        "identities": [law._asdict() for law in identities(seed)],
        "connectivity": connectivity(seed, size.steps)._asdict(),
        "eight_tasks": scores(specialists),
        "dare_small": dare(specialists, seed),
        "dare_large": dare(family(seed, size, rate=LARGE_RATE), seed),
        "shared_head": scores(family(seed, size, shared_head=True), SHARED),
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the experiments as the command line asks; returns what they gave."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.merging_science")
    parser.add_argument("--work", type=Path, required=True, help="folder of finished seeds, not run again")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--publish", action="store_true", help="write merging_science.md and its results")
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    runs = []
    for seed in range(options.seeds):
        kept = options.work / f"seed-{seed}.json"
        if not kept.is_file():
            kept.write_text(json.dumps(experiments(seed)) + "\n", encoding="utf-8")
        runs.append(json.loads(kept.read_text(encoding="utf-8")))
        print(f"seed {seed}: {len(runs[-1]['eight_tasks'])} rows", flush=True)
    results = {"machine": describe(FOLDER), "size": Size()._asdict(), "runs": runs}
    results["claims"] = [claim._asdict() for claim in claims(runs)]
    text = page(results, json.loads(SOUP.read_text(encoding="utf-8")))
    print(text)
    if options.publish:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(text, encoding="utf-8")
    return results


if __name__ == "__main__":
    main()
