"""Times `mergelab diff` on a pair of 1.5B models: against reading their files once.

    python -m benchmarks.diff --work DIR [--publish]

Both files (3 GB each, bfloat16, made once) are in the page cache if memory allows. The programs take turns,
each in a process of its own; the table gives medians. `--publish` writes it into benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks.family import QWEN2_0_5B, TINY, Shape
from benchmarks.machine import describe
from benchmarks.process import measure
from benchmarks.table import replace_section
from mergelab.platform import usable_cores

__all__ = ["build_pair", "main", "render"]

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results" / "diff.json"
QWEN2_1_5B = replace(
    QWEN2_0_5B, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12
)
PROGRAMS = ("read", "mergelab diff")
SECTION = """
## Comparing two models

    python -m benchmarks.diff --work WORK --publish

`diff.py` compares a random pair in the shape of Qwen2-1.5B, 3 GB each in bfloat16. `read` reads the same
bytes once, by as many threads, into buffers that are used again, from the page cache, which is many times as
fast as a disk. A comparison keeps up with a disk whose GB/s are below its own. Imports are not counted.

<!-- diff table -->
<!-- end of diff table -->
"""
_CHUNK = 4 << 20


def build_pair(folder: Path, shape: Shape) -> list[Path]:
    """Writes a random bfloat16 Qwen2 and one that differs by a hundredth of it, unless they are there."""
    from mergelab.models.families import model_from_config
    from mergelab.models.table import stored_shapes

    fixed = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True}
    config = {**fixed, **vars(shape), "max_position_embeddings": 32768}
    shapes = stored_shapes(model_from_config(config).table())
    folders = [folder / "base", folder / "tuned"]
    header: dict[str, Any] = {}
    end = 0
    for name, size in shapes.items():
        begin, end = end, end + 2 * math.prod(size)
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    for number, each in enumerate(folders):
        if (each / "config.json").is_file():
            continue
        each.mkdir(parents=True, exist_ok=True)
        draw, change = (np.random.Generator(np.random.SFC64(seed)) for seed in (0, 1))
        with (each / "model.safetensors").open("wb") as file:  # one tensor is in memory at a time
            file.write(len(text).to_bytes(8, "little") + text)
            for size in shapes.values():
                values = draw.standard_normal(size, np.float32) * np.float32(0.02)
                if number:
                    values += change.standard_normal(size, np.float32) * np.float32(2e-4)
                file.write(values.astype(ml_dtypes.bfloat16).tobytes())
        (each / "config.json").write_text(json.dumps(config))
    return folders


def read(files: Sequence[Path], threads: int) -> int:
    """Reads every byte once, by several threads into buffers that are used again; returns how many."""
    places = [(file, at) for file in files for at in range(0, file.stat().st_size, _CHUNK)]

    def work(first: int) -> int:
        buffer = memoryview(bytearray(_CHUNK))
        opened = {file: os.open(file, os.O_RDONLY) for file in files}
        count = sum(os.preadv(opened[file], [buffer], at) for file, at in places[first::threads])
        for descriptor in opened.values():
            os.close(descriptor)
        return count

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(work, range(threads)))


def work(program: str, folders: Sequence[Path]) -> None:
    """Runs one program and prints its seconds and processor seconds, imports not counted."""
    from mergelab.merging import diff_models

    started, used = time.perf_counter(), time.process_time()
    if program == "read":
        read([folder / "model.safetensors" for folder in folders], usable_cores())
    else:
        diff_models(*folders)
    seconds, processor = time.perf_counter() - started, time.process_time() - used
    print(json.dumps({"seconds": seconds, "processor": processor}))


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark as the command line asks; returns what it measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.diff")
    parser.add_argument("--work", type=Path, required=True, help="folder for the models (6 GB, kept)")
    parser.add_argument("--repeats", type=int, default=5, help="turns that are counted")
    parser.add_argument("--quick", action="store_true", help="a tiny pair, to try the program")
    parser.add_argument("--publish", action="store_true", help="write the table into benchmarks/README.md")
    parser.add_argument("--run", choices=PROGRAMS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    folder = options.work.resolve() / ("tiny" if options.quick else "pair")
    folders = build_pair(folder, TINY if options.quick else QWEN2_1_5B)
    if options.run is not None:
        work(options.run, folders)
        return {}
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    environment.setdefault("JAX_PLATFORMS", "cpu")
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in PROGRAMS}
    load = os.getloadavg()[0]
    for turn in range(-1, options.repeats):  # the first turn brings files and libraries into memory
        for name in PROGRAMS if turn % 2 else PROGRAMS[::-1]:
            command = [sys.executable, "-m", "benchmarks.diff", "--work", str(options.work.resolve())]
            command += ["--run", name, *(["--quick"] if options.quick else [])]
            measured = measure(command, cwd=options.work, env=environment)
            found = json.loads(measured.stdout.splitlines()[-1])
            if turn >= 0:
                runs[name].append({**found, "memory": measured.peak_anonymous})
    results = {
        "machine": describe(options.work),
        "load": load,
        "repeats": options.repeats,
        "bytes": sum((each / "model.safetensors").stat().st_size for each in folders),
        "programs": {
            name: {key: statistics.median(run[key] for run in found) for key in found[0]}
            for name, found in runs.items()
        },
    }
    (options.work / "diff.json").write_text(json.dumps(results, indent=1))
    print(render(results))
    if options.publish:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        page = REPOSITORY / "benchmarks" / "README.md"
        text = page.read_text(encoding="utf-8")
        text += "" if "<!-- diff table -->" in text else SECTION
        page.write_text(replace_section(text, "diff table", render(results)), encoding="utf-8")
    return results


def render(results: Mapping[str, Any]) -> str:
    """The table: one row per program, then the machine."""
    lines = [
        "| program | seconds | x read | GB/s | processor s | memory MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    floor = results["programs"]["read"]["seconds"]
    for name, found in results["programs"].items():
        cells = (
            f"{found['seconds']:.2f}",
            f"{found['seconds'] / floor:.2f}",
            f"{results['bytes'] / found['seconds'] / 1e9:.2f}",
            f"{found['processor']:.2f}",
            f"{found['memory'] / 1e6:.0f}",
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    machine = ", ".join(f"{name} {value}" for name, value in results["machine"].items())
    return "\n".join([
        *lines,
        "",
        f"Medians of {results['repeats']} turns; {results['bytes'] / 1e9:.2f} GB of bfloat16 weights in two "
        f"files. Load average of the machine at the start: {results['load']:.1f}. Machine: {machine}.",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
