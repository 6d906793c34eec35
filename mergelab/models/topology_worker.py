"""The process behind `mergelab.models.topology`: compiles one forward pass for chips that are not there."""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["collectives", "main"]

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_OPERATION = re.compile(rf"= (.*?) ({'|'.join(_KINDS)})(-start)?\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")


def collectives(program: str) -> dict[str, tuple[int, int]]:
    """Kind -> count and bytes of results, from the text of a compiled program.

    An asynchronous operation counts once, at its start, whose result is a tuple of inputs and outputs: the
    largest array of it is what is exchanged.

    >>> text = "%r = f32[8,4]{1,0} all-reduce(%x)\\n%g = (bf16[2], bf16[8]) all-gather-start(%y)"
    >>> collectives(text)
    {'all-reduce': (1, 128), 'all-gather': (1, 16)}
    """
    found: dict[str, tuple[int, int]] = {}
    for shape, kind, start in _OPERATION.findall(program):
        sizes = [
            _width(dtype) * math.prod(int(n) for n in dims.split(",") if n)
            for dtype, dims in _ARRAY.findall(shape)
        ]
        nbytes = max(sizes, default=0) if start else sum(sizes)
        count, before = found.get(kind, (0, 0))
        found[kind] = (count + 1, before + nbytes)
    return found


def _width(dtype: str) -> int:
    bits = re.search(r"\d+", dtype)
    return max(1, int(bits[0]) // 8) if bits else 1


def _compile(request: Mapping[str, Any]) -> Any:
    import jax
    import jax.numpy as jnp
    from jax.experimental import mesh_utils, topologies
    from jax.sharding import AxisType, Mesh

    from mergelab.errors import MeshError
    from mergelab.models.declaration import tree_from_leaves
    from mergelab.models.families import model_from_config
    from mergelab.models.topology import ChipReport, Collective
    from mergelab.sharding import named_sharding

    devices = list(topologies.get_topology_desc(platform="tpu", topology_name=request["topology"]).devices)
    sizes = dict(request["mesh"])
    known = math.prod(size for size in sizes.values() if size != -1)
    sizes = {name: len(devices) // known if size == -1 else size for name, size in sizes.items()}
    if math.prod(sizes.values()) != len(devices):
        raise MeshError(f"a mesh of {sizes} cannot be laid over its {len(devices)} chips.")
    grid = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
    mesh = Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    rules = {name: tuple(to) if to else None for name, to in request["rules"].items()}
    model = model_from_config(request["config"])
    dtype = jnp.dtype(request["dtype"])

    def array(shape: tuple[int, ...], kind: Any, axes: tuple[str | None, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, kind, sharding=named_sharding(mesh, shape, axes, rules))

    params = tree_from_leaves({leaf: array(leaf.shape, dtype, leaf.axes) for leaf in model.table()})
    tokens = array((request["batch"], request["length"]), jnp.int32, ("batch", "length"))

    def forward(params: Any, tokens: jax.Array) -> Any:
        found = model.apply(params, tokens)
        return found.hidden if found.logits is None else found.logits

    started = time.perf_counter()
    compiled = jax.jit(forward).lower(params, tokens).compile()
    seconds = time.perf_counter() - started
    memory: Any = compiled.memory_analysis()
    cost: Any = compiled.cost_analysis()
    exchanged = collectives(compiled.as_text() or "")
    return ChipReport(
        chips=len(devices),
        device=devices[0].device_kind,
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        flops=float(cost.get("flops", 0.0)),
        collectives=tuple(Collective(kind, *numbers) for kind, numbers in sorted(exchanged.items())),
        seconds=seconds,
    )


def main() -> None:
    """Reads a request from standard input, writes the answer to the file that the argument names."""
    from mergelab.models.topology import write_answer

    try:
        answer = _compile(json.load(sys.stdin))
    except Exception as error:  # the compiler's errors have many types; the parent raises its own
        answer = {"error": " ".join(str(error).split())[:600] or type(error).__name__}
    write_answer(Path(sys.argv[1]), answer)


if __name__ == "__main__":
    main()
