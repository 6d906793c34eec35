"""Bytes and arrays: model folders and weight files read piece by piece, and written to a planned layout."""

from mergelab.checkpoints.dtypes import dtype_from_name, is_float, promote
from mergelab.checkpoints.folder import FolderCheckpoint, open_checkpoint
from mergelab.checkpoints.lora import LoraCheckpoint, with_lora
from mergelab.checkpoints.lora_tensor import read_whole
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
    "ShardPlan",
    "TensorSource",
    "TensorSpec",
    "dtype_from_name",
    "is_float",
    "open_checkpoint",
    "open_pickled",
    "open_safetensors",
    "plan_shards",
    "promote",
    "read_whole",
    "with_lora",
]
