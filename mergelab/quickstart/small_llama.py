"""Llama models from their sizes alone: the few calls that training a small family needs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mergelab.checkpoints.folder import open_checkpoint
from mergelab.errors import CheckpointError
from mergelab.models.families import model_from_config
from mergelab.models.load import load_params
from mergelab.models.model import Model, Params
from mergelab.models.save import save_params
from mergelab.models.table import Leaf

__all__ = ["LlamaConfig", "Params", "apply", "init", "leaves", "load", "save"]


@dataclass(frozen=True)
class LlamaConfig:
    """Shape of a Llama model, with HF's field names.

    `head_dim` defaults to `hidden_size / num_attention_heads`, `num_key_value_heads` to
    `num_attention_heads`; the token ids are None where the tokenizer has no such token.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], place: str = "config.json") -> LlamaConfig:
        """Reads a parsed `config.json`.

        Raises:
            CheckpointError: a field is missing, unknown, or has a value this class does not hold.
        """
        if config.get("model_type") != "llama":
            raise CheckpointError(f"{place} has model_type = {config.get('model_type')!r}, not 'llama'.")
        model = model_from_config(config, place)
        c = model.config
        ids = {name: config.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        found = cls(
            vocab_size=c.vocab_size,
            hidden_size=c.d_model,
            intermediate_size=c.mlp_width,
            num_hidden_layers=c.n_layers,
            num_attention_heads=c.n_heads,
            num_key_value_heads=c.n_kv_heads,
            head_dim=c.head_dim,
            max_position_embeddings=c.max_length,
            rms_norm_eps=c.norm.eps,
            rope_theta=c.blocks[0].attention.rotary.theta,
            tie_word_embeddings=c.tied,
            **ids,
        )
        if found.model.config != c:
            raise CheckpointError(
                f"{place} has biases or scaled rotary positions, which a LlamaConfig does not hold; load the "
                "folder with mergelab.models.load.load_model."
            )
        return found

    @property
    def model(self) -> Model:
        """The model of this configuration."""
        return model_from_config(self.to_hf())

    def to_hf(self) -> dict[str, Any]:
        """The fields of a `config.json` that `transformers` and `from_hf` read."""
        fixed = {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "rope_scaling": None,
            "attention_dropout": 0,
        }
        return fixed | asdict(self) | {"torch_dtype": "float32"}


def init(config: LlamaConfig, seed: int) -> Params:
    """Fresh float32 parameters: embeddings of deviation 0.02, norm scales 1, kernels as in `Linear`."""
    return config.model.init(seed)


def apply(
    config: LlamaConfig, params: Params, tokens: Int[Array, "batch length"]
) -> Float[Array, "batch length vocab"]:
    """Next-token logits, a pure function of parameters and tokens."""
    logits = config.model.apply(params, tokens).logits
    assert logits is not None
    return logits


def leaves(config: LlamaConfig) -> Iterator[Leaf]:
    """Every parameter of the model, in the order an HF checkpoint stores them."""
    yield from config.model.table()


def load(path: str | Path) -> tuple[LlamaConfig, Params]:
    """Loads an HF Llama folder; weights of any float dtype become float32.

    Raises:
        CheckpointError: the folder, its config or a tensor is missing, unknown, or of another shape.
    """
    checkpoint = open_checkpoint(path)
    config = LlamaConfig.from_hf(checkpoint.config, str(checkpoint.path / "config.json"))
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    table = tuple(leaves(config))
    params = load_params(
        checkpoint.tensors, table, str(path), unused=tied.__contains__, dtype=np.dtype(np.float32)
    )
    return config, params


def save(
    params: Params, config: LlamaConfig, path: str | Path, files: Mapping[str, bytes] | None = None
) -> None:
    """Writes an HF Llama folder with float32 weights.

    Args:
        params: the parameters.
        config: their configuration.
        path: a folder that is empty or does not exist.
        files: further files by name, such as the tokenizer's.

    Raises:
        OutputError: the folder is not empty, or the disk is full.
    """
    fields = config.to_hf()
    ids = {name: fields[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    texts = {"config.json": _json(fields), "generation_config.json": _json(ids)}
    params = jax.tree.map(lambda array: array.astype(jnp.float32), params)
    save_params(params, tuple(leaves(config)), path, files={**texts, **(files or {})})


def _json(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, sort_keys=True) + "\n").encode()
