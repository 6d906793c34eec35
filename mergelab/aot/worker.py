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

from mergelab.aot.chips import LINKED, ChipReport, Collective, chip_of, device_count
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


_GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  core_count: {cores}
  l2_cache_size: {cache}
  clock_rate_ghz: {clock}
  memory_bandwidth: {bandwidth}
  device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""
"""What XLA is told of a GPU that is not there (`GpuTargetConfigProto`); limits of compute capability 9.0."""


def _gpus(topology: str) -> list[Any]:
    """The devices of a slice of GPUs."""
    from jax.experimental import topologies

    chip, count = chip_of(topology), device_count(topology)
    gpu = chip.gpu
    assert gpu is not None
    major, minor = gpu.capability
    target = _GPU.format(
        cores=gpu.cores, cache=gpu.cache, clock=gpu.clock, bandwidth=int(chip.bandwidth), memory=chip.memory,
        major=major, minor=minor, name=gpu.name,
    )  # fmt: skip
    hosts = -(-count // LINKED)
    shape = f"1x{hosts}x{count // hosts}"
    options: dict[str, Any] = {"target_config": target, "topology": shape}
    return list(topologies.get_topology_desc(platform="cuda", topology_name=topology, **options).devices)


def _mesh(topology: str, sizes: Mapping[str, int]) -> Any:
    import numpy as np
    from jax.experimental import mesh_utils, topologies
    from jax.sharding import AxisType, Mesh

    if chip_of(topology).gpu is not None:
        grid = np.asarray(_gpus(topology)).reshape(tuple(sizes.values()))
        return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    options: dict[str, Any] = _host_bounds(topology)
    if topology.startswith("v4:"):  # whose two cores run as one, as on the machines themselves
        options["chip_config_name"] = "megacore"
    sliced = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    devices = list(sliced.devices)
    if math.prod(sizes.values()) != len(devices):
        raise MeshError(f"a mesh of {dict(sizes)} cannot be laid over its {len(devices)} devices.")
    grid = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


_PASSES = {"DEFAULT": 1, "HIGH": 3, "HIGHEST": 6}
_PRODUCT = re.compile(
    r"stablehlo\.dot_general (.*?) : \(tensor<([^>]*)>, tensor<([^>]*)>\) -> tensor<([^>]*)>"
)


def products(program: str) -> tuple[float, float]:
    """Fraction of the operations in matrix products that are of float32, and bfloat16 passes on average.

    >>> text = "stablehlo.dot_general %a, %b, contracting_dims = [1] x [0], precision = [HIGHEST, HIGHEST]"
    >>> products(text + " : (tensor<8x4xf32>, tensor<4x2xf32>) -> tensor<8x2xf32>")
    (1.0, 6.0)

    Args:
        program: StableHLO, as `jax.stages.Lowered.as_text` gives it.
    """
    total = wide = passes = 0.0
    for options, left, right, result in _PRODUCT.findall(program):
        sizes = {name: [int(n) for n in name.split("x")[:-1]] for name in (left, result)}
        dims = re.search(r"contracting_dims = \[([\d, ]*)\]", options)
        over = [int(n) for n in dims[1].split(",") if n.strip()] if dims else []
        operations = math.prod(sizes[result]) * math.prod(sizes[left][n] for n in over)
        precision = re.search(r"precision = \[(\w+)", options)
        float32 = left.endswith("f32") and right.endswith("f32")
        total += operations
        wide += operations * float32
        passes += operations * (_PASSES.get(precision[1] if precision else "DEFAULT", 1) if float32 else 1)
    return (wide / total, passes / total) if total else (0.0, 1.0)


_AMOUNT = r"([\d.]+)([KMGTP]?)i?B?"
_SHORT = re.compile(rf"total memory required for HLO temporaries \({_AMOUNT}\)")
_USED = re.compile(rf"Used {_AMOUNT} of {_AMOUNT}")
_ARGUMENTS = re.compile(rf"arguments?:? +{_AMOUNT}")


def asked_for(message: str) -> int | None:
    """Bytes of temporaries that a compiler did not find room for, from its error; None for another error.

    >>> asked_for("the total memory required for HLO temporaries (25.60G) exceeds available HBM (15.75G).")
    27487790694
    """
    if found := _SHORT.search(message):
        return _amount(found)
    if found := _USED.search(message):
        held = _ARGUMENTS.search(message)
        return max(0, _amount(found) - (_amount(held) if held else 0))
    return 0 if "RESOURCE_EXHAUSTED" in message else None


def _amount(found: re.Match[str]) -> int:
    return int(float(found[1].rstrip(".")) * 2 ** (10 * " KMGTP".index(found[2] or " ")))


def _cost(compiled: Any) -> Mapping[str, float]:
    """Operations and traffic of a program whose compiler does not count them (GPUs); nothing if unknown."""
    import jax

    try:
        # jaxlib is a part of jax, and this function of it has no public name.
        xla_client = importlib.import_module("jaxlib.xla_client")
        (module,) = compiled.runtime_executable().hlo_modules()
        return xla_client._xla.hlo_module_cost_analysis(jax.devices("cpu")[0].client, module)
    except (AttributeError, ImportError, ValueError, RuntimeError):
        return {}


def _compile(program: str, topology: str, sizes: Mapping[str, int], request: Mapping[str, Any]) -> ChipReport:
    mesh = _mesh(topology, sizes)
    module, _, function = program.partition(":")
    started = time.perf_counter()
    lowered = getattr(importlib.import_module(module), function)(mesh, request)
    float32, passes = products(lowered.as_text())
    known: dict[str, Any] = {
        "chips": mesh.devices.size,
        "device": mesh.devices.flat[0].device_kind,
        "float32": float32,
        "passes": passes,
    }
    try:
        compiled = lowered.compile()
    except Exception as error:  # whose type is another in each version of jax
        asked = asked_for(str(error))
        if asked is None:
            raise
        nothing: dict[str, Any] = dict.fromkeys(("arguments", "outputs", "aliased", "flops", "traffic"), 0)
        seconds = time.perf_counter() - started
        return ChipReport(**known, **nothing, temporaries=asked, collectives=(), seconds=seconds, fits=False)
    seconds = time.perf_counter() - started
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or _cost(compiled)
    exchanged = collectives(compiled.as_text() or "")
    return ChipReport(
        **known,
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
