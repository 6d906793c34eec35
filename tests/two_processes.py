"""Two real processes of one `jax.distributed` run on this machine."""

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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Devices are for the module to simulate, as many as it likes.
    env = {**os.environ, "XLA_FLAGS": flags_without_devices()}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(port), str(process), str(folder)],
            cwd=REPOSITORY,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(o[-3000:] for o in outputs)
    return [json.loads((folder / f"report-{process}.json").read_text()) for process in range(2)]
