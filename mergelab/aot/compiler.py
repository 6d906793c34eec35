"""Runs the compiler of TPUs or GPUs in a process of its own.

Its settings (no accelerator, no metadata server) must be in the environment before JAX starts and must not
stay in the caller's.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mergelab.aot.chips import ChipReport, Collective, chip_of, device_count, slice_name
from mergelab.errors import DependencyError, MeshError
from mergelab.sharding import fill_sizes

__all__ = ["compile_for_topology"]


def compile_for_topology(
    program: str,
    topology: str,
    mesh: Mapping[str, int],
    request: Mapping[str, Any],
    *,
    timeout: float = 900.0,
) -> ChipReport:
    """Compiles a program for chips that need not be there. It proves what fits, never how fast it is.

    Args:
        program: `module:function` of a function `(mesh, request) -> jax.stages.Lowered`; the compiler's
            process imports it.
        topology: name of a slice, such as `v5e:4x4`, `v6e:16x16`, `v5p:4x8x8`, or of some GPUs: `h100:8`;
            `v5e` and `h100` are one chip.
        mesh: the sizes of the mesh's axes; one may be -1.
        request: what the function is given: plain data, as JSON holds it.
        timeout: seconds after which the compiler is stopped.

    Raises:
        DependencyError: the compiler is not installed.
        MeshError: no such topology, or a mesh or a program that cannot be laid over it. A program that takes
            more memory than a chip has is no error: `ChipReport.fits` says so.
    """
    name = slice_name(topology)
    sizes = fill_sizes(mesh, device_count(topology), all_of_them=True, place=f"chips of {topology}")
    if chip_of(topology).gpu is not None:
        if all(importlib.util.find_spec(f"jax_cuda{n}_plugin") is None for n in (12, 13)):
            raise DependencyError(
                "compiling for a GPU needs JAX's CUDA plugin, which is not installed (no GPU is needed); "
                f'install mergelab[cuda12], or just that: pip install "jax[cuda12]=={version("jax")}"'
            )
    elif importlib.util.find_spec("libtpu") is None:
        raise DependencyError(
            "compiling for a TPU needs libtpu, which is not installed; install mergelab[tpu-aot], "
            f'or just that: pip install "jax[tpu]=={version("jax")}"'
        )
    question = {
        "program": program,
        "topology": name,
        "sizes": sizes,
        "request": dict(request),
    }
    answer = _ask(question, timeout)
    if "error" in answer:
        raise MeshError(f"{topology}: {answer['error']}")
    collectives = tuple(Collective(**found) for found in answer.pop("collectives"))
    return ChipReport(**answer, collectives=collectives)


def _ask(question: Mapping[str, Any], timeout: float) -> dict[str, Any]:
    """Runs the compiler's process; it answers in a file, because libraries write to its output."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        # Plain CPU arrays, and no question to the metadata server that TPU machines have.
        settings = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_LOG_DIR": "disabled"}
        # The compiler locks TPUs against other processes, also where it opens none.
        settings["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
        if chip_of(question["topology"]).gpu is not None:
            # There is no GPU on which kernels could be timed against each other.
            settings["XLA_FLAGS"] = "--xla_gpu_autotune_level=0"
        try:
            done = subprocess.run(
                [sys.executable, "-m", "mergelab.aot.worker", str(answer)],
                input=json.dumps(question),
                env=kept | settings | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                capture_output=True,
                text=True,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired:
            return {
                "error": f"the compiler did not finish in {timeout:g} s; choose a smaller batch or model."
            }
        if done.returncode or not answer.is_file():
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            return {"error": f"the compiler's process failed: {lines[-1]}"}
        return json.loads(answer.read_text(encoding="utf-8"))
