"""Every operator on three fine-tuned siblings of a language model: what is kept of their gains, at what cost.

    python -m benchmarks.siblings --model path/to/SmolLM2 --work DIR [--mergekit-env VENV] [--publish]

`mergelab finetune` trains a sibling on each kind of text (`sibling_texts.py`); every operator merges them
with the base, in a process of its own, and the merge is judged on passages of all three. What is done is kept
in the folder and not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.machine import describe
from benchmarks.process import measure
from benchmarks.sibling_page import page
from benchmarks.sibling_texts import DOMAINS, write_texts

__all__ = ["MERGEKIT", "MERGES", "main"]

FOLDER = Path(__file__).resolve().parent
RESULTS, PAGE = FOLDER / "results" / "siblings.json", FOLDER / "siblings.md"

_WHOLE, _THIRD = {"weight": 1.0}, {"weight": 1 / 3}
MERGES: Mapping[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # name: (merge_method, parameters of each sibling, parameters of the merge)
    "average": ("linear", _THIRD, {}),
    "task_arithmetic, 1": ("task_arithmetic", _WHOLE, {}),
    "task_arithmetic, 0.5": ("task_arithmetic", {"weight": 0.5}, {}),
    "ties": ("ties", {**_WHOLE, "density": 0.2}, {}),
    "dare_linear": ("dare_linear", {**_WHOLE, "density": 0.5}, {}),
    "dare_ties": ("dare_ties", {**_WHOLE, "density": 0.5}, {}),
    "darex": ("darex", {**_WHOLE, "q": 0.5, "density": 0.3}, {}),
    "della": ("della", {**_WHOLE, "density": 0.5}, {}),
    "della_linear": ("della_linear", {**_WHOLE, "density": 0.5}, {}),
    "breadcrumbs": ("breadcrumbs", {**_WHOLE, "density": 0.9}, {}),
    "breadcrumbs_ties": ("breadcrumbs_ties", {**_WHOLE, "density": 0.9}, {}),
    "sce": ("sce", {}, {"select_topk": 0.5}),
    "ram": ("ram", {}, {}),
    "ramplus_tl": ("ramplus_tl", {}, {}),
    "multislerp": ("multislerp", _THIRD, {}),
    "karcher": ("karcher", {}, {}),
    "model_stock": ("model_stock", {}, {}),
    "magmax": ("magmax", {}, {}),
    "consensus": ("consensus", {}, {}),
    "pcb": ("pcb", {}, {}),
    "lines": ("lines", {}, {"beta": 0.5}),
    "star": ("star", {}, {}),
    "svc": ("svc", {}, {}),
    "opcm": ("opcm", {}, {}),
    "knots": ("knots", {}, {}),
    "core_space": ("core_space", {}, {"method": "tsv_m"}),
    "wudi": ("wudi", {}, {}),
    "wudi, gradient": ("wudi", {}, {"solver": "gradient", "steps": 30}),
    "iso_c": ("iso_c", {}, {}),
    "iso_cts": ("iso_cts", {}, {}),
    "tsv_m": ("tsv_m", {}, {}),
    "emr, unified": ("emr", {}, {}),
    "regmean": ("regmean", {}, {}),
    "fisher": ("fisher", {}, {}),
}
MERGEKIT = frozenset(
    (
        "linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "della", "della_linear", "sce",
        "breadcrumbs", "breadcrumbs_ties", "multislerp", "karcher", "model_stock",
    )
)  # fmt: skip
"""Methods that mergekit 0.1.5 has for any number of models."""

_STATISTICS = {"regmean": "gram", "fisher": "fisher"}
_BASELESS = frozenset({"linear", "karcher", "multislerp", "regmean", "fisher"})


class Bench:
    """The folder, its texts and siblings, and what was measured so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.work = options, options.work.resolve()
        self.base = options.model.resolve()
        self.texts = write_texts(self.work / "texts", train=options.train, held_out=options.held_out)
        self.siblings = {domain: self.work / domain.replace(" ", "-") for domain in DOMAINS}
        path = os.pathsep.join(filter(None, [str(FOLDER.parent), os.environ.get("PYTHONPATH")]))
        self.env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}

    def kept(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A row, made unless it is there."""
        path = self.work / "rows" / f"{name.replace(' ', '_')}.json"
        if not path.is_file():
            path.parent.mkdir(exist_ok=True)
            row = make()
            path.write_text(json.dumps(row) + "\n", encoding="utf-8")
            print(f"{name}: {_brief(row)}", file=sys.stderr, flush=True)
        return json.loads(path.read_text(encoding="utf-8"))

    def run(self, *arguments: str | Path) -> tuple[float, int]:
        """Seconds and peak bytes of a command of mergelab."""
        command = [sys.executable, "-m", "mergelab", *map(str, arguments)]
        measured = measure(command, cwd=self.work, env=self.env)
        return measured.seconds, measured.peak_anonymous

    def finetune(self, domain: str) -> dict[str, Any]:
        """One sibling and what it cost."""
        o, out = self.options, self.siblings[domain]
        train, held_out = self.texts[domain]
        seconds, peak = self.run(
            "finetune", self.base, "--text", train, "--held-out", held_out, "--out", out, "--overwrite",
            "--tokens", str(o.tokens), "--context", "256", "--batch", "4", "--lr", str(o.lr),
        )  # fmt: skip
        record = json.loads((out / "finetune.json").read_text(encoding="utf-8"))
        losses = {key: record[key] for key in ("before", "after") if key in record}
        return {"seconds": seconds, "memory": peak, "losses": losses}

    def judged(self, model: Path) -> dict[str, Any]:
        """Bits and bytes of every passage, by domain."""
        from mergelab.verdict import evaluate_model

        held_out = [passages for _, passages in self.texts.values()]
        scores = evaluate_model(model, text=held_out, context=192, dtype="float32").text
        assert scores is not None and scores.bits.size == len(self.texts) * self.options.held_out
        columns = {"bits": scores.bits, "bytes": scores.bytes}
        parts = {name: column.reshape(len(self.texts), -1) for name, column in columns.items()}
        return {
            "scores": {
                domain: {name: part[number].tolist() for name, part in parts.items()}
                for number, domain in enumerate(self.texts)
            }
        }

    def merge(self, name: str) -> dict[str, Any]:
        """One operator: its cost, mergekit's, and what its output says."""
        method, each, shared = MERGES[name]
        out = self.work / "merged.out"
        shutil.rmtree(out, ignore_errors=True)
        statistics = self.statistics(method)
        recipe = self.recipe(method, each, shared, statistics)
        seconds, peak = self.run("merge", recipe, "--out", out)
        row = {"seconds": seconds, "memory": peak, **self.judged(out)}
        shutil.rmtree(out)
        if statistics:
            row["statistics_seconds"] = sum(taken for _, taken in statistics.values())
        environment = self.options.mergekit_env
        if environment and method in MERGEKIT:
            env = {key: value for key, value in self.env.items() if key != "PYTHONPATH"}
            program = str(environment.resolve() / "bin" / "mergekit-yaml")
            command = [program, str(recipe), str(out), "--quiet", "--no-write-model-card"]
            theirs = measure(command, cwd=self.work, env=env)
            row |= {"mergekit_seconds": theirs.seconds, "mergekit_memory": theirs.peak_anonymous}
            shutil.rmtree(out)
        return row

    def statistics(self, method: str) -> dict[str, tuple[Path, float]]:
        """A folder of statistics for each sibling on its own text, and the seconds it took."""
        kind = _STATISTICS.get(method)
        found: dict[str, tuple[Path, float]] = {}
        for domain, sibling in self.siblings.items() if kind else ():
            out = self.work / f"{sibling.name}.{kind}"
            taken, _ = self.run(
                "statistics", sibling, "--text", self.texts[domain][0], "--kind", str(kind), "--out", out,
                "--tokens", "4096", "--context", "256", "--overwrite",
            )  # fmt: skip
            found[domain] = (out, taken)
        return found

    def recipe(
        self,
        method: str,
        each: Mapping[str, Any],
        shared: Mapping[str, Any],
        statistics: Mapping[str, tuple[Path, float]],
    ) -> Path:
        """The recipe as a file."""
        models = [
            {"model": str(path), "parameters": dict(each)}
            | ({"statistics": str(statistics[domain][0])} if statistics else {})
            for domain, path in self.siblings.items()
        ]
        recipe = {"merge_method": method, "models": models, "parameters": dict(shared), "dtype": "float32"}
        if method not in _BASELESS:
            recipe["base_model"] = str(self.base)
        path = self.work / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        return path


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark as the command line asks; returns what it measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.siblings")
    parser.add_argument("--model", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--work", type=Path, required=True, help="folder for three models and results")
    parser.add_argument("--mergekit-env", type=Path, help="virtual environment that holds mergekit 0.1.5")
    parser.add_argument("--only", nargs="+", choices=MERGES, default=list(MERGES), metavar="MERGE")
    parser.add_argument("--tokens", type=int, default=20_480, help="tokens that each sibling learns")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--train", type=int, default=120_000, help="characters to learn from, of each kind")
    parser.add_argument("--held-out", type=int, default=20, help="passages to judge on, of each kind")
    parser.add_argument("--busy", action="store_true", help="other work went on: seconds are left out")
    parser.add_argument("--publish", action="store_true", help="write siblings.md and its results")
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(options)
    tuned = {d: bench.kept(f"finetune {d}", lambda d=d: bench.finetune(d)) for d in DOMAINS}
    parents = {"base": bench.base, **bench.siblings}
    results = {
        "machine": describe(bench.work),
        "busy": options.busy,
        "left_out": [name for name in MERGES if name not in options.only],
        "settings": {key: getattr(options, key) for key in ("tokens", "lr", "train", "held_out")},
        "model": bench.base.name,
        "finetune": tuned,
        "parents": {n: bench.kept(f"judge {n}", lambda p=p: bench.judged(p)) for n, p in parents.items()},
        "merges": {name: bench.kept(name, lambda name=name: bench.merge(name)) for name in options.only},
    }
    text = page(results)
    print(text)
    if options.publish:
        RESULTS.write_text(json.dumps(results) + "\n", encoding="utf-8")
        PAGE.write_text(text, encoding="utf-8")
    return results


def _brief(row: Mapping[str, Any]) -> str:
    parts = [f"{key} {value:.4g}" for key, value in row.items() if isinstance(value, int | float)]
    for domain, score in row.get("scores", {}).items():
        parts.append(f"{domain} {np.sum(score['bits']) / np.sum(score['bytes']):.4f}")
    return ", ".join(parts)


if __name__ == "__main__":
    main()
