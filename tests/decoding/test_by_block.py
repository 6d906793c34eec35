"""One program per kind of block gives what the whole program gives, and deep models compile no longer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mergelab.decoding import (
    Thinking,
    beam_search,
    complete_thinking,
    generate,
    generate_contrastive,
    generation_state,
    pad_prompts,
    speculate,
    steps,
)
from mergelab.errors import DecodingError
from mergelab.models import blockwise
from mergelab.models.blockwise import Blockwise, runs_by_block
from mergelab.models.families import model_from_config
from mergelab.models.layers.bfloat16_bits import Bits, as_bits
from mergelab.reasoning import Writer
from mergelab.reasoning.growth import Growth
from tests.decoding.syllables import syllables
from tests.models.tiny_models import CONFIGS, MASK, TOKENS, params_of, tiny, weights, write

# Layers of two kinds (windows and rotations by layer), learned positions, experts; tied and untied heads.
KINDS = ["gemma3", "gpt2", "mixtral"]


def by_site(x: jax.Array, site: str) -> jax.Array:
    return x * jnp.asarray(1.0 + 0.1 * int(site.split(".")[1]), x.dtype)


def late(x: jax.Array, positions: jax.Array, generated: jax.Array) -> jax.Array:
    return jnp.where(((positions > 2) & ~generated)[..., None], 0.5 * x, x)


ASKED: dict[str, Any] = {
    "capture": ["blocks.*.resid_post", "blocks.1.attn.pattern", "embed", "logits"],
    "edit": {"blocks.*.attn.z": by_site, "blocks.1.mlp.out": late, "embed": lambda x: x + 0.25},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_by_block_is_the_whole_pass(kind: str) -> None:
    model, params = tiny(kind)
    tokens, mask = jnp.asarray(TOKENS), jnp.asarray(MASK)
    assert runs_by_block(model, params)
    whole = jax.jit(lambda p, c: model.apply(p, tokens, mask=mask, cache=c, **ASKED))
    expected = whole(params, model.new_cache(3, 12))
    found = Blockwise(model, params, **ASKED)(tokens, model.new_cache(3, 12), mask=mask)
    assert found.captured.keys() == expected.captured.keys()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-4), found, expected)
    plain = Blockwise(model, params)(tokens, model.new_cache(3, 12), mask=mask)
    assert np.abs(np.asarray(plain.logits) - np.asarray(found.logits)).max() > 1e-2  # the edits did something


def test_generation_by_block_is_that_of_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    model, params = tiny("gemma3")
    prompts = pad_prompts([[3, 14, 15, 9], [60, 1]])
    options: dict[str, Any] = {"max_new_tokens": 9, "log_probs": True, **ASKED}
    found = generate(model, params, *prompts, **options)
    other = generate(model, params, *prompts, max_new_tokens=9)
    for module in (generation_state, steps):
        monkeypatch.setattr(module, "runs_by_block", lambda *trees: False)
    expected = generate(model, params, *prompts, **options)
    assert found.rows() == expected.rows() != other.rows()
    np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), found.captured, expected.captured)


@pytest.mark.slow
def test_compiling_does_not_grow_with_depth(caplog: pytest.LogCaptureFixture) -> None:
    def compiled(layers: int) -> list[str]:
        # A width that no other test has, so that nothing is compiled already.
        config = {**CONFIGS["gemma3"], "num_hidden_layers": layers, "intermediate_size": 36 + layers}
        config["layer_types"] = ["sliding_attention", "full_attention"] * (layers // 2)
        model = model_from_config(config)
        params = model.init(0)
        caplog.clear()
        with jax.log_compiles():
            generate(model, params, [[3, 1]], max_new_tokens=2)
        said = (record.message.partition("Finished XLA compilation of ") for record in caplog.records)
        return [program.split()[0] for _, found, program in said if found]

    # Entrance and two kinds of blocks, for the prompt and for one token; and the exit.
    first, deeper = compiled(2), compiled(4)
    assert first.count("jit(run)") == 7 and len(first) <= 15
    assert deeper == ["jit(run)"] * 7, "no other program depends on the model or its depth"


@pytest.mark.parametrize("shape", [(61, 24), (1100, 130)])
@pytest.mark.parametrize("tokens", [1, 140])
def test_bits_multiply_as_their_values_do(shape: tuple[int, int], tokens: int) -> None:
    draw = np.random.default_rng(0)
    matrix = jnp.asarray(draw.normal(size=shape), jnp.bfloat16)
    bits = as_bits({"kernel": matrix})["kernel"]
    assert isinstance(bits, Bits)
    wide = np.asarray(matrix, np.float64)
    x, y = draw.normal(size=(tokens, shape[0])), draw.normal(size=(tokens, shape[1]))
    for found, expected in (
        (jax.jit(Bits.product)(bits, jnp.asarray(x, jnp.float32)), x @ wide),
        (jax.jit(Bits.scores)(bits, jnp.asarray(y, jnp.float32)), y @ wide.T),
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5 * np.sqrt(max(shape)))
    assert jax.jit(Bits.product)(bits, jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16
    rows = jnp.asarray([[0, shape[0] - 1]], jnp.int32)
    np.testing.assert_array_equal(jax.jit(Bits.take)(bits, rows), matrix[rows])


def test_bits_share_the_memory_of_their_matrix() -> None:
    matrix = jnp.ones((64, 64), jnp.bfloat16)
    params = {"kernel": matrix, "scale": jnp.ones(64, jnp.bfloat16), "up": {"kernel": jnp.ones((2, 2))}}
    seen = as_bits(params)
    assert seen["kernel"].bits.unsafe_buffer_pointer() == matrix.unsafe_buffer_pointer()
    assert seen["scale"] is params["scale"] and seen["up"]["kernel"] is params["up"]["kernel"]


@pytest.mark.parametrize("kind", ["gemma3", "gpt2", "mixtral"])
def test_bfloat16_is_multiplied_as_exactly_as_by_xla(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, params = tiny(kind)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    tokens, mask = jnp.asarray(TOKENS), jnp.asarray(MASK)

    def logits(params: Any, dtype: Any) -> np.ndarray:
        found = Blockwise(model, params)(tokens, model.new_cache(3, 10, dtype), mask=mask).logits
        assert found is not None and found.dtype == jnp.float32
        return np.asarray(found)[MASK]

    exact, found = logits(wide, jnp.float32), logits(half, jnp.bfloat16)
    monkeypatch.setattr(blockwise, "as_bits", lambda params: params)
    usual = logits(half, jnp.bfloat16)
    # Both round what each product gives; sums in another order may round to a neighbor.
    assert 0 < np.abs(found - exact).mean() < 1.1 * np.abs(usual - exact).mean()
    if kind != "mixtral":  # XLA rounds experts before it sums them, and not the sum
        assert np.abs(found - usual).mean() < 0.3 * np.abs(usual - exact).mean()


def longrope() -> tuple[Any, Any]:
    config = {**CONFIGS["phi3, longrope"], "original_max_position_embeddings": 9}
    model = model_from_config(config)
    return model, params_of(model, weights(model))


CROSSING = [3, 14, 15, 9, 26]
# What transformers 5.24 generates: positions 5 to 16, of which those from 9 on use the long factors.
RECORDED = [13, 26, 21, 40, 26, 26, 26, 26, 16, 39, 41, 26]


@pytest.mark.slow
def test_a_text_that_outgrows_longrope_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, params = longrope()
    assert generate(model, params, [CROSSING], max_new_tokens=12).rows() == [RECORDED]
    # Rows cross at their own steps, and a prompt that just crosses is one text too.
    prompts = [CROSSING, [7, 8], [*CROSSING, *RECORDED[:5]]]
    rows = generate(model, params, *pad_prompts(prompts), max_new_tokens=7).rows()
    assert rows[0] == RECORDED[:7] and rows[2] == RECORDED[5:]
    for module in (generation_state, steps):
        monkeypatch.setattr(module, "runs_by_block", lambda *trees: False)
    assert generate(model, params, *pad_prompts(prompts), max_new_tokens=7).rows() == rows
    monkeypatch.setattr(steps.Steps, "_crossings", lambda *given: [])
    assert generate(model, params, [CROSSING], max_new_tokens=12).rows() != [RECORDED]


def test_what_takes_tokens_back_refuses_to_outgrow_longrope() -> None:
    model, _ = longrope()
    ways: list[Any] = [
        lambda: beam_search(model, {}, [CROSSING], max_new_tokens=5, beams=2),
        lambda: speculate(model, {}, model, {}, [CROSSING], max_new_tokens=5),
        lambda: generate_contrastive(model, {}, model, {}, [CROSSING], max_new_tokens=5),
        lambda: complete_thinking(model, {}, syllables(), [CROSSING], Thinking("bo", 3), max_new_tokens=5),
        lambda: Growth(Writer(model, {}, syllables(), 5), CROSSING, 2, 0, by_step=True),
    ]
    for way in ways:
        with pytest.raises(DecodingError, match=r"5 tokens and \d+ new ones.* one side of the model's 9"):
            way()


@pytest.mark.oracle
def test_longrope_is_that_of_transformers(tmp_path: Path) -> None:
    assert transformers_longrope(tmp_path) == RECORDED


def transformers_longrope(folder: Path) -> list[int]:
    import torch
    import transformers

    path = write(folder / "model", "phi3, longrope")
    config = {**CONFIGS["phi3, longrope"], "original_max_position_embeddings": 9}
    (path / "config.json").write_text(json.dumps(config))
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = torch.tensor([CROSSING])
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 12}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return out[0, len(CROSSING) :].tolist()
