"""What a process was told of the run it belongs to: by arguments, by variables, by Slurm or a TPU pod."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from mergelab.errors import MeshError, quoted

__all__ = ["Launch", "address", "find_launch", "managed", "unjoined_tasks"]

VARIABLES = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}
"""Variables that say what the argument of the same name says; an argument goes before its variable."""

_OPTIONS = {"coordinator": "--coordinator", "processes": "--processes", "process_id": "--process-id"}
_MOST = 1_000_000


@dataclass(frozen=True)
class Launch:
    """The place of one process in a run.

    Attributes:
        coordinator: `HOST:PORT` at which process 0 listens, one port that all processes reach.
        processes: number of processes in all.
        process_id: number of this one, from 0.
        local_devices: numbers of the machine's devices that this process takes; all if None.
    """

    coordinator: str
    processes: int
    process_id: int
    local_devices: tuple[int, ...] | None = None


Detected = tuple[str | None, int | None, int | None, tuple[int, ...] | None]
"""Address, number of processes, number of this one, its devices: what a cluster says, as far as it does."""


def find_launch(
    given: Mapping[str, str | int | None],
    environment: Mapping[str, str],
    detect: Callable[[], Detected] | None = None,
) -> Launch | None:
    """The place of this process in a run; None where it stands alone.

    Args:
        given: `coordinator`, `processes` and `process_id`, as far as arguments say them.
        environment: variables of the process, those of `VARIABLES` among them.
        detect: function that asks the cluster for what neither says. It is called only where the environment
            looks like one (`managed`), and may take a moment.

    Raises:
        MeshError: what is said is incomplete or impossible; all faults at once.
    """
    said = {name: (given.get(name), _OPTIONS[name]) for name in VARIABLES}
    for name, variable in VARIABLES.items():
        if said[name][0] is None and environment.get(variable, "").strip():
            said[name] = environment[variable].strip(), variable
    faults: list[str] = []
    processes = _whole(*said["processes"], 1, faults)
    process = _whole(*said["process_id"], 0, faults)
    coordinator = address(*said["coordinator"], faults)
    if faults:
        raise MeshError(faults)
    if processes == 1:
        if process:
            raise MeshError(f"{said['process_id'][1]} is {process}, but the run has one process, number 0")
        return None
    devices: tuple[int, ...] | None = None
    if None in (coordinator, processes, process):
        found = detect() if detect is not None and managed(environment) else (None, None, None, None)
        coordinator = found[0] if coordinator is None else coordinator
        processes = found[1] if processes is None else processes
        process = found[2] if process is None else process
        devices = found[3]
    missing = [
        f"{_OPTIONS[name]} ({VARIABLES[name]})"
        for name, value in zip(VARIABLES, (coordinator, processes, process), strict=True)
        if value is None
    ]
    if len(missing) == len(VARIABLES) or (processes == 1 and not process):
        return None
    if coordinator is None or processes is None or process is None:
        raise MeshError(
            f"a run of several processes was asked for, but {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing; give all three to every process"
        )
    if process >= processes:
        raise MeshError(
            f"{said['process_id'][1]} is {process}, but {processes} processes have the numbers 0 to "
            f"{processes - 1}"
        )
    return Launch(coordinator, processes, process, devices)


def managed(environment: Mapping[str, str]) -> bool:
    """Whether variables, or the machine, look as if something has started several processes as one run.

    Slurm's `srun`, Open MPI, indexed jobs of Kubernetes and TPU pods are what JAX knows to ask further.
    """

    def count(name: str) -> int:
        text = environment.get(name, "")
        return int(text) if text.isascii() and text.isdigit() and len(text) < 9 else 0

    if count("SLURM_NTASKS") > 1 and environment.keys() >= _STEP:
        return True
    if count("OMPI_COMM_WORLD_SIZE") > 1 or count("MEGASCALE_NUM_SLICES") > 1:
        return True
    if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys():
        return True
    if any("," in environment.get(name, "") for name in ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")):
        return True
    platforms = environment.get("JAX_PLATFORMS", "")
    if platforms and "tpu" not in platforms.split(","):
        return False
    # A TPU machine of Google's asks its metadata server, which other machines do not have.
    tpu = any(Path("/dev").glob("accel*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    return tpu and "TPU_SKIP_MDS_QUERY" not in environment and find_spec("libtpu") is not None


_STEP = {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"}
"""Variables that `srun` gives each task of a step."""


def unjoined_tasks(environment: Mapping[str, str]) -> str | None:
    """A sentence for a process that stands alone where Slurm has allotted several tasks; else None."""
    tasks = environment.get("SLURM_NTASKS", "")
    if not (tasks.isascii() and tasks.isdigit()) or int(tasks[:9]) < 2:
        return None
    return (
        f"Slurm has allotted {tasks} tasks, but this process runs alone: put `srun` before the command, so "
        "that all tasks are one run, or give --processes 1 where this is meant"
    )


def address(value: str | int | None, name: str, faults: list[str]) -> str | None:
    """`HOST:PORT`, checked; what is wrong with it is added to `faults`."""
    if value is None:
        return None
    text = str(value).strip()
    host, _, port = text.rpartition(":")
    plain = re.fullmatch(r"[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.%A-Za-z]{2,60}\]", host)
    if not plain or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        faults.append(
            f"{name} is {quoted(text)}, not an address of process 0; write HOST:PORT, such as 10.0.0.1:8476"
        )
        return None
    return text


def _whole(value: str | int | None, name: str, least: int, faults: list[str]) -> int | None:
    if value is None:
        return None
    text = str(value).strip()
    if not re.fullmatch("[0-9]{1,9}", text) or not least <= int(text) <= _MOST:
        faults.append(f"{name} is {quoted(text)}, not a whole number from {least} on")
        return None
    return int(text)
