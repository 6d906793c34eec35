"""Compiles a model for a TPU slice that is not there: what it takes of each chip, what the chips exchange.

The compiler runs in a process of its own, because its settings (no TPU, no metadata server) must be in the
environment before JAX starts and must not stay in the caller's.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mergelab.errors import DependencyError, MeshError
from mergelab.models.model import Model
from mergelab.sharding import DEFAULT_RULES, Rules

__all__ = ["ChipReport", "Collective", "compile_for_topology"]


@dataclass(frozen=True)
class Collective:
    """One kind of exchange between chips in a compiled program.

    Attributes:
        kind: `all-gather`, `all-reduce`, `reduce-scatter`, `all-to-all` or `collective-permute`.
        count: how many the program has.
        nbytes: bytes of their results on one chip, together.
    """

    kind: str
    count: int
    nbytes: int


@dataclass(frozen=True)
class ChipReport:
    """A forward pass as it was compiled for one chip of many.

    Attributes:
        chips: how many chips the topology has.
        device: what one is, as the compiler calls it.
        arguments: bytes of parameters and tokens.
        outputs: bytes of the logits.
        temporaries: bytes of the largest working memory.
        flops: floating-point operations of one pass on one chip.
        collectives: what the chips exchange.
        seconds: how long the compilation took.
    """

    chips: int
    device: str
    arguments: int
    outputs: int
    temporaries: int
    flops: float
    collectives: tuple[Collective, ...]
    seconds: float

    @property
    def peak(self) -> int:
        """Bytes that one chip needs."""
        return self.arguments + self.outputs + self.temporaries


def compile_for_topology(
    model: Model,
    topology: str,
    mesh: Mapping[str, int],
    *,
    batch: int,
    length: int,
    dtype: str = "bfloat16",
    rules: Rules = DEFAULT_RULES,
    timeout: float = 900.0,
) -> ChipReport:
    """Compiles `model.apply` for a TPU topology; needs no TPU. It proves what fits, never how fast it is.

    Args:
        model: the model.
        topology: such as `v5e:4x4`, `v6e:16x16`, `v5p:4x8x8`.
        mesh: the sizes of the mesh's axes; one may be -1.
        batch: sequences in the pass, over all chips.
        length: tokens of each.
        dtype: of parameters and activations.
        rules: logical axis -> mesh axes.
        timeout: seconds after which the compiler is stopped.

    Raises:
        DependencyError: the TPU compiler is not installed.
        MeshError: no such topology, a mesh that does not fit it, or a program that does not fit the chips.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise DependencyError(
            "compiling for a TPU needs libtpu, which is not installed; install mergelab[tpu-aot]."
        )
    request = {
        "config": dict(model.hf_config),
        "topology": topology,
        "mesh": dict(mesh),
        "batch": batch,
        "length": length,
        "dtype": dtype,
        "rules": {name: [to] if isinstance(to, str) else to for name, to in rules.items()},
    }
    answer = _ask(request, timeout)
    if "error" in answer:
        raise MeshError(f"{topology}: {answer['error']}")
    collectives = tuple(Collective(**found) for found in answer.pop("collectives"))
    return ChipReport(**answer, collectives=collectives)


def _ask(request: Mapping[str, Any], timeout: float) -> dict[str, Any]:
    """Runs the compiler's process; it answers in a file, because libraries write to its output."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        # Plain CPU arrays, and no question to the metadata server that TPU machines have.
        settings = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_LOG_DIR": "disabled"}
        command = [sys.executable, "-m", "mergelab.models.topology_worker", str(answer)]
        try:
            done = subprocess.run(
                command,
                input=json.dumps(request),
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


def write_answer(path: Path, answer: Mapping[str, Any] | ChipReport) -> None:
    """What the compiler's process writes for `_ask`."""
    data = asdict(answer) if isinstance(answer, ChipReport) else dict(answer)
    path.write_text(json.dumps(data), encoding="utf-8")
