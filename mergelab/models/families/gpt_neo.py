"""GPT-Neo: learned positions, every other layer local, scores that are not scaled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergelab.errors import CheckpointError, quoted
from mergelab.models.decoder import DECODER, DecoderConfig
from mergelab.models.families.config_fields import head_width, layered, read_fields
from mergelab.models.families.known_fields import MAX_LAYERS
from mergelab.models.layers.attention import AttentionSpec
from mergelab.models.layers.block import BlockSpec
from mergelab.models.layers.mlp import ACTIVATIONS, MLPSpec
from mergelab.models.layers.norms import NormKind
from mergelab.models.model import Family
from mergelab.models.table import Row, linear_rows, norm_rows

__all__ = ["GPT_NEO"]

_LAYER = "transformer.h.{i}"
_LINEAR = {
    "attn.q": "attn.attention.q_proj",
    "attn.k": "attn.attention.k_proj",
    "attn.v": "attn.attention.v_proj",
    "attn.o": "attn.attention.out_proj",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}
GPT_NEO_ROWS = (
    Row("embed.embedding", "transformer.wte.weight"),
    Row("positions.embedding", "transformer.wpe.weight"),
    *norm_rows("blocks_{i}.attn_norm", f"{_LAYER}.ln_1"),
    *norm_rows("blocks_{i}.mlp_norm", f"{_LAYER}.ln_2"),
    *linear_rows("blocks_{i}", _LAYER, _LINEAR),
    *norm_rows("final_norm", "transformer.ln_f"),
    Row("unembed.kernel", "lm_head.weight", "transpose"),
)


def read_gpt_neo(config: Mapping[str, Any], place: str) -> DecoderConfig:
    """Reads a `config.json`; raises `CheckpointError` for what this family does not implement."""
    fields = read_fields(
        config,
        place,
        required=("vocab_size", "hidden_size", "num_layers", "num_heads"),
        optional={
            "intermediate_size": None,
            "max_position_embeddings": 2048,
            "window_size": 256,
            "layer_norm_epsilon": 1e-5,
            "activation_function": "gelu_new",
            "tie_word_embeddings": True,
            "is_causal": True,
        },
        fixed={"activation_function": tuple(ACTIVATIONS)},
        inert=("attention_types", "attention_layers", "embed_dropout", "resid_dropout"),
    )
    width, heads, count = fields["hidden_size"], fields["num_heads"], fields["num_layers"]
    head_dim = head_width(width, heads, place)
    if head_dim * heads != width:
        raise CheckpointError(f"{place} has {heads} heads for a width of {width}, which they cannot share.")
    local = _local(config.get("attention_types") or [[["global", "local"], 12]], count, place)
    norm = NormKind("layer", fields["layer_norm_epsilon"])
    mlp = MLPSpec(
        fields["intermediate_size"] or 4 * width, fields["activation_function"], gated=False, bias=True
    )
    block = BlockSpec(AttentionSpec(heads, heads, head_dim, 1.0, out_bias=True), mlp, norm)
    return DecoderConfig(
        vocab_size=fields["vocab_size"],
        d_model=width,
        max_length=fields["max_position_embeddings"],
        blocks=layered(block, [None] * count, [fields["window_size"] if one else None for one in local]),
        norm=norm,
        learned_positions=True,
        tied=fields["tie_word_embeddings"],
        causal=fields["is_causal"],
    )


def _local(given: Any, layers: int, place: str) -> list[bool]:
    """Whether each layer is local, from pairs of kinds and how often they repeat."""

    def is_pair(pair: Any) -> bool:
        fits = isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], list)
        return fits and type(pair[1]) is int and 0 <= pair[1] <= MAX_LAYERS

    if not isinstance(given, list) or not all(map(is_pair, given)):
        raise CheckpointError(
            f"{place} has attention_types = {quoted(given)}, but expected pairs such as "
            "[['global', 'local'], 12]; correct it."
        )
    total = sum(len(kinds) * times for kinds, times in given)
    if total != layers:
        raise CheckpointError(
            f"{place} has attention_types for {total} layers, but {layers} layers; give one per layer."
        )
    found = [kind for kinds, times in given for _ in range(times) for kind in kinds]
    for kind in found:
        if kind not in ("global", "local"):
            raise CheckpointError(
                f"{place} has the attention type {quoted(kind)}, but this model family implements only "
                "'global' or 'local'; the model cannot be run here."
            )
    return [kind == "local" for kind in found]


GPT_NEO = Family(
    "gpt_neo",
    DECODER,
    read_gpt_neo,
    lambda _: GPT_NEO_ROWS,
    prefix="transformer.",
    unused=("lm_head.weight",),  # the tied copy
)
