"""RoBERTa, XLM-RoBERTa and CamemBERT: BERT whose positions count real tokens, from the padding id on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mergelab.errors import CheckpointError
from mergelab.models.encoder import ENCODER, EncoderConfig
from mergelab.models.families.bert import (
    BERT_OPTIONAL,
    BERT_ROWS,
    bert_encoder,
    read_bert_fields,
    with_pooler,
)
from mergelab.models.model import Family

__all__ = ["CAMEMBERT", "ROBERTA", "XLM_ROBERTA", "after_padding"]

_ROWS = tuple(row._replace(hf_name=row.hf_name.replace("bert.", "roberta.", 1)) for row in BERT_ROWS)


def after_padding(fields: Mapping[str, Any], padding: int, place: str) -> dict[str, Any]:
    """Positions that begin behind the row of the padding id, as fields of `EncoderConfig`.

    Args:
        fields: result of `read_bert_fields`.
        padding: the id of padding, which names the row that is never read.
        place: the config's path, for messages.

    Raises:
        CheckpointError: the table of positions ends before that.
    """
    first = padding + 1
    if fields["max_position_embeddings"] <= first:
        raise CheckpointError(
            f"{place} has max_position_embeddings = {fields['max_position_embeddings']}, but positions begin "
            f"at {first}, behind the padding id; correct one of the two."
        )
    room = fields["max_position_embeddings"] - first
    return {"first_position": first, "max_length": room, "skips_padding": True}


def read_roberta(config: Mapping[str, Any], place: str) -> EncoderConfig:
    """Reads a `config.json`; raises `CheckpointError` for what this family does not implement."""
    stated = {name: value for name, value in config.items() if (name, value) != ("pad_token_id", None)}
    fields = read_bert_fields(stated, place, {**BERT_OPTIONAL, "pad_token_id": 1})
    return bert_encoder(fields, **after_padding(fields, fields["pad_token_id"], place))


ROBERTA = Family(
    "roberta",
    ENCODER,
    read_roberta,
    lambda _: _ROWS,
    prefix="roberta.",
    unused=("lm_head.*",),  # the masked-language-model head
    adapt=with_pooler,
)
XLM_ROBERTA = replace(ROBERTA, model_type="xlm-roberta")
CAMEMBERT = replace(ROBERTA, model_type="camembert")
