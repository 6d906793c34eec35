"""What most decoders since Llama say in `config.json` in the same words: sizes, norms, rotary positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mergelab.errors import CheckpointError
from mergelab.models.config_fields import head_width, read_fields
from mergelab.models.config_rotary import ROTARY_FIELDS, read_rotary
from mergelab.models.decoder_config import DecoderConfig
from mergelab.models.layers.norms import NormKind

__all__ = ["read_usual_fields", "usual_decoder"]

_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_OPTIONAL: Mapping[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    **ROTARY_FIELDS,
}


def read_usual_fields(
    config: Mapping[str, Any],
    place: str,
    optional: Mapping[str, Any],
    fixed: Mapping[str, Sequence[Any]],
) -> dict[str, Any]:
    """The usual fields and a family's own; the arguments are those of `read_fields`.

    Args:
        config: the parsed `config.json`.
        place: its path, for messages.
        optional: fields of the family, or other defaults of the usual ones; `max_position_embeddings` among
            them.
        fixed: as in `read_fields`.

    Raises:
        CheckpointError: as `read_fields`.
    """
    found = read_fields(config, place, required=_REQUIRED, optional={**_OPTIONAL, **optional}, fixed=fixed)
    width, heads = found["hidden_size"], found["num_attention_heads"]
    return {**found, "head_dim": found["head_dim"] or head_width(width, heads, place)}


def usual_decoder(
    fields: Mapping[str, Any], place: str, theta: float = 10000.0, **different: Any
) -> DecoderConfig:
    """The decoder that the usual fields describe.

    Args:
        fields: from `read_usual_fields`.
        place: the config's path, for messages.
        theta: the base of the rotary frequencies where the config names none.
        different: fields of `DecoderConfig` that this family sets otherwise.

    Raises:
        CheckpointError: the rotary scaling is unknown or malformed.
    """
    layers, heads, length = (
        fields["num_hidden_layers"],
        fields["num_attention_heads"],
        fields["max_position_embeddings"],
    )
    head_dim = fields["head_dim"]
    key_heads = fields["num_key_value_heads"] or heads
    if heads % key_heads:
        raise CheckpointError(
            f"{place} has {heads} heads for {key_heads} key-value heads, which cannot share them evenly; "
            "correct one of the two."
        )
    if "rotary" not in different:
        rotary = read_rotary(fields, place, head_dim=head_dim, max_length=length, theta=theta)
        different["rotary"] = (rotary,) * layers
    usual: dict[str, Any] = {
        "vocab_size": fields["vocab_size"],
        "width": fields["hidden_size"],
        "layers": layers,
        "heads": heads,
        "kv_heads": key_heads,
        "head_dim": head_dim,
        "mlp_width": fields["intermediate_size"],
        "max_length": length,
        "windows": (None,) * layers,
        "query_scale": head_dim**-0.5,
        "norm": NormKind("rms", fields["rms_norm_eps"]),
        "tied": fields["tie_word_embeddings"],
    }
    return DecoderConfig(**usual | different)
