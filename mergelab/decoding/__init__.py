"""Next tokens from logits: samplers, stop rules, and generation with a key-value cache."""

from mergelab.decoding.penalties import MinNewTokens, RepetitionPenalty, logit_bias, suppress
from mergelab.decoding.samplers import Sampler, greedy, row_keys, sample, sampler_from_options
from mergelab.decoding.stop import Stop, cut_at_strings, stop_at
from mergelab.decoding.transform import History, LogitsTransform, chain
from mergelab.decoding.truncation import MinP, Temperature, TopK, TopP

__all__ = [
    "History",
    "LogitsTransform",
    "MinNewTokens",
    "MinP",
    "RepetitionPenalty",
    "Sampler",
    "Stop",
    "Temperature",
    "TopK",
    "TopP",
    "chain",
    "cut_at_strings",
    "greedy",
    "logit_bias",
    "row_keys",
    "sample",
    "sampler_from_options",
    "stop_at",
    "suppress",
]
