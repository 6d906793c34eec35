"""Loading a 400 MB checkpoint takes the memory of its arrays and little more; so does saving."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mergelab.checkpoints.shard_plan import TensorSpec, plan_shards

REPOSITORY = Path(__file__).resolve().parents[2]
ROWS, COLUMNS, COUNT = 2048, 1024, 50

# Runs alone and under a limit, so that the peak of its resident memory is that of loading. The files are
# read, not mapped: they add nothing to it.
PROGRAM = """
import gc, json, re, resource, sys
from pathlib import Path
import jax
from mergelab.checkpoints.folder import open_checkpoint
from mergelab.models.table import Leaf
from mergelab.models.load import load_params
from mergelab.models.save import save_params
from mergelab.sharding import make_mesh

def status(field):
    return int(re.search(rf"^{field}:\\s+(\\d+) kB", Path("/proc/self/status").read_text(), re.M)[1]) * 1024

def reset_peak():
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")

rows, columns, count, mesh, folder, transform, dtype, held = json.loads(sys.argv[1])
shape = (columns, rows) if transform == "transpose" else (rows, columns)
kernels = [Leaf((f"t{i}",), f"t{i}", shape, transform, ("embed", "mlp")) for i in range(count)]
norms = [[Leaf((f"{n}{i}",), f"{n}{i}", (columns,), axes=("embed",)) for i in range(count)] for n in "abc"]
table = [leaf for leaves in zip(kernels, *norms) for leaf in leaves]
tensors = open_checkpoint(folder).tensors
mesh = make_mesh(mesh) if mesh else None
small = table[0]
load_params({"t0": tensors["t0"]}, [small], folder, mesh=mesh, dtype=dtype)  # warm: devices, threads
width = 4 if dtype is None else 2
limit = status("VmData") + (rows + 3) * columns * count * width + (64 << 20)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
before = reset_peak()
if held == "control":  # what a loader that keeps every tensor on the host would need
    import numpy as np
    kept = []
    for source in tensors.values():
        kept.append(np.zeros(source.shape, source.dtype) + 1)
params = load_params(tensors, table, folder, mesh=mesh, dtype=dtype)
jax.block_until_ready(params)
loaded = sum(array.nbytes for array in params.values())  # replicas on simulated devices share memory
report = {"loaded": loaded, "load": status("VmHWM") - before - loaded}
before = reset_peak()
few = table[:48]
kept = {leaf.path[0]: params[leaf.path[0]] for leaf in few}
save_params(kept, few, folder + "/out", files={}, overwrite=True)
report["save"] = status("VmHWM") - before
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifty tensors of 8 MB with vectors between them, all zeros: a file of holes, which takes no disk."""
    out = tmp_path_factory.mktemp("large")
    shapes = {"t": (ROWS, COLUMNS), **dict.fromkeys("abc", (COLUMNS,))}
    specs = [TensorSpec(f"{n}{i}", np.dtype(np.float32), s) for i in range(COUNT) for n, s in shapes.items()]
    (shard,) = plan_shards(specs, 1 << 40).shards
    with open(out / shard.file, "wb") as file:
        file.write(shard.head)
        file.truncate(shard.size)
    return out


def measured(folder: Path, *options: object) -> dict[str, int]:
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    arguments = json.dumps([ROWS, COLUMNS, COUNT, *options])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, arguments],
        cwd=REPOSITORY,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("mesh", "transform", "dtype"),
    [
        pytest.param(None, "transpose", None, marks=pytest.mark.slow),
        pytest.param({"fsdp": 2, "tensor": 4}, "transpose", None, marks=pytest.mark.slow),
        ({"fsdp": 8}, "identity", "bfloat16"),
    ],
    ids=["one device", "8 devices", "8 devices, cast"],
)
def test_memory_is_the_arrays_and_less_than_three_tensors(
    mesh: dict[str, int] | None, transform: str, dtype: str | None, folder: Path
) -> None:
    found = measured(folder, mesh, str(folder), transform, dtype, "")
    size = (ROWS + 3) * COLUMNS * COUNT * (4 if dtype is None else 2)
    assert found["loaded"] == size
    few = 3 * ROWS * COLUMNS * 4
    assert found["load"] < few, found
    assert found["save"] < few, found


def test_a_loader_that_keeps_tensors_on_the_host_would_be_seen(folder: Path) -> None:
    with pytest.raises(RuntimeError, match="MemoryError"):
        measured(folder, None, str(folder), "identity", None, "control")
