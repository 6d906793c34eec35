"""The experiment from end to end, each stage once."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Any

from mergelab.checkpoints.json_data import read_json_object
from mergelab.checkpoints.output_target import OutputLock, check_target
from mergelab.checkpoints.publish import publish_file
from mergelab.checkpoints.text_file import read_text
from mergelab.errors import CheckpointError, OutputError
from mergelab.merging import merge
from mergelab.quickstart.autoencoder import find_features, train_autoencoder
from mergelab.quickstart.corpus import DOMAINS, TextDocument, gather
from mergelab.quickstart.family import TrainedFamily, train_tokenizer
from mergelab.quickstart.presets import QuickstartSettings
from mergelab.quickstart.results import Results, bits_per_byte_of, changes, score_models, verdict
from mergelab.shipped import shipped_folder
from mergelab.version import __version__

__all__ = ["Progress", "Stages", "copy_recipe", "remove", "run", "stage_key"]


_DEFAULT_OUT = "mergelab-quickstart/"  # what the shipped recipes call the quickstart's output folder


def copy_recipe(name: str, folder: Path) -> Path:
    """Writes the recipe `name` into `folder`, which lies in the output folder, with paths relative to it."""
    text = (shipped_folder("quickstart") / f"{name}.yaml").read_text(encoding="utf-8")
    path = folder / f"{name}.yaml"
    folder.mkdir(exist_ok=True)
    publish_file(path, text.replace(_DEFAULT_OUT, "../").encode())
    return path


RECORD = "stages.json"


def stage_key(*parts: Any) -> str:
    """SHA-256 of the parts (through `repr`) and of this package's version."""
    return hashlib.sha256(repr((__version__, *parts)).encode()).hexdigest()


class Stages:
    """The stages done in an output folder, and what they returned.

    `stages.json` is rewritten after each stage, so an interrupted run goes on where it stopped.
    """

    def __init__(self, folder: Path, *, force: bool = False) -> None:
        """Opens or creates the output folder.

        Args:
            folder: the output folder.
            force: forget what was done before.

        Raises:
            OutputError: the folder holds something that no quickstart wrote.
        """
        self.folder = folder
        self.record = folder / RECORD
        if folder.exists() and not self.record.is_file() and not _only_begun(folder):
            raise OutputError(
                f"{folder} exists and was not written by the quickstart (it has no {RECORD}); "
                "choose another --out, or empty it first."
            )
        folder.mkdir(parents=True, exist_ok=True)
        self.ran: list[str] = []  # stages of this run that were not done before
        self._done: dict[str, Any] = {} if force else self._read()
        if not self.record.is_file() or force:
            self._write()

    def run(self, name: str, key: str, work: Callable[[Path], Any], product: str | None = None) -> Any:
        """Returns what the stage returned when it last ran with this key, running it if need be.

        Args:
            name: the stage.
            key: a digest of all it depends on.
            work: does it and returns plain JSON data; it gets the product's path, where nothing is yet, and
                must make the product appear there complete or not at all.
            product: the file or folder it makes, relative to the output folder; None if there is none.
        """
        target = self.folder / (product or "")
        known = self._done.get(name)
        if known and known["key"] == key and target.exists():
            return known["value"]
        if self._done.pop(name, None):
            self._write()  # before its product goes, so that a stop in between is not taken for success
        if product is not None:
            remove(target)
            target.parent.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        value = work(target)
        self.ran.append(name)
        self._done[name] = {"key": key, "value": value, "seconds": round(time.perf_counter() - started, 2)}
        self._write()
        return value

    @property
    def seconds(self) -> dict[str, float]:
        """Wall time of each stage when it last ran."""
        return {name: entry["seconds"] for name, entry in self._done.items()}

    def _read(self) -> dict[str, Any]:
        try:
            return read_json_object(self.record)
        except CheckpointError:
            return {}  # no run yet, or a run killed in its first moment

    def _write(self) -> None:
        publish_file(self.record, (json.dumps(self._done, indent=1) + "\n").encode())


def _only_begun(folder: Path) -> bool:
    """Whether a folder holds nothing but what a run killed in its first moment leaves."""
    return folder.is_dir() and all(entry.name.startswith(f".{RECORD}.") for entry in folder.iterdir())


def remove(path: Path) -> None:
    """Deletes a file or a folder with all that is in it, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


Progress = Callable[[str, int, int], None]
"""Called with what is being done, the steps done and the steps in all: first with none done, and not at all
for what an earlier run has done."""


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
        seed: seed of initial weights, batches and random merges.
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
    family = TrainedFamily(settings, corpus, tokenizer, seed)
    keys: dict[str, str] = {}  # of every model folder, relative to `out`

    for name in ("base", *DOMAINS):
        folder, stage = f"models/{name}", f"train {name}"
        start = out / "models" / "base" if name in DOMAINS else None
        keys[folder] = key

        def train(path: Path, name: str = name, stage: str = stage, start: Path | None = start) -> object:
            on_progress(stage, 0, (settings.specialist if start else settings.base).steps)
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

        def write_merge(path: Path, recipe: Path = recipe, number: int = number) -> None:
            on_progress("merge", number - 1, len(settings.recipes))
            merge(recipe, path, seed=seed)
            on_progress("merge", number, len(settings.recipes))

        stages.run(f"merge {name}", keys[folder], write_merge, folder)

    bits: dict[str, dict[str, list[float]]] = {}  # of each document
    for number, (folder, folder_key) in enumerate(keys.items(), start=1):
        name = Path(folder).name

        def evaluate(_: Path, folder: str = folder, number: int = number) -> object:
            on_progress("evaluate", number - 1, len(keys))
            found = family.evaluate(out / folder)
            on_progress("evaluate", number, len(keys))
            return found

        bits[name] = stages.run(f"evaluate {name}", stage_key(folder_key, "documents"), evaluate)

    def train_sae(path: Path) -> object:
        documents = [document for domain in DOMAINS for document in corpus.train[domain]]
        on_progress("autoencoder", 0, settings.autoencoder.tokens // settings.autoencoder.batch_size)
        return train_autoencoder(
            out / "models" / "base", documents, settings.autoencoder, path, seed,
            lambda done, total: on_progress("autoencoder", done, total),
        )  # fmt: skip

    def show_features(_: Path) -> object:
        documents = [document for domain in DOMAINS for document in corpus.held_out[domain]]
        on_progress("features", 0, 1)
        found = find_features(out / "models" / "base", out / "sae", documents, settings.autoencoder)
        on_progress("features", 1, 1)
        return asdict(found)

    stages.run("train autoencoder", key, train_sae, "sae")
    features = stages.run("find features", key, show_features)

    publish_file(out / "held-out.txt", _mixed(corpus.held_out).encode())
    sizes = {d: [document.num_bytes for document in corpus.held_out[d]] for d in DOMAINS}
    scores = score_models(bits_per_byte_of(bits, sizes), DOMAINS, changes(bits, sizes))
    judged = verdict(scores, DOMAINS)
    results = Results(DOMAINS, scores, judged, family.facts(), stages.seconds, features)
    publish_file(out / "results.json", (json.dumps(results.to_dict(), indent=2) + "\n").encode())
    return results


def _mixed(documents: Mapping[str, Sequence[TextDocument]]) -> str:
    """The documents of all domains in turn, so that both halves of the text are alike."""
    turns = zip_longest(*documents.values())
    return "\n\n".join(document.text for turn in turns for document in turn if document is not None)
