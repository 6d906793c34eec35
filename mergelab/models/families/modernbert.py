"""ModernBERT: rotated positions, norms on what layers read, gated layers, windows in two layers of three."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from mergelab.errors import CheckpointError
from mergelab.models.encoder import ENCODER, EncoderConfig
from mergelab.models.families.config_fields import head_width, layer_types_of, layered, read_fields
from mergelab.models.families.rotary_config import rotary_from
from mergelab.models.layers.attention import AttentionSpec
from mergelab.models.layers.block import BlockSpec
from mergelab.models.layers.mlp import ACTIVATIONS, MLPSpec
from mergelab.models.layers.norms import NormKind
from mergelab.models.layers.rotary import Rotary
from mergelab.models.model import Family
from mergelab.models.table import Fused, Row, norm_rows

__all__ = ["MODERNBERT"]

_LAYER = "model.layers.{i}"
_OPTIONAL: Mapping[str, Any] = {
    "intermediate_size": 1152,
    "hidden_activation": "gelu",
    "max_position_embeddings": 8192,
    "norm_eps": 1e-5,
    "norm_bias": False,
    "attention_bias": False,
    "mlp_bias": False,
    "local_attention": 128,
    "sliding_window": None,
    "global_attn_every_n_layers": 3,
    "global_rope_theta": 160000.0,
    "local_rope_theta": 10000.0,
    "layer_types": None,
    "rope_parameters": None,
    "rope_scaling": None,
    "tie_word_embeddings": True,  # of the head, which is not loaded
}
# Of heads, of training, of kernels, and what older files repeat under BERT's names.
_INERT = (
    "classifier_activation",
    "classifier_bias",
    "classifier_pooling",
    "decoder_bias",
    "deterministic_flash_attn",
    "initializer_cutoff_factor",
    "layer_norm_eps",
    "mlp_dropout",
    "position_embedding_type",
    "reference_compile",
    "repad_logits_with_grad",
    "sparse_pred_ignore_index",
    "sparse_prediction",
)


def _rows(config: EncoderConfig) -> Iterator[Row]:
    block: Any = config.blocks[0]
    yield Row("embed.embedding", "model.embeddings.tok_embeddings.weight")
    yield from norm_rows("embed_norm", "model.embeddings.norm")
    yield from norm_rows("blocks_{i}.attn_norm", f"{_LAYER}.attn_norm")
    width, hidden = block.attention.n_heads * block.attention.head_dim, block.mlp.hidden
    for part, name in enumerate("qkv"):
        fused = Fused(part * width, 3 * width)
        yield Row(f"blocks_{{i}}.attn.{name}.kernel", f"{_LAYER}.attn.Wqkv.weight", fused)
        yield Row(f"blocks_{{i}}.attn.{name}.bias", f"{_LAYER}.attn.Wqkv.bias", fused)
    yield Row("blocks_{i}.attn.o.kernel", f"{_LAYER}.attn.Wo.weight", "transpose")
    yield Row("blocks_{i}.attn.o.bias", f"{_LAYER}.attn.Wo.bias")
    yield from norm_rows("blocks_{i}.mlp_norm", f"{_LAYER}.mlp_norm")
    for part, name in enumerate(("gate", "up")):
        fused = Fused(part * hidden, 2 * hidden)
        yield Row(f"blocks_{{i}}.mlp.{name}.kernel", f"{_LAYER}.mlp.Wi.weight", fused)
        yield Row(f"blocks_{{i}}.mlp.{name}.bias", f"{_LAYER}.mlp.Wi.bias", fused)
    yield Row("blocks_{i}.mlp.down.kernel", f"{_LAYER}.mlp.Wo.weight", "transpose")
    yield Row("blocks_{i}.mlp.down.bias", f"{_LAYER}.mlp.Wo.bias")
    yield from norm_rows("final_norm", "model.final_norm")


def read_modernbert(config: Mapping[str, Any], place: str) -> EncoderConfig:
    """Reads a `config.json`; raises `CheckpointError` for what this family does not implement."""
    fields = read_fields(
        config,
        place,
        required=("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
        optional=_OPTIONAL,
        fixed={"hidden_activation": tuple(ACTIVATIONS)},
        inert=_INERT,
    )
    layers, heads = fields["num_hidden_layers"], fields["num_attention_heads"]
    head_dim = head_width(fields["hidden_size"], heads, place)
    every = fields["global_attn_every_n_layers"]
    default = ["sliding_attention" if i % every else "full_attention" for i in range(layers)]
    # So many tokens in all, the token itself in their middle; `sliding_window` is half of them.
    window = fields["sliding_window"] or fields["local_attention"] // 2
    windows = layer_types_of(fields["layer_types"], default, window, place)
    full, sliding = _rotaries(fields, head_dim, place)
    norm = NormKind("layer", fields["norm_eps"], biased=fields["norm_bias"])
    biased = fields["attention_bias"]
    attention = AttentionSpec(heads, heads, head_dim, head_dim**-0.5, qkv_bias=biased, out_bias=biased)
    mlp = MLPSpec(fields["intermediate_size"], fields["hidden_activation"], bias=fields["mlp_bias"])
    spec = BlockSpec(attention, mlp, norm)
    first, *rest = layered(spec, [full if window is None else sliding for window in windows], windows)
    return EncoderConfig(
        vocab_size=fields["vocab_size"],
        d_model=fields["hidden_size"],
        max_length=fields["max_position_embeddings"],
        blocks=(replace(first, reads_plain=True), *rest),
        learned_positions=False,
        embed_norm=norm,
        final_norm=norm,
    )


def _rotaries(fields: Mapping[str, Any], head_dim: int, place: str) -> tuple[Rotary, Rotary]:
    """The rotation of global layers and that of local ones."""
    given, scaling = fields["rope_parameters"] or {}, fields["rope_scaling"] or {}
    sizes = {"head_dim": head_dim, "max_length": fields["max_position_embeddings"]}
    bases = {"full_attention": "global_rope_theta", "sliding_attention": "local_rope_theta"}
    for kind in bases:
        if not isinstance(given.get(kind) or {}, Mapping):
            raise CheckpointError(
                f"{place} has rope_parameters of {kind!r} that are no object; correct them."
            )
    full, sliding = (
        rotary_from({**(given.get(kind) or {}), **scaling}, place, theta=fields[base], **sizes)
        for kind, base in bases.items()
    )
    return full, sliding


MODERNBERT = Family(
    "modernbert",
    ENCODER,
    read_modernbert,
    _rows,
    prefix="model.",
    unused=("head.*", "decoder.*"),  # the masked-language-model head
)
