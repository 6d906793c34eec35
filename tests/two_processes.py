"""Real processes of one `jax.distributed` run on this machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.compilation import flags_without_devices

REPOSITORY = Path(__file__).resolve().parent.parent


def run_two(module: str, folder: Path) -> list[dict[str, Any]]:
    """Runs `python -m MODULE PORT PROCESS FOLDER` twice; returns the `report-PROCESS.json` of each."""
    return run_together(module, folder, 2)


def run_together(
    module: str, folder: Path, count: int, *arguments: str, codes: int | None = 0
) -> list[dict[str, Any]]:
    """Runs `python -m MODULE PORT PROCESS FOLDER ARGUMENTS` for each of `count` processes.

    Args:
        module: what to run.
        folder: its folder.
        count: number of processes.
        arguments: what else it is given.
        codes: exit status that all must have; None for processes that are to be killed.

    Returns:
        The `report-PROCESS.json` of each; none where they are to be killed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Devices are for the module to simulate, as many as it likes.
    env = {**os.environ, "XLA_FLAGS": flags_without_devices()}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(port), str(process), str(folder), *arguments],
            cwd=REPOSITORY,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(count)
    ]
    try:
        outputs = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    if codes is None:
        return []
    told = "\n".join(o[-3000:] for o in outputs)
    assert [process.returncode for process in processes] == [codes] * count, told
    return [json.loads((folder / f"report-{process}.json").read_text()) for process in range(count)]
