"""Times samples of one prompt: together, one call each, and `num_return_sequences` of transformers.

    python -m benchmarks.test_time --model path/to/SmolLM2 --out test_time.json [--peer]

All run in one process and take turns, after a round that compiles; the figures are medians. `--peer` needs
torch and transformers, and a folder in their format. Both draw at temperature 1 and end no text early.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import describe

__all__ = ["main", "render", "turns"]

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


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints, and writes the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of a model")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", action="store_true", help="time transformers too")
    given = parser.parse_args(arguments)
    prompt = np.random.default_rng(0).integers(3, 200, given.prompt_tokens).tolist()
    sizes = (given.model, prompt, given.samples, given.new_tokens)
    programs = ours(*sizes) | (peer(*sizes) if given.peer else {})
    found = {
        "machine": describe(given.model),
        "samples": given.samples,
        "prompt_tokens": given.prompt_tokens,
        "new_tokens": given.new_tokens,
        "seconds": turns(programs, given.rounds),
    }
    if given.out is not None:
        given.out.write_text(json.dumps(found, indent=1) + "\n")
    print(render(found))


if __name__ == "__main__":
    main()
