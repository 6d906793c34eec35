"""Virtual environments that sections run other programs in: made once, and found again by the next run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["interpreter", "make", "versions"]


def interpreter(version: str) -> str:
    """The Python of a version such as `"3.13"`: `PYTHON313`, one on the path, or the newest of pyenv's.

    Raises:
        RuntimeError: there is none.
    """
    if version == "{}.{}".format(*sys.version_info[:2]):
        return sys.executable
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    kept = sorted(
        root.glob(f"versions/{version}.*/bin/python"), key=lambda path: int(path.parts[-3].split(".")[2])
    )
    named = os.environ.get(f"PYTHON{version.replace('.', '')}")
    for found in (named, shutil.which(f"python{version}"), *map(str, reversed(kept))):
        if found and _is(found, version):  # what pyenv puts on the path need not run
            return found
    raise RuntimeError(f"no Python {version} here: set PYTHON{version.replace('.', '')}")


def _is(program: str, version: str) -> bool:
    code = f"import sys; sys.exit('{{}}.{{}}'.format(*sys.version_info[:2]) != {version!r})"
    return subprocess.run([program, "-c", code], capture_output=True).returncode == 0


def make(folder: Path, python: str, installs: Sequence[Sequence[str]]) -> Path:
    """The `bin` folder of an environment with these packages, installed by one `pip install` after another.

    Raises:
        RuntimeError: pip failed; the message holds the end of what it wrote.
    """
    stamp = folder / "installed.json"
    wanted = json.dumps([list(packages) for packages in installs])
    if stamp.is_file() and stamp.read_text() == wanted:
        return folder / "bin"
    if not (folder / "bin" / "python").exists():
        subprocess.run([python, "-m", "venv", str(folder)], check=True)
    for packages in installs:
        command = [str(folder / "bin" / "pip"), "install", "-q", *packages]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"pip install {' '.join(packages)}:\n{done.stderr[-3000:]}")
    stamp.write_text(wanted)
    return folder / "bin"


def versions(programs: Path, names: Sequence[str]) -> Mapping[str, str]:
    """Installed versions by name, and that of Python."""
    code = (
        "import importlib.metadata, json, platform, sys\n"
        "found = {name: importlib.metadata.version(name) for name in sys.argv[1:]}\n"
        "print(json.dumps({'python': platform.python_version()} | found))"
    )
    done = subprocess.run(
        [programs / "python", "-c", code, *names], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout)
