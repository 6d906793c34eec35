"""Model soups: averages of fine-tuned siblings, chosen on validation data or not at all."""

from typing import TYPE_CHECKING

from mergelab.lazy import lazy_names

if TYPE_CHECKING:
    from mergelab.merging.soups.averages import (
        ExponentialAverage,
        RunningAverage,
        exponential_soup,
        last_soup,
        uniform_soup,
    )
    from mergelab.merging.soups.evaluators import CommandEvaluator, TextLoss
    from mergelab.merging.soups.folders import RunningFolder, average_checkpoints, soup, update_average
    from mergelab.merging.soups.greedy import GreedySoup, greedy_soup, replay
    from mergelab.merging.soups.greedy_folders import greedy_soup_checkpoints
    from mergelab.merging.soups.scores import (
        Guarded,
        Lexicographic,
        Objective,
        SoupSelection,
        WeightedScores,
    )
    from mergelab.merging.soups.trace import Decision, Ranked, SoupTrace

__all__ = [
    "CommandEvaluator",
    "Decision",
    "ExponentialAverage",
    "GreedySoup",
    "Guarded",
    "Lexicographic",
    "Objective",
    "Ranked",
    "RunningAverage",
    "RunningFolder",
    "SoupSelection",
    "SoupTrace",
    "TextLoss",
    "WeightedScores",
    "average_checkpoints",
    "exponential_soup",
    "greedy_soup",
    "greedy_soup_checkpoints",
    "last_soup",
    "replay",
    "soup",
    "uniform_soup",
    "update_average",
]

__getattr__, __dir__ = lazy_names(__name__)
