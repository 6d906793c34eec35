"""The quickstart end to end: tokenizer, base, specialists, merges, scores, features; each stage done once."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path

from mergelab.checkpoints.output_target import OutputLock, check_target
from mergelab.checkpoints.publish import publish_file
from mergelab.checkpoints.text_file import read_text
from mergelab.merging import merge
from mergelab.quickstart.corpus import DOMAINS, Document, gather
from mergelab.quickstart.family import Family, train_tokenizer
from mergelab.quickstart.features import find_features, train_autoencoder
from mergelab.quickstart.recipes import copy_recipe
from mergelab.quickstart.results import Results, score_models, verdict
from mergelab.quickstart.settings import QuickstartSettings
from mergelab.quickstart.stages import Stages, remove, stage_key

__all__ = ["Progress", "run"]

Progress = Callable[[str, int, int], None]
"""Called with what is being done, the steps done and the steps in all."""


def run(
    out: str | Path,
    settings: QuickstartSettings,
    *,
    seed: int = 0,
    force: bool = False,
    on_progress: Progress = lambda stage, done, total: None,
) -> Results:
    """Trains, merges and scores the model family; what an earlier run with equal settings made is kept.

    Writes `models/NAME`, `merges/RECIPE`, `checkpoints/STEP` of the base (HF folders), `recipes/RECIPE.yaml`,
    `sae`, `held-out.txt` and `results.json`.

    Args:
        out: the output folder.
        settings: all sizes.
        seed: of initial weights, batches and random merges.
        force: run every stage again.
        on_progress: called as stages advance.

    Raises:
        OutputError: `out` holds something that no quickstart wrote, may not be written, or another run writes
            there.
        MergelabError: this Python has no standard-library sources.
    """
    out = Path(out)
    check_target(out)
    out = out.resolve()
    with OutputLock(out):
        return _run(out, settings, seed, Stages(out, force=force), on_progress)


def _run(
    out: Path, settings: QuickstartSettings, seed: int, stages: Stages, on_progress: Progress
) -> Results:
    corpus = gather(settings.train_bytes, settings.held_out_bytes)
    key = stage_key(corpus.digest, settings, seed)
    tokenizer = stages.run("tokenizer", key, lambda _: train_tokenizer(corpus, settings))
    family = Family(settings, corpus, tokenizer, seed)
    keys: dict[str, str] = {}  # of every model folder, relative to `out`

    for name in ("base", *DOMAINS):
        folder, stage = f"models/{name}", f"train {name}"
        start = out / "models" / "base" if name in DOMAINS else None
        keys[folder] = key

        def train(path: Path, name: str = name, stage: str = stage, start: Path | None = start) -> object:
            checkpoints = None if start else out / "checkpoints"
            if checkpoints:
                remove(checkpoints)  # of a training that was stopped
            return family.train(
                name,
                start,
                path,
                lambda done, total: on_progress(stage, done, total),
                checkpoints=checkpoints,
            )

        stages.run(stage, key, train, folder)

    for number, name in enumerate(settings.recipes, start=1):
        folder, recipe = f"merges/{name}", copy_recipe(name, out / "recipes")
        keys[folder] = stage_key(key, read_text(recipe))

        def write_merge(path: Path, recipe: Path = recipe) -> None:
            merge(recipe, path, seed=seed)

        stages.run(f"merge {name}", keys[folder], write_merge, folder)
        on_progress("merge", number, len(settings.recipes))

    bits: dict[str, dict[str, float]] = {}
    for number, (folder, folder_key) in enumerate(keys.items(), start=1):
        name = Path(folder).name
        bits[name] = stages.run(f"evaluate {name}", folder_key, lambda _, f=folder: family.evaluate(out / f))
        on_progress("evaluate", number, len(keys))

    def train_sae(path: Path) -> object:
        documents = [document for domain in DOMAINS for document in corpus.train[domain]]
        return train_autoencoder(
            out / "models" / "base", documents, settings.autoencoder, path, seed,
            lambda done, total: on_progress("autoencoder", done, total),
        )  # fmt: skip

    def show_features(_: Path) -> object:
        documents = [document for domain in DOMAINS for document in corpus.held_out[domain]]
        return asdict(find_features(out / "models" / "base", out / "sae", documents, settings.autoencoder))

    stages.run("train autoencoder", key, train_sae, "sae")
    features = stages.run("find features", key, show_features)

    publish_file(out / "held-out.txt", _mixed(corpus.held_out).encode())
    scores = score_models(bits, DOMAINS)
    judged = verdict(scores, DOMAINS)
    results = Results(DOMAINS, scores, judged, family.facts(), stages.seconds, features)
    publish_file(out / "results.json", (json.dumps(results.to_dict(), indent=2) + "\n").encode())
    return results


def _mixed(documents: Mapping[str, Sequence[Document]]) -> str:
    """The documents of all domains in turn, so that both halves of the text are alike."""
    turns = zip_longest(*documents.values())
    return "\n\n".join(document.text for turn in turns for document in turn if document is not None)
