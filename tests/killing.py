"""A process that runs commands in forks of itself, each killed before a chosen change of files.

Forking after the imports and before JAX's backend starts makes hundreds of commands affordable. Reads one
JSON object per line, `{"command": [...], "cwd": folder, "kill": n or null}`, and answers with one: the exit
status (137: killed), what was printed, and how many changes of files below the folder were seen.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

_CHANGES = {
    "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink", "shutil.rmtree",
}  # fmt: skip


def watch(folder: str, kill: int | None, seen: list[int]) -> None:
    """Counts changes of names below `folder`, in every thread, and ends the process before the `kill`-th."""
    lock = threading.Lock()

    def inside(path: Any) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        return os.path.abspath(os.fsdecode(path)).startswith(folder + os.sep)

    def change() -> None:
        with lock:
            seen[0] += 1
            if seen[0] == kill:
                os._exit(137)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = any(c in mode for c in "wax+") if isinstance(mode, str) else False
            if (writes or (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) and inside(path):
                change()
        elif event in _CHANGES and any(map(inside, arguments[:2])):
            change()

    sys.addaudithook(hook)
    # The exchange of two folders is a call into the C library, which no audit event announces.
    from mergelab.checkpoints import publish

    exchange = publish.exchange

    def counted(a: Path, b: Path) -> bool:
        change()
        return exchange(a, b)

    publish.exchange = counted


def child(job: dict[str, Any], answer: int) -> None:
    seen = [0]
    os.chdir(job["cwd"])
    watch(os.path.abspath(job["cwd"]), job["kill"], seen)
    out, err = io.StringIO(), io.StringIO()
    status: Any = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            from mergelab.cli.main import cli

            cli.main(job["command"], prog_name="mergelab")
        except SystemExit as exit:
            status = exit.code or 0
        except BaseException as error:
            status = f"{type(error).__name__}: {error}"
    result = {"status": status, "out": out.getvalue(), "err": err.getvalue(), "changes": seen[0]}
    os.write(answer, json.dumps(result).encode())
    os._exit(0)


def main() -> None:
    """Serves jobs until its input ends."""
    import jax  # noqa: F401
    import orbax.checkpoint  # noqa: F401

    import mergelab.abliteration
    import mergelab.cli.abliterate
    import mergelab.merging.run_merge
    import mergelab.merging.soups.greedy_folders
    import mergelab.sae.training  # noqa: F401

    for line in sys.stdin:
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            child(json.loads(line), write)
        os.close(write)
        with os.fdopen(read) as answer:
            text = answer.read()
        _, state = os.waitpid(pid, 0)
        dead = {"status": os.waitstatus_to_exitcode(state), "out": "", "err": "", "changes": -1}
        print(text or json.dumps(dead), flush=True)


if __name__ == "__main__":
    main()
