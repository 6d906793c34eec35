"""Next tokens from logits: samplers, stop rules, generation with a cache, search, and what attempts cost."""

from typing import TYPE_CHECKING

from mergelab.lazy import lazy_names

if TYPE_CHECKING:
    from mergelab.activations.batches import bucket_size, pad_prompts
    from mergelab.decoding.accuracy import (
        accuracy_interval,
        best_of_n_kl,
        majority_accuracy,
        pass_at_k,
        pass_at_k_interval,
    )
    from mergelab.decoding.allocation import (
        Vote,
        adaptive_vote,
        expected_votes,
        vote_confidence,
        vote_is_decided,
    )
    from mergelab.decoding.beams import Beams, beam_search
    from mergelab.decoding.budget_forcing import Thinking, complete_thinking
    from mergelab.decoding.completion import Completion, complete
    from mergelab.decoding.compute_fits import LogComputeFit, fit_log_compute
    from mergelab.decoding.contrast import Contrast, LayerContrast, generate_contrastive, layer_contrast
    from mergelab.decoding.cost import (
        Prices,
        Retried,
        Usage,
        correct_answers_for,
        escalation_saving,
        mixed_cost,
        retry_failures,
    )
    from mergelab.decoding.generation import Generated, begin, generate
    from mergelab.decoding.generation_state import GenerationState, start
    from mergelab.decoding.guided_search import (
        FoundStates,
        guided_beams,
        guided_trees,
        particle_filter,
        systematic_resample,
    )
    from mergelab.decoding.memory import Memory
    from mergelab.decoding.monitors import Monitor, confidence_monitor, margin_monitor, monitor
    from mergelab.decoding.routing import Route, Routing, Tier, Verifier, cheapest_routing, route_of
    from mergelab.decoding.samplers import Sampler, greedy, row_keys, sample, sampler_from_options
    from mergelab.decoding.speculative import Speculated, speculate
    from mergelab.decoding.steps import advance
    from mergelab.decoding.stop import Stop, cut_at_strings, stop_at
    from mergelab.decoding.text_generation import generate_text
    from mergelab.decoding.thought_tree import tree_of_thought
    from mergelab.decoding.token_sets import (
        BanTexts,
        FirstTokens,
        Promote,
        ban_texts,
        ban_texts_of,
        promote,
        promote_texts,
    )
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
    from mergelab.decoding.votes import (
        best_of_n,
        boxed_answer,
        last_number,
        lowest_group_confidence,
        self_consistency,
        step_score,
        tail_confidence,
        weighted_vote,
    )

__all__ = [
    "BanTexts",
    "Beams",
    "Completion",
    "Contrast",
    "FirstTokens",
    "FoundStates",
    "Generated",
    "GenerationState",
    "History",
    "LayerContrast",
    "LogComputeFit",
    "LogitsTransform",
    "Memory",
    "MinNewTokens",
    "MinPFilter",
    "Monitor",
    "Prices",
    "Promote",
    "RepetitionPenalty",
    "Retried",
    "Route",
    "Routing",
    "Sampler",
    "Speculated",
    "Stop",
    "Temperature",
    "Thinking",
    "Tier",
    "TopKFilter",
    "TopPFilter",
    "Usage",
    "Verifier",
    "Vote",
    "accuracy_interval",
    "adaptive_vote",
    "advance",
    "ban_texts",
    "ban_texts_of",
    "beam_search",
    "begin",
    "best_of_n",
    "best_of_n_kl",
    "boxed_answer",
    "bucket_size",
    "chain",
    "cheapest_routing",
    "complete",
    "complete_thinking",
    "confidence_monitor",
    "correct_answers_for",
    "cut_at_strings",
    "escalation_saving",
    "expected_votes",
    "fit_log_compute",
    "generate",
    "generate_contrastive",
    "generate_text",
    "greedy",
    "guided_beams",
    "guided_trees",
    "last_number",
    "layer_contrast",
    "logit_bias",
    "lowest_group_confidence",
    "majority_accuracy",
    "margin_monitor",
    "mixed_cost",
    "monitor",
    "pad_prompts",
    "particle_filter",
    "pass_at_k",
    "pass_at_k_interval",
    "promote",
    "promote_texts",
    "retry_failures",
    "route_of",
    "row_keys",
    "sample",
    "sampler_from_options",
    "self_consistency",
    "speculate",
    "start",
    "step_score",
    "stop_at",
    "suppress",
    "systematic_resample",
    "tail_confidence",
    "tree_of_thought",
    "vote_confidence",
    "vote_is_decided",
    "weighted_vote",
]

__getattr__, __dir__ = lazy_names(__name__)
