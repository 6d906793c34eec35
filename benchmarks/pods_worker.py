"""One process of `benchmarks.pods`: `python -m benchmarks.pods_worker PORT PROCESSES INDEX FOLDER`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import jax

FIRST, LAST = 40, 140
DEVICES = 4
CONFIG: dict[str, Any] = {
    "sae": {"variant": "topk", "n_latents": 512, "k": 8},
    "data": {"kind": "toy", "toy": {"d_in": 64, "n_features": 128, "l0": 4.0}, "buffer_rows": 16384},
    "train": {"batch_size": 512, "tokens": 512 * LAST, "lr": 1e-3},
    "checkpoint": {"every": 1000, "log_every": 20},
    "mesh": {"data": DEVICES},
}


def main(port: str, processes: int, index: int, folder: Path) -> None:
    """Trains, and writes down the processor seconds of a step of this process."""
    jax.config.update("jax_num_cpu_devices", DEVICES // processes)
    if processes > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", processes, index)
    from mergelab.sae.training import train

    marks: dict[int, float] = {}

    def progress(done: int, *_: Any) -> None:
        used = os.times()
        marks[done] = used.user + used.system

    train(CONFIG, folder / "run", progress=progress)
    seconds = (marks[LAST] - marks[FIRST]) / (LAST - FIRST)
    (folder / f"cpu-{index}.json").write_text(json.dumps(seconds), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
