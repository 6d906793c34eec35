"""Training runs: batches to steps, with checkpoints, metrics and a finished SAE at the end."""

from mergelab.sae.training.trainer import Progress, Result, train

__all__ = ["Progress", "Result", "train"]
