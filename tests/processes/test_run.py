"""Members of one run, as threads of one process and without JAX: they come, agree, hear of ends, leave."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

import pytest

from mergelab.errors import MeshError
from mergelab.processes.hub import numbers
from mergelab.processes.launch import Launch
from mergelab.processes.messages import Ended
from mergelab.processes.run import Run

FACTS = {"mergelab": "1", "jax": "2"}


class Member(Run):
    """A run whose end is noted, where a real one ends its process."""

    killed: Ended | None = None

    def _exit(self, ended: Ended, *, quiet: bool = False) -> NoReturn:  # pyright: ignore[reportReturnType]
        self.killed = ended

    def cut(self) -> None:
        """What the others see of a process that is killed."""
        link = self._link
        link.leaving = True
        self._loop.call_soon_threadsafe(lambda: link._writer and link._writer.transport.abort())


_open: list[Member] = []


@pytest.fixture(autouse=True)
def close_members() -> Iterator[None]:
    yield
    while _open:
        _open.pop().close()


def members(count: int, *, heartbeat: float = 60.0, join_timeout: float = 30.0) -> list[Member]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"127.0.0.1:{port}"
    times = {"heartbeat": heartbeat, "join_timeout": join_timeout}
    return [member(Launch(address, count, process), **times) for process in range(count)]


def member(launch: Launch, **times: float) -> Member:
    _open.append(Member(launch, **times))
    return _open[-1]


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(30) for future in [pool.submit(call) for call in calls]]


def joined(count: int, **times: float) -> list[Member]:
    runs = members(count, **times)
    at_once(*(lambda run=run: run.connect(FACTS) for run in runs))
    return runs


def refused(run: Member, facts: dict[str, Any] = FACTS) -> str:
    with pytest.raises(MeshError) as caught:
        run.connect(facts)
    return str(caught.value)


def test_processes_stop_at_the_step_after_the_one_that_is_farthest() -> None:
    runs = joined(3)
    for run, steps in zip(runs, (4, 6, 5), strict=True):
        assert not any(run.stops_at(step) for step in range(steps))
    runs[2].request_stop(None)
    for run in runs:
        until = time.monotonic() + 20
        while run._stop_at is None and time.monotonic() < until:
            time.sleep(0.01)
    # They have asked for steps 3, 5 and 4.
    assert [run.stops_at(4) for run in runs[:1]] == [False]
    assert [run.stops_at(5) for run in (runs[0], runs[2])] == [False, False]
    assert [run.stops_at(6) for run in runs] == [True] * 3
    assert all(run.stopped for run in runs)
    finished: list[int] = []
    assert at_once(*(lambda run=run: run.leave(lambda: finished.append(1)) for run in runs)) == [True] * 3
    assert len(finished) == 3 and not any(run.killed for run in runs)


def test_the_others_hear_why_one_fails_and_are_ended() -> None:
    runs = joined(3)
    assert runs[1].fail("data/x: row 7 holds NaN") is None
    for run in (runs[0], runs[2]):
        until = time.monotonic() + 20
        while run.killed is None and time.monotonic() < until:
            time.sleep(0.02)
        assert run.killed is not None
        host = socket.gethostname()
        assert run.lines(run.killed) == [f"process 1 of 3 ({host}) failed: data/x: row 7 holds NaN"]
        assert run.status(run.killed) == 2
    # Who fails later, of whatever, is told the first cause.
    first = runs[2].fail("the exchange broke off")
    assert first is not None and first.process == 1


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_is_named_with_the_way_on(lost: int) -> None:
    runs = joined(2)
    other = runs[1 - lost]
    other.advice = "go on with --resume"
    if lost == 0:
        hub = runs[0]._hub
        assert hub is not None
        for member in hub._members.values():
            runs[0]._loop.call_soon_threadsafe(member.writer.transport.abort)
    else:
        runs[1].cut()
    ended = other.cause(20)
    assert ended is not None and (ended.process, ended.kind) == (lost, "vanished")
    (line,) = other.lines(ended)
    assert line.startswith(f"process {lost} of 2 (") and line.endswith("; go on with --resume")


def test_silence_ends_a_run_and_is_laid_to_the_process_that_was_silent() -> None:
    runs = joined(2, heartbeat=1.0)
    runs[1]._link.say = lambda **message: None  # it lives, and says nothing
    ended = runs[0].cause(20)
    assert ended is not None
    assert (ended.process, ended.kind) == (1, "silent")
    assert "no sign of life for 1 s" in runs[0].lines(ended)[0]
    # One that stood still itself does not accuse the others, whose words it has not read.
    runs = joined(2, heartbeat=1.0)
    runs[1]._loop.call_soon_threadsafe(time.sleep, 2.5)
    assert [ended.process for run in runs if (ended := run.cause(20)) is not None] == [1, 1]


def test_a_run_that_is_not_whole_says_who_is_missing() -> None:
    runs = members(4, join_timeout=1.0)
    said = at_once(*(lambda run=run: refused(run) for run in (runs[0], runs[2])))
    assert all("processes 1, 3 of 4 did not join the run within 1 s" in one for one in said)
    lonely = members(2, join_timeout=1.0)[1]
    assert "process 0 does not answer at 127.0.0.1:" in refused(lonely)


def test_processes_that_do_not_fit_together_are_refused() -> None:
    first, second = members(2)
    twin = member(first.launch, join_timeout=5.0)
    other = member(Launch(first.launch.coordinator, 3, 1), join_timeout=5.0)
    said = at_once(lambda: refused(first), lambda: time.sleep(0.5) or refused(other))
    assert all("process 1 (" in one and "was started as one of 3" in one for one in said)
    assert "cannot listen on port" in refused(twin) or first._hub is None
    first, second = members(2)
    said = at_once(lambda: refused(first), lambda: time.sleep(0.5) or refused(second, {**FACTS, "jax": "3"}))
    assert all("has jax 3, process 0 has 2" in one for one in said)
    first, second, _ = members(3)
    again = member(second.launch, join_timeout=5.0)
    calls = [lambda: refused(first), lambda: time.sleep(0.3) or refused(second)]
    said = at_once(*calls, lambda: time.sleep(0.6) or refused(again))
    assert all("two processes say that they are number 1" in one for one in said)


def test_a_stranger_at_the_port_disturbs_nobody() -> None:
    runs = joined(2)
    host, _, port = runs[0].launch.coordinator.rpartition(":")
    for words in (b"GET / HTTP/1.1\r\n\r\n", b"\0" * 200_000, b'{"hello": 1, "processes": 2}\n', b"[]\n"):
        with socket.create_connection((host, int(port)), timeout=10) as stranger:
            stranger.settimeout(10)
            try:
                stranger.sendall(words)
                stranger.shutdown(socket.SHUT_WR)
                stranger.recv(1)
            except OSError:
                pass
    assert runs[0].ended is None and runs[1].ended is None
    threads = [threading.Thread(target=run.leave, args=(lambda: None,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()


def test_numbers_of_processes_are_told_shortly() -> None:
    assert numbers([3]) == "process 3"
    assert numbers([1, 2, 3, 7]) == "processes 1 to 3, 7"
    assert numbers(list(range(0, 60, 2))).endswith("18 and more")
