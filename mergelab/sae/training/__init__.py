"""Training runs: batches to steps, with checkpoints, metrics and a finished SAE at the end."""

from typing import TYPE_CHECKING

from mergelab.lazy import lazy_names
from mergelab.sae.training.initialize import geometric_median, initialize

if TYPE_CHECKING:
    from mergelab.sae.training.aot import StepPlan, plan_step
    from mergelab.sae.training.checkpoints import Checkpoints
    from mergelab.sae.training.config import TrainConfig, TrainingRecipe, load_config
    from mergelab.sae.training.finish import finished_sae
    from mergelab.sae.training.in_memory import train_sae
    from mergelab.sae.training.state import TrainState, place_batch, place_state
    from mergelab.sae.training.step import Metrics, Step, make_step, train_step
    from mergelab.sae.training.tracking import read_metrics
    from mergelab.sae.training.trainer import Progress, Result, train

__all__ = [
    "Checkpoints",
    "Metrics",
    "Progress",
    "Result",
    "Step",
    "StepPlan",
    "TrainConfig",
    "TrainState",
    "TrainingRecipe",
    "finished_sae",
    "geometric_median",
    "initialize",
    "load_config",
    "make_step",
    "place_batch",
    "place_state",
    "plan_step",
    "read_metrics",
    "train",
    "train_sae",
    "train_step",
]

__getattr__, __dir__ = lazy_names(__name__)
