"""Compute at test time: samples of one prompt timed, and accuracy against compute.

    python -m benchmarks.test_time --model path/to/SmolLM2 --out test_time.json [--peer]
    python -m benchmarks.test_time --experiment WORK [--seeds 3] [--publish]
    python -m benchmarks.test_time --language-model path/to/SmolLM2 [--publish]

The first times samples: together, one call each, and `num_return_sequences` of transformers. All run in one
process and take turns, after a round that compiles; the figures are medians. `--peer` needs torch and
transformers, and a folder in their format. Both draw at temperature 1 and end no text early.

The second trains a small transformer on sums with scratchpads, for each seed in a few CPU minutes, and
solves others by plain, voted, verified, searched and forced decoding. WORK keeps every seed: the same command
goes on with those that are missing. The third runs the same methods on a language model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import describe
from benchmarks.thinking_parts.page import page
from benchmarks.thinking_parts.scratchpads import Size

__all__ = ["experiment", "main", "render", "turns"]

FOLDER = Path(__file__).resolve().parent
RESULTS, PAGE = FOLDER / "results" / "test_time.json", FOLDER / "test_time.md"

AIM = 1 / 3
"""Time of all samples together over that of as many calls, at most."""


def turns(programs: dict[str, Callable[[int], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each program, called with the number of the round; the first is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for number in range(rounds + 1):
        for name, run in programs.items():
            started = time.perf_counter()
            run(number)
            if number:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(each) for name, each in seconds.items()}


def ours(folder: Path, prompt: Sequence[int], samples: int, new: int) -> dict[str, Callable[[int], object]]:
    """The two ways to take samples here."""
    from mergelab.decoding import generate, sample
    from mergelab.models import load_model

    model, params = load_model(folder)
    tokens = np.asarray([prompt], np.int32)

    def run(seed: int, count: int) -> None:
        found = generate(model, params, tokens, max_new_tokens=new, sampler=sample(), key=seed, samples=count)
        assert np.asarray(found.tokens).shape == (count, new)

    return {
        "together": lambda number: run(number, samples),
        "one call each": lambda number: [run(number * samples + n, 1) for n in range(samples)],
    }


def peer(folder: Path, prompt: Sequence[int], samples: int, new: int) -> dict[str, Callable[[int], object]]:
    """The samples of transformers."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.tensor([list(prompt)])

    def run(seed: int) -> None:
        torch.manual_seed(seed)
        with torch.no_grad():
            found = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=True,
                top_k=0,
                num_return_sequences=samples,
                min_new_tokens=new,
                max_new_tokens=new,
            )
        assert tuple(found.shape) == (samples, len(prompt) + new)

    return {"transformers": run}


def render(found: dict[str, Any]) -> str:
    """The figures as lines of text."""
    seconds, samples = found["seconds"], found["samples"]
    ratio = seconds["together"] / seconds["one call each"]
    lines = [f"{name}: {value:.2f} s for {samples} samples" for name, value in seconds.items()]
    return "\n".join([*lines, f"together over one call each: {ratio:.3f} (aim: at most {AIM:.3f})"])


def experiment(work: Path, seeds: int, size: Size) -> dict[str, Any]:
    """The sums of every seed, by seed; each is written to `work` as soon as it is done, and found again.

    Args:
        work: folder of the results.
        seeds: number of seeds.
        size: how large the experiment is.
    """
    from benchmarks.thinking_parts.arithmetic import arithmetic

    work.mkdir(parents=True, exist_ok=True)
    runs = {}
    for seed in range(seeds):
        file = work / f"seed-{seed}.json"
        kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if kept.get("size") != asdict(size):
            kept = {"size": asdict(size), "run": arithmetic(seed, size)}
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
            partial.replace(file)
        runs[str(seed)] = kept["run"]
        print(f"seed {seed}: {kept['run']['voted'][-1]['accuracy']:.3f} by the vote of all", flush=True)
    return runs


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what is asked for, prints it, and writes the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="folder of a model whose samples are timed")
    parser.add_argument("--out", type=Path, help="JSON file for the times")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", action="store_true", help="time transformers too")
    parser.add_argument("--experiment", type=Path, metavar="WORK", help="folder of the sums, seed by seed")
    parser.add_argument("--seeds", type=int, default=3)
    for name, value in asdict(Size()).items():
        parser.add_argument(f"--sums-{name}", type=int, default=value, help="size of the experiment")
    parser.add_argument("--language-model", type=Path, help="model that is asked sums in words")
    parser.add_argument("--publish", action="store_true", help="write test_time.md and its results")
    given = parser.parse_args(arguments)
    if (
        given.model is None
        and given.experiment is None
        and given.language_model is None
        and not given.publish
    ):
        parser.error("say what to measure: --model, --experiment or --language-model")
    results: dict[str, Any] = {}
    if RESULTS.exists():
        results = json.loads(RESULTS.read_text(encoding="utf-8"))
    if given.model is not None:
        prompt = np.random.default_rng(0).integers(3, 200, given.prompt_tokens).tolist()
        sizes = (given.model, prompt, given.samples, given.new_tokens)
        programs = ours(*sizes) | (peer(*sizes) if given.peer else {})
        results["throughput"] = {
            "machine": describe(given.model),
            "samples": given.samples,
            "prompt_tokens": given.prompt_tokens,
            "new_tokens": given.new_tokens,
            "seconds": turns(programs, given.rounds),
        }
        if given.out is not None:
            given.out.write_text(json.dumps(results["throughput"], indent=1) + "\n")
        print(render(results["throughput"]))
    if given.experiment is not None:
        size = Size(**{name: getattr(given, f"sums_{name}") for name in asdict(Size())})
        results["arithmetic"] = experiment(given.experiment, given.seeds, size)
        results["size"] = asdict(size)
    if given.language_model is not None:
        from benchmarks.thinking_parts.language_model import language_model

        results["language_model"] = language_model(given.language_model)
    if given.experiment is not None or given.language_model is not None or given.publish:
        print(page(results))
    if given.publish:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
