"""Tasks solved with more compute at test time, judged and steered by what happens inside the model."""

from typing import TYPE_CHECKING

from mergelab.lazy import lazy_names

if TYPE_CHECKING:
    from mergelab.reasoning.answers import extract_answer, reference_answer
    from mergelab.reasoning.concept_injection import Injections, concept_vectors, inject_concepts
    from mergelab.reasoning.decision_odds import EndingOdds, odds_monitor, read_ending_odds
    from mergelab.reasoning.decision_paths import sparse_token_sum, token_analogy
    from mergelab.reasoning.decision_report import render_decision
    from mergelab.reasoning.decision_trace import DecisionTrace, trace_decision
    from mergelab.reasoning.decision_values import value_contributions
    from mergelab.reasoning.fitted import StepRows, fit_reading, load_probe, save_probe, step_rows
    from mergelab.reasoning.flops import PassCosts, pass_costs
    from mergelab.reasoning.growth import Growth
    from mergelab.reasoning.latent_steps import (
        LatentSteps,
        compare_latent_steps,
        generate_after_latent_steps,
        latent_steps_of,
    )
    from mergelab.reasoning.methods import METHODS, Attempt, MethodOptions, attempt, decide
    from mergelab.reasoning.outcomes import results_of
    from mergelab.reasoning.preferences import (
        bradley_terry_loss,
        dpo_loss,
        elo_expected,
        elo_loss,
        elo_update,
        implicit_reward,
        model_implicit_reward,
        sequence_log_probs,
    )
    from mergelab.reasoning.readings import (
        Reading,
        confidence_reading,
        entropy_reading,
        latent_reading,
        lens_reading,
        log_probability_reading,
        monitor_of,
        probe_reading,
    )
    from mergelab.reasoning.reward_files import load_reward_model, save_reward_model
    from mergelab.reasoning.reward_model import RewardModel, new_reward_model, score_texts
    from mergelab.reasoning.reward_rows import RewardRows, outcome_rows, pair_rows, process_rows
    from mergelab.reasoning.reward_scratchpads import Scratchpads, generate_scratchpads
    from mergelab.reasoning.reward_training import RewardRecord, train_reward_model
    from mergelab.reasoning.rewards import (
        clipped_fraction,
        clipped_objective,
        group_advantages,
        kl_estimate,
        length_penalized_reward,
        relative_length_reward,
    )
    from mergelab.reasoning.solving import Solved, solve
    from mergelab.reasoning.tasks import Task, check_tasks, read_tasks
    from mergelab.reasoning.triggers import disagreement_reading, write_forking, write_while_thinking
    from mergelab.reasoning.verifier_names import VERIFIERS
    from mergelab.reasoning.writer import Trace, Writer

__all__ = [
    "METHODS",
    "VERIFIERS",
    "Attempt",
    "DecisionTrace",
    "EndingOdds",
    "Growth",
    "Injections",
    "LatentSteps",
    "MethodOptions",
    "PassCosts",
    "Reading",
    "RewardModel",
    "RewardRecord",
    "RewardRows",
    "Scratchpads",
    "Solved",
    "StepRows",
    "Task",
    "Trace",
    "Writer",
    "attempt",
    "bradley_terry_loss",
    "check_tasks",
    "clipped_fraction",
    "clipped_objective",
    "compare_latent_steps",
    "concept_vectors",
    "confidence_reading",
    "decide",
    "disagreement_reading",
    "dpo_loss",
    "elo_expected",
    "elo_loss",
    "elo_update",
    "entropy_reading",
    "extract_answer",
    "fit_reading",
    "generate_after_latent_steps",
    "generate_scratchpads",
    "group_advantages",
    "implicit_reward",
    "inject_concepts",
    "kl_estimate",
    "latent_reading",
    "latent_steps_of",
    "length_penalized_reward",
    "lens_reading",
    "load_probe",
    "load_reward_model",
    "log_probability_reading",
    "model_implicit_reward",
    "monitor_of",
    "new_reward_model",
    "odds_monitor",
    "outcome_rows",
    "pair_rows",
    "pass_costs",
    "probe_reading",
    "process_rows",
    "read_ending_odds",
    "read_tasks",
    "reference_answer",
    "relative_length_reward",
    "render_decision",
    "results_of",
    "save_probe",
    "save_reward_model",
    "score_texts",
    "sequence_log_probs",
    "solve",
    "sparse_token_sum",
    "step_rows",
    "token_analogy",
    "trace_decision",
    "train_reward_model",
    "value_contributions",
    "write_forking",
    "write_while_thinking",
]

__getattr__, __dir__ = lazy_names(__name__)
