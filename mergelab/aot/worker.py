"""The process that compiles: a program and abstract arguments in, what XLA says of it out."""

from __future__ import annotations

import importlib
import json
import math
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mergelab.aot.chips import ChipReport, Collective
from mergelab.errors import MeshError

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


_HOST = (2, 2, 1)
"""Chips of a host, by which compilers divide a slice unless they are told of a smaller host."""


def _host_bounds(topology: str) -> dict[str, tuple[int, ...]]:
    """What a slice smaller than a host must say besides its name.

    >>> _host_bounds("v5e:1x1"), _host_bounds("v5p:1x1x1"), _host_bounds("v5e:4x4"), _host_bounds("nonsense")
    ({'chips_per_host_bounds': (1, 1, 1)}, {'chips_per_host_bounds': (1, 1, 1)}, {}, {})
    """
    sizes = [int(n) for n in topology.partition(":")[2].split("x") if n.isdecimal()][:3]
    bounds = (
        tuple(min(n, most) for n, most in zip([*sizes, 1, 1][:3], _HOST, strict=True)) if sizes else _HOST
    )
    return {} if bounds == _HOST else {"chips_per_host_bounds": bounds}


def _mesh(topology: str, sizes: Mapping[str, int]) -> Any:
    from jax.experimental import mesh_utils, topologies
    from jax.sharding import AxisType, Mesh

    sliced = topologies.get_topology_desc(platform="tpu", topology_name=topology, **_host_bounds(topology))
    devices = list(sliced.devices)
    known = math.prod(size for size in sizes.values() if size != -1)
    shape = {name: len(devices) // known if size == -1 else size for name, size in sizes.items()}
    if math.prod(shape.values()) != len(devices):
        raise MeshError(f"a mesh of {shape} cannot be laid over its {len(devices)} chips.")
    grid = mesh_utils.create_device_mesh(tuple(shape.values()), devices, allow_split_physical_axes=True)
    return Mesh(grid, tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


def _compile(program: str, topology: str, sizes: Mapping[str, int], request: Mapping[str, Any]) -> ChipReport:
    mesh = _mesh(topology, sizes)
    module, _, function = program.partition(":")
    started = time.perf_counter()
    compiled = getattr(importlib.import_module(module), function)(mesh, request).compile()
    seconds = time.perf_counter() - started
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    exchanged = collectives(compiled.as_text() or "")
    return ChipReport(
        chips=mesh.devices.size,
        device=mesh.devices.flat[0].device_kind,
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        flops=float(cost.get("flops", 0.0)),
        traffic=float(cost.get("bytes accessed", 0.0)),
        collectives=tuple(Collective(kind, *numbers) for kind, numbers in sorted(exchanged.items())),
        seconds=seconds,
    )


def main() -> None:
    """Reads a request from standard input, writes the answer to the file that the argument names."""
    try:
        answer = asdict(_compile(**json.load(sys.stdin)))
    except Exception as error:  # the compiler's errors have many types; the parent raises its own
        answer = {"error": " ".join(str(error).split())[:600] or type(error).__name__}
    Path(sys.argv[1]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
