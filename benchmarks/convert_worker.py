"""One turn of benchmarks/convert.py in a process of its own: loads a checkpoint one way.

    python -m benchmarks.convert_worker PROGRAM FOLDER

Prints JSON: seconds of loading (imports and start-up not counted), bytes of the loaded arrays, and anonymous
memory of the process before it began.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["PROGRAMS", "main"]

_CHUNK = 4 << 20


def read(folder: Path) -> Callable[[], int]:
    """Reads every byte once, on two threads, into two reused buffers."""
    buffers = [memoryview(bytearray(_CHUNK)) for _ in range(2)]
    return lambda: _read_all(folder, lambda thread, place, size: buffers[thread][:size], keep=False)


def read_into_new_memory(folder: Path) -> Callable[[], int]:
    """The same into new memory of the model's size, as any loader that does not map the file must."""

    def load() -> int:
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        memory = np.empty(size, np.uint8).data
        return _read_all(folder, lambda thread, place, size: memory[place : place + size], keep=True)

    return load


def mergelab_1(folder: Path) -> Callable[[], int]:
    """This library, to one device."""
    return _mergelab(folder, None)


def mergelab_8(folder: Path) -> Callable[[], int]:
    """This library, to a mesh of eight simulated devices."""
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    return _mergelab(folder, {"fsdp": 2, "tensor": 4})


def _mergelab(folder: Path, sizes: dict[str, int] | None) -> Callable[[], int]:
    import jax

    from mergelab.models.load import load_model
    from mergelab.sharding import make_mesh

    mesh = None if sizes is None else make_mesh(sizes)
    jax.block_until_ready(jax.numpy.zeros(1))

    def load() -> int:
        _, params = load_model(folder, mesh=mesh)
        _KEPT.append(params)
        # Replicas on simulated devices share their memory, and count once.
        return sum(array.nbytes for array in jax.tree.leaves(jax.block_until_ready(params)))

    return load


def transformers(folder: Path) -> Callable[[], int]:
    """Uses transformers. Every page of every weight is touched: it may be mapped and not yet read."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM  # pyright: ignore[reportMissingImports]

    def load() -> int:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        _KEPT.append(model)
        tensors = {p.data_ptr(): p.detach() for p in model.parameters()}.values()
        for tensor in tensors:
            tensor.reshape(-1).view(torch.uint8)[::4096].sum()
        return sum(tensor.nbytes for tensor in tensors)

    return load


PROGRAMS: dict[str, Callable[[Path], Callable[[], int]]] = {
    "read": read,
    "read into new memory": read_into_new_memory,
    "mergelab, 1 device": mergelab_1,
    "mergelab, 8 devices": mergelab_8,
    "transformers": transformers,
}
_KEPT: list[Any] = []
"""What was loaded stays to the end of the process, as it would in use."""


def _read_all(folder: Path, buffer: Callable[[int, int, int], memoryview], *, keep: bool) -> int:
    done = 0
    for path in sorted(folder.glob("*.safetensors")):
        size, file = path.stat().st_size, os.open(path, os.O_RDONLY)

        def work(thread: int, size: int = size, file: int = file, base: int = done) -> None:
            for start in range(thread * _CHUNK, size, 2 * _CHUNK):
                count = min(_CHUNK, size - start)
                if os.preadv(file, [buffer(thread, base + start, count)], start) != count:
                    raise OSError(f"short read at byte {start} of {size}")

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(work, range(2)))
        os.close(file)
        done += size
    return done if keep else 0


def _anonymous() -> int:
    found = re.search(r"^RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def main(arguments: list[str]) -> str:
    """Loads as the command line asks; returns the JSON to print."""
    load = PROGRAMS[arguments[0]](Path(arguments[1]))
    before = _anonymous()
    started = time.perf_counter()
    loaded = load()
    return json.dumps({"seconds": time.perf_counter() - started, "loaded": loaded, "before": before})


if __name__ == "__main__":
    print(main(sys.argv[1:]))
