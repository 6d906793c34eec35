"""Commands run as several real processes of one run on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.compilation import flags_without_devices

REPOSITORY = Path(__file__).resolve().parent.parent
PATIENCE = 300.0
"""Seconds for a run to reach what a test waits for, on a busy machine."""

CLUSTERS = ("JAX_COORDINATOR", "JAX_NUM_PROC", "JAX_PROCESS", "SLURM_", "OMPI_", "TPU_", "MEGASCALE_")


@dataclass(frozen=True)
class Process:
    """How one process ended: its status, what it wrote, and when."""

    status: int
    out: str
    err: str


class Several:
    """The processes of one run; a context manager that leaves none behind."""

    def __init__(
        self,
        folder: Path,
        arguments: Callable[[int], Sequence[str]],
        count: int = 2,
        *,
        place: Callable[[int, int, int], Mapping[str, str] | Sequence[str]] | None = None,
        prepare: Callable[[int], Any] | None = None,
    ) -> None:
        """Starts them.

        Args:
            folder: where they work, and their streams go.
            arguments: the command line of a process, by its number.
            count: number of processes.
            place: options or variables that tell a process its place, of port, count and number.
            prepare: function that is called in each process before it begins, with its number.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.folder = folder
        self._all: list[subprocess.Popen[bytes]] = []
        usual = {name: value for name, value in os.environ.items() if not name.startswith(CLUSTERS)}
        for number in range(count):
            told = (place or options)(port, count, number)
            env = {**usual, "PYTHONPATH": str(REPOSITORY), "XLA_FLAGS": flags_without_devices()}
            words = [sys.executable, "-m", "mergelab", *arguments(number)]
            if isinstance(told, Mapping):
                env |= told
            else:
                words += told
            before = None if prepare is None else (lambda number=number: prepare(number))
            with (folder / f"out-{number}").open("wb") as out, (folder / f"err-{number}").open("wb") as err:
                self._all.append(
                    subprocess.Popen(words, cwd=folder, env=env, stdout=out, stderr=err, preexec_fn=before)
                )

    def wait_until(self, reached: Callable[[], bool]) -> None:
        """Waits for something that the run does, as long as all processes live."""
        until = time.monotonic() + PATIENCE
        while not reached():
            assert time.monotonic() < until, self.said()
            assert all(process.poll() is None for process in self._all), self.said()
            time.sleep(0.05)

    def signal(self, number: int, *processes: int) -> None:
        """Sends a signal to some of them."""
        for process in processes:
            self._all[process].send_signal(number)

    def end(self, seconds: float = PATIENCE) -> list[Process]:
        """Waits for all to have ended."""
        until = time.monotonic() + seconds
        for process in self._all:
            try:
                process.wait(max(until - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"alive after {seconds} s\n{self.said()}") from None
        return [
            Process(
                process.returncode,
                (self.folder / f"out-{number}").read_text(),
                (self.folder / f"err-{number}").read_text(),
            )
            for number, process in enumerate(self._all)
        ]

    def said(self) -> str:
        """What all of them have written, for the message of a failed test."""
        parts = [f"--- {p.name}\n{p.read_text()[-3000:]}" for p in sorted(self.folder.glob("*-[0-9]"))]
        return "\n".join(parts)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._all:
            process.kill()
            process.wait()


def options(port: int, count: int, number: int) -> list[str]:
    """A process's place as options of the command."""
    place = {"coordinator": f"127.0.0.1:{port}", "processes": count, "process-id": number}
    return [word for name, value in place.items() for word in (f"--{name}", str(value))]


def variables(port: int, count: int, number: int) -> dict[str, str]:
    """A process's place as JAX's variables."""
    return {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(number),
    }


def slurm(port: int, count: int, number: int) -> dict[str, str]:
    """A process's place as `srun` says it; JAX makes the port of the job's number."""
    return {
        "SLURM_JOB_ID": str(port),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": str(count),
        "SLURM_PROCID": str(number),
        "SLURM_LOCALID": str(number),
        "SLURM_STEP_NUM_NODES": "1",
        "JAX_COORDINATOR_PORT": str(port),
    }
