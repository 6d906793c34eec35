"""BERT and the sentence encoders built on it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mergelab.models.encoder import ENCODER, EncoderConfig, bert_blocks
from mergelab.models.families.config_fields import head_width, read_fields
from mergelab.models.layers.mlp import ACTIVATIONS, MLPSpec
from mergelab.models.layers.norms import NormKind
from mergelab.models.model import Family
from mergelab.models.table import Row, linear_rows, norm_rows

__all__ = ["BERT", "bert_encoder", "read_bert_fields", "with_pooler"]

_LAYER = "bert.encoder.layer.{i}"
_LINEAR = {
    "attn.q": "attention.self.query",
    "attn.k": "attention.self.key",
    "attn.v": "attention.self.value",
    "attn.o": "attention.output.dense",
    "mlp.up": "intermediate.dense",
    "mlp.down": "output.dense",
}


BERT_ROWS = (
    Row("embed.embedding", "bert.embeddings.word_embeddings.weight"),
    Row("positions.embedding", "bert.embeddings.position_embeddings.weight"),
    Row("token_types.embedding", "bert.embeddings.token_type_embeddings.weight"),
    *norm_rows("embed_norm", "bert.embeddings.LayerNorm"),
    *linear_rows("blocks_{i}", _LAYER, _LINEAR),
    *norm_rows("blocks_{i}.attn_norm", f"{_LAYER}.attention.output.LayerNorm"),
    *norm_rows("blocks_{i}.mlp_norm", f"{_LAYER}.output.LayerNorm"),
    Row("pooler.kernel", "bert.pooler.dense.weight", "transpose"),
    Row("pooler.bias", "bert.pooler.dense.bias"),
)


# Fields of the first BERT files, whose converter kept what the TensorFlow models said of their pooler.
BERT_INERT = (
    "directionality",
    "pooler_fc_size",
    "pooler_num_attention_heads",
    "pooler_num_fc_layers",
    "pooler_size_per_head",
    "pooler_type",
)


BERT_OPTIONAL: Mapping[str, Any] = {
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "tie_word_embeddings": True,  # of heads, which are not loaded
}


def read_bert_fields(
    config: Mapping[str, Any],
    place: str,
    optional: Mapping[str, Any] = BERT_OPTIONAL,
    fixed: Mapping[str, Sequence[Any]] | None = None,
    inert: Collection[str] = (),
) -> dict[str, Any]:
    """The fields that BERT and its kin share, checked; raises `CheckpointError`.

    Args:
        config: the parsed `config.json`.
        place: its path, for messages.
        optional: fields that may be there, and what they are if not.
        fixed: fields of the family that it computes for some values only, beside BERT's.
        inert: fields of the family that say nothing of a forward pass, beside BERT's.
    """
    fields = read_fields(
        config,
        place,
        required=("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
        optional=optional,
        fixed={
            "hidden_act": tuple(ACTIVATIONS),
            "position_embedding_type": ("absolute",),
            "is_decoder": (False,),
            "add_cross_attention": (False,),
            **(fixed or {}),
        },
        inert=(*BERT_INERT, *inert),
    )
    return fields | {"head_dim": head_width(fields["hidden_size"], fields["num_attention_heads"], place)}


def bert_encoder(fields: Mapping[str, Any], **different: Any) -> EncoderConfig:
    """The encoder that the fields describe.

    Args:
        fields: result of `read_bert_fields`.
        different: fields of `EncoderConfig` that the family sets otherwise.
    """
    norm = NormKind("layer", fields["layer_norm_eps"])
    mlp = MLPSpec(fields["intermediate_size"], fields["hidden_act"], gated=False, bias=True)
    layers, heads = fields["num_hidden_layers"], fields["num_attention_heads"]
    usual: dict[str, Any] = {
        "vocab_size": fields["vocab_size"],
        "d_model": fields["hidden_size"],
        "max_length": fields["max_position_embeddings"],
        "token_types": fields.get("type_vocab_size", 0),
        "embed_norm": norm,
        "pooler": True,
    }
    if "blocks" not in different:
        usual["blocks"] = bert_blocks(layers, heads, fields["head_dim"], mlp, norm)
    return EncoderConfig(**usual | different)


def read_bert(config: Mapping[str, Any], place: str) -> EncoderConfig:
    """Reads a `config.json`; raises `CheckpointError` for what this family does not implement."""
    return bert_encoder(read_bert_fields(config, place))


def with_pooler(config: EncoderConfig, names: Collection[str]) -> EncoderConfig:
    """The configuration with a pooler where the files hold one."""
    return replace(config, pooler=any(name.endswith("pooler.dense.weight") for name in names))


BERT = Family(
    "bert",
    ENCODER,
    read_bert,
    lambda _: BERT_ROWS,
    prefix="bert.",
    unused=("cls.*",),  # the masked-language-model head, which every file of the first BERTs holds
    adapt=with_pooler,
)
