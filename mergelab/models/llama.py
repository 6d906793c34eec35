"""The Llama family: configuration, module, and the table that maps its parameters to HF checkpoints.

The module is flax.linen, not nnx: `init`/`apply` are pure functions of a plain parameter dictionary, which is
the object that merging, optax and checkpoints all work on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from mergelab.checkpoints.folder import open_checkpoint
from mergelab.models.config_fields import check_fields, rope_theta_of
from mergelab.models.declaration import Leaf
from mergelab.models.layers import (
    Linear,
    RMSNorm,
    causal_attention,
    matmul,
    rotary_angles,
    rotate,
)
from mergelab.models.storage import load_params, save_params

__all__ = ["Llama", "LlamaConfig", "Params", "apply", "init", "leaves", "load", "save"]

Params = dict[str, Any]

# What `config.json` may say: fields that shape the computation, and fields that only hold for other values
# of a switch this family does not implement.
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_OPTIONAL = (
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_parameters",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
_FIXED = {
    "model_type": ("llama",),
    "architectures": (["LlamaForCausalLM"], None),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "rope_scaling": (None,),
    "attention_dropout": (0, 0.0),
}


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
            CheckpointError: a field is missing, unknown, or has a value this family does not implement.
        """
        check_fields(config, place, _REQUIRED, _OPTIONAL, _FIXED)
        heads = config["num_attention_heads"]
        given = {name: config[name] for name in _OPTIONAL if config.get(name) is not None}
        given.pop("rope_parameters", None)
        given["rope_theta"] = rope_theta_of(config, place)
        given.setdefault("num_key_value_heads", heads)
        given.setdefault("head_dim", config["hidden_size"] // heads)
        return cls(**{name: config[name] for name in _REQUIRED}, **given)

    @property
    def residual_gain(self) -> float:
        """Initial gain of what is added to the residual stream, twice a layer: keeps the sum's scale."""
        return (2 * self.num_hidden_layers) ** -0.5

    def to_hf(self) -> dict[str, Any]:
        """The fields of a `config.json` that `transformers` and `from_hf` read."""
        fixed = {name: values[0] for name, values in _FIXED.items()}
        return fixed | asdict(self) | {"torch_dtype": "float32"}


class Attention(nn.Module):
    config: LlamaConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length width"], angles: Float[Array, "length half"]
    ) -> Float[Array, "batch length width"]:
        c = self.config
        q = Linear(c.num_attention_heads * c.head_dim, name="q")(x).reshape(*x.shape[:2], -1, c.head_dim)
        k = Linear(c.num_key_value_heads * c.head_dim, name="k")(x).reshape(*x.shape[:2], -1, c.head_dim)
        v = Linear(c.num_key_value_heads * c.head_dim, name="v")(x).reshape(*x.shape[:2], -1, c.head_dim)
        z = causal_attention(rotate(q, angles), rotate(k, angles), v)
        return Linear(c.hidden_size, c.residual_gain, name="o")(z.reshape(*x.shape[:2], -1))


class MLP(nn.Module):
    """`down(silu(gate(x)) * up(x))` (SwiGLU, arXiv:2002.05202)."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch length width"]) -> Float[Array, "batch length width"]:
        gate = Linear(self.config.intermediate_size, name="gate")(x)
        up = Linear(self.config.intermediate_size, name="up")(x)
        return Linear(self.config.hidden_size, self.config.residual_gain, name="down")(jax.nn.silu(gate) * up)


class Block(nn.Module):
    config: LlamaConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length width"], angles: Float[Array, "length half"]
    ) -> Float[Array, "batch length width"]:
        eps = self.config.rms_norm_eps
        x = x + Attention(self.config, name="attn")(RMSNorm(eps, name="attn_norm")(x), angles)
        return x + MLP(self.config, name="mlp")(RMSNorm(eps, name="mlp_norm")(x))


class Llama(nn.Module):
    """Decoder-only transformer: tokens in, next-token logits out."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, tokens: Int[Array, "batch length"]) -> Float[Array, "batch length vocab"]:
        c = self.config
        embed = nn.Embed(
            c.vocab_size, c.hidden_size, embedding_init=nn.initializers.normal(0.02), name="embed"
        )
        x = embed(tokens)
        angles = rotary_angles(tokens.shape[1], c.head_dim, c.rope_theta)
        for i in range(c.num_hidden_layers):
            x = Block(c, name=f"blocks_{i}")(x, angles)
        x = RMSNorm(c.rms_norm_eps, name="final_norm")(x)
        if c.tie_word_embeddings:
            return matmul(x, embed.embedding.T)
        return Linear(c.vocab_size, name="unembed")(x)


def init(config: LlamaConfig, seed: int) -> Params:
    """Fresh float32 parameters: embeddings of deviation 0.02, norm scales 1, kernels as in `Linear`."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    return jax.jit(Llama(config).init)(jax.random.key(seed), tokens)["params"]


def apply(
    config: LlamaConfig, params: Params, tokens: Int[Array, "batch length"]
) -> Float[Array, "batch length vocab"]:
    """Next-token logits, a pure function of parameters and tokens."""
    logits = Llama(config).apply({"params": params}, tokens)
    assert isinstance(logits, jax.Array)
    return logits


def leaves(config: LlamaConfig) -> Iterator[Leaf]:
    """Every parameter of the model, in the order an HF checkpoint stores them."""
    c = config
    yield Leaf(("embed", "embedding"), "model.embed_tokens.weight", (c.vocab_size, c.hidden_size))
    for i in range(c.num_hidden_layers):
        yield from _block_leaves(c, f"blocks_{i}", f"model.layers.{i}")
    yield Leaf(("final_norm", "scale"), "model.norm.weight", (c.hidden_size,))
    if not c.tie_word_embeddings:
        yield Leaf(("unembed", "kernel"), "lm_head.weight", (c.hidden_size, c.vocab_size), "transpose")


def _block_leaves(c: LlamaConfig, ours: str, hf: str) -> Iterator[Leaf]:
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    width, hidden = c.hidden_size, c.intermediate_size
    yield Leaf((ours, "attn_norm", "scale"), f"{hf}.input_layernorm.weight", (width,))
    for name, shape in (("q", (width, q)), ("k", (width, kv)), ("v", (width, kv)), ("o", (q, width))):
        yield Leaf((ours, "attn", name, "kernel"), f"{hf}.self_attn.{name}_proj.weight", shape, "transpose")
    yield Leaf((ours, "mlp_norm", "scale"), f"{hf}.post_attention_layernorm.weight", (width,))
    for name, shape in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
        yield Leaf((ours, "mlp", name, "kernel"), f"{hf}.mlp.{name}_proj.weight", shape, "transpose")


def load(path: str | Path) -> tuple[LlamaConfig, Params]:
    """Loads an HF Llama folder; weights of any float dtype become float32.

    Raises:
        CheckpointError: the folder, its config or a tensor is missing, unknown, or of another shape.
    """
    checkpoint = open_checkpoint(path)
    config = LlamaConfig.from_hf(checkpoint.config, str(checkpoint.path / "config.json"))
    tied = ("lm_head.weight",) if config.tie_word_embeddings else ()
    return config, load_params(checkpoint.tensors, tuple(leaves(config)), str(path), ignore=tied)


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
    save_params(params, tuple(leaves(config)), config.to_hf(), Path(path), files or {})
