"""BERT and the sentence encoders built on it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from mergelab.models.encoder import ENCODER, EncoderConfig
from mergelab.models.families.config_fields import head_width, read_fields
from mergelab.models.layers.mlp import ACTIVATIONS
from mergelab.models.layers.norms import NormKind
from mergelab.models.model import Family
from mergelab.models.table import Row, linear_rows, norm_rows

__all__ = ["BERT"]

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


def read_bert(config: Mapping[str, Any], place: str) -> EncoderConfig:
    """Reads a `config.json`; raises `CheckpointError` for what this family does not implement."""
    fields = read_fields(
        config,
        place,
        required=("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
        optional={
            "intermediate_size": 3072,
            "hidden_act": "gelu",
            "max_position_embeddings": 512,
            "type_vocab_size": 2,
            "layer_norm_eps": 1e-12,
            "tie_word_embeddings": True,  # of heads, which are not loaded
        },
        fixed={
            "hidden_act": tuple(ACTIVATIONS),
            "position_embedding_type": ("absolute",),
            "is_decoder": (False,),
            "add_cross_attention": (False,),
        },
        inert=BERT_INERT,
    )
    head_width(fields["hidden_size"], fields["num_attention_heads"], place)
    return EncoderConfig(
        vocab_size=fields["vocab_size"],
        d_model=fields["hidden_size"],
        n_layers=fields["num_hidden_layers"],
        n_heads=fields["num_attention_heads"],
        mlp_width=fields["intermediate_size"],
        max_length=fields["max_position_embeddings"],
        token_types=fields["type_vocab_size"],
        norm=NormKind("layer", fields["layer_norm_eps"]),
        activation=fields["hidden_act"],
    )


def _with_pooler(config: EncoderConfig, names: Collection[str]) -> EncoderConfig:
    return replace(config, pooler=any(name.endswith("pooler.dense.weight") for name in names))


BERT = Family(
    "bert",
    ENCODER,
    read_bert,
    lambda _: BERT_ROWS,
    prefix="bert.",
    unused=("cls.*",),  # the masked-language-model head, which every file of the first BERTs holds
    adapt=_with_pooler,
)
