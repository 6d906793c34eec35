"""Activations of a model whose weights stay in their file, against the loaded model and reading it once.

    python -m benchmarks.stream --work DIR [--shape 3b|small] [--tokens 16384] [--publish]
    python -m benchmarks.stream --work DIR --shape 8gb --tokens 512 --limit 3000000000 [--publish]

The checkpoint (random bfloat16 weights, written once, a tensor at a time) is read by each of three programs,
every one in a process of its own: `read` reads the file's bytes once; `in memory` loads the model and takes
three sites of all tokens; `streamed` does so block by block. Each process first runs one batch, which
compiles. With `--limit` the streamed program alone runs, under that limit of private memory
(`RLIMIT_DATA`): it harvests, scores text, and finds a direction. `--publish` writes
the table into benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks.machine import describe
from benchmarks.process import measure
from benchmarks.table import replace_section

__all__ = ["build", "main", "render"]

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results" / "stream.json"
PROGRAMS = ("read", "in memory", "streamed")
SECTION = """
## A model that stays in its file

    python -m benchmarks.stream --work WORK --tokens 4096 --publish

`stream.py` takes three sites of a text from a random Llama of 3.2B parameters (6.4 GB, bfloat16),
loaded and streamed; `read` reads the file once. The first batch compiles; what streams reads the file for it
too. Memory is the peak of anonymous memory of the whole process.

<!-- stream table -->
<!-- end of stream table -->
"""

_LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "rms_norm_eps": 1e-5,
    "dtype": "bfloat16",
}
SHAPES: Mapping[str, dict[str, Any]] = {
    "3b": {
        **_LLAMA, "vocab_size": 128_256, "hidden_size": 3072, "intermediate_size": 8192,
        "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 8192, "rope_theta": 500_000.0, "tie_word_embeddings": True,
    },
    "small": {
        **_LLAMA, "vocab_size": 16_000, "hidden_size": 1024, "intermediate_size": 2816,
        "num_hidden_layers": 8, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64,
        "max_position_embeddings": 2048, "rope_theta": 10_000.0, "tie_word_embeddings": True,
    },
}  # fmt: skip
SHAPES = {**SHAPES, "8gb": {**SHAPES["3b"], "num_hidden_layers": 36}}
_LENGTH, _BATCH, _CHUNK = 256, 4, 4 << 20


def build(folder: Path, config: Mapping[str, Any]) -> Path:
    """Writes a checkpoint of random weights, a tensor at a time, unless it is there."""
    from mergelab.models.families import model_from_config
    from mergelab.models.table import stored_shapes

    path = folder / "model.safetensors"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    shapes = stored_shapes(model_from_config(config).table())
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng, begun = np.random.default_rng(0), folder / "model.begun"
    with begun.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            rest, norm = int(np.prod(shape)), "norm" in name
            scale = 0.02 if name.startswith("model.embed") else shape[-1] ** -0.5
            while rest:
                count = min(rest, _CHUNK)
                values = (
                    np.ones(count, np.float32) if norm else rng.standard_normal(count, np.float32) * scale
                )
                file.write(values.astype(ml_dtypes.bfloat16).tobytes())
                rest -= count
    begun.rename(path)
    (folder / "config.json").write_text(json.dumps(dict(config)))
    return path


def _read(path: Path) -> dict[str, float]:
    """Seconds of reading the file once, into buffers that are used again."""
    size, file = path.stat().st_size, os.open(path, os.O_RDONLY)

    def work(first: int) -> None:
        buffer = memoryview(bytearray(_CHUNK))
        for start in range(first * _CHUNK, size, 2 * _CHUNK):
            os.preadv(file, [buffer[: min(_CHUNK, size - start)]], start)

    started = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))
    return {"seconds": time.perf_counter() - started}


def _sites(config: Mapping[str, Any]) -> tuple[str, ...]:
    layers = config["num_hidden_layers"]
    return tuple(f"blocks.{layer}.resid_post" for layer in (layers // 4, layers // 2, layers - 1))


def _harvest(folder: Path, config: Mapping[str, Any], tokens: int, streamed: bool) -> dict[str, float]:
    """Seconds of loading, of one batch, which compiles, and of all tokens; a checksum of the rows."""
    import mergelab as ml
    from mergelab.activations.model_activations import ModelActivations

    ids = _tokens(config, tokens)
    started = time.perf_counter()
    model: Any
    params: Any
    model, params = ml.stream(folder) if streamed else ml.load_model(folder)
    found = {"loading": time.perf_counter() - started}
    if streamed:
        found["planned"] = params.memory_plan(tokens, _sites(config)).total
    for name, taken in (("first", ids[:_BATCH]), ("all", ids)):
        started = time.perf_counter()
        source = ModelActivations(model, params, taken, _sites(config), batch=_BATCH)
        total, step = 0.0, _BATCH * _LENGTH
        for start in range(0, source.rows, step):
            rows = source.read_sites(start, min(start + step, source.rows))
            total += sum(float(np.abs(site).mean(dtype=np.float64)) for site in rows)
        found[name] = time.perf_counter() - started
        found["checksum"] = total
    return found


def _limited(folder: Path, config: Mapping[str, Any], tokens: int, limit: int) -> dict[str, float]:
    """A harvest, a loss and directions of a streamed model, with no more private memory than the limit."""
    import mergelab as ml
    from mergelab.abliteration.directions import mean_activations
    from mergelab.abliteration.prompts import Prompts
    from mergelab.activations.losses import target_scores

    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    found = _harvest(folder, config, tokens, streamed=True)
    model, params = ml.stream(folder)
    ids = _tokens(config, tokens)
    started = time.perf_counter()
    nats, _ = target_scores(model, params, ids, np.ones((len(ids), _LENGTH - 1), bool), batch=_BATCH)
    found |= {"evaluated": time.perf_counter() - started, "loss": float(nats.mean())}
    started = time.perf_counter()
    prompts = Prompts.of(ids[:, :32].tolist())
    means = mean_activations(model, params, prompts, batch=_BATCH)
    found |= {"directions": time.perf_counter() - started, "norm": float(np.linalg.norm(means[-1, -1]))}
    return found


def _tokens(config: Mapping[str, Any], count: int) -> np.ndarray:
    contexts = max(1, count // _LENGTH)
    return np.random.default_rng(1).integers(3, config["vocab_size"], (contexts, _LENGTH)).astype(np.int32)


def _work(options: argparse.Namespace) -> dict[str, float]:
    """What one process measures."""
    folder, config = options.work / options.shape, SHAPES[options.shape]
    if options.worker == "read":
        return _read(folder / "model.safetensors")
    if options.worker == "limited":
        return _limited(folder, config, options.tokens, options.limit)
    return _harvest(folder, config, options.tokens, options.worker == "streamed")


def render(results: Mapping[str, Any]) -> str:
    """The table, and what follows from it, in Markdown."""
    rows = [
        "| program | loading s | first batch s | all tokens s | tokens/s | planned MB | memory MB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, found in results["programs"].items():
        seconds = found.get("all", found.get("seconds"))
        speed = "" if name == "read" else f"{results['tokens'] / seconds:,.0f}"
        before = [f"{found[key]:.2f}" if key in found else "" for key in ("loading", "first")]
        memory = [f"{found[key] / 1e6:,.0f}" if key in found else "" for key in ("planned", "memory")]
        rows.append(f"| {name} | {' | '.join(before)} | {seconds:.2f} | {speed} | {' | '.join(memory)} |")
    facts = ", ".join(f"{key} {value}" for key, value in results["machine"].items())
    size = results["bytes"] / 1e9
    rows += ["", f"A file of {size:.2f} GB, {results['tokens']:,} tokens. Machine: {facts}."]
    if limited := results.get("limited"):
        (found,) = limited["programs"].values()
        seconds = [found[name] for name in ("all", "evaluated", "directions")]
        times = ", ".join(f"{each:.0f}" for each in seconds)
        rows += [
            "",
            f"Under a limit of {limited['limit'] / 1e9:.1f} GB of private memory a file of "
            f"{limited['bytes'] / 1e9:.2f} GB gave the sites of {limited['tokens']:,} tokens, their "
            f"loss, and the mean activations that a direction is found from, in {times} s; the peak was "
            f"{found['memory'] / 1e6:,.0f} MB.",
        ]
    return "\n".join([*rows, ""])


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the programs, or is one of them (`--worker`)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", required=True, type=Path, help="folder for the checkpoint")
    parser.add_argument("--shape", choices=list(SHAPES), default="3b", help="which model")
    parser.add_argument("--tokens", type=int, default=16_384, help="tokens of the text")
    parser.add_argument(
        "--limit", type=int, help="bytes of private memory of the streamed program, run alone"
    )
    parser.add_argument("--publish", action="store_true", help="write the table into benchmarks/README.md")
    parser.add_argument("--worker", choices=[*PROGRAMS, "limited"], help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        print(json.dumps(_work(options)))
        return
    path = build(options.work / options.shape, SHAPES[options.shape])
    programs: dict[str, Any] = {}
    for name in ("limited",) if options.limit else PROGRAMS:
        command = [sys.executable, "-m", "benchmarks.stream", "--work", str(options.work.resolve())]
        command += ["--shape", options.shape, "--tokens", str(options.tokens), "--worker", name]
        command += ["--limit", str(options.limit)] if options.limit else []
        measured = measure(command, cwd=REPOSITORY, env=dict(os.environ))
        programs[name] = json.loads(measured.stdout.splitlines()[-1]) | {"memory": measured.peak_anonymous}
        print(name, programs[name], file=sys.stderr)
    results = {
        "programs": programs, "tokens": options.tokens, "bytes": path.stat().st_size, "shape": options.shape,
        "machine": describe(options.work),
    }  # fmt: skip
    if options.limit:
        print(json.dumps(results, indent=2))
        results["limit"] = options.limit
    else:
        print(render(results))
    if options.publish:
        before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        if options.limit and not before:
            sys.exit("publish the table first: what was done under a limit stands under it")
        results = {**before, "limited": results} if options.limit else before | results
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
        document = REPOSITORY / "benchmarks" / "README.md"
        text = document.read_text()
        text = text if "<!-- stream table -->" in text else text.rstrip() + "\n" + SECTION
        document.write_text(replace_section(text, "stream table", render(results)))


if __name__ == "__main__":
    main()
