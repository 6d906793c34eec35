"""Times the forward pass and generation of random Llamas: mergelab and transformers, side by side.

    python -m benchmarks.forward --work DIR [--publish]
    python -m benchmarks.forward --work DIR --only --folder SmolLM2=path/to/SmolLM2 --dtype bfloat16 --batch 1

The programs take turns, each in a process of its own, so that a machine that slows down slows both; the table
gives medians. Both must generate the same tokens. `--publish` writes the table into benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import describe
from benchmarks.process import measure
from benchmarks.table import replace_section

__all__ = ["MODELS", "build_model", "main", "render"]

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results" / "forward.json"
PROGRAMS = ("mergelab", "transformers")
AIMS = {"prefill": 1.2, "decode": 3.0}

MODELS: Mapping[str, dict[str, int]] = {
    "tiny": {
        "vocab_size": 1024,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
    },
    "100M": {
        "vocab_size": 32000,
        "hidden_size": 640,
        "intermediate_size": 1728,
        "num_hidden_layers": 12,
        "num_attention_heads": 10,
    },
}
"""The shapes: 2.2M and 100.4M parameters."""


def build_model(folder: Path, shape: Mapping[str, int]) -> int:
    """Writes a random Llama unless it is there; returns its number of parameters."""
    from mergelab.models.families import model_from_config
    from mergelab.models.save import save_model

    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 2048}
    model = model_from_config({**config, **shape})
    if not folder.is_dir():
        save_model(model, model.init(0), folder)
    return sum(leaf.size for leaf in model.table())


def count_parameters(folder: Path) -> int:
    """Parameters of a model folder, by its configuration."""
    from mergelab.models.families import model_from_config

    model = model_from_config(json.loads((folder / "config.json").read_text()))
    return sum(leaf.size for leaf in model.table())


def _named_folder(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not equals or not Path(folder, "config.json").is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FOLDER of a model")
    return name, Path(folder)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark as the command line asks; returns what it measured."""
    options = _parse(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    results: dict[str, Any] = {
        "machine": describe(options.work),
        "load": os.getloadavg()[0],
        "repeats": options.repeats,
        "pass": {
            "batch": options.batch,
            "length": options.length,
            "new": options.new,
            "dtype": options.dtype,
        },
        "models": {},
    }
    folders = {name: options.work.resolve() / name for name in options.only}
    sizes_of = {name: build_model(folder, MODELS[name]) for name, folder in folders.items()}
    for name, folder in options.folder:
        folders[name], sizes_of[name] = folder.resolve(), count_parameters(folder)
    for name, folder in folders.items():
        parameters = sizes_of[name]
        runs: dict[str, list[dict[str, Any]]] = {program: [] for program in PROGRAMS}
        for turn in range(options.repeats):
            for program in PROGRAMS:
                sizes = [f"--{key}={value}" for key, value in results["pass"].items()]
                command = [sys.executable, "-m", "benchmarks.forward_worker", program, str(folder), *sizes]
                measured = measure(command, cwd=options.work, env=environment)
                runs[program].append(json.loads(measured.stdout.splitlines()[-1]))
            print(f"{turn + 1}/{options.repeats} {name}", file=sys.stderr)
        results["models"][name] = {"parameters": parameters, **_summary(runs)}
    (options.json or options.work / "forward.json").write_text(json.dumps(results, indent=1))
    print(render(results))
    if options.publish:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        page = REPOSITORY / "benchmarks" / "README.md"
        text = replace_section(page.read_text(encoding="utf-8"), "forward table", render(results))
        page.write_text(text, encoding="utf-8")
    return results


def _summary(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Medians of both programs, and how far their results agree."""
    ours, theirs = (runs[program][0] for program in PROGRAMS)
    medians = {
        program: {kind: statistics.median(run[f"{kind}_tokens_per_second"] for run in found) for kind in AIMS}
        for program, found in runs.items()
    }
    return {
        "median": medians,
        "device": {program: found[0]["device"] for program, found in runs.items()},
        "same_tokens": ours["generated"] == theirs["generated"],
        "largest_logit_difference": float(
            np.abs(np.array(ours["logits"]) - np.array(theirs["logits"])).max()
        ),
    }


def render(results: Mapping[str, Any]) -> str:
    """The table: one row per model and phase, then the machine; a ratio that misses its aim is bold."""
    lines = [
        "| model | phase | mergelab tokens/s | transformers tokens/s | ratio | aim | same tokens |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for name, model in results["models"].items():
        for phase, aim in AIMS.items():
            ours, theirs = (model["median"][program][phase] for program in PROGRAMS)
            ratio = f"{ours / theirs:.2f}" if ours / theirs >= aim else f"**{ours / theirs:.2f}**"
            same = "yes" if model["same_tokens"] else "**no**"
            lines.append(
                f"| {name} ({model['parameters'] / 1e6:.1f}M) | {phase} | {ours:,.0f} | {theirs:,.0f} | "
                f"{ratio} | {aim:g} | {same} |"
            )
    p = results["pass"]
    machine = ", ".join(f"{name} {value}" for name, value in results["machine"].items())
    settings = (
        f"Medians of {results['repeats']} turns, {p['dtype']}; prefill {p['batch']} x {p['length']} tokens, "
        f"decode {p['batch']} x {p['new']} tokens after prompts of 16, greedy. "
        f"Load average of the machine at the start: {results['load']:.1f}. Machine: {machine}."
    )
    return "\n".join([*lines, "", settings])


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.forward")
    parser.add_argument("--work", type=Path, required=True, help="folder for models (0.4 GB, kept)")
    parser.add_argument("--only", nargs="*", choices=MODELS, default=list(MODELS), metavar="MODEL")
    parser.add_argument(
        "--folder", action="append", type=_named_folder, default=[], metavar="NAME=FOLDER",
        help="one more model, a real one; repeatable",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--json", type=Path, help="where the measurements go (default: forward.json in --work)"
    )
    parser.add_argument("--publish", action="store_true", help="write the table of benchmarks/README.md")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
