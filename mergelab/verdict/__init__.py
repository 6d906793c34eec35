"""Models measured on held-out text and tasks, with paired intervals, and the honest sentence about a merge.

>>> import mergelab as ml
>>> ml.compare_models(["a", "b", "ties.yaml"], text=Path("held-out.txt")).table()  # doctest: +SKIP
"""

from typing import TYPE_CHECKING

from mergelab.lazy import lazy_names

if TYPE_CHECKING:
    from mergelab.verdict.answers import AnswerScores, score_answers
    from mergelab.verdict.bootstrap import Difference, Estimate, difference, estimate, resampled_sums
    from mergelab.verdict.choice_tasks import ChoiceTask, TaskScores, read_tasks, score_tasks
    from mergelab.verdict.comparison import Comparison, compare_models
    from mergelab.verdict.evaluation import Evaluation, Material, evaluate_model
    from mergelab.verdict.held_out_text import HeldOutText, TextScores, read_held_out, score_text
    from mergelab.verdict.merge_verdict import MergeTrial, MergeVerdict, prepare_verdict, verdict_of

__all__ = [
    "AnswerScores",
    "ChoiceTask",
    "Comparison",
    "Difference",
    "Estimate",
    "Evaluation",
    "HeldOutText",
    "Material",
    "MergeTrial",
    "MergeVerdict",
    "TaskScores",
    "TextScores",
    "compare_models",
    "difference",
    "estimate",
    "evaluate_model",
    "prepare_verdict",
    "read_held_out",
    "read_tasks",
    "resampled_sums",
    "score_answers",
    "score_tasks",
    "score_text",
    "verdict_of",
]

__getattr__, __dir__ = lazy_names(__name__)
