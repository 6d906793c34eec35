"""One process of a distributed training: `python -m tests.sae.training.distributed_worker PORT N FOLDER`.

Four simulated devices in each of two processes; the runs of `MESHES` one after the other.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from mergelab.errors import MergelabError
from mergelab.sae.formats import load_dictionary
from mergelab.sae.training import train
from mergelab.sharding import make_mesh

MESHES: dict[str, dict[str, int]] = {
    "each process its tokens": {"data": 2, "latents": 4},
    "each process its latents": {"latents": 8},
}
CONFIG: dict[str, Any] = {
    "sae": {"variant": "topk", "n_latents": 64, "k": 4},
    "data": {"kind": "toy", "toy": {"d_in": 16, "n_features": 32, "l0": 2.0}, "buffer_rows": 4096},
    "train": {"batch_size": 64, "tokens": 64 * 24, "lr": 3e-3, "dead_after_tokens": 256},
    "checkpoint": {"every": 10, "log_every": 4},
}


class Stopped(Exception):
    """Stands for a run that is killed."""


def stop_at(step: int) -> Any:
    def progress(done: int, *_: Any) -> None:
        if done >= step:
            raise Stopped

    return progress


def main(port: str, process: int, folder: Path) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
    report: dict[str, Any] = {}
    for name, mesh in MESHES.items():
        result = train({**CONFIG, "mesh": mesh}, folder / name)
        report[name] = {key: value for key, value in result.metrics.items() if "second" not in key}
        again = load_dictionary(result.path, mesh=make_mesh(mesh))
        same = jax.tree.map(jnp.array_equal, again.arrays(), result.dictionary.arrays())
        report[f"{name}, read again"] = {
            "same": all(bool(value) for value in same.values()),
            "held": {key: value.addressable_shards[0].data.shape for key, value in again.arrays().items()},
        }
    resumed = {**CONFIG, "mesh": MESHES["each process its tokens"]}
    try:
        train(resumed, folder / "resumed", progress=stop_at(14))
    except Stopped:
        report["stopped"] = True
    train(resumed, folder / "resumed", resume=True)
    try:
        train(CONFIG, folder / "no mesh")
    except MergelabError as error:
        report["no mesh"] = str(error)
    try:
        train(resumed, folder / "resumed")
    except MergelabError as error:
        report["occupied"] = str(error)
    (folder / f"report-{process}.json").write_text(json.dumps(report))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
