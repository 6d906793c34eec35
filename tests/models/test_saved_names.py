"""Weights as people saved them: without a head, wrapped by trainers, years ago, inside a model that sees."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from mergelab.decoding import generate
from mergelab.errors import CheckpointError, MergelabError
from mergelab.models.families import model_from_config
from mergelab.models.footprint import take_inventory
from mergelab.models.load import load_model
from mergelab.models.model import Params
from mergelab.models.save import save_model
from mergelab.models.saved_names import is_buffer
from tests.models.tiny_models import CONFIGS, MASK, TOKENS, tiny, weights
from tests.slow import slow_except

Tensors = dict[str, np.ndarray]


def write(folder: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def same(left: Params, right: Params) -> bool:
    return jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), left, right))


def named(change: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {change(name): value for name, value in tensors.items()}


def old_norms(name: str) -> str:
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("llama", named(lambda name: f"module.{name}")),
        ("llama", named(lambda name: f"_orig_mod.{name}")),
        ("gpt_neox", named(lambda name: f"_orig_mod.module.{name}")),
        ("gpt2", named(lambda name: f"module.{name}")),
        ("mixtral", named(lambda name: f"module.{name}")),
        ("bert", named(old_norms)),
        ("bert", named(lambda name: old_norms(name).removeprefix("bert."))),
        ("qwen3", named(lambda name: name.removeprefix("model."))),
        ("gemma2", named(lambda name: name.removeprefix("model."))),
        ("phi3", named(lambda name: f"language_model.{name}")),
    ],
)
def test_a_table_follows_the_names_of_a_file(
    kind: str, change: Callable[[Tensors], Tensors], tmp_path: Path
) -> None:
    model, params = tiny(kind)
    renamed = change(weights(model))
    assert renamed.keys() != weights(model).keys()
    folder = write(tmp_path / "model", CONFIGS[kind], renamed)
    fitted, found = load_model(folder)
    assert same(found, params)
    assert fitted.config == model.config
    assert not take_inventory(folder).faults
    # What is saved again has the names of the family, but for the base class, whose files have no prefix.
    _, again = load_model(save_model(fitted, found, tmp_path / "again"))
    assert same(again, params)
    prefix = model.family.prefix
    bare = all(name.startswith(prefix) for name in weights(model)) and any(
        name.removeprefix(prefix) in renamed for name in weights(model)
    )
    written = {name for leaf in fitted.standard().table() for name in leaf.hf_names}
    expected = {name.removeprefix(prefix) for name in weights(model)} if bare else weights(model).keys()
    assert written == expected


@pytest.mark.parametrize("kind", slow_except(["llama", "gpt_neox"], ["llama", "mistral", "phi3", "gpt_neox"]))
def test_weights_of_the_base_class_give_hidden_states_and_no_logits(kind: str, tmp_path: Path) -> None:
    model, params = tiny(kind)
    head = {"unembed"}
    prefix = model.family.prefix
    tensors = {
        name.removeprefix(prefix): value for name, value in weights(model).items() if name.startswith(prefix)
    }
    fitted, found = load_model(write(tmp_path / "model", CONFIGS[kind], tensors))
    assert params.keys() - found.keys() == head and same(found, {k: params[k] for k in found})
    tokens, mask = jnp.asarray(TOKENS), jnp.asarray(MASK)
    expected, output = model.apply(params, tokens, mask=mask), fitted.apply(found, tokens, mask=mask)
    assert output.logits is None and "logits" not in fitted.sites()
    np.testing.assert_array_equal(output.hidden, expected.hidden)
    with pytest.raises(MergelabError, match="saved without a head of next tokens"):
        generate(fitted, found, tokens[:1], mask[:1], max_new_tokens=1)
    again, _ = load_model(save_model(fitted, found, tmp_path / "again"))
    assert again == fitted


@pytest.mark.parametrize(
    ("kind", "extra", "without_head"),
    [
        ("llama", {"score.weight": (2, 24)}, True),
        ("llama", {"v_head.summary.weight": (1, 24), "v_head.summary.bias": (1,)}, False),
        ("gpt2", {"score.weight": (2, 24)}, False),
        ("bert", {"classifier.weight": (2, 24), "classifier.bias": (2,)}, False),
        ("bert", {"qa_outputs.weight": (2, 24)}, False),
    ],
)
def test_other_heads_are_skipped_with_a_note(
    kind: str, extra: dict[str, tuple[int, ...]], without_head: bool, tmp_path: Path
) -> None:
    model, params = tiny(kind)
    tensors = weights(model) | {name: np.ones(shape, np.float32) for name, shape in extra.items()}
    if without_head:
        del tensors["lm_head.weight"]
        del params["unembed"]
    folder = write(tmp_path / "model", CONFIGS[kind], tensors)
    with pytest.warns(UserWarning, match=f"another head, which is not loaded: {', '.join(sorted(extra))}"):
        _, found = load_model(folder)
    assert same(found, params)


def test_a_head_that_the_config_promises_is_missed(tmp_path: Path) -> None:
    model, _ = tiny("llama")
    tensors = weights(model)
    del tensors["lm_head.weight"]
    for classes in ({}, {"architectures": ["LlamaForCausalLM"]}):
        folder = write(tmp_path / "model", CONFIGS["llama"] | classes, tensors)
        with pytest.raises(CheckpointError, match=r"lacks the tensor 'lm_head.weight'"):
            load_model(folder)
    load_model(write(folder, CONFIGS["llama"] | {"architectures": ["LlamaModel"]}, tensors))


@pytest.mark.parametrize(
    ("kind", "name", "shape"),
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq", (3,)),
        ("llama", "model.rotary_emb.inv_freq", (3,)),
        ("gpt2", "transformer.h.0.attn.bias", (1, 1, 32, 32)),
        ("gpt2", "transformer.h.0.attn.masked_bias", ()),
        ("gpt_neox", "gpt_neox.layers.0.attention.bias", (1, 1, 64, 64)),
        ("gpt_neox", "gpt_neox.layers.0.attention.masked_bias", ()),
        ("gpt_neox", "gpt_neox.layers.0.attention.rotary_emb.inv_freq", (3,)),
        ("bert", "bert.embeddings.position_ids", (1, 64)),
        ("bert", "embeddings.position_ids", (1, 64)),
    ],
)
def test_buffers_load_in_silence(kind: str, name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    model, params = tiny(kind)
    tensors = weights(model) | {name: np.ones(shape, np.float32)}
    _, found = load_model(write(tmp_path / "model", CONFIGS[kind], tensors))
    assert same(found, params)
    assert is_buffer(name, len(shape))


def test_a_tensor_that_nothing_is_known_of_is_refused(tmp_path: Path) -> None:
    model, _ = tiny("llama")
    for name in ("model.layers.0.self_attn.q_proj.biases", "lm_head.bias", "visual.patch.weight"):
        tensors = weights(model) | {name: np.ones(24, np.float32)}
        with pytest.raises(CheckpointError, match=f"has the tensor '{name}'"):
            load_model(write(tmp_path / "model", CONFIGS["llama"], tensors))
    assert not is_buffer("model.layers.0.attn.bias", 1)


# Wrappers: where the text tower and the others stand in their files.
OLD = ("language_model.model.", "language_model.", "vision_tower.")
NEW = ("model.language_model.", "", "model.vision_tower.")
WRAPPED: dict[str, tuple[str, str, str, str, str]] = {
    "gemma 3, old": ("gemma3", "gemma3", *OLD),
    "gemma 3": ("gemma3", "gemma3", *NEW),
    "mistral 3, old": ("mistral", "mistral3", *OLD),
    "qwen2-vl, old": ("qwen2", "qwen2_vl", "model.", "", "visual."),
    "qwen2.5-vl": ("qwen2", "qwen2_5_vl", "model.language_model.", "", "model.visual."),
    "llava, old": ("llama", "llava", *OLD),
    "llava": ("llama", "llava", *NEW),
}


def wrapped(case: str) -> tuple[dict[str, Any], Tensors]:
    """The config and the tensors of a wrapper whose text tower is a tiny model of its family."""
    kind, wrapper, lead, head, other = WRAPPED[case]
    text, outer = dict(CONFIGS[kind]), {"model_type": wrapper}
    if "qwen" in case:
        text |= {"model_type": f"{wrapper}_text", "rms_norm_eps": 1e-6}
        text["rope_scaling"] = {"type": "mrope", "mrope_section": [1, 1, 1]}
    if case == "qwen2-vl, old":  # flat, as on the hub
        config = {**text, **outer, "vision_config": {"depth": 1}, "image_token_id": 5}
    else:
        config = {**outer, "text_config": text, "vision_config": {"hidden_size": 8}, "image_token_index": 5}
    model = model_from_config(CONFIGS[kind])
    tensors = {
        lead + name.removeprefix("model.") if name.startswith("model.") else head + name: value
        for name, value in weights(model).items()
    }
    return config, tensors | {f"{other}patch.weight": np.ones((3, 3), np.float32)}


@pytest.mark.parametrize("case", WRAPPED)
def test_the_text_tower_of_a_wrapper_is_a_model_of_its_family(case: str, tmp_path: Path) -> None:
    kind, _, lead, *_ = WRAPPED[case]
    model, params = tiny(kind)
    config, tensors = wrapped(case)
    folder = write(tmp_path / "model", config, tensors)
    with pytest.warns(UserWarning, match="1 tensors of other towers.*only the text tower is loaded"):
        tower, found = load_model(folder)
    assert tower.config == model.config and same(found, params)
    assert all(name.startswith(lead) for leaf in tower.table()[:-1] for name in leaf.hf_names)
    assert not take_inventory(folder).faults
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a model of its own, without other towers
        alone, again = load_model(save_model(tower, found, tmp_path / "alone"))
    assert alone == model and same(again, params)


def test_an_embedding_that_stands_twice_is_no_place_to_find() -> None:
    model, _ = tiny("llama")
    names = [f"{tower}.{name}" for tower in ("one", "two") for name in weights(model)]
    assert model.for_tensors(names).spelling is None
