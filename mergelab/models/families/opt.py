"""OPT: learned positions that begin at 2, ReLU; the 350m has narrow embeddings and norms on its stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergelab.errors import CheckpointError
from mergelab.models.decoder import DECODER, DecoderConfig
from mergelab.models.families.config_fields import head_width, read_fields
from mergelab.models.layers.attention import AttentionSpec
from mergelab.models.layers.block import BlockSpec
from mergelab.models.layers.mlp import ACTIVATIONS, MLPSpec
from mergelab.models.layers.norms import NormKind
from mergelab.models.model import Family
from mergelab.models.table import Row, linear_rows, norm_rows

__all__ = ["OPT"]

_BASE = "model.decoder"
_LAYER = f"{_BASE}.layers.{{i}}"
_LINEAR = {
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.out_proj",
    "mlp.up": "fc1",
    "mlp.down": "fc2",
}
OPT_ROWS = (
    Row("embed.embedding", f"{_BASE}.embed_tokens.weight"),
    Row("embed_up.kernel", f"{_BASE}.project_in.weight", "transpose"),
    Row("positions.embedding", f"{_BASE}.embed_positions.weight"),
    *norm_rows("blocks_{i}.attn_norm", f"{_LAYER}.self_attn_layer_norm"),
    *linear_rows("blocks_{i}", _LAYER, _LINEAR),
    *norm_rows("blocks_{i}.mlp_norm", f"{_LAYER}.final_layer_norm"),
    *norm_rows("final_norm", f"{_BASE}.final_layer_norm"),
    Row("unembed_down.kernel", f"{_BASE}.project_out.weight", "transpose"),
    Row("unembed.kernel", "lm_head.weight", "transpose"),
)


def read_opt(config: Mapping[str, Any], place: str) -> DecoderConfig:
    """Reads a `config.json`; raises `CheckpointError` for what this family does not implement."""
    fields = read_fields(
        config,
        place,
        required=("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
        optional={
            "ffn_dim": 3072,
            "max_position_embeddings": 2048,
            "word_embed_proj_dim": None,
            "do_layer_norm_before": True,
            "_remove_final_layer_norm": False,
            "layer_norm_elementwise_affine": True,
            "enable_bias": True,
            "activation_function": "relu",
            "tie_word_embeddings": True,
            "is_causal": True,
        },
        fixed={"activation_function": tuple(ACTIVATIONS)},
        inert=("dropout", "activation_dropout", "init_std", "layerdrop"),
    )
    width, heads, bias = fields["hidden_size"], fields["num_attention_heads"], fields["enable_bias"]
    head_dim, narrow = head_width(width, heads, place), fields["word_embed_proj_dim"]
    if head_dim * heads != width:
        raise CheckpointError(f"{place} has {heads} heads for a width of {width}, which they cannot share.")
    if narrow not in (None, width) and not fields["tie_word_embeddings"]:
        raise CheckpointError(
            f"{place} has embeddings of width {narrow} for a stream of {width} and a head of its own, but "
            "this model family implements only one that is tied to them; the model cannot be run here."
        )
    before, affine = fields["do_layer_norm_before"], fields["layer_norm_elementwise_affine"]
    norm = NormKind("layer", 1e-5, scaled=affine, biased=affine)
    attention = AttentionSpec(heads, heads, head_dim, head_dim**-0.5, qkv_bias=bias, out_bias=bias)
    mlp = MLPSpec(fields["ffn_dim"], fields["activation_function"], gated=False, bias=bias)
    block = BlockSpec(attention, mlp, norm, "pre" if before else "after")
    last = norm if before and not fields["_remove_final_layer_norm"] else NormKind("none", scaled=False)
    return DecoderConfig(
        vocab_size=fields["vocab_size"],
        d_model=width,
        max_length=fields["max_position_embeddings"],
        blocks=(block,) * fields["num_hidden_layers"],
        norm=last,
        learned_positions=True,
        first_position=2,
        embed_width=None if narrow == width else narrow,
        tied=fields["tie_word_embeddings"],
        causal=fields["is_causal"],
    )


OPT = Family(
    "opt",
    DECODER,
    read_opt,
    lambda _: OPT_ROWS,
    prefix="model.",
    unused=("lm_head.weight",),  # the tied copy
)
