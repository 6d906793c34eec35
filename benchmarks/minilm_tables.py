"""The tables of `minilm_features`: a scorecard with a column per SAE, and features with patterns."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["OURS", "render"]

OURS = "mergelab"

_SHOWN = {
    "reconstruction.nmse": "NMSE",
    "reconstruction.l0": "L0",
    "reconstruction.alive": "alive",
    "embeddings.cosine": "embedding cosine",
    "embeddings.recovered": "cosine recovered",
    "embeddings.rank": "rank agreement",
    "embeddings.nearest": "nearest kept",
    "probing.relative_loss": "probe loss / prior",
    "probing.f1_1": "1-sparse F1",
    "probing.f1_5": "5-sparse F1",
    "absorption.rate": "absorption",
    "explanations.precision": "N2G precision",
    "explanations.recall": "N2G recall",
}


def render(results: Mapping[str, Any]) -> str:
    """The scorecard, a column for each SAE, and the features."""
    runs: Mapping[str, Any] = results["runs"]
    columns: dict[str, list[Any]] = {}
    for key, run in runs.items():
        columns.setdefault(key.split("/")[0], []).append(run["scores"])
    rows = [[label, *(_cell(found, name) for found in columns.values())] for name, label in _SHOWN.items()]
    features = [
        [
            str(feature["latent"]),
            f"{feature['density']:.2%}",
            " ".join(_code(token) for token in feature["tokens"][:4]),
            _marked(feature["example"]),
            _marked(feature["pattern"]),
            "none" if feature["precision"] is None else f"{feature['precision']:.2f}",
            f"{feature['recall']:.2f}",
        ]
        for feature in results["features"]
    ]
    head = [
        "latent",
        "density",
        "strongest on",
        "strongest example",
        "strongest pattern",
        "precision",
        "recall",
    ]
    size, machine = results["size"], ", ".join(f"{k} {v}" for k, v in results["machine"].items())
    metrics = list(next(iter(runs.values()))["seconds"])
    # The least, because a machine that is busy with other things only ever adds to them.
    training = min(run["train_seconds"] for key, run in runs.items() if key.split("/")[0] == OURS)
    spent = {m: min(run["seconds"].get(m, 0.0) for run in runs.values()) for m in metrics}
    return "\n".join(
        [
            *_markdown(["score", *columns], rows, ["---", *["---:"] * len(columns)]),
            "",
            f"Means over {len(columns[OURS])} seeds, ± their standard deviation. {size['n_latents']} "
            f"latents, k {size['k']}, on {size['site']}, {size['tokens']:,} tokens of training, judged on "
            f"{size['judged'] // 2 * size['context']:,} others. Least seconds: training {training:.0f}, "
            f"{', '.join(f'{m} {s:.1f}' for m, s in spent.items())}. Machine: {machine}.",
            "",
            *_markdown(head, features, ["---:", "---:", "---", "---", "---", "---:", "---:"]),
            "",
            f"{len(features)} of {results['explained']} latents drawn at random, evenly spaced from the best "
            "to the worst F1 of their patterns. The active token is bold; `*` in a pattern is any token.",
        ]
    )


def _cell(found: Sequence[Mapping[str, float]], name: str) -> str:
    values = [scores[name] for scores in found if name in scores]
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def _code(text: str) -> str:
    return f"`{text.strip().replace('`', 'ˋ').replace('|', '¦')}`" if text.strip() else ""


def _marked(parts: Sequence[str]) -> str:
    before, active, after = (_code(part) for part in parts)
    return " ".join(part for part in (before, f"**{active}**", after) if part)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]], rule: Sequence[str]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)]
