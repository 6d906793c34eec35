"""Tiny configurations of encoders other than BERT, for `tiny_models.CONFIGS`."""

from __future__ import annotations

from typing import Any

_SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
}


def sizes(**changes: Any) -> dict[str, Any]:
    return {**_SIZES, **changes}


ENCODERS: dict[str, dict[str, Any]] = {
    "roberta": sizes(model_type="roberta", type_vocab_size=1, layer_norm_eps=1e-5),
    "xlm-roberta": sizes(model_type="xlm-roberta", type_vocab_size=1),
    "camembert": sizes(model_type="camembert", type_vocab_size=2, pad_token_id=2, eos_token_id=1),
    "mpnet": sizes(model_type="mpnet", relative_attention_num_buckets=33),
    "distilbert": {
        "model_type": "distilbert",
        "vocab_size": 61,
        "dim": 24,
        "n_layers": 2,
        "n_heads": 4,
        "hidden_dim": 40,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    },
    "modernbert": sizes(
        model_type="modernbert",
        num_hidden_layers=3,
        global_attn_every_n_layers=2,
        local_attention=5,
        global_rope_theta=1000.0,
        local_rope_theta=50.0,
        cls_token_id=0,
        sep_token_id=2,
    ),
    "modernbert, biases": sizes(
        model_type="modernbert",
        attention_bias=True,
        mlp_bias=True,
        norm_bias=True,
        layer_types=["sliding_attention", "full_attention"],
        local_attention=4,
        rope_parameters={"sliding_attention": {"rope_type": "default", "rope_theta": 30.0}},
        cls_token_id=0,
        sep_token_id=2,
    ),
    "deberta-v2": sizes(
        model_type="deberta-v2",
        relative_attention=True,
        position_buckets=4,
        max_relative_positions=-1,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type="p2c|c2p",
        position_biased_input=False,
        pad_token_id=0,
    ),
    "deberta-v2, own projections": sizes(
        model_type="deberta-v2",
        relative_attention=True,
        max_relative_positions=6,
        pos_att_type=["c2p", "p2c"],
        type_vocab_size=2,
        pad_token_id=0,
    ),
    "deberta-v2, convolved": sizes(
        model_type="deberta-v2",
        relative_attention=True,
        position_buckets=6,
        pos_att_type="p2c",
        norm_rel_ebd="layer_norm",
        conv_kernel_size=3,
        conv_act="gelu",
        pad_token_id=0,
    ),
    "deberta-v2, contents to positions": sizes(
        model_type="deberta-v2",
        relative_attention=True,
        position_buckets=8,
        pos_att_type=["c2p"],
        share_att_key=True,
        pad_token_id=0,
    ),
    "neobert": {
        "model_type": "neobert",
        "vocab_size": 61,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_length": 64,
        "norm_eps": 1e-6,
        "pad_token_id": 0,
    },
    "clip_text_model": sizes(
        model_type="clip_text_model", projection_dim=20, eos_token_id=5, hidden_act="quick_gelu"
    ),
}
