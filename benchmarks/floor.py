"""The floor of any merge: read every input byte once, write and sync every output byte once, compute nothing.

`python -m benchmarks.floor INPUT... --out FILE` prints the seconds that took, as JSON. Two threads each read
a chunk of every input into reused buffers and write one chunk of output at its place in a new file of full
size, which is on the medium (fsync) when they are done: a merge ends so, too.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

__all__ = ["stream"]

CHUNK = 4 << 20


def stream(inputs: list[Path], out: Path, threads: int = 2) -> float:
    """Reads all of `inputs` (equally long files) and writes as many bytes as one holds to `out`.

    Returns:
        The seconds from before the output exists until it is on the medium.
    """
    size = inputs[0].stat().st_size
    if any(path.stat().st_size != size for path in inputs):
        raise ValueError(f"inputs of different sizes: {[path.stat().st_size for path in inputs]}")
    sources = [os.open(path, os.O_RDONLY) for path in inputs]
    started = time.perf_counter()
    target = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.posix_fallocate(target, 0, size)

    def work(first: int) -> None:
        buffers = [bytearray(CHUNK) for _ in sources]
        for start in range(first * CHUNK, size, threads * CHUNK):
            length = min(CHUNK, size - start)
            for source, buffer in zip(sources, buffers, strict=True):
                if os.preadv(source, [memoryview(buffer)[:length]], start) != length:
                    raise OSError(f"short read at byte {start}")
            if os.pwrite(target, memoryview(buffers[0])[:length], start) != length:
                raise OSError(f"short write at byte {start}")

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))
    os.fsync(target)
    seconds = time.perf_counter() - started
    for descriptor in (*sources, target):
        os.close(descriptor)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("inputs", nargs="+", type=Path)
    parser.add_argument("--out", required=True, type=Path)
    options = parser.parse_args()
    print(json.dumps({"seconds": stream(options.inputs, options.out)}))


if __name__ == "__main__":
    main()
