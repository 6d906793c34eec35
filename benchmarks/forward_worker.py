"""One turn of benchmarks/forward.py in a process of its own: prefill and decode speed of one program.

    python -m benchmarks.forward_worker mergelab|transformers FOLDER --batch 4 --length 256 --new 64

Prints JSON: tokens per second, and what was generated. Loading and the first call, which compiles, are not
timed; of the timed calls the fastest counts.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Program", "main", "mergelab_program", "transformers_program"]

_PROMPT = 16
_CALLS = 3


class Program(NamedTuple):
    """A loaded model: both functions return numpy arrays, and so wait for the result."""

    device: str
    prefill: Callable[[np.ndarray], np.ndarray]
    decode: Callable[[np.ndarray, int], np.ndarray]


def mergelab_program(folder: str, dtype: str) -> Program:
    """This library's: `Model.apply` under jit, and `generate`."""
    import jax

    from mergelab.decoding import generate
    from mergelab.models.load import load_model

    model, params = load_model(folder, dtype=dtype)

    @jax.jit
    def last(params: Any, tokens: jax.Array) -> Any:
        logits: Any = model.apply(params, tokens).logits
        return logits[:, -1]

    return Program(
        jax.devices()[0].device_kind,
        lambda tokens: np.asarray(last(params, tokens)),
        lambda tokens, new: np.asarray(generate(model, params, tokens, max_new_tokens=new).tokens),
    )


def transformers_program(folder: str, dtype: str) -> Program:
    """That of `transformers`: its forward pass, and `generate` with its default cache."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM  # pyright: ignore[reportMissingImports]

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    model = model.to(device).eval()

    @torch.inference_mode()
    def prefill(tokens: np.ndarray) -> np.ndarray:
        logits = model(torch.from_numpy(tokens).long().to(device)).logits
        return logits[:, -1].float().cpu().numpy()

    @torch.inference_mode()
    def decode(tokens: np.ndarray, new: int) -> np.ndarray:
        ids = torch.from_numpy(tokens).long().to(device)
        options = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new, "pad_token_id": 0}
        found = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        return found[:, tokens.shape[1] :].cpu().numpy()

    return Program(torch.cuda.get_device_name() if device == "cuda" else "cpu", prefill, decode)


def _fastest(call: Callable[[], Any]) -> float:
    call()
    seconds = []
    for _ in range(_CALLS):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def main() -> None:
    """Times one program as the command line asks."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.forward_worker")
    parser.add_argument("program", choices=["mergelab", "transformers"])
    parser.add_argument("folder")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--new", type=int, default=64, help="tokens to generate; 0 for prefill alone")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    build = mergelab_program if options.program == "mergelab" else transformers_program
    program = build(options.folder, options.dtype)
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, 256, (options.batch, options.length)).astype(np.int32)
    prompts = tokens[:, :_PROMPT]
    prefill = _fastest(lambda: program.prefill(tokens))
    result = {
        "device": program.device,
        "prefill_tokens_per_second": tokens.size / prefill,
        "logits": program.prefill(tokens)[:, :8].astype(float).tolist(),
    }
    if options.new:
        decode = _fastest(lambda: program.decode(prompts, options.new))
        result["decode_tokens_per_second"] = options.batch * options.new / decode
        result["generated"] = program.decode(prompts, options.new).tolist()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
