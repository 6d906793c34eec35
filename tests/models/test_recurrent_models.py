"""Models with recurrent layers: the laws of caches, sites and meshes hold, or the sentence is clear."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mergelab.decoding import beam_search, generate, generation_state, pad_prompts, speculate, steps, stop_at
from mergelab.decoding.memory import Memory
from mergelab.errors import CheckpointError, DecodingError, MergelabError, SiteError
from mergelab.interp import direct_logit_attribution, head_weights
from mergelab.models.blockwise import Blockwise
from mergelab.models.families import model_from_config
from mergelab.models.load import load_model
from mergelab.models.model import Model, Output, Params
from mergelab.models.residual_stream import added_sites, writers
from mergelab.sharding import make_mesh
from mergelab.tuning.lora import find_factors
from mergelab.tuning.settings import LoraSettings
from tests.models.recurrent_configs import recurrent_configs
from tests.models.test_cache import HOLES, in_pieces
from tests.models.tiny_models import CONFIGS, MASK, TOKENS, sizes, tiny, write
from tests.models.transformers_outputs import continued, hidden_states

NAMES = list(recurrent_configs(sizes))
KINDS = ["qwen3_next", "qwen3_5", "mamba", "mamba2", "jamba"]


@pytest.fixture(scope="module", params=KINDS)
def loaded(request: pytest.FixtureRequest) -> tuple[Model, Params]:
    return tiny(request.param)


def test_tokens_in_pieces_give_what_they_give_at_once(loaded: tuple[Model, Params]) -> None:
    model, params = loaded
    whole = np.asarray(jax.jit(model.apply)(params, TOKENS, mask=HOLES).logits)
    found, cache = in_pieces(model, params, model.new_cache(3, 14), [5, 8, 9])
    np.testing.assert_allclose(found[HOLES], whole[HOLES], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(cache.mask, np.pad(HOLES, ((0, 0), (0, 4))))
    # Every row is the row alone, without its padding.
    for row in (1, 2):
        alone = jax.jit(model.apply)(params, TOKENS[row : row + 1, HOLES[row]]).logits
        np.testing.assert_allclose(whole[row, HOLES[row]], alone[0], rtol=0, atol=1e-4)


def test_rows_forked_go_on_as_each_would_alone(loaded: tuple[Model, Params]) -> None:
    model, params = loaded
    step = jax.jit(lambda tokens, cache: model.apply(params, tokens, cache=cache))
    read = step(jnp.asarray(TOKENS[:1, :8]), model.new_cache(1, 12)).cache
    found = step(jnp.asarray(TOKENS[:, 8:10]), read.repeat(3))
    whole = jax.jit(lambda tokens: model.apply(params, tokens).logits)
    for row in range(3):
        text = np.concatenate([TOKENS[0, :8], TOKENS[row, 8:10]])[None]
        np.testing.assert_allclose(found.logits[row], whole(text)[0, 8:], rtol=0, atol=1e-4)
    with pytest.raises(MergelabError, match="recurrent layers, whose states hold all tokens"):
        found.cache.rewind(3)


def test_generation_by_block_is_that_of_the_loop(
    loaded: tuple[Model, Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, params = loaded
    prompts = pad_prompts([[3, 14, 15, 9], [60, 1]])
    site = f"blocks.0.{'mixer' if 0 in model.config.recurrent else 'attn'}.z"
    options: dict[str, Any] = {"max_new_tokens": 6, "edit": {site: lambda x: 0.5 * x}, "capture": [site]}
    found = generate(model, params, *prompts, **options)
    for module in (generation_state, steps):
        monkeypatch.setattr(module, "runs_by_block", lambda *trees: False)
    expected = generate(model, params, *prompts, **options)
    assert found.rows() == expected.rows()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), found.captured, expected.captured)
    plain = generate(model, params, *prompts, max_new_tokens=6)
    assert plain.rows() != found.rows()
    # The rows are those of the whole text, read anew for every token; and one alone is one in a batch.
    text = [3, 14, 15, 9]
    run = jax.jit(lambda tokens, mask: model.apply(params, tokens, mask=mask).logits)
    for _ in range(6):
        tokens, mask = np.zeros((1, 12), np.int32), np.zeros((1, 12), bool)
        tokens[0, : len(text)], mask[0, : len(text)] = text, True
        text.append(int(run(tokens, mask)[0, len(text) - 1].argmax()))
    assert plain.rows()[0] == text[4:]
    assert plain.rows()[1] == generate(model, params, [[60, 1]], max_new_tokens=6).rows()[0]


def test_what_takes_tokens_back_is_refused_before_it_reads(loaded: tuple[Model, Params]) -> None:
    model, params = loaded
    with pytest.raises(
        DecodingError, match=f"'{model.family.model_type}'.*recurrent layers.*takes tokens back"
    ):
        speculate(model, params, model, params, [[3, 4]], max_new_tokens=2)
    with pytest.raises(SiteError, match="recurrent and have no attention heads, block 0"):
        head_weights(model, params)


def test_beams_are_the_likeliest_continuations() -> None:
    model, params = tiny("qwen3_5")
    found = beam_search(model, params, [[3, 14, 15]], max_new_tokens=2, beams=3)
    run = jax.jit(lambda tokens: jax.nn.log_softmax(model.apply(params, tokens).logits[:, -1]))
    first = np.asarray(run(jnp.asarray([[3, 14, 15]])))[0]
    texts = np.stack([np.array([3, 14, 15, token]) for token in range(61)]).astype(np.int32)
    total = first[:, None] + np.asarray(run(texts))
    best = np.unravel_index(total.argmax(), total.shape)
    best_of_beams = found.rows()[0]
    assert total[tuple(best_of_beams)] >= np.sort(total[np.argsort(-first)[:3]].ravel())[-1] - 1e-4
    assert found.log_probs[0, 0] == pytest.approx(total[tuple(best_of_beams)], abs=1e-4)
    assert total[best] >= found.log_probs[0, 0] - 1e-4


def test_a_conversation_goes_on_where_it_ended_and_else_from_its_beginning() -> None:
    model, params = tiny("jamba")
    memory, options = Memory(), {"max_new_tokens": 4, "stop": stop_at()}
    for prompt in ([3, 14, 15, 9, 2], [3, 14, 15, 9, 2, 6, 5, 3, 5], [3, 14, 7, 9]):
        state = memory.begin(model, params, prompt, **options)
        whole = jax.jit(lambda tokens: model.apply(params, tokens).logits)(np.array([prompt], np.int32))
        step = jax.jit(lambda tokens, cache: model.apply(params, tokens, cache=cache))
        out = step(np.array([prompt[-1:]], np.int32), state.cache)
        np.testing.assert_allclose(out.logits[0, -1], whole[0, -1], rtol=0, atol=1e-4)
        memory.keep(prompt, state)


@pytest.mark.parametrize("name", KINDS)
def test_a_model_computes_the_same_on_a_mesh(name: str, tmp_path: Path) -> None:
    folder, found = write(tmp_path, name), []
    for mesh in (None, make_mesh({"data": 2, "fsdp": 2, "tensor": 2})):
        model, params = load_model(folder, mesh=mesh)
        run = jax.jit(lambda p, m=model: m.apply(p, jnp.asarray(TOKENS), mask=jnp.asarray(MASK)).logits)
        found.append(np.asarray(run(params)))
        if mesh is not None:
            kernel = params["blocks_0"]["mixer"]["o"]["kernel"]
            assert kernel.sharding.spec[0] == "tensor"
    np.testing.assert_allclose(found[1][MASK], found[0][MASK], rtol=0, atol=1e-4)


def test_what_blocks_add_is_the_stream_and_is_attributed(loaded: tuple[Model, Params]) -> None:
    model, params = loaded
    run = jax.jit(partial(model.apply, capture=("blocks.*",)))
    c = run(params, TOKENS, mask=MASK).captured
    for i in range(model.config.n_layers):
        total = c[f"blocks.{i}.resid_pre"] + sum(c[name] for name in added_sites(model, i))
        np.testing.assert_allclose(total, c[f"blocks.{i}.resid_post"], rtol=0, atol=1e-5)
    kernel = params["blocks_0"]["mixer"]["o"]["kernel"]
    z = c["blocks.0.mixer.z"].reshape(*TOKENS.shape, -1)
    bias = params["blocks_0"]["mixer"]["o"].get("bias", jnp.zeros(kernel.shape[1]))
    np.testing.assert_allclose(z @ kernel + bias[None, None], c["blocks.0.mixer.out"], rtol=0, atol=1e-5)
    parts = direct_logit_attribution(model, params, TOKENS[:1], [5])
    logits = jax.jit(model.apply)(params, TOKENS[:1]).logits[0, :, 5]
    np.testing.assert_allclose(parts.parts[0].sum(axis=0), logits, rtol=0, atol=1e-4)
    assert any(writer.leaf.path[1:3] == ("mixer", "o") for writer in writers(model))


def test_edits_inside_a_recurrence_reach_later_tokens_alone_and_stay_in_the_state() -> None:
    model, params = tiny("qwen3_next")

    def fifth(x: jax.Array) -> jax.Array:
        return x.at[:, 4].set(0.0)

    run = jax.jit(model.apply)
    edited = jax.jit(partial(model.apply, edit={"blocks.0.mixer.v": fifth}))
    plain, other = (np.asarray(f(params, TOKENS).logits) for f in (run, edited))
    np.testing.assert_array_equal(plain[:, :4], other[:, :4])
    assert (np.abs(plain - other)[:, 4:].max(axis=(0, 2)) > 1e-3).all()
    first = edited(params, TOKENS[:, :6], cache=model.new_cache(3, 10))
    then = run(params, TOKENS[:, 6:], cache=first.cache)
    np.testing.assert_allclose(then.logits, other[:, 6:], rtol=0, atol=1e-4)


def test_bfloat16_by_block_is_bfloat16_at_once_and_keeps_its_memory_in_float32() -> None:
    model, params = tiny("mamba2")
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    cache = model.new_cache(3, 10, jnp.bfloat16)
    found = Blockwise(model, half)(jnp.asarray(TOKENS), cache, mask=jnp.asarray(MASK))
    assert found.cache is not None and found.cache.values[0].dtype == jnp.float32
    assert found.cache.keys[0].dtype == jnp.bfloat16
    run: Any = jax.jit(lambda p: model.apply(p, jnp.asarray(TOKENS), mask=jnp.asarray(MASK)).logits)
    exact = np.asarray(run(params))[MASK]
    assert np.abs(np.asarray(found.logits)[MASK] - exact).mean() < 0.1 * np.abs(exact).mean()


def test_every_projection_may_have_factors(loaded: tuple[Model, Params]) -> None:
    model, _ = loaded
    names = {module.name.rpartition(".")[2] for module in find_factors(model, LoraSettings(2)).modules}
    known = {"in_proj", "x_proj", "dt_proj", "in_proj_qkvz", "in_proj_ba", "in_proj_qkv", "in_proj_z"}
    assert "out_proj" in names and names & known and "conv1d" not in names


def test_packed_experts_are_those_by_themselves(tmp_path: Path) -> None:
    folder = write(tmp_path, "qwen3_5_moe")
    expected = load_model(folder)[1]
    tensors = load_file(folder / "model.safetensors")
    packed = {name: array for name, array in tensors.items() if ".experts." not in name}
    for i in range(2):
        experts = f"model.layers.{i}.mlp.experts"
        gate, up, down = (
            np.stack([tensors[f"{experts}.{e}.{part}_proj.weight"] for e in range(5)])
            for part in ("gate", "up", "down")
        )
        packed[f"{experts}.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        packed[f"{experts}.down_proj"] = down
    save_file({**packed, "mtp.norm.weight": np.zeros(3, np.float32)}, folder / "model.safetensors")
    _, found = load_model(folder)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("qwen3_next", {"layer_types": ["linear_attention"]}, "1 layer_types for 2 layers"),
        (
            "qwen3_next",
            {"layer_types": ["chunked", "full_attention"]},
            "layer type 'chunked'.*'linear_attention'",
        ),
        ("qwen3_next", {"linear_num_value_heads": 3}, "3 linear_num_value_heads for 2"),
        ("qwen3_next", {"is_causal": False}, "is_causal = False"),
        ("qwen3_5", {"attn_output_gate": False}, "attn_output_gate = False"),
        ("qwen3_5_moe", {"num_experts_per_tok": 6}, "chooses 6 of 5 experts"),
        ("mamba", {"state_size": 0}, "state_size = 0.*from 1"),
        ("mamba", {"time_step_rank": "many"}, "time_step_rank = 'many'"),
        ("mamba", {"rms_norm": False}, "rms_norm = False"),
        ("mamba2", {"num_heads": 5}, "5 heads of width 8 for 48 channels"),
        ("mamba2", {"n_groups": 4}, "6 heads in 4 n_groups"),
        ("mamba2", {"time_step_limit": [1.0]}, "time_step_limit"),
        ("jamba", {"attn_layer_offset": 2}, "attn_layer_offset = 2 for attn_layer_period = 2"),
        ("jamba", {"mamba_inner_layernorms": False}, "mamba_inner_layernorms = False"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused_by_name(
    name: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        model_from_config(CONFIGS[name] | changes, "some/config.json")


# As published, without fields that say nothing of a pass.
PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen3-Next-80B-A3B-Instruct": {
        "model_type": "qwen3_next",
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "full_attention_interval": 4,
        "head_dim": 256,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 5120,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_value_head_dim": 128,
        "max_position_embeddings": 262144,
        "mlp_only_layers": [],
        "moe_intermediate_size": 512,
        "norm_topk_prob": True,
        "num_attention_heads": 16,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "num_hidden_layers": 48,
        "num_key_value_heads": 2,
        "partial_rotary_factor": 0.25,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 10000000,
        "shared_expert_intermediate_size": 512,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "Qwen3.5-35B-A3B": {
        "model_type": "qwen3_5_moe",
        "vision_config": {"depth": 27},
        "text_config": {
            "model_type": "qwen3_5_moe_text",
            "attn_output_gate": True,
            "full_attention_interval": 4,
            "hidden_size": 2048,
            "layer_types": [*["linear_attention"] * 3, "full_attention"] * 10,
            "mamba_ssm_dtype": "float32",
            "mtp_num_hidden_layers": 1,
            "mtp_use_dedicated_embeddings": False,
            "num_hidden_layers": 40,
            "rope_parameters": {
                "mrope_interleaved": True,
                "mrope_section": [11, 11, 10],
                "partial_rotary_factor": 0.25,
                "rope_theta": 10000000,
                "rope_type": "default",
            },
        },
    },
    "mamba-130m-hf": {
        "model_type": "mamba",
        "conv_kernel": 4,
        "d_inner": 1536,
        "d_model": 768,
        "expand": 2,
        "fused_add_norm": True,
        "hidden_act": "silu",
        "hidden_size": 768,
        "intermediate_size": 1536,
        "layer_norm_epsilon": 1e-5,
        "n_layer": 24,
        "num_hidden_layers": 24,
        "residual_in_fp32": True,
        "rms_norm": True,
        "ssm_cfg": {},
        "state_size": 16,
        "time_step_rank": 48,
        "time_step_scale": 1.0,
        "use_bias": False,
        "use_conv_bias": True,
        "vocab_size": 50280,
    },
    "Jamba-v0.1": {
        "model_type": "jamba",
        "attn_layer_offset": 4,
        "attn_layer_period": 8,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "hidden_size": 4096,
        "mamba_conv_bias": True,
        "mamba_d_conv": 4,
        "mamba_dt_rank": 256,
        "mamba_inner_layernorms": True,
        "num_experts": 16,
        "sliding_window": None,
        "use_mamba_kernels": True,
    },
}


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("Qwen3-Next-80B-A3B-Instruct", 79e9, 81e9),
        ("Qwen3.5-35B-A3B", 34e9, 36e9),
        ("mamba-130m-hf", 129_135_360, 129_135_360),
        ("Jamba-v0.1", 51e9, 52e9),
    ],
)
def test_a_published_config_is_a_model_of_its_size(name: str, least: float, most: float) -> None:
    model = model_from_config(PUBLISHED[name])  # a warning would be an error
    assert least <= sum(leaf.size for leaf in model.table()) <= most


@pytest.mark.oracle
@pytest.mark.parametrize("name", NAMES)
def test_states_and_continuations_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", name)
    model, params = tiny(name)
    run: Any = jax.jit(partial(model.apply, capture="blocks.*.resid_post"))
    output: Output = run(params, TOKENS, mask=MASK)
    expected = hidden_states(folder, TOKENS, MASK)
    assert len(expected) == model.config.n_layers - 1
    for i in range(len(expected)):
        found = np.asarray(output.captured[f"blocks.{i}.resid_post"])
        # Streams of some hundreds, of which float32 keeps seven digits.
        rounding = 1e-4 + 1e-6 * np.abs(expected[i]).max()
        np.testing.assert_allclose(found[MASK], expected[i][MASK], rtol=0, atol=rounding)
    prompts = [[3, 14, 15, 9, 26], [60, 11]]
    tokens, mask = pad_prompts(prompts)
    rows = generate(model, params, tokens, mask, max_new_tokens=8).rows()
    assert rows == continued(folder, prompts, 8)
