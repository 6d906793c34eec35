"""DistilBERT: BERT without segments and pooler, with names of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergelab.models.encoder import ENCODER, EncoderConfig, bert_blocks
from mergelab.models.families.config_fields import head_width, read_fields
from mergelab.models.layers.mlp import ACTIVATIONS, MLPSpec
from mergelab.models.layers.norms import NormKind
from mergelab.models.model import Family
from mergelab.models.table import Row, linear_rows, norm_rows

__all__ = ["DISTILBERT"]

_LAYER = "distilbert.transformer.layer.{i}"
_LINEAR = {
    "attn.q": "attention.q_lin",
    "attn.k": "attention.k_lin",
    "attn.v": "attention.v_lin",
    "attn.o": "attention.out_lin",
    "mlp.up": "ffn.lin1",
    "mlp.down": "ffn.lin2",
}
_ROWS = (
    Row("embed.embedding", "distilbert.embeddings.word_embeddings.weight"),
    Row("positions.embedding", "distilbert.embeddings.position_embeddings.weight"),
    *norm_rows("embed_norm", "distilbert.embeddings.LayerNorm"),
    *linear_rows("blocks_{i}", _LAYER, _LINEAR),
    *norm_rows("blocks_{i}.attn_norm", f"{_LAYER}.sa_layer_norm"),
    *norm_rows("blocks_{i}.mlp_norm", f"{_LAYER}.output_layer_norm"),
)
# Dropouts, how the table of positions began, and what the first files said.
_INERT = ("dropout", "qa_dropout", "seq_classif_dropout", "sinusoidal_pos_embds", "tie_weights_")
# Today's names of these fields; transformers takes either.
_ALIASES = {"hidden_size": "dim", "num_attention_heads": "n_heads", "num_hidden_layers": "n_layers"}


def read_distilbert(config: Mapping[str, Any], place: str) -> EncoderConfig:
    """Reads a `config.json`; raises `CheckpointError` for what this family does not implement."""
    config = {_ALIASES.get(name, name): value for name, value in config.items()}
    fields = read_fields(
        config,
        place,
        required=("vocab_size",),
        optional={
            "dim": 768,
            "n_layers": 6,
            "n_heads": 12,
            "hidden_dim": 3072,
            "activation": "gelu",
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,  # of the head, which is not loaded
        },
        fixed={"activation": tuple(ACTIVATIONS)},
        inert=_INERT,
    )
    width, heads = fields["dim"], fields["n_heads"]
    norm = NormKind("layer", 1e-12)
    mlp = MLPSpec(fields["hidden_dim"], fields["activation"], gated=False, bias=True)
    return EncoderConfig(
        vocab_size=fields["vocab_size"],
        d_model=width,
        max_length=fields["max_position_embeddings"],
        blocks=bert_blocks(fields["n_layers"], heads, head_width(width, heads, place), mlp, norm),
        embed_norm=norm,
    )


DISTILBERT = Family(
    "distilbert",
    ENCODER,
    read_distilbert,
    lambda _: _ROWS,
    prefix="distilbert.",
    # The masked-language-model head.
    unused=("vocab_transform.*", "vocab_layer_norm.*", "vocab_projector.*"),
)
