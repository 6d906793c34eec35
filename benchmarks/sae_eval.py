"""Scorecards of SAEs on the quickstart's base model: two widths, two k, controls, and other libraries' SAEs.

    python -m benchmarks.sae_eval --work DIR --peers-env VENV [--publish]

All are trained on the same stored activations in the same order, at their default learning rates, and judged
by the same code on held-out text. Results are kept in DIR after every SAE, so that a run that was
stopped goes on where it stood.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from benchmarks.machine import describe
from benchmarks.sae_peers.problem import TRAINERS, Arrays, Problem
from benchmarks.sae_step import REPOSITORY, run_worker
from benchmarks.table import replace_section
from mergelab.activations.model_activations import ModelActivations, contexts_of_texts, halves
from mergelab.models.load import load_model
from mergelab.quickstart import small_llama
from mergelab.quickstart.corpus import DOMAINS, Corpus, gather
from mergelab.quickstart.family import END_OF_TEXT_ID, fresh_params, tokenizer_files, train_tokenizer
from mergelab.quickstart.presets import PRESETS, QuickstartSettings
from mergelab.quickstart.train import train_lm
from mergelab.sae.evaluation.metric import Evidence, Options
from mergelab.sae.evaluation.probing_tasks import LabeledTokens, label_texts
from mergelab.sae.evaluation.scorecard import scorecard
from mergelab.sae.evaluation.training_curve import loss_curve
from mergelab.sae.sae import SAE, SAEConfig
from mergelab.text.packing import random_windows, token_stream

__all__ = ["Bench", "main", "render"]

RESULTS = REPOSITORY / "benchmarks" / "results" / "sae_eval.json"
OURS = ("mergelab", "frozen decoder", "random")
PEERS = ("sparsify+Adam", "SAELens")

_SHOWN = {
    "reconstruction.nmse": "NMSE",
    "reconstruction.alive": "alive",
    "downstream.delta_ce": "delta CE",
    "downstream.recovered_mean": "CE recovered (mean)",
    "downstream.compute_equivalent": "compute equivalent",
    "probing.relative_loss": "probe loss / prior",
    "probing.f1_1": "1-sparse F1",
    "absorption.rate": "absorption",
    "sparsity.latents": "ablation sparsity",
    "explanations.precision": "N2G precision",
    "explanations.recall": "N2G recall",
}


@dataclass(frozen=True)
class Size:
    """How much is trained and judged.

    Attributes:
        preset: of the quickstart, whose base model the SAEs belong to.
        shapes: latents and k of the SAEs.
        batch: tokens per step.
        steps: of each SAE's training.
        judged: contexts of held-out text, half of which fit explanations.
        points: steps of the model's training at which its loss is taken.
    """

    preset: str
    shapes: tuple[tuple[int, int], ...]
    batch: int
    steps: int
    judged: int
    points: tuple[int, ...]


FULL = Size(
    "default", ((512, 8), (512, 16), (1024, 8), (1024, 16)), 1024, 400, 256, (5, 10, 20, 50, 100, 200, 400)
)
QUICK = Size("tiny", ((64, 4),), 256, 20, 16, (5, 40))


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark as the command line asks; returns what it found."""
    options = _parse(arguments)
    bench = Bench(options.work, options.peers_env, QUICK if options.quick else FULL)
    for seed in range(options.seeds):
        for n, k in bench.size.shapes:
            for program in options.programs:
                bench.run(program, n, k, seed)
    print(render(bench.results))
    if options.publish:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(bench.results, indent=1) + "\n")
        page = REPOSITORY / "benchmarks" / "README.md"
        text = replace_section(page.read_text(encoding="utf-8"), "sae eval table", render(bench.results))
        page.write_text(text, encoding="utf-8")
    return bench.results


class Bench:
    """Trains and judges, each setting once, and remembers."""

    def __init__(self, work: Path, peers: Path | None, size: Size) -> None:
        self.work, self.peers, self.size = work, peers, size
        self.settings: QuickstartSettings = PRESETS[size.preset]
        self.file = work / "sae_eval.json"
        self.results: dict[str, Any] = {"machine": describe(work), "host": {}, "runs": {}}
        if self.file.is_file():
            self.results = json.loads(self.file.read_text())
        corpus = gather(self.settings.train_bytes, self.settings.held_out_bytes)
        model = work / "model"
        if not model.is_dir():
            self._train_subject_model(corpus, model)
        length, site = self.settings.autoencoder.context, self.settings.autoencoder.site
        texts = [document.text for domain in DOMAINS for document in corpus.train[domain]]
        loaded, params = load_model(model)
        train = contexts_of_texts(model, texts, length)
        self.train = ModelActivations(loaded, params, train, (site,))
        self.labeled = _held_out(corpus, model, work / "text", length, size.judged)
        self.source = replace(self.train, tokens=self.labeled.tokens)
        self.curve = self._curve()

    def run(self, program: str, n: int, k: int, seed: int) -> dict[str, Any]:
        """The scores of one SAE."""
        key = f"{n}/{k}/{program}/{seed}"
        if key not in self.results["runs"]:
            sae, seconds = self._train(program, n, k, seed)
            resources = {"labels": self.labeled.labels, "mask_token": END_OF_TEXT_ID, "curve": self.curve}
            card = scorecard(sae, Evidence(self.source, resources), Options(seed=seed))
            found = {"scores": card.values(), "seconds": dict(card.seconds), "train_seconds": seconds}
            self.results["runs"][key] = found
            self.file.write_text(json.dumps(self.results, indent=1))
            print(f"{key}: nmse {found['scores']['reconstruction.nmse']:.4f}", file=sys.stderr)
        return self.results["runs"][key]

    def _train_subject_model(self, corpus: Corpus, path: Path) -> None:
        """The quickstart's base model, with the checkpoints its curve is made of."""
        tokenizer = Tokenizer.from_str(train_tokenizer(corpus, self.settings))
        documents = [document.text for domain in DOMAINS for document in corpus.train[domain]]
        encoded = [one.ids for one in tokenizer.encode_batch(documents, add_special_tokens=False)]
        batches = random_windows(
            token_stream(encoded, END_OF_TEXT_ID), self.settings.context, self.settings.batch, 0
        )
        model = self.settings.model
        files = tokenizer_files(tokenizer, self.settings.context)

        def keep(step: int, params: small_llama.Params) -> None:
            if step in self.size.points:
                small_llama.save(params, model, self.work / "checkpoints" / str(step), files)

        apply = partial(small_llama.apply, model)
        params, _ = train_lm(apply, fresh_params(model, 0), batches, self.settings.base, on_step=keep)
        small_llama.save(params, model, path, files)

    def _curve(self) -> tuple[np.ndarray, np.ndarray]:
        """Losses of the model's checkpoints on the text that judges."""
        steps, losses = loss_curve(self.work / "checkpoints", halves(self.source)[1])
        self.results["host"] = {str(int(step)): float(loss) for step, loss in zip(steps, losses, strict=True)}
        return steps, losses

    def _train(self, program: str, n: int, k: int, seed: int) -> tuple[SAE, float]:
        rows = self.work / "rows.npy"
        if not rows.is_file():
            np.save(rows, self._shuffled_rows())
            np.save(self.work / "sample.npy", np.load(rows, mmap_mode="r")[: 32 * 1024])
        problem = Problem(self.train.widths[0], n, k, self.size.batch, self.size.steps, seed)
        files = {"rows": rows, "sample": self.work / "sample.npy", "out": self.work / "arrays.npz"}
        asked = {"do": "train", "trainer": program, "problem": asdict(problem)}
        done = run_worker(asked | {name: str(file) for name, file in files.items()}, self.peers)
        with np.load(self.work / "arrays.npz") as arrays:
            return _sae(dict(arrays), k), done["train_seconds"]

    def _shuffled_rows(self) -> np.ndarray:
        """Rows for all steps: whole epochs over the training text, each in an order of its own."""
        wanted, rng = self.size.steps * self.size.batch, np.random.default_rng(0)
        contexts = min(len(self.train.tokens), -(-wanted // self.train.tokens.shape[1]))
        chosen = rng.permutation(len(self.train.tokens))[:contexts]
        source = replace(self.train, tokens=self.train.tokens[np.sort(chosen)])
        rows = source.read_sites(0, source.rows)[0]
        epochs = [rng.permutation(len(rows)) for _ in range(-(-wanted // len(rows)))]
        return rows[np.concatenate(epochs)[:wanted]]


def _held_out(corpus: Corpus, model: Path, folder: Path, length: int, contexts: int) -> LabeledTokens:
    """Held-out code and prose, as files that tell the labels of tokens; contexts in a random order."""
    folder.mkdir(exist_ok=True)
    paths: list[Path] = []
    for domain, suffix in (("code", ".py"), ("prose", ".txt")):
        for number, document in enumerate(corpus.held_out[domain]):
            paths.append(folder / f"{domain}-{number:03d}{suffix}")
            paths[-1].write_text(document.text, encoding="utf-8")
    found = label_texts(model, paths, length)
    order = np.random.default_rng(0).permutation(len(found.tokens))[:contexts]
    return LabeledTokens(found.tokens[order], {name: label[order] for name, label in found.labels.items()})


def _sae(arrays: Arrays, k: int) -> SAE:
    config = SAEConfig("topk", k=k, subtract_b_dec=True)
    names = ("W_enc", "b_enc", "W_dec", "b_dec")
    return SAE(*(jnp.asarray(arrays[name]) for name in names), config=config).checked()


def render(results: Mapping[str, Any]) -> str:
    """A row for each shape and program, and the seconds of each evaluation."""
    runs: Mapping[str, Any] = results["runs"]
    groups: dict[tuple[str, str, str], list[Any]] = {}
    for key, run in runs.items():
        n, k, program, _ = key.split("/")
        groups.setdefault((n, k, program), []).append(run)
    head = ["latents", "k", "program", *_SHOWN.values(), "seeds"]
    rows = [
        [*group, *(_cell(found, name) for name in _SHOWN), str(len(found))] for group, found in groups.items()
    ]
    metrics = list(next(iter(runs.values()))["seconds"])
    times = {metric: statistics.median(run["seconds"][metric] for run in runs.values()) for metric in metrics}
    spent = ", ".join(f"{metric} {seconds:.1f} s" for metric, seconds in times.items())
    curve = ", ".join(f"{loss:.3f} at step {step}" for step, loss in results["host"].items())
    machine = ", ".join(f"{name} {value}" for name, value in results["machine"].items())
    return "\n".join(
        [
            *(
                f"| {' | '.join(cells)} |"
                for cells in (head, ["---:", "---:", "---", *["---:"] * (len(head) - 3)])
            ),
            *(f"| {' | '.join(cells)} |" for cells in rows),
            "",
            f"Means over seeds, ± their standard deviation. The model loses {curve} (nats per token). Median "
            f"time per evaluation, compilation included: {spent}. Machine: {machine}.",
        ]
    )


def _cell(found: Sequence[Mapping[str, Any]], name: str) -> str:
    values = [run["scores"][name] for run in found if name in run["scores"]]
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sae_eval")
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for the model, activations and results"
    )
    parser.add_argument("--peers-env", type=Path, help="virtual environment of the peers")
    programs = [*OURS, *PEERS]
    parser.add_argument("--programs", nargs="+", choices=TRAINERS, default=programs, metavar="PROGRAM")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="the tiny preset: shows that it runs")
    parser.add_argument("--publish", action="store_true", help="write the table of benchmarks/README.md")
    options = parser.parse_args(arguments)
    if options.quick:
        options.seeds = 1
    if set(options.programs) - set(OURS) and not options.peers_env:
        parser.error("the peers need an environment of their own: --peers-env VENV, or --programs mergelab")
    if options.publish and options.quick:
        parser.error("--publish writes figures of the full size: leave --quick out")
    options.work.mkdir(parents=True, exist_ok=True)
    return options


if __name__ == "__main__":
    main()
