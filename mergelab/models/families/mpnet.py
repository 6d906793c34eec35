"""MPNet: RoBERTa's positions without segments, and a bias of scores by relative position."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergelab.errors import CheckpointError
from mergelab.models.encoder import ENCODER, EncoderConfig
from mergelab.models.families.bert import BERT_OPTIONAL, bert_encoder, read_bert_fields, with_pooler
from mergelab.models.families.roberta import after_padding
from mergelab.models.layers.relative import RelativeBias
from mergelab.models.model import Family
from mergelab.models.table import Row, linear_rows, norm_rows

__all__ = ["MPNET"]

_LAYER = "mpnet.encoder.layer.{i}"
_LINEAR = {
    "attn.q": "attention.attn.q",
    "attn.k": "attention.attn.k",
    "attn.v": "attention.attn.v",
    "attn.o": "attention.attn.o",
    "mlp.up": "intermediate.dense",
    "mlp.down": "output.dense",
}
_ROWS = (
    Row("embed.embedding", "mpnet.embeddings.word_embeddings.weight"),
    Row("positions.embedding", "mpnet.embeddings.position_embeddings.weight"),
    *norm_rows("embed_norm", "mpnet.embeddings.LayerNorm"),
    *linear_rows("blocks_{i}", _LAYER, _LINEAR),
    *norm_rows("blocks_{i}.attn_norm", f"{_LAYER}.attention.LayerNorm"),
    *norm_rows("blocks_{i}.mlp_norm", f"{_LAYER}.output.LayerNorm"),
    Row("relative.embedding", "mpnet.encoder.relative_attention_bias.weight"),
    Row("pooler.kernel", "mpnet.pooler.dense.weight", "transpose"),
    Row("pooler.bias", "mpnet.pooler.dense.bias"),
)
# transformers reads these two of no config: `MPNetEmbeddings`, `MPNetEncoder.compute_position_bias`.
_PADDING, _BUCKETS = 1, 32


def read_mpnet(config: Mapping[str, Any], place: str) -> EncoderConfig:
    """Reads a `config.json`; raises `CheckpointError` for what this family does not implement."""
    optional = {name: value for name, value in BERT_OPTIONAL.items() if name != "type_vocab_size"}
    optional |= {"relative_attention_num_buckets": _BUCKETS}
    fields = read_bert_fields(config, place, optional)
    rows = fields["relative_attention_num_buckets"]
    if rows < _BUCKETS:
        raise CheckpointError(
            f"{place} has relative_attention_num_buckets = {rows}, but {_BUCKETS} are in use; correct it."
        )
    relative = RelativeBias(fields["num_attention_heads"], rows, _BUCKETS)
    return bert_encoder(fields, relative=relative, **after_padding(fields, _PADDING, place))


MPNET = Family(
    "mpnet",
    ENCODER,
    read_mpnet,
    lambda _: _ROWS,
    prefix="mpnet.",
    unused=("lm_head.*",),  # the masked-language-model head
    adapt=with_pooler,
)
