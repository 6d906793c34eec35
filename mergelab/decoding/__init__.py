"""Next tokens from logits: samplers, stop rules, and generation with a key-value cache."""

from mergelab.activations.batches import bucket_size, pad_prompts
from mergelab.decoding.generate import Generated, begin, generate
from mergelab.decoding.penalties import MinNewTokens, RepetitionPenalty, logit_bias, suppress
from mergelab.decoding.progress import Progress, advance, start
from mergelab.decoding.samplers import Sampler, greedy, row_keys, sample, sampler_from_options
from mergelab.decoding.stop import Stop, cut_at_strings, stop_at
from mergelab.decoding.text import Completion, complete
from mergelab.decoding.transform import History, LogitsTransform, chain
from mergelab.decoding.truncation import MinP, Temperature, TopK, TopP

__all__ = [
    "Completion",
    "Generated",
    "History",
    "LogitsTransform",
    "MinNewTokens",
    "MinP",
    "Progress",
    "RepetitionPenalty",
    "Sampler",
    "Stop",
    "Temperature",
    "TopK",
    "TopP",
    "advance",
    "begin",
    "bucket_size",
    "chain",
    "complete",
    "cut_at_strings",
    "generate",
    "greedy",
    "logit_bias",
    "pad_prompts",
    "row_keys",
    "sample",
    "sampler_from_options",
    "start",
    "stop_at",
    "suppress",
]
