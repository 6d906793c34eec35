"""Times loading a 1 GB checkpoint to one device and to eight: against reading its bytes, and transformers.

    python -m benchmarks.convert --work DIR [--publish] [--transformers-python PYTHON]

The programs take turns, each in a process of its own, so that a machine that slows down slows them all; the
table gives medians. `--publish` writes it into benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks.convert_worker import PROGRAMS
from benchmarks.family import QWEN2_0_5B, TINY, Shape
from benchmarks.machine import describe
from benchmarks.process import measure
from benchmarks.table import replace_section

__all__ = ["build_model", "main", "render"]

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results" / "convert.json"
TIME_AIM, MEMORY_AIM = 1.5, 0.1
FLOOR = "read"


def build_model(folder: Path, shape: Shape) -> int:
    """Writes a random bfloat16 Qwen2 unless it is there; returns the bytes of its weights."""
    from mergelab.models.families import model_from_config
    from mergelab.models.save import save_model
    from mergelab.models.table import tree_from_leaves

    fixed = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True}
    model = model_from_config({**fixed, **asdict(shape), "max_position_embeddings": 32768})
    if not folder.is_dir():
        draw = np.random.Generator(np.random.SFC64(0))
        arrays = {
            leaf: (draw.standard_normal(leaf.shape, np.float32) * 0.02).astype(ml_dtypes.bfloat16)
            for leaf in model.table()
        }
        save_model(model, tree_from_leaves(arrays), folder)
    return sum(2 * leaf.size for leaf in model.table())


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark as the command line asks; returns what it measured."""
    options = _parse(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    folder = options.work.resolve() / ("tiny" if options.quick else "model")
    nbytes = build_model(folder, TINY if options.quick else QWEN2_0_5B)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in options.only}
    load = os.getloadavg()[0]
    for turn in range(-1, options.repeats):  # the first turn brings files and libraries into memory
        # Memory that the program before has just freed is cheaper to get: the order changes.
        for name in random.Random(turn).sample(options.only, len(options.only)):
            python = options.transformers_python if name == "transformers" else sys.executable
            command = [str(python), "-m", "benchmarks.convert_worker", name, str(folder)]
            measured = measure(command, cwd=options.work, env=environment)
            found = json.loads(measured.stdout.splitlines()[-1])
            beyond = max(0.0, measured.peak_anonymous - found["before"] - found["loaded"])
            if turn >= 0:
                runs[name].append({"seconds": found["seconds"], "loaded": found["loaded"], "beyond": beyond})
        print(f"{turn + 1}/{options.repeats}", file=sys.stderr)
    results = {
        "machine": describe(options.work),
        "load": load,
        "repeats": options.repeats,
        "bytes": nbytes,
        "programs": {
            name: {key: statistics.median(run[key] for run in found) for key in found[0]}
            for name, found in runs.items()
        },
    }
    (options.work / "convert.json").write_text(json.dumps(results, indent=1))
    print(render(results))
    if options.publish:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        page = REPOSITORY / "benchmarks" / "README.md"
        text = replace_section(page.read_text(encoding="utf-8"), "convert table", render(results))
        page.write_text(text, encoding="utf-8")
    return results


def render(results: Mapping[str, Any]) -> str:
    """The table: one row per program, then the machine; a figure of ours that misses its aim is bold."""
    lines = ["| program | seconds | x read | memory beyond the arrays, MB |", "| --- | ---: | ---: | ---: |"]
    floor = results["programs"][FLOOR]["seconds"]
    for name, found in results["programs"].items():
        ratio, share = found["seconds"] / floor, found["beyond"] / results["bytes"]
        ours = name.startswith("mergelab")
        times = f"**{ratio:.2f}**" if ours and ratio > TIME_AIM else f"{ratio:.2f}"
        memory = f"{found['beyond'] / 1e6:.0f}"
        memory = f"**{memory}**" if ours and share > MEMORY_AIM else memory
        lines.append(f"| {name} | {found['seconds']:.3f} | {times} | {memory} |")
    machine = ", ".join(f"{name} {value}" for name, value in results["machine"].items())
    return "\n".join([
        *lines,
        "",
        f"Medians of {results['repeats']} turns; {results['bytes'] / 1e6:.0f} MB of bfloat16 weights in the "
        f"page cache. Load average of the machine at the start: {results['load']:.1f}. Machine: {machine}.",
    ])  # fmt: skip


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convert")
    parser.add_argument("--work", type=Path, required=True, help="folder for the model (1 GB, kept)")
    parser.add_argument(
        "--only", nargs="+", choices=PROGRAMS, default=list(PROGRAMS), metavar="PROGRAM",
        help=f"some of: {', '.join(PROGRAMS)}; {FLOOR!r} must be among them",
    )  # fmt: skip
    parser.add_argument(
        "--transformers-python", type=Path, default=Path(sys.executable),
        help="interpreter of an environment that holds torch and transformers",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a tiny model: shows that it runs, not how fast")
    parser.add_argument("--publish", action="store_true", help="write the table of benchmarks/README.md")
    options = parser.parse_args(arguments)
    if FLOOR not in options.only:
        parser.error(f"--only must name {FLOOR!r}, which the others are compared with")
    if options.publish and options.quick:
        parser.error("--publish writes figures of the full-size model: leave --quick out")
    return options


if __name__ == "__main__":
    main()
