"""Model soups: averages of fine-tuned siblings, chosen on validation data or not at all."""

from mergelab.merging.soups.averages import (
    ExponentialAverage,
    RunningAverage,
    exponential_soup,
    last_soup,
    uniform_soup,
)
from mergelab.merging.soups.greedy import GreedySoup, greedy_soup, replay
from mergelab.merging.soups.scores import Guarded, Lexicographic, Objective, SoupSelection, WeightedScores
from mergelab.merging.soups.trace import Decision, Ranked, SoupTrace

__all__ = [
    "Decision",
    "ExponentialAverage",
    "GreedySoup",
    "Guarded",
    "Lexicographic",
    "Objective",
    "Ranked",
    "RunningAverage",
    "SoupSelection",
    "SoupTrace",
    "WeightedScores",
    "exponential_soup",
    "greedy_soup",
    "last_soup",
    "replay",
    "uniform_soup",
]
