"""A loaded model trained further on text: whole or by LoRA, AdamW or Muon, near to a teacher, resumable."""

from typing import TYPE_CHECKING

from mergelab.lazy import lazy_names

if TYPE_CHECKING:
    from mergelab.tuning.in_memory import LoraRecord, Tuned, finetune
    from mergelab.tuning.lora import Factors, find_factors, init_factors, with_factors
    from mergelab.tuning.objective import TokenLoss
    from mergelab.tuning.optimizers import Optimizer
    from mergelab.tuning.run import TunedFolder, finetune_folder
    from mergelab.tuning.settings import LoraSettings, TuningSettings
    from mergelab.tuning.training import Record
    from mergelab.tuning.writing import save_adapter

__all__ = [
    "Factors",
    "LoraRecord",
    "LoraSettings",
    "Optimizer",
    "Record",
    "TokenLoss",
    "Tuned",
    "TunedFolder",
    "TuningSettings",
    "find_factors",
    "finetune",
    "finetune_folder",
    "init_factors",
    "save_adapter",
    "with_factors",
]

__getattr__, __dir__ = lazy_names(__name__)
