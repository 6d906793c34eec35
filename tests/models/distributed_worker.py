"""One process of the distributed test: `python -m tests.models.distributed_worker PORT PROCESS FOLDER`.

Four simulated devices in each of two processes make one mesh. What each saw goes to `FOLDER/report-N.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mergelab.checkpoints.folder import open_checkpoint
from mergelab.checkpoints.shared_writer import SharedWriter
from mergelab.errors import CheckpointError, MergelabError, OutputError
from mergelab.models.load import load_model, load_params
from mergelab.models.orbax import load_orbax, save_orbax
from mergelab.models.save import save_model, save_params
from mergelab.models.table import Leaf
from mergelab.operators import OPERATORS
from mergelab.sharding import make_mesh
from tests.models.synthetic import Counted

WIDE = (
    Leaf(("kernel",), "kernel", (2048, 64), "transpose", ("embed", "heads")),
    Leaf(("down",), "down", (64, 2048), "transpose", ("mlp", "embed")),
    Leaf(("embed",), "embed", (64, 2048), axes=("vocab", "embed")),
    Leaf(("experts",), "experts.{}", (4, 2048, 16), "transpose", ("experts", "embed", "mlp"), stack=4),
)
"""Leaves split over processes by rows and by columns of their files, in runs no shorter than a page."""


class Broken:
    """A source that fails in the middle of the model."""

    def __init__(self, source: Any) -> None:
        self.source, self.name, self.shape, self.dtype = source, source.name, source.shape, source.dtype

    def read_into(self, start: int, out: np.ndarray) -> None:
        raise CheckpointError("the disk of this process is broken")


def error_of(action: Any) -> str:
    try:
        action()
    except MergelabError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def main(port: str, process: int, folder: Path) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
    mesh = make_mesh({"fsdp": 2, "tensor": 4})
    report: dict[str, Any] = {}

    count = [0]
    wide = open_checkpoint(folder / "wide").tensors
    params = load_params({n: Counted(s, count) for n, s in wide.items()}, WIDE, "wide", mesh=mesh)
    report["bytes read"] = count[0]
    report["shards"] = {n: sorted({str(s.index) for s in a.addressable_shards}) for n, a in params.items()}
    save_params(params, WIDE, folder / "wide-out", files={}, shard_bytes=600_000)

    model, params = load_model(folder / "model", mesh=mesh, dtype="bfloat16")
    save_model(model, params, folder / "model-out")
    merged = OPERATORS["linear"](weight=[0.5, 0.5])([params["embed"], params["embed"]])
    report["merge stays"] = merged["embedding"].sharding == params["embed"]["embedding"].sharding
    save_orbax(model, params, folder / "orbax")
    _, restored = load_orbax(folder / "orbax", mesh=make_mesh({"tensor": 2, "fsdp": 4}))
    save_model(model, restored, folder / "orbax-out")
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
    summed = jax.jit(lambda p, t: model.apply(p, t).logits.astype(np.float32).sum())(params, tokens)
    report["logits"] = float(summed)

    broken = {n: Broken(s) if n == "down" and process == 1 else s for n, s in wide.items()}
    report["load"] = error_of(lambda: load_params(broken, WIDE, "wide", mesh=mesh))
    report["occupied"] = error_of(lambda: save_model(model, params, folder / "model-out"))
    if process == 1:

        def fail(*arguments: Any) -> None:
            raise OutputError("the disk of this process is full")

        SharedWriter.write_runs = fail  # type: ignore[method-assign]
    report["save"] = error_of(lambda: save_model(model, params, folder / "failed"))
    (folder / f"report-{process}.json").write_text(json.dumps(report))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
