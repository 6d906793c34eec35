"""Bytes and arrays: model folders and weight files read piece by piece, and written to a planned layout."""

from typing import TYPE_CHECKING

from mergelab.lazy import lazy_names

if TYPE_CHECKING:
    from mergelab.checkpoints.dtypes import dtype_from_name, is_float, promote
    from mergelab.checkpoints.folder import FolderCheckpoint, open_checkpoint, weights_sha256
    from mergelab.checkpoints.hub_push import push
    from mergelab.checkpoints.locations import local_path
    from mergelab.checkpoints.lora import LoraCheckpoint, with_lora
    from mergelab.checkpoints.lora_tensor import read_whole
    from mergelab.checkpoints.peft import LoraConfig, read_lora_config
    from mergelab.checkpoints.safetensors_file import open_safetensors
    from mergelab.checkpoints.shard_plan import ShardPlan, TensorSpec, plan_shards
    from mergelab.checkpoints.source import Checkpoint, TensorSource
    from mergelab.checkpoints.torch_reader import open_pickled
    from mergelab.checkpoints.writer import CheckpointWriter

__all__ = [
    "Checkpoint",
    "CheckpointWriter",
    "FolderCheckpoint",
    "LoraCheckpoint",
    "LoraConfig",
    "ShardPlan",
    "TensorSource",
    "TensorSpec",
    "dtype_from_name",
    "is_float",
    "local_path",
    "open_checkpoint",
    "open_pickled",
    "open_safetensors",
    "plan_shards",
    "promote",
    "push",
    "read_lora_config",
    "read_whole",
    "weights_sha256",
    "with_lora",
]

__getattr__, __dir__ = lazy_names(__name__)
