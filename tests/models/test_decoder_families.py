"""Decoders of `decoder_configs.py`: as many parameters as published, faults by name, slopes of the paper."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergelab.errors import CheckpointError, SiteError
from mergelab.models.families import model_from_config
from mergelab.models.layers.alibi import alibi_slopes
from mergelab.models.residual_stream import require_decoder, require_sum
from tests.models.decoder_configs import DECODER_CONFIGS

_E2B = "gemma4, embeddings per layer, shared keys"
# What decides the sizes of published configs, with the fields by which they differ from others.
PUBLISHED: dict[str, tuple[int, dict[str, Any]]] = json.loads(
    Path(__file__).with_name("decoder_hub_configs.json").read_text()
)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_has_the_published_number_of_parameters(name: str) -> None:
    count, config = PUBLISHED[name]
    assert sum(leaf.size for leaf in model_from_config(config).table()) == count


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("opt", {"num_attention_heads": 5}, "5 heads for a width of 24, which they cannot share"),
        ("opt", {"word_embed_proj_dim": 12, "tie_word_embeddings": False}, "width 12 for a stream of 24"),
        ("opt", {"activation_function": "mish"}, "activation_function = 'mish'"),
        (
            "falcon, new form, key heads",
            {"num_kv_heads": 3},
            "4 heads for 3 key-value heads",
        ),
        ("falcon", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn = 2"),
        ("falcon", {"num_ln_in_parallel_attn": 3}, "num_ln_in_parallel_attn = 3"),
        ("falcon", {"alibi": "yes"}, "alibi = 'yes', but expected true or false"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "post_layernorm = True"),
        ("bloom", {"n_head": 7}, "7 heads for a width of 24"),
        ("gptj", {"rotary_dim": 5}, "rotates 5 of 8 components"),
        ("gptj", {"rotary_dim": 16}, "rotates 16 of 8 components"),
        ("gptj", {"tie_word_embeddings": True}, "tie_word_embeddings = True"),
        ("gpt_neo", {"attention_types": [[["global"], 3]]}, "attention_types for 3 layers, but 2 layers"),
        ("gpt_neo", {"attention_types": [[["global", "sparse"], 1]]}, "attention type 'sparse'"),
        ("gpt_neo", {"attention_types": [[["global"] * 9, 10**9]]}, "expected pairs such as"),
        ("gpt_neo", {"attention_types": "global"}, "expected pairs such as"),
        ("llama4", {"no_rope_layers": [1]}, "1 no_rope_layers for 3 layers"),
        ("llama4", {"layer_types": ["full_attention"]}, "1 layer_types for 3 layers"),
        ("llama4", {"layer_types": ["sliding_attention"] * 3}, "layer type 'sliding_attention'"),
        ("llama4", {"layer_types": ["chunked_attention"] * 3, "attention_chunk_size": None}, "no attention_"),
        ("llama4", {"moe_layers": [3]}, "moe_layers up to 3, but 3 layers"),
        ("llama4", {"num_experts_per_tok": 5}, "chooses 5 of 4 experts"),
        (
            "gemma4",
            {"num_kv_shared_layers": 1},
            "layer 1 read the keys .* none of the first 1 is of that type",
        ),
        (_E2B, {"num_kv_shared_layers": 5}, "num_kv_shared_layers = 5 for 5 layers"),
        (_E2B, {"vocab_size_per_layer_input": 60}, r"for 60 tokens \(vocab_size_per_layer_input\) of 61"),
        (
            _E2B,
            {"per_layer_config": {"2": {"head_dim": 12}, "4": {"head_dim": 16}}},
            r"layer 4 read the keys of layer 2 .* 1 heads of 16 and 1 heads of 12",
        ),
        ("gemma4", {"num_global_key_value_heads": 3}, "4 heads for 3 key-value heads"),
        ("gemma4", {"layer_types": ["full_attention"]}, "1 layer_types for 2 layers"),
        ("gemma4", {"per_layer_config": {"2": {"head_dim": 8}}}, r"per_layer_config\['2'\]"),
        (
            "gemma4",
            {"per_layer_config": {"1": {"hidden_act": "relu"}}},
            "only head_dim and num_key_value_heads",
        ),
        ("gemma4", {"use_bidirectional_attention": "all"}, "use_bidirectional_attention = 'all'"),
        ("gemma4, experts", {"top_k_experts": None}, "lacks the field 'top_k_experts'"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused_by_name(
    name: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        model_from_config(DECODER_CONFIGS[name] | changes, "some/config.json")


def test_sizes_by_layer_are_those_of_global_layers_said_otherwise() -> None:
    config = DECODER_CONFIGS["gemma4"]
    by_layer = {"1": {"head_dim": 12, "num_key_value_heads": 1}}
    given = {name: value for name, value in config.items() if "global" not in name}
    assert model_from_config(given | {"per_layer_config": by_layer}) == model_from_config(config)
    assert model_from_config(given | {"per_layer_config": {}}) != model_from_config(config)


def test_slopes_are_those_of_the_paper() -> None:
    # Section 3: for 8 heads 1/2, 1/4, ..., 1/256; for 16 the same interpolated by the square root.
    np.testing.assert_allclose(alibi_slopes(8), [2.0**-i for i in range(1, 9)])
    np.testing.assert_allclose(alibi_slopes(16), [2.0 ** (-i / 2) for i in range(1, 17)])
    # Its code, for other numbers: those of the lower power of 2, then every other one of the higher.
    np.testing.assert_allclose(alibi_slopes(11), [*alibi_slopes(8), *alibi_slopes(16)[0::2][:3]])


@pytest.mark.parametrize("name", ["opt, narrow embeddings, norms on the stream", "bloom", "gemma4"])
def test_a_stream_that_is_no_sum_is_told_from_one_that_is(name: str) -> None:
    model = model_from_config(DECODER_CONFIGS[name])
    require_decoder(model)
    with pytest.raises(SiteError, match="no sum of what its embeddings and layers added"):
        require_sum(model)
    require_sum(model_from_config(DECODER_CONFIGS["opt"]))
