"""Next tokens from logits: samplers, stop rules, and generation with a key-value cache."""

from typing import TYPE_CHECKING

from mergelab.lazy import lazy_names

if TYPE_CHECKING:
    from mergelab.activations.batches import bucket_size, pad_prompts
    from mergelab.decoding.completion import Completion, complete
    from mergelab.decoding.generation import Generated, begin, generate
    from mergelab.decoding.generation_state import GenerationState, start
    from mergelab.decoding.memory import Memory
    from mergelab.decoding.samplers import Sampler, greedy, row_keys, sample, sampler_from_options
    from mergelab.decoding.steps import advance
    from mergelab.decoding.stop import Stop, cut_at_strings, stop_at
    from mergelab.decoding.text_generation import generate_text
    from mergelab.decoding.transforms import (
        History,
        LogitsTransform,
        MinNewTokens,
        MinPFilter,
        RepetitionPenalty,
        Temperature,
        TopKFilter,
        TopPFilter,
        chain,
        logit_bias,
        suppress,
    )

__all__ = [
    "Completion",
    "Generated",
    "GenerationState",
    "History",
    "LogitsTransform",
    "Memory",
    "MinNewTokens",
    "MinPFilter",
    "RepetitionPenalty",
    "Sampler",
    "Stop",
    "Temperature",
    "TopKFilter",
    "TopPFilter",
    "advance",
    "begin",
    "bucket_size",
    "chain",
    "complete",
    "cut_at_strings",
    "generate",
    "generate_text",
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

__getattr__, __dir__ = lazy_names(__name__)
