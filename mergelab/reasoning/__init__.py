"""Tasks solved with more compute at test time, judged and steered by what happens inside the model."""

from typing import TYPE_CHECKING

from mergelab.lazy import lazy_names

if TYPE_CHECKING:
    from mergelab.reasoning.answers import extract_answer, reference_answer
    from mergelab.reasoning.fitted import StepRows, fit_reading, load_probe, save_probe, step_rows
    from mergelab.reasoning.flops import PassCosts, pass_costs
    from mergelab.reasoning.growth import Growth
    from mergelab.reasoning.methods import METHODS, Attempt, MethodOptions, attempt, decide
    from mergelab.reasoning.outcomes import results_of
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
    from mergelab.reasoning.solving import Solved, solve
    from mergelab.reasoning.tasks import Task, check_tasks, read_tasks
    from mergelab.reasoning.triggers import disagreement_reading, write_forking, write_while_thinking
    from mergelab.reasoning.verifier_names import VERIFIERS
    from mergelab.reasoning.writer import Trace, Writer

__all__ = [
    "METHODS",
    "VERIFIERS",
    "Attempt",
    "Growth",
    "MethodOptions",
    "PassCosts",
    "Reading",
    "Solved",
    "StepRows",
    "Task",
    "Trace",
    "Writer",
    "attempt",
    "check_tasks",
    "confidence_reading",
    "decide",
    "disagreement_reading",
    "entropy_reading",
    "extract_answer",
    "fit_reading",
    "latent_reading",
    "lens_reading",
    "load_probe",
    "log_probability_reading",
    "monitor_of",
    "pass_costs",
    "probe_reading",
    "read_tasks",
    "reference_answer",
    "results_of",
    "save_probe",
    "solve",
    "step_rows",
    "write_forking",
    "write_while_thinking",
]

__getattr__, __dir__ = lazy_names(__name__)
