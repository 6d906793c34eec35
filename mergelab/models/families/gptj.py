"""GPT-J: blocks of one norm, whose two layers run side by side; neighbors rotated in part of a head."""

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
from mergelab.models.layers.rotary import Rotary
from mergelab.models.model import Family
from mergelab.models.table import Row, linear_rows, norm_rows

__all__ = ["GPTJ"]

_LAYER = "transformer.h.{i}"
_LINEAR = {
    "attn.q": "attn.q_proj",
    "attn.k": "attn.k_proj",
    "attn.v": "attn.v_proj",
    "attn.o": "attn.out_proj",
    "mlp.up": "mlp.fc_in",
    "mlp.down": "mlp.fc_out",
}
GPTJ_ROWS = (
    Row("embed.embedding", "transformer.wte.weight"),
    *norm_rows("blocks_{i}.attn_norm", f"{_LAYER}.ln_1"),
    *linear_rows("blocks_{i}", _LAYER, _LINEAR),
    *norm_rows("final_norm", "transformer.ln_f"),
    Row("unembed.kernel", "lm_head.weight", "transpose"),
    Row("unembed.bias", "lm_head.bias"),
)


def read_gptj(config: Mapping[str, Any], place: str) -> DecoderConfig:
    """Reads a `config.json`; raises `CheckpointError` for what this family does not implement."""
    fields = read_fields(
        config,
        place,
        required=("vocab_size", "n_embd", "n_layer", "n_head"),
        optional={
            "n_positions": 2048,
            "n_inner": None,
            "rotary_dim": 64,
            "layer_norm_epsilon": 1e-5,
            "activation_function": "gelu_new",
            "is_causal": True,
        },
        # A head that is tied has a bias all the same, which no table here says.
        fixed={"activation_function": tuple(ACTIVATIONS), "tie_word_embeddings": (False,)},
        inert=("n_ctx", "rotary", "scale_attn_weights"),
    )
    width, heads, turned = fields["n_embd"], fields["n_head"], fields["rotary_dim"]
    head_dim = head_width(width, heads, place)
    faults = []
    if head_dim * heads != width:
        faults.append(
            f"{place} has {heads} heads for a width of {width}, which they cannot share; correct one."
        )
    if turned % 2 or turned > head_dim:
        faults.append(
            f"{place} rotates {turned} of {head_dim} components of a head (rotary_dim); the number must be "
            "even and no larger."
        )
    if faults:
        raise CheckpointError(faults)
    rotary = Rotary(10000.0, turned, neighbors=True)
    norm = NormKind("layer", fields["layer_norm_epsilon"])
    mlp = MLPSpec(fields["n_inner"] or 4 * width, fields["activation_function"], gated=False, bias=True)
    attention = AttentionSpec(heads, heads, head_dim, head_dim**-0.5, rotary)
    return DecoderConfig(
        vocab_size=fields["vocab_size"],
        d_model=width,
        max_length=fields["n_positions"],
        blocks=(BlockSpec(attention, mlp, norm, "joint"),) * fields["n_layer"],
        norm=norm,
        logit_bias=True,
        causal=fields["is_causal"],
    )


GPTJ = Family("gptj", DECODER, read_gptj, lambda _: GPTJ_ROWS, prefix="transformer.")
