"""Joining a run: process 0 is found, all are waited for, and JAX is told; its end is told to all."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from types import TracebackType
from typing import TYPE_CHECKING, Any

from mergelab.errors import MeshError
from mergelab.processes.launch import Detected, Launch, find_launch
from mergelab.version import __version__

if TYPE_CHECKING:
    from mergelab.processes.run import Run

__all__ = ["current_run", "join_run", "last_word", "leave_run"]

_joined: list[Run] = []


def current_run() -> Run | None:
    """The run that this process has joined; None if it stands alone."""
    return _joined[0] if _joined else None


def join_run(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    *,
    join_timeout: float = 300.0,
    heartbeat: float = 100.0,
) -> Run | None:
    """The run that this process belongs to, joined; None where it stands alone.

    Call it first, instead of `jax.distributed.initialize`: the devices of all processes are JAX's from then
    on. What is not given comes from the variables `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and
    `JAX_PROCESS_ID`, or from Slurm, Open MPI, Kubernetes or a TPU pod. A failure of one process ends all
    of them, each with the cause and the process it came from. A second call returns the run of the first.

    Args:
        coordinator: `HOST:PORT` at which process 0 listens.
        processes: number of processes; 1 stands alone whatever a cluster says.
        process_id: number of this one, from 0.
        join_timeout: seconds within which all processes have to come.
        heartbeat: seconds without a sign of life after which a process counts as gone, at least 1.

    Raises:
        MeshError: what is said is incomplete or impossible, the processes do not find each other or do not
            fit together, or JAX has computed something already.
    """
    if _joined:
        return _joined[0]
    for name, value in (("join_timeout", join_timeout), ("heartbeat", heartbeat)):
        if not 1 <= value <= 1e6:
            raise MeshError(f"{name} is {value!r}, not a number of seconds from 1 on")
    given = {"coordinator": coordinator, "processes": processes, "process_id": process_id}
    launch = find_launch(given, os.environ, lambda: _ask_cluster(int(join_timeout)))
    if launch is None:
        return None
    import jax
    import jax.distributed

    from mergelab.processes.run import Run

    if jax.distributed.is_initialized():
        raise MeshError("jax.distributed.initialize was called before join_run; leave it out")
    run = Run(launch, join_timeout=join_timeout, heartbeat=heartbeat)
    run.connect({"mergelab": __version__, "jax": jax.__version__})
    _tell_jax(run, launch)
    _joined.append(run)
    _follow(run)
    return run


def _tell_jax(run: Run, launch: Launch) -> None:
    import jax

    from mergelab.compat import leave_signals_alone

    # JAX would take SIGTERM for itself; here the step at which all stop is agreed on by `Run.stops_at`.
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM) if main else None
    leave_signals_alone()
    try:
        jax.distributed.initialize(
            run.service,
            launch.processes,
            launch.process_id,
            list(launch.local_devices) if launch.local_devices else None,
            cluster_detection_method="deactivate",
            initialization_timeout=max(int(run.join_timeout), 30),
            coordinator_bind_address=run.service,
            # A silent process is noticed by `Run`, which says so; JAX would abort this one.
            heartbeat_timeout_seconds=int(100 + 4 * run.heartbeat),
        )
    except RuntimeError as error:
        sentence = f"JAX cannot join the run ({str(error).splitlines()[0]})"
        run.fail(sentence)
        raise MeshError(sentence) from error
    if main and before is not None:
        signal.signal(signal.SIGTERM, before)


def _follow(run: Run) -> None:
    """Tells the others of an exception that ends this process, and waits for them when it ends well."""
    failed: list[bool] = []
    usual = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> Any:
        failed.append(True)
        if run.follows(error):
            run.cause()
        said = f"{kind.__name__}: {error}".strip(": ")
        ended = run.fail(said, "interrupted" if issubclass(kind, KeyboardInterrupt) else "failed")
        if ended is None:
            usual(kind, error, trace)
        elif sys.stderr is not None:
            sys.stderr.writelines(f"error: {line}\n" for line in run.lines(ended))

    sys.excepthook = hook

    def end() -> None:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        if failed or run.ended is not None:
            os._exit(1)  # JAX would wait for the others for minutes
        if not leave_run(run, timeout=300.0):
            os._exit(0)

    atexit.register(end)  # after JAX's own, so that it comes before


def leave_run(run: Run, timeout: float | None = None) -> bool:
    """Waits for the other processes' part and takes the run apart; False if they do not come in time."""
    import jax

    return run.leave(jax.distributed.shutdown, timeout)


def last_word(kind: str) -> None:
    """Tells the others, without waiting, that a signal ends this process."""
    if _joined:
        _joined[0].last_word(kind)


def _ask_cluster(timeout: int) -> Detected:
    from mergelab.compat import cluster_facts

    return cluster_facts(timeout)
