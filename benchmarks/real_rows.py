"""The rows and the held-out text of benchmarks/sae_real.py: a model on the text that every Python carries.

Code without comments and prose of docstrings take turns, in files of one document each; a document is on
one side of the split. The store is written as `mergelab activations` does, once; which of its rows count is
what the library says by default.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np

from mergelab.activations import (
    ActivationFiles,
    open_activation_files,
    open_model_activations,
    write_store,
)
from mergelab.activations.kept import DEFAULT_RULE
from mergelab.activations.stored_tokens import kept_of_files
from mergelab.checkpoints.publish import WorkFolder
from mergelab.quickstart.corpus import TextDocument, gather
from mergelab.sae.evaluation.probing_tasks import LabeledTokens, label_texts
from mergelab.text.corpus_files import corpus_files

__all__ = ["DOMAINS", "RowsOfModel", "held_out_text"]

DOMAINS = ("code", "prose")
_SHUFFLED_SEED = 0
_BLOCK = 4096
_HELD_OUT_BYTES = 100_000  # of each domain


@dataclass(frozen=True)
class RowsOfModel:
    """What is trained on.

    Attributes:
        model: the model's folder.
        site: site that is read.
        context: tokens in a context.
        tokens: number of tokens that are run; about one in a hundred does not count.
        rows: number of rows that are trained on, each once.
        text_bytes: bytes of text of each domain, enough for the tokens.
    """

    model: Path
    site: str
    context: int
    tokens: int
    rows: int
    text_bytes: int

    def write(self, folder: Path) -> float:
        """Writes `rows.npy`, the shuffled rows that count, in a scale of variance 1 per coordinate.

        Returns:
            The factor that rows of the model were multiplied by.
        """
        known = folder / "rows.json"
        if known.is_file():
            return float(json.loads(known.read_text())["factor"])
        store = folder / "store"
        if not store.is_dir():
            self._harvest(folder / "text", store)
        files = open_activation_files(store)
        kept = kept_of_files(files, DEFAULT_RULE)
        numbers = []
        total, squares, count = np.zeros(files.d_in), 0.0, 0
        for start in range(0, files.rows, _BLOCK):
            rows = files.read(start, min(start + _BLOCK, files.rows))
            there = kept.numbers(start, start + len(rows)) - start
            there = there[kept.short_enough(rows[there], rows[there])]
            numbers.append(start + there)
            total += rows[there].sum(axis=0, dtype=np.float64)
            squares += float((rows[there].astype(np.float64) ** 2).sum())
            count += len(there)
        chosen = np.random.default_rng(_SHUFFLED_SEED).permutation(np.concatenate(numbers))
        if len(chosen) < self.rows:
            raise ValueError(f"{len(chosen):,} rows count, fewer than the {self.rows:,} to train on")
        mean = total / count
        factor = float((squares / count - mean @ mean) / files.d_in) ** -0.5
        _write_in_order(files, chosen[: self.rows], factor, folder / "rows.npy")
        known.write_text(json.dumps({"factor": factor, "of": int(files.rows), "counted": count}))
        return factor

    def _harvest(self, texts: Path, store: Path) -> None:
        corpus = gather(self.text_bytes, _HELD_OUT_BYTES)
        paths = _written(corpus.train, texts)
        source = open_model_activations(
            self.model, (self.site,), corpus_files(paths), length=self.context, dtype="float32"
        )
        with WorkFolder(store, inputs=[str(self.model), *map(str, paths)]) as work:
            write_store(source, work, model=self.model, rows=self.tokens)


Documents = Mapping[str, Sequence[TextDocument]]


def _written(by_domain: Documents, folder: Path) -> list[Path]:
    """One file for each document, code and prose taking turns."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, (domain, document) in enumerate(_in_turns(by_domain)):
        paths.append(folder / f"{number:05d}.{'py' if domain == 'code' else 'txt'}")
        paths[-1].write_text(document.text, encoding="utf-8")
    return paths


def _in_turns(by_domain: Documents) -> Iterator[tuple[str, TextDocument]]:
    sides = [[(domain, document) for document in by_domain[domain]] for domain in DOMAINS]
    return (pair for pair in chain.from_iterable(zip_longest(*sides)) if pair is not None)


def _write_in_order(files: ActivationFiles, numbers: np.ndarray, factor: float, path: Path) -> None:
    """Rows of these numbers, in this order, read in the order of the files."""
    out = np.lib.format.open_memmap(path, "w+", np.float32, (len(numbers), files.d_in))
    order = np.argsort(numbers)
    for start in range(0, files.rows, _BLOCK):
        stop = min(start + _BLOCK, files.rows)
        first, last = np.searchsorted(numbers[order], [start, stop])
        places = order[first:last]
        if len(places):
            out[places] = files.read(start, stop)[numbers[places] - start] * factor
    out.flush()


def held_out_text(model: Path, context: int, contexts: int, folder: Path) -> LabeledTokens:
    """Contexts of held-out documents with the answers to every task of probing."""
    corpus = gather(_HELD_OUT_BYTES, _HELD_OUT_BYTES)
    found = label_texts(model, _written(corpus.held_out, folder), context)
    order = np.random.default_rng(_SHUFFLED_SEED).permutation(len(found.tokens))[:contexts]
    return LabeledTokens(found.tokens[order], {name: label[order] for name, label in found.labels.items()})
