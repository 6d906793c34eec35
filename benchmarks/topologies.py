"""What models that people run on Colab take of TPUs and GPUs that are not there, by their compilers' counts.

    python -m benchmarks.topologies --work DIR [--only v5e:1x1 ...] [--publish]

For each model and slice, a forward pass and one decoding step are compiled: bytes that a chip needs, its
operations, and the exchanges between chips. Nothing is run and nothing is timed. TPUs need the extra
`tpu-aot`, GPUs `cuda12`; what the compiler at hand cannot do is left for another call: WORK keeps every cell,
and `--publish` writes topologies.md from all of them. Shapes are those of the published config.json files.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

__all__ = ["MODELS", "SLICES", "lower_decode", "main", "page"]

PAGE = Path(__file__).resolve().parent / "topologies.md"
RESULTS = Path(__file__).resolve().parent / "results" / "topologies.json"


def _shape(
    kind: str, vocabulary: int, width: int, hidden: int, layers: int, heads: int, kv_heads: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": kind, "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": hidden,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "max_position_embeddings": 8192, "tie_word_embeddings": True,
    } | more  # fmt: skip


MODELS: Mapping[str, dict[str, Any]] = {
    "SmolLM2-135M": _shape("llama", 49152, 576, 1536, 30, 9, 3, rope_theta=1e5),
    "Qwen2.5-0.5B": _shape("qwen2", 151936, 896, 4864, 24, 14, 2, rope_theta=1e6),
    "Llama-3.2-1B": _shape("llama", 128256, 2048, 8192, 16, 32, 8, head_dim=64, rope_theta=5e5),
    "Gemma-2-2B": _shape(
        "gemma2", 256000, 2304, 9216, 26, 8, 4, head_dim=256, query_pre_attn_scalar=256, sliding_window=4096
    ),
    "Qwen3-4B": _shape("qwen3", 151936, 2560, 9728, 36, 32, 8, head_dim=128, rope_theta=5e6),
    "Llama-3.1-8B": _shape(
        "llama", 128256, 4096, 14336, 32, 32, 8, rope_theta=5e5, tie_word_embeddings=False
    ),
}
SLICES: Mapping[str, dict[str, int]] = {
    "v5e:1x1": {"data": 1},
    "v5e:2x4": {"tensor": 8},
    "v6e:2x4": {"tensor": 8},
    "h100:8": {"tensor": 8},
}
_LENGTH, _BATCH = 1024, {"data": 1, "tensor": 8}


def lower_decode(mesh: Any, request: Mapping[str, Any]) -> Any:
    """One decoding step of one token a row with a full cache, which is used up."""
    import jax
    import jax.numpy as jnp

    from mergelab.models import model_from_config
    from mergelab.models.table import tree_from_leaves
    from mergelab.sharding import named_sharding

    model = model_from_config(request["config"])
    batch, length = request["batch"], request["length"]

    def array(shape: tuple[int, ...], kind: Any, axes: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, kind, sharding=named_sharding(mesh, shape, axes))

    params = tree_from_leaves({leaf: array(leaf.shape, jnp.bfloat16, leaf.axes) for leaf in model.table()})
    empty = jax.eval_shape(lambda: model.new_cache(batch, length, jnp.bfloat16))
    axes = {4: ("batch", "length", "kv_heads", None), 2: ("batch", "length"), 1: ("batch",)}
    cache = jax.tree.map(lambda leaf: array(leaf.shape, leaf.dtype, axes[leaf.ndim]), empty)
    tokens = array((batch, 1), jnp.int32, ("batch", "length"))

    def step(params: Any, tokens: Any, cache: Any) -> Any:
        found = model.apply(params, tokens, cache=cache)
        return found.logits, found.cache

    return jax.jit(step, donate_argnums=2).lower(params, tokens, cache)


def compile_cell(name: str, topology: str) -> dict[str, Any]:
    """A model's pass and decoding step on a slice."""
    from mergelab.aot import compile_for_topology
    from mergelab.models import model_from_config
    from mergelab.models.footprint import compile_forward

    config, mesh = MODELS[name], SLICES[topology]
    model, batch = model_from_config(config), _BATCH[next(iter(mesh))]
    request = {"config": config, "batch": batch, "length": _LENGTH}
    whole = compile_forward(model, topology, mesh, batch=batch, length=_LENGTH)
    step = compile_for_topology("benchmarks.topologies:lower_decode", topology, mesh, request)
    weights = 2 * sum(leaf.size for leaf in model.table())
    return {
        "weights": weights,
        "pass": asdict(whole) | {"peak": whole.peak},
        "step": asdict(step) | {"peak": step.peak},
    }


def page(cells: Mapping[str, Mapping[str, Any]]) -> str:
    """The page, from the cells by `MODEL on SLICE`."""
    lines = [
        "# Models on chips that are not there",
        "",
        "Written by `python -m benchmarks.topologies --work DIR --publish`: forward passes and decoding",
        "steps in bfloat16, compiled by XLA for TPUs and GPUs without one. Counts of the compiler for one",
        f"chip, no times. A pass is {_LENGTH:,} tokens on one chip, and {_BATCH['tensor']} rows of as many",
        "on eight, whose weights are split over them (`tensor=8`). A step adds a token to every row, behind",
        "a cache of as many. *Fits* is against what the compiler, or JAX by default on GPUs, leaves.",
        "",
        "| model | slice | weights GB | pass: GB a chip | fits | TFLOP a chip | exchanges (MB) "
        "| step: GB a chip | read and written / held |",
        "| --- | --- | ---: | ---: | --- | ---: | --- | ---: | ---: |",
    ]
    for name in MODELS:
        for topology in SLICES:
            if cell := cells.get(f"{name} on {topology}"):
                lines.append(_row(name, topology, cell))
    lines += [
        "",
        "The last column is what a decoding step moves between a chip and its memory, by the compiler,",
        "over the weights and the cache that the chip holds, each of which a step has to read once: 1 is the",
        "least. XLA counts a tensor again for every part of a program that touches it.",
        "",
    ]
    return "\n".join(lines)


def _row(name: str, topology: str, cell: Mapping[str, Any]) -> str:
    whole, step = cell["pass"], cell["step"]
    exchanges = ", ".join(f"{c['count']} {c['kind']} ({c['nbytes'] / 1e6:.0f})" for c in whole["collectives"])
    known = whole["fits"]
    cells = [
        name,
        topology,
        f"{cell['weights'] / 1e9:.2f}",
        f"{whole['peak'] / 1e9:.2f}" if known else f"> {whole['arguments'] / 1e9:.1f}",
        "yes" if known and whole["peak"] <= _usable(topology) else "no",
        f"{whole['flops'] / 1e12:.2f}" if known else "-",
        (exchanges or "none") if known else "-",
        f"{step['peak'] / 1e9:.2f}" if step["fits"] else "-",
        f"{step['traffic'] / step['arguments']:.2f}" if step["fits"] else "-",
    ]
    return "| " + " | ".join(cells) + " |"


def _usable(topology: str) -> int:
    from mergelab.aot import chip_of

    return chip_of(topology).usable


def main(arguments: Sequence[str] | None = None) -> None:
    """Compiles what WORK does not hold."""
    from mergelab.errors import DependencyError

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", required=True, type=Path, help="folder that keeps the cells")
    parser.add_argument("--only", nargs="+", choices=SLICES, default=list(SLICES), help="slices")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="models")
    parser.add_argument("--publish", action="store_true", help="write topologies.md")
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    for name in options.models:
        for topology in options.only:
            place = options.work / f"{name} on {topology}.json".replace(":", "-")
            if place.exists():
                continue
            try:
                cell = compile_cell(name, topology)
            except DependencyError as error:
                print(f"{topology}: {error}", file=sys.stderr)
                continue
            place.write_text(json.dumps(cell), encoding="utf-8")
            print(
                f"{name} on {topology}: {cell['pass']['seconds'] + cell['step']['seconds']:.0f} s",
                file=sys.stderr,
            )
    cells = {
        f"{name} on {topology}": json.loads(place.read_text(encoding="utf-8"))
        for name in MODELS
        for topology in SLICES
        if (place := options.work / f"{name} on {topology}.json".replace(":", "-")).exists()
    }
    print(page(cells))
    if options.publish:
        RESULTS.write_text(json.dumps(cells, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(page(cells), encoding="utf-8")


if __name__ == "__main__":
    main()
