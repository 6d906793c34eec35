"""Phi 1 and 2: blocks of one norm, whose two layers run side by side; partly rotated heads; biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergelab.models.decoder import DECODER, DecoderConfig
from mergelab.models.families.config_fields import read_usual_fields, usual_decoder
from mergelab.models.families.llama import LLAMA_FILES
from mergelab.models.layers.mlp import ACTIVATIONS, MLPSpec
from mergelab.models.layers.norms import NormKind
from mergelab.models.model import Family
from mergelab.models.table import Row, linear_rows, norm_rows

__all__ = ["PHI"]

_LAYER = "model.layers.{i}"
_LINEAR = {
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.dense",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
}
PHI_ROWS = (
    Row("embed.embedding", "model.embed_tokens.weight"),
    *norm_rows("blocks_{i}.attn_norm", f"{_LAYER}.input_layernorm"),
    *linear_rows("blocks_{i}", _LAYER, _LINEAR),
    *norm_rows("blocks_{i}.attn.q_norm", f"{_LAYER}.self_attn.q_layernorm"),
    *norm_rows("blocks_{i}.attn.k_norm", f"{_LAYER}.self_attn.k_layernorm"),
    *norm_rows("final_norm", "model.final_layernorm"),
    Row("unembed.kernel", "lm_head.weight", "transpose"),
    Row("unembed.bias", "lm_head.bias"),
)


def read_phi(config: Mapping[str, Any], place: str) -> DecoderConfig:
    """Reads a `config.json`; raises `CheckpointError` for what this family does not implement."""
    optional = {
        "intermediate_size": 8192,
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "hidden_act": "gelu_new",
        "partial_rotary_factor": 0.5,
        "qk_layernorm": False,
    }
    # A head that is tied has a bias all the same, which no table here says.
    fixed = {"hidden_act": tuple(ACTIVATIONS), "tie_word_embeddings": (False,)}
    fields = read_usual_fields(config, place, optional, fixed)
    norm = NormKind("layer", fields["layer_norm_eps"])
    return usual_decoder(
        fields,
        place,
        attention={"qkv_bias": True, "out_bias": True, "qk_norm": norm if fields["qk_layernorm"] else None},
        mlp=MLPSpec(fields["intermediate_size"], fields["hidden_act"], gated=False, bias=True),
        block={"norm": norm, "placement": "joint"},
        logit_bias=True,
    )


PHI = Family("phi", DECODER, read_phi, lambda _: PHI_ROWS, **LLAMA_FILES)
