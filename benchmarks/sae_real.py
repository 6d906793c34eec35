"""SAEs of a real model's activations, ours and the peers', at default and best rates: writes sae_real.md.

    python -m benchmarks.sae_real --work DIR --model SMOLLM2 --peers-env VENV [--publish]

Every program is trained on the same rows in the same order, once through; files of its own format are then
read by `load_sae`, and judged on held-out text. Rates are compared at the first seed by the error alone; the
default and the best are trained at every seed, and scored in full. The result of every training and of every
scoring is kept in DIR as a file, so that a run that was stopped goes on where it stood.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import describe
from benchmarks.real_rows import RowsOfModel, held_out_text
from benchmarks.real_scores import Judge, RememberedActivations
from benchmarks.sae_peers.problem import Problem
from benchmarks.sae_step import REPOSITORY, run_worker
from mergelab.models import load_model
from mergelab.sae import SAE, load_sae
from mergelab.sae.formats.shared import fold_norm_scaling
from mergelab.text.tokenizer import load_tokenizer

__all__ = ["FACTORS", "Bench", "main", "render"]

RESULTS = REPOSITORY / "benchmarks" / "results" / "sae_real.json"
PAGE = REPOSITORY / "benchmarks" / "sae_real.md"

FACTORS: Mapping[str, Sequence[float]] = {
    "mergelab": (0.5, 1, 2, 4),
    "sparsify": (0.25, 0.5, 1, 2),
    "sparsify+Adam": (1, 4, 8, 16),
    "SAELens": (1, 2, 4, 8),
}
"""Programs, and the rates of each: multiples of its default, which is among them."""

_COLUMNS = {
    "fvu": ("FVU", 4),
    "delta_ce": ("delta CE", 3),
    "alive": ("alive", 3),
    "f1_1": ("1-sparse F1", 3),
    "f1_5": ("5-sparse F1", 3),
    "n2g_precision": ("N2G precision", 3),
    "n2g_recall": ("N2G recall", 3),
    "n2g_f1": ("N2G F1", 3),
    "cpu_seconds": ("training CPU s", 0),
}
_LOWER = {"fvu", "delta_ce", "cpu_seconds"}
"""Figures of which less is better; of the others more is."""


@dataclass(frozen=True)
class Size:
    """How much is trained and judged.

    Attributes:
        tokens: tokens the model is run on for training; at context 128 one in 128 does not count.
        rows: rows that are trained on.
        text_bytes: bytes of text of each domain, enough for the tokens.
        latents: latents of an SAE.
        k: latents per token.
        batch: rows in a step.
        held_out: contexts of held-out text, half of which is judged.
        spliced: judged contexts whose loss is taken.
        explained: latents that are explained.
        examples: examples of an explanation.
    """

    tokens: int
    rows: int
    text_bytes: int
    latents: int
    k: int
    batch: int
    held_out: int
    spliced: int
    explained: int
    examples: int


FULL = Size(104_448, 51_200, 500_000, 2048, 32, 256, 64, 16, 8, 4)
QUICK = Size(4096, 2048, 20_000, 128, 4, 256, 8, 2, 2, 2)
_CONTEXT = 128


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark as the command line asks; returns what it found."""
    options = _parse(arguments)
    size = QUICK if options.quick else FULL
    bench = Bench(options.work, options.model, options.site, options.peers_env, size)
    programs = {name: FACTORS[name] for name in options.programs}
    for program, factors in programs.items():
        bench.train(program, [(factor, 0) for factor in factors])
        best = bench.best(program)
        bench.train(program, [(factor, seed) for seed in range(options.seeds) for factor in {1, best}])
    for seed in range(options.seeds):
        for program in programs:
            for factor in dict.fromkeys((1, bench.best(program))):
                bench.scored(program, factor, seed)
    results = bench.results()
    print(render(results))
    if options.publish:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        PAGE.write_text(page(results), encoding="utf-8")
    return results


class Bench:
    """Trains and scores, each setting once, and keeps what it found."""

    def __init__(self, work: Path, model: Path, site: str, peers: Path | None, size: Size) -> None:
        self.work, self.model, self.site, self.peers, self.size = work, model, site, peers, size
        self.rows = RowsOfModel(model, site, _CONTEXT, size.tokens, size.rows, size.text_bytes)
        (work / "cells").mkdir(parents=True, exist_ok=True)

    @cached_property
    def factor(self) -> float:
        """What the model's rows are multiplied by before any program sees them."""
        return self.rows.write(self.work)

    @cached_property
    def judge(self) -> Judge:
        """The held-out text."""
        size = self.size
        model, params = load_model(self.model, dtype="float32")
        tokenizer = load_tokenizer(self.model)
        text = held_out_text(self.model, _CONTEXT, size.held_out, self.work / "held-out")
        source = RememberedActivations(
            model, params, text.tokens, (self.site,), special_ids=tokenizer.special_ids
        )
        return Judge(source, text.labels, tokenizer.mask_id, size.spliced, size.explained, size.examples)

    def train(self, program: str, runs: Sequence[tuple[float, int]]) -> None:
        """Trains at multiples of the default rate and seeds, what is not there yet, in one process."""
        scale, size = self.factor, self.size
        assert scale > 0
        (self.work / "saes").mkdir(exist_ok=True)
        missing = []
        for factor, seed in dict.fromkeys(runs):
            folder = self._folder(program, factor, seed)
            if not Path(f"{folder}.json").is_file():
                shutil.rmtree(folder, ignore_errors=True)
                missing.append({"factor": factor, "seed": seed, "folder": str(folder)})
        if missing:
            rows = np.load(self.work / "rows.npy", mmap_mode="r")
            np.save(self.work / "sample.npy", rows[: min(size.rows, 32 * 1024)])
            problem = Problem(rows.shape[1], size.latents, size.k, size.batch, size.rows // size.batch)
            files = {"rows": str(self.work / "rows.npy"), "sample": str(self.work / "sample.npy")}
            asked = {"do": "sweep", "trainer": program, "problem": asdict(problem), "runs": missing}
            run_worker(asked | files, self.peers)

    def trained(self, program: str, factor: float, seed: int) -> dict[str, Any]:
        """Rate, CPU seconds, error and fraction alive of a training."""

        def judge() -> dict[str, Any]:
            told = json.loads(Path(f"{self._folder(program, factor, seed)}.json").read_text())
            return told | self.judge.reconstruction(self._load(program, factor, seed))

        return self._kept(f"{program}-{factor:g}-{seed}", judge)

    def scored(self, program: str, factor: float, seed: int) -> dict[str, Any]:
        """All scores of a training."""

        def score() -> dict[str, Any]:
            sae = self._load(program, factor, seed)
            loss = self.judge.spliced_loss(sae) - self.own_loss()
            return {"delta_ce": loss} | self.judge.probing(sae) | self.judge.explanations(sae)

        found = self.trained(program, factor, seed)
        return found | self._kept(f"{program}-{factor:g}-{seed}-scores", score)

    def own_loss(self) -> float:
        """Nats per token of the model as it is."""
        return self._kept("model", lambda: {"ce": self.judge.spliced_loss(None)})["ce"]

    def best(self, program: str) -> float:
        """The multiple of the default rate with the lowest error at the first seed."""
        return min(FACTORS[program], key=lambda factor: self.trained(program, factor, 0)["fvu"])

    def results(self) -> dict[str, Any]:
        """All that was found, in plain data."""
        kept = {path.stem: json.loads(path.read_text()) for path in sorted((self.work / "cells").iterdir())}
        return {"machine": describe(self.work), "size": asdict(self.size), "site": self.site, "cells": kept}

    def _kept(self, name: str, find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        path = self.work / "cells" / f"{name}.json"
        if not path.is_file():
            started = time.process_time()
            found = find()
            found["parent_cpu_seconds"] = time.process_time() - started
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(found))
            partial.replace(path)
            brief = {key: round(value, 4) for key, value in found.items() if isinstance(value, float)}
            print(f"{name}: {brief}", file=sys.stderr, flush=True)
        return json.loads(path.read_text())

    def _folder(self, program: str, factor: float, seed: int) -> Path:
        return self.work / "saes" / f"{program}-{factor:g}-{seed}"

    def _load(self, program: str, factor: float, seed: int) -> SAE:
        return fold_norm_scaling(load_sae(self._folder(program, factor, seed)), self.factor)


def render(results: Mapping[str, Any]) -> str:
    """A row for each program at its default and at its best rate."""
    groups = list(_groups(results["cells"]))
    means = {
        name: [statistics.mean(values) for _, _, group in groups if (values := _values(group, name))]
        for name in _COLUMNS
    }
    head = ["program", "rate", *(title for title, _ in _COLUMNS.values()), "seeds"]
    rows = []
    for program, rate, group in groups:
        cells = []
        for name, (_, digits) in _COLUMNS.items():
            values = _values(group, name)
            if not values:
                cells.append("")
                continue
            mean = statistics.mean(values)
            text = f"{mean:.{digits}f}"
            if mean == (min if name in _LOWER else max)(means[name]):
                text = f"**{text}**"
            if len(values) > 1 and digits:
                text += f" ± {statistics.stdev(values):.{digits}f}"
            cells.append(text)
        rows.append([program, rate, *cells, str(len(group))])
    table = (head, ["---", "---", *["---:"] * (len(head) - 2)], *rows)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in table)


def _groups(cells: Mapping[str, Any]) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """Program, rate in words, and the figures of every seed that was scored in full."""
    for program, factors in FACTORS.items():
        known = {factor: cells.get(f"{program}-{factor:g}-0") for factor in factors}
        first = {factor: run for factor, run in known.items() if run}
        if not first:
            continue
        best = min(first, key=lambda factor: first[factor]["fvu"])
        for factor in dict.fromkeys((1, best)):
            scored = [
                cells[name] | cells[f"{name}-scores"]
                for name in (f"{program}-{factor:g}-{seed}" for seed in range(99))
                if f"{name}-scores" in cells
            ]
            if not scored:
                continue
            said = [f"{scored[0]['learning_rate']:.2g}"]
            said += ["default"] if factor == 1 else []
            said += [f"best of {len(first)}"] if factor == best and len(first) > 1 else []
            yield program, ", ".join(said), scored


def _values(group: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [run[name] for run in group if name in run]


def page(results: Mapping[str, Any]) -> str:
    """benchmarks/sae_real.md, all of it."""
    size, machine = results["size"], results["machine"]
    described = ", ".join(f"{name} {value}" for name, value in machine.items())
    judged = size["held_out"] // 2 * _CONTEXT
    return f"""# SAEs of SmolLM2-135M-Instruct, ours and the peers'

Written by `python -m benchmarks.sae_real --work WORK --model SMOLLM2 --peers-env PEERS --publish`; the
environment of the peers is that of [README.md](README.md).

Site `{results["site"]}`; {size["rows"]:,} tokens that count by the library's defaults (not the first of a
context, no special ones, no attention sinks), of contexts of {_CONTEXT}, code and docstrings of Python's
standard library in turns; {size["latents"]:,} latents, k = {size["k"]}, {size["rows"] // size["batch"]} steps
of {size["batch"]} rows, each row seen once, in the same order by all.
All programs get the rows multiplied by one number that brings the variance per coordinate to 1, which
mergelab does itself and the peers do not by default (SAELens' `expected_average_only_in` is nearly that); the
weights are scaled back before they are judged. AuxK and all else is at each program's defaults; *sparsify* is
its default optimizer, sign descent, *sparsify+Adam* its other one. The files that each program writes are
read by `load_sae`.

Judged on {judged:,} held-out tokens, of which those that count are counted: **FVU** is the squared error over
that of the mean; **delta CE** the loss in nats per token, over the model's own
{results["cells"]["model"]["ce"]:.3f}, with the reconstructions spliced in, on {size["spliced"]} contexts;
**alive** the fraction of latents active on some token; **F1** that of probes on the latents that tell a
property of the token, mean over properties; **N2G** token patterns of {size["explained"]} latents, from
{size["examples"]} examples each. **CPU s** is the training's, initialization included, after a step that
compiles. The best rate is that of least FVU at the first seed. In bold the best of a column.

{render(results)}

Means over seeds (of initial parameters), ± their standard deviation. FVU of every rate at the first seed; if
the best of four is the highest, one beyond it may be better:

{_rates(results["cells"])}

Machine, shared with other work while this ran: {described}.
"""


def _rates(cells: Mapping[str, Any]) -> str:
    lines = ["| program | rate: FVU |", "| --- | --- |"]
    for program, factors in FACTORS.items():
        found = [cells.get(f"{program}-{factor:g}-0") for factor in factors]
        said = ", ".join(f"{run['learning_rate']:.2g}: {run['fvu']:.4f}" for run in found if run)
        if said:
            lines.append(f"| {program} | {said} |")
    return "\n".join(lines)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sae_real")
    parser.add_argument("--work", type=Path, required=True, help="folder for activations, SAEs and results")
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder of the model")
    parser.add_argument("--site", default="blocks.15.resid_post", help="site that is read")
    parser.add_argument("--peers-env", type=Path, help="virtual environment of the peers")
    parser.add_argument("--programs", nargs="+", choices=FACTORS, default=list(FACTORS), metavar="PROGRAM")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="few rows and latents: shows that it runs")
    parser.add_argument("--publish", action="store_true", help="write benchmarks/sae_real.md and its results")
    options = parser.parse_args(arguments)
    if set(options.programs) - {"mergelab"} and not options.peers_env:
        parser.error("the peers need an environment of their own: --peers-env VENV, or --programs mergelab")
    if options.publish and options.quick:
        parser.error("--publish writes figures of the full size: leave --quick out")
    options.work.mkdir(parents=True, exist_ok=True)
    return options


if __name__ == "__main__":
    main()
