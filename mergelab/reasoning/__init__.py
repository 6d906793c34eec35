"""Tasks solved with more compute at test time, judged and steered by what happens inside the model."""

from typing import TYPE_CHECKING

from mergelab.lazy import lazy_names

if TYPE_CHECKING:
    from mergelab.reasoning.answers import extract_answer, reference_answer
    from mergelab.reasoning.tasks import Task, check_tasks, read_tasks

__all__ = [
    "Task",
    "check_tasks",
    "extract_answer",
    "read_tasks",
    "reference_answer",
]

__getattr__, __dir__ = lazy_names(__name__)
