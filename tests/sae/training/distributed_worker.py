"""One process of a distributed training: `python -m tests.sae.training.distributed_worker PORT N FOLDER`.

Four simulated devices in each of two processes; the runs of `MESHES` one after the other.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils

from mergelab.errors import MergelabError
from mergelab.processes import Terminated
from mergelab.sae.formats import load_sae
from mergelab.sae.training import train
from mergelab.sae.training.checkpoints import Checkpoints
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


def terminate(process: int) -> Any:
    """SIGTERM to the first process alone, as of a cluster that takes one machine; JAX tells the other."""
    sent: list[int] = []

    def progress(done: int, *_: Any) -> None:
        if done >= 8 and not sent:
            sent.append(done)
            if process == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(3)  # JAX looks for the signal about once a second

    return progress


def main(port: str, process: int, folder: Path) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
    report: dict[str, Any] = {}
    for name, mesh in MESHES.items():
        result = train({**CONFIG, "mesh": mesh}, folder / name)
        report[name] = {key: value for key, value in result.metrics.items() if "second" not in key}
        again = load_sae(result.path, mesh=make_mesh(mesh))
        same = jax.tree.map(jnp.array_equal, again.arrays(), result.sae.arrays())
        report[f"{name}, read again"] = {
            "same": all(bool(value) for value in same.values()),
            "held": {key: value.addressable_shards[0].data.shape for key, value in again.arrays().items()},
        }
    resumed = {**CONFIG, "mesh": MESHES["each process its tokens"]}
    try:
        train(resumed, folder / "resumed", progress=stop_at(21))
    except Stopped:
        report["stopped"] = True
    multihost_utils.sync_global_devices("stopped")
    if process == 0:  # what only one process has seen, all of them pass over
        os.truncate(folder / "resumed" / "checkpoints" / "20" / "manifest.json", 30)
    said: list[str] = []
    report["resumed"] = train(resumed, folder / "resumed", resume=True, notice=said.append).resumed
    report["said"] = said
    report["again"] = train(resumed, folder / "resumed", resume=True).resumed
    try:
        train(CONFIG, folder / "no mesh")
    except MergelabError as error:
        report["no mesh"] = str(error)
    try:
        train(resumed, folder / "resumed")
    except MergelabError as error:
        report["occupied"] = str(error)
    try:
        train(resumed, folder / "terminated", progress=terminate(process))
    except Terminated:
        report["terminated"] = Checkpoints(folder / "terminated" / "checkpoints", 2).find().step
    (folder / f"report-{process}.json").write_text(json.dumps(report))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
