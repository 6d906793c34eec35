"""Several processes as one run: how they find each other, do steps together, stop at one step, and end."""

from typing import TYPE_CHECKING

from mergelab.lazy import lazy_names

if TYPE_CHECKING:
    from mergelab.processes.agreement import agree, check_shared, preempted, span_processes, together
    from mergelab.processes.joining import current_run, join_run
    from mergelab.processes.launch import Launch, find_launch, unjoined_tasks
    from mergelab.processes.messages import Ended
    from mergelab.processes.run import Run
    from mergelab.processes.termination import Terminated

__all__ = [
    "Ended",
    "Launch",
    "Run",
    "Terminated",
    "agree",
    "check_shared",
    "current_run",
    "find_launch",
    "join_run",
    "preempted",
    "span_processes",
    "together",
    "unjoined_tasks",
]

__getattr__, __dir__ = lazy_names(__name__)
