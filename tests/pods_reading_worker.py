"""One of three processes that read and write together: `python -m tests.pods_reading_worker PORT N FOLDER`.

Two simulated devices each. What every process read is counted, and goes to `FOLDER/report-N.json`.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mergelab.activations import store
from mergelab.activations.model_activations import ModelActivations, open_model_activations
from mergelab.activations.store import ActivationFiles, write_store
from mergelab.checkpoints.folder import open_checkpoint
from mergelab.errors import MergelabError
from mergelab.models.load import load_params
from mergelab.models.table import Leaf
from mergelab.sae.training import inputs, train
from mergelab.sharding import make_mesh
from tests.models.distributed_worker import Broken
from tests.models.synthetic import TABLE, Counted, expected, tensors

PROCESSES = 3
ROWS, BATCH, BUFFER = 2880, 96, 1024
MESHES: dict[str, dict[str, int]] = {
    "data": {"data": 6},
    "across": {"data": 2, "latents": 3},
    "latents": {"latents": 6},
}
SITES = ("blocks.0.resid_post", "blocks.1.mlp.out")
SHARD_ROWS = 160
NARROW = (
    Leaf(("embed",), "embed", (601, 96), axes=("vocab", "embed")),
    Leaf(("kernel",), "kernel", (96, 300), "identity", ("mlp", "embed")),
    Leaf(("up",), "up", (96, 384), "transpose", ("embed", "mlp")),
    Leaf(("experts",), "experts.{}", (2, 96, 72), "transpose", ("experts", "embed", "mlp"), stack=2),
    Leaf(("norm",), "norm", (96,), axes=("embed",)),
)
"""Leaves whose columns are split: runs of 64 to 256 bytes, one of a length that six devices do not divide."""


def config(folder: Path, mesh: dict[str, int] | None) -> dict[str, Any]:
    """A training of one epoch."""
    return {
        "sae": {"variant": "topk", "n_latents": 48, "k": 4},
        "data": {
            "kind": "files",
            "path": str(folder / "rows.npy"),
            "buffer_rows": BUFFER,
            "max_norm_multiple": None,
        },  # a limit takes a sample of rows, which process 0 reads
        "train": {"batch_size": BATCH, "tokens": ROWS, "lr": 3e-3, "dead_after_tokens": 256},
        "checkpoint": {"every": 10, "log_every": 5},
        "mesh": mesh,
    }


def text_config(folder: Path, mesh: dict[str, int] | None, model_mesh: dict[str, int] | None = None) -> Any:
    """A training on what a model computes of a text, in less than an epoch."""
    return {
        "sae": {"variant": "topk", "n_latents": 48, "k": 4},
        "data": {
            "kind": "model", "model": str(folder / "model"), "site": SITES[0],
            "text": str(folder / "text.txt"), "context": 16, "buffer_rows": 1024, "model_mesh": model_mesh,
        },
        "train": {"batch_size": 24, "tokens": 24 * 20, "lr": 3e-3, "dead_after_tokens": 256},
        "checkpoint": {"every": 10, "log_every": 5},
        "mesh": mesh,
    }  # fmt: skip


class Stopped(Exception):
    """Stands for a run that is killed."""


def stop_at(step: int) -> Any:
    def progress(done: int, *_: Any) -> None:
        if done >= step:
            raise Stopped

    return progress


def count_rows() -> list[int]:
    """Makes activation files note how many rows they are asked for."""
    count, read = [0], ActivationFiles.read

    def counted(self: ActivationFiles, start: int, stop: int) -> np.ndarray:
        count[0] += stop - start
        return read(self, start, stop)

    ActivationFiles.read = counted  # type: ignore[method-assign]
    inputs._READ_BYTES = 0  # small files are read once more, before a run is begun
    return count


def trainings(folder: Path, count: list[int]) -> dict[str, Any]:
    report: dict[str, Any] = {}
    for name, mesh in MESHES.items():
        count[0] = 0
        train(config(folder, mesh), folder / name)
        report[name] = count[0]
    with contextlib.suppress(Stopped):
        train(config(folder, MESHES["latents"]), folder / "resumed", progress=stop_at(25))
    count[0] = 0
    train(config(folder, MESHES["across"]), folder / "resumed", resume=True)
    report["resumed"] = count[0]
    return report


def texts(folder: Path) -> dict[str, Any]:
    count, read = [0], ModelActivations._gather

    def counted(self: ModelActivations, numbers: Any) -> Any:
        count[0] += len(numbers)
        return read(self, numbers)

    ModelActivations._gather = counted  # type: ignore[method-assign]
    train(text_config(folder, {"data": 6}, {"tensor": 2}), folder / "text")
    report: dict[str, Any] = {"rows": count[0]}
    for name in ("text-alone", "text-together"):
        with contextlib.suppress(Stopped):
            train(text_config(folder, {"data": 6}), folder / name, progress=stop_at(15))
    train(text_config(folder, {"latents": 6}, {"data": 2}), folder / "text-together", resume=True)
    try:
        train(text_config(folder, {"data": 6}, {"rows": 2}), folder / "no-mesh")
    except MergelabError as error:
        report["axis"] = str(error)
    return report


def loading(folder: Path, process: int) -> dict[str, Any]:
    mesh, report = make_mesh({"fsdp": 6}), {}
    count = [0]
    sources = {n: Counted(s, count) for n, s in open_checkpoint(folder / "narrow").tensors.items()}
    params = load_params(sources, NARROW, "narrow", mesh=mesh)
    kept = sum(shard.data.nbytes for a in params.values() for shard in a.addressable_shards)
    report["read"], report["kept"] = count[0], kept
    stored = {name: np.asarray(array) for name, array in _stored(folder / "narrow").items()}
    report["same"] = all(
        np.array_equal(shard.data, expected(leaf, stored)[shard.index])
        for leaf in NARROW
        for shard in params[leaf.name].addressable_shards
    )
    table = tensors(np.float32)
    mixed = load_params(open_checkpoint(folder / "table").tensors, TABLE, "table", mesh=mesh)
    report["every transform"] = all(
        np.array_equal(shard.data, expected(leaf, table)[shard.index])
        for leaf in TABLE
        for shard in _of(mixed, leaf).addressable_shards
    )
    broken = {n: Broken(s) if n == "up" and process == 1 else s for n, s in sources.items()}
    try:
        load_params(broken, NARROW, "narrow", mesh=mesh)
    except MergelabError as error:
        report["broken"] = f"{type(error).__name__}: {error}"
    return report


def _of(params: Any, leaf: Leaf) -> jax.Array:
    for key in leaf.path:
        params = params[key]
    return params


def _stored(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


def stores(folder: Path, process: int) -> dict[str, Any]:
    store._SHARD_ROWS = SHARD_ROWS
    report: dict[str, Any] = {}
    source = open_model_activations(folder / "model", SITES, [folder / "text.txt"], length=16)
    report["rows"] = write_store(source, folder / "acts", model=folder / "model")
    other = "other.txt" if process == 1 else "text.txt"
    unlike = open_model_activations(folder / "model", SITES, [folder / other], length=16)
    try:
        write_store(unlike, folder / "unlike", model=folder / "model")
    except MergelabError as error:
        report["unlike"] = f"{type(error).__name__}: {error}"
    return report


def main(port: str, process: int, folder: Path, part: str = "all") -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"127.0.0.1:{port}", PROCESSES, process)
    report: dict[str, Any] = {}
    if part == "killed":  # all of them, in the midst of a store
        store._SHARD_ROWS = SHARD_ROWS
        source = open_model_activations(folder / "model", SITES, [folder / "text.txt"], length=16)
        write_store(
            source, folder / "killed", model=folder / "model",
            progress=lambda done, total: os._exit(9) if done > 4 * SHARD_ROWS else None,
        )  # fmt: skip
    parts = {
        "loading": lambda: loading(folder, process),
        "trainings": lambda: trainings(folder, count_rows()),
        "texts": lambda: texts(folder),
        "stores": lambda: stores(folder, process),
    }
    for name, run in parts.items():
        if part in ("all", name):
            report[name] = run()
    (folder / f"report-{process}.json").write_text(json.dumps(report))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:])
