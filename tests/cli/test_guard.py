"""The edge of a command: whatever it is doing, a signal ends it within two seconds and without noise."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import pytest

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
SECONDS = 2.0
SLACK = 1.5  # what a busy machine may add

PRELUDE = """
import ctypes, os, signal, subprocess, sys, threading, time
from mergelab.cli.guard import guarded

def ready():
    print("ready", flush=True)

def deadlock():  # waits in native code, which no signal ends, without holding the interpreter
    libc = ctypes.CDLL(None)
    mutex = ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    ready()
    libc.pthread_mutex_lock(mutex)
"""


@dataclass(frozen=True)
class Ended:
    """How a process ended: its status, what it wrote, and the seconds since the first signal."""

    status: int
    out: str
    err: str
    seconds: float


def interrupt(program: str, signals: Sequence[int], *, pause: float = 0.1, cwd: Path | None = None) -> Ended:
    """Runs a program until it prints `ready`, and sends it signals."""
    with subprocess.Popen(
        [sys.executable, "-c", PRELUDE + program],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd, env=ENVIRONMENT,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n", process.stderr and process.stderr.read()
            started = time.perf_counter()
            for number, each in enumerate(signals):
                time.sleep(pause if number else 0)
                process.send_signal(each)
            out, err = process.communicate(timeout=20)
        finally:
            process.kill()
    return Ended(process.returncode, out, err, time.perf_counter() - started)


COMMANDS = {
    "in Python": "def command():\n    ready()\n    while True: time.sleep(.01)",
    "in native code": "def command():\n    deadlock()",
    "with a thread that does not end": """
def command():
    threading.Thread(target=lambda: time.sleep(60)).start()
    ready()
    time.sleep(60)
""",
    "with threads that fail when it ends": """
from concurrent.futures import ThreadPoolExecutor
import logging
def work(pool):
    while True:
        time.sleep(.01)
        logging.getLogger("absl").error("a traceback of a library")
        pool.submit(print, end="").result()
def command():
    logging.getLogger("absl").addFilter(lambda record: len(pools) == 1)
    with ThreadPoolExecutor(2) as pool:
        pools.append(pool)
        pool.submit(work, pool)
        threading.Thread(target=work, args=(pool,)).start()
        ready()
        time.sleep(60)
pools = [1]
""",
    "in code that swallows it": """
def command():
    ready()
    while True:
        try: time.sleep(60)
        except BaseException: pass
""",
    "in code that makes another error of it": """
def command():
    ready()
    try: time.sleep(60)
    except BaseException: raise ValueError("not an interruption")
""",
    "in code that fails with a status": """
def command():
    ready()
    try: time.sleep(60)
    except BaseException: return 2
""",
    "in an import": """
def command():
    open("slow_module.py", "w").write("import __main__, time; __main__.ready(); time.sleep(60)")
    sys.path.insert(0, os.getcwd())
    import slow_module
""",
    "in clean-up that does not end": """
def command():
    ready()
    try: time.sleep(60)
    finally: deadlock()
""",
    "in the interpreter's own exit": """
import atexit
def command():
    atexit.register(lambda: (ready(), time.sleep(60)))
    return 0
""",
    "while a reader does not read what it prints": """
def command():
    ready()
    while True: print("x" * 1000)
""",
}


# Each of these takes a process: one signal or three, the one or the other, in turn.
IN_TURN = cycle([[signal.SIGINT], [signal.SIGTERM] * 3, [signal.SIGTERM], [signal.SIGINT] * 3])


@pytest.mark.parametrize(("doing", "signals"), [(doing, next(IN_TURN)) for doing in COMMANDS], ids=COMMANDS)
def test_a_signal_ends_a_command(doing: str, signals: list[signal.Signals], tmp_path: Path) -> None:
    ended = interrupt(f"{COMMANDS[doing]}\nguarded(command)", signals, cwd=tmp_path)
    assert (ended.status, ended.err) == (128 + signals[0], "interrupted\n")
    assert ended.seconds < SECONDS + SLACK


def test_without_the_guard_the_same_programs_end_otherwise() -> None:
    ended = interrupt(COMMANDS["in Python"] + "\ncommand()", [signal.SIGINT])
    assert ended.status != 130 or "Traceback" in ended.err


def test_clean_up_is_done_though_signals_go_on(tmp_path: Path) -> None:
    program = """
def command():
    ready()
    try: time.sleep(60)
    finally:
        for part in "abcde":
            time.sleep(.1)
            open(part, "w").close()
guarded(command)
"""
    ended = interrupt(program, [signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGINT], cwd=tmp_path)
    assert (ended.status, ended.err) == (130, "interrupted\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == list("abcde")


def test_a_training_may_take_sigterm_over_and_finish_its_checkpoint(tmp_path: Path) -> None:
    program = """
from mergelab.processes import Terminated
def command():
    asked = []
    before = signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
    ready()
    try:
        while not asked: time.sleep(.01)
        time.sleep(2.5)
        open("checkpoint", "w").close()
        raise Terminated
    finally:
        signal.signal(signal.SIGTERM, before)
guarded(command)
"""
    ended = interrupt(program, [signal.SIGTERM], cwd=tmp_path)
    assert (ended.status, ended.err) == (143, "interrupted\n")
    assert (tmp_path / "checkpoint").exists()


def test_libraries_see_sigterm_as_its_own_kind_of_interruption() -> None:
    program = """
import mergelab.processes
def command():
    ready()
    try: time.sleep(60)
    except mergelab.processes.Terminated: print("terminated")
guarded(command)
"""
    ended = interrupt(program, [signal.SIGTERM])
    assert (ended.status, ended.out) == (143, "terminated\n")


def test_what_a_process_was_started_to_ignore_stays_ignored() -> None:
    program = """
for number in (signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
def command():
    ready()
    time.sleep(.5)
    print("done")
    return 0
guarded(command)
"""
    ended = interrupt(program, [signal.SIGINT, signal.SIGHUP, signal.SIGINT])
    assert (ended.status, ended.out, ended.err) == (0, "done\n", "")


def test_a_signal_to_a_forked_child_is_not_the_parents() -> None:
    program = """
def command():
    child = os.fork()
    if not child:
        time.sleep(60)
    time.sleep(.2)
    os.kill(child, signal.SIGTERM)
    ready()
    time.sleep(2)
    print(os.WTERMSIG(os.waitpid(child, 0)[1]))
    return 0
guarded(command)
"""
    ended = interrupt(program, [])
    assert (ended.status, ended.out) == (0, f"{signal.SIGTERM.value}\n")


@pytest.mark.parametrize("status", [0, 2, 70])
def test_the_process_ends_with_the_commands_status(status: int) -> None:
    hang = "threading.Thread(target=lambda: time.sleep(60)).start()" if status else "pass"
    ended = interrupt(f"def command():\n    {hang}\n    ready()\n    return {status}\nguarded(command)", [])
    assert (ended.status, ended.err) == (status, "")
    assert ended.seconds < SECONDS


def test_a_closed_stream_is_never_the_place_of_an_output(tmp_path: Path) -> None:
    program = """
def command():
    print(os.open("file", os.O_CREAT | os.O_RDWR) > 2)
    os.write(1, b"noise")
    return 0
os.close(1)
guarded(command)
"""
    subprocess.run([sys.executable, "-c", PRELUDE + program], check=True, cwd=tmp_path, env=ENVIRONMENT)
    assert (tmp_path / "file").read_bytes() == b""
