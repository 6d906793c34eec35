"""Models of images: outputs of transformers, sites, edits, files, meshes, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mergelab.checkpoints.folder import open_checkpoint
from mergelab.errors import CheckpointError, MergelabError, TokenError
from mergelab.merging.recipe.recipe_file import parse_recipe
from mergelab.merging.run_merge import merge
from mergelab.models.families import model_from_config
from mergelab.models.load import load_model
from mergelab.models.model import Model, Params
from mergelab.models.save import save_model
from mergelab.models.streamed import stream_model
from mergelab.models.table import check_table, get_leaf
from mergelab.models.token_checks import check_images
from mergelab.sharding import make_mesh
from mergelab.tuning import LoraSettings, find_factors, init_factors, with_factors
from tests.models.tiny_models import weights
from tests.models.tiny_vision import MASK, TOKENS, VISION, images, tiny, write
from tests.models.transformers_vision import RECORDED, outputs

SITES = {
    "vit": ["pooled"],
    "clip_vision_model": ["embedding"],
    "clip": ["logits", "text.embedding", "vision.embedding"],
}


@cache
def recorded() -> dict[str, dict[str, Any]]:
    return json.loads(RECORDED.read_text())


def run(model: Model, params: Params, **given: Any) -> dict[str, np.ndarray]:
    """The sites of a model and its last hidden state, where there is one."""
    read: dict[str, Any] = {"tokens": TOKENS, "mask": MASK, "images": images(model), **given}

    @jax.jit
    def call(params: Params, tokens: Any, mask: Any, pixels: Any) -> dict[str, Any]:
        both = model.reads_both
        output = model.apply(
            params,
            (tokens, pixels) if both else pixels,
            mask=mask if both else None,
            capture=SITES[model.family.model_type],
        )
        return output.captured | ({} if output.hidden is None else {"hidden": output.hidden})

    found = call(params, read["tokens"], read["mask"], read["images"])
    return {name: np.asarray(value) for name, value in found.items()}


def difference(found: dict[str, np.ndarray], name: str) -> float:
    expected = recorded()[name]
    assert found.keys() == expected.keys()
    return max(
        float(np.abs(value.reshape(-1, value.shape[-1])[:, :8] - np.array(expected[site])).max())
        for site, value in found.items()
    )


@pytest.mark.parametrize("name", ["vit", "clip"])
def test_outputs_are_the_recorded_ones(name: str) -> None:
    model, params = tiny(name)
    assert difference(run(model, params), name) <= 1e-4
    # Control: images whose height and width are exchanged within their channels.
    turned = images(model)[..., ::-1]
    assert difference(run(model, params, images=np.ascontiguousarray(turned)), name) > 1e-2


@pytest.mark.thorough
@pytest.mark.parametrize("name", [name for name in VISION if name not in ("vit", "clip")])
def test_outputs_of_variants_are_the_recorded_ones(name: str) -> None:
    assert difference(run(*tiny(name)), name) <= 1e-4


@pytest.mark.oracle
@pytest.mark.parametrize("name", VISION)
def test_outputs_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    model, params = tiny(name)
    expected = outputs(write(tmp_path / "model", name), TOKENS, MASK, images(model))
    assert difference(expected, name) <= 1e-5
    for site, value in run(model, params).items():
        np.testing.assert_allclose(value, expected[site], rtol=0, atol=1e-4)
        assert (value.argmax(-1) == expected[site].argmax(-1)).all()


def wrong(model: Model) -> Iterator[tuple[str, Model]]:
    """A model with one thing forgotten or mistaken, where that leaves its parameters alone."""
    c = model.config

    def towers(change: Any) -> Any:
        changed = (
            {tower: change(getattr(c, tower)) for tower in ("text", "vision")} if model.reads_both else {}
        )
        return replace(c, **changed) if changed else change(c)

    def blocks(tower: Any, part: str, **changes: Any) -> Any:
        block = tower.blocks[0]
        inner = replace(getattr(block, part), **changes) if part else None
        new = replace(block, **{part: inner}) if part else replace(block, **changes)
        return replace(tower, blocks=(new,) * len(tower.blocks))

    yield "scale", replace(model, config=towers(lambda t: blocks(t, "attention", scale=0.5)))
    other = "relu"
    yield "activation", replace(model, config=towers(lambda t: blocks(t, "mlp", activation=other)))
    yield "placement", replace(model, config=towers(lambda t: blocks(t, "", placement="parallel")))
    if model.reads_both:  # that texts are read in order, `clip_text_model` tells: here one layer reads them
        yield "end", replace(model, config=replace(c, end=8 if c.end is None else None))


@pytest.mark.thorough
@pytest.mark.parametrize("name", VISION)
def test_a_thing_forgotten_or_mistaken_fails_the_comparison(name: str) -> None:
    model, params = tiny(name)
    for what, mistaken in wrong(model):
        assert difference(run(mistaken, params), name) > 1e-3, what


@pytest.mark.parametrize("name", VISION)
def test_the_table_is_one_to_one_and_is_what_the_module_makes(name: str) -> None:
    model = model_from_config(VISION[name])
    check_table(model.table())
    made = jax.eval_shape(lambda: model.init(0))
    shapes = {tuple(key.key for key in path): leaf.shape for path, leaf in jax.tree.leaves_with_path(made)}
    assert shapes == {leaf.path: leaf.shape for leaf in model.table()}
    assert all(len(leaf.axes) == len(leaf.shape) for leaf in model.table())
    assert {leaf.reads for leaf in model.table()} - {None} <= model.sites().keys()


@pytest.mark.parametrize("name", ["vit", "clip"])
def test_saving_a_loaded_model_gives_its_files_back(name: str, tmp_path: Path) -> None:
    write(tmp_path / "in", name)
    made = {n: a.astype(ml_dtypes.bfloat16) for n, a in weights(model_from_config(VISION[name])).items()}
    save_file(made, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    model, params = load_model(tmp_path / "in", mesh=make_mesh({"fsdp": 2, "tensor": 4}))
    out = save_model(model, params, tmp_path / "out")
    found = load_file(out / "model.safetensors")
    assert found.keys() == made.keys()
    assert all(found[n].shape == a.shape and found[n].tobytes() == a.tobytes() for n, a in made.items())
    assert json.loads((out / "config.json").read_text()) == {**VISION[name], "torch_dtype": "bfloat16"}


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["vit", "clip"])
def test_a_model_computes_the_same_on_a_mesh(name: str, tmp_path: Path) -> None:
    found = [
        run(*load_model(write(tmp_path, name), mesh=mesh))
        for mesh in (None, make_mesh({"fsdp": 2, "tensor": 2}))
    ]
    for site, value in found[0].items():
        np.testing.assert_allclose(found[1][site], value, rtol=0, atol=2e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["vit", "clip"])
def test_every_site_is_met_in_order_and_can_be_edited(name: str) -> None:
    model = model_from_config(VISION[name])
    params = jax.eval_shape(lambda: model.init(0))
    met: list[str] = []

    def meet(x: jax.Array, site: str) -> jax.Array:
        met.append(site)
        return x

    def call(params: Params) -> Any:
        pixels = jnp.asarray(images(model))
        read = (jnp.asarray(TOKENS[:2]), pixels) if model.reads_both else pixels
        return model.apply(params, read, capture="*", edit={"*": meet})

    output = jax.eval_shape(call, params)
    assert met == list(model.sites()) and output.captured.keys() == model.sites().keys()
    sizes = {"batch": 2, "length": 10, "query": 10, "key": 10}
    for site, shape in model.sites().items():
        expected = tuple(sizes[size] if isinstance(size, str) else size for size in shape)
        assert output.captured[site].shape == expected, site


@pytest.mark.thorough
def test_an_edit_of_a_patch_changes_what_follows_and_nothing_before() -> None:
    model, params = tiny("vit")
    pixels, at = jnp.asarray(images(model)), "blocks.1.attn.z"
    edit = {at: lambda z: z.at[:, 2].set(0)}
    plain, edited = (
        jax.jit(lambda p, given=given: model.apply(p, pixels, capture="*", edit=given).captured)(params)
        for given in ({}, edit)
    )
    np.testing.assert_array_equal(edited["blocks.0.resid_post"], plain["blocks.0.resid_post"])
    assert np.abs(edited["blocks.1.resid_post"][:, 2] - plain["blocks.1.resid_post"][:, 2]).max() > 1e-2
    np.testing.assert_array_equal(edited["blocks.1.attn.out"][:, 1], plain["blocks.1.attn.out"][:, 1])


@pytest.mark.thorough
def test_a_tower_is_run_alone() -> None:
    model, params = tiny("clip")
    texts = model.apply(params, (jnp.asarray(TOKENS), None), mask=jnp.asarray(MASK), capture="text.embedding")
    seen = model.apply(params, (None, jnp.asarray(images(model))), capture="vision.embedding")
    assert texts.logits is None and seen.logits is None
    expected = recorded()["clip"]
    np.testing.assert_allclose(texts.captured["text.embedding"][:, :8], expected["text.embedding"], atol=1e-4)
    np.testing.assert_allclose(
        seen.captured["vision.embedding"][:, :8], expected["vision.embedding"], atol=1e-4
    )


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["vit", "clip"])
def test_it_is_merged_from_its_files_and_in_memory_alike(name: str, tmp_path: Path) -> None:
    first, second = write(tmp_path / "first", name), write(tmp_path / "second", name)
    other = weights(model_from_config(VISION[name]), seed=1)
    save_file(other, second / "model.safetensors", metadata={"format": "pt"})
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(path), "parameters": {"weight": 0.5}} for path in (first, second)],
        "dtype": "float32",
    }
    merge(parse_recipe(json.dumps(recipe)), tmp_path / "merged")
    model, params = load_model(tmp_path / "merged")
    mean = jax.tree.map(lambda a, b: (a + b) / 2, load_model(first)[1], load_model(second)[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params, mean)
    assert difference(run(model, params), name) > 1e-2


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["vit", "clip"])
def test_low_rank_factors_stand_for_changes_of_its_blocks(name: str) -> None:
    model, params = tiny(name)
    factors = find_factors(model, LoraSettings(rank=2, alpha=2.0))
    blocks = sum(leaf.path[-3:] == ("attn", "q", "kernel") for leaf in model.table())
    assert len(factors.modules) == 6 * blocks
    drawn = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.1), init_factors(factors, 0))
    changed = with_factors(factors, params, drawn)
    for leaf in model.table():
        moved = np.abs(np.asarray(get_leaf(changed, leaf)) - np.asarray(get_leaf(params, leaf))).max()
        assert (moved > 1e-3) == (leaf.reads is not None and "projection" not in leaf.name), leaf.name


def test_what_a_model_of_images_cannot_read_is_refused(tmp_path: Path) -> None:
    model = model_from_config(VISION["vit"])
    both = model_from_config(VISION["clip"])
    pixels = jnp.zeros((1, 3, 8, 12))
    for read, message in (
        (jnp.zeros((1, 5), jnp.int32), r"int32 of shape \[1, 5\].*\[batch, 3, 8, 12\]"),
        (jnp.zeros((1, 3, 12, 8)), r"\[1, 3, 12, 8\]"),
    ):
        with pytest.raises(TokenError, match=message):
            model.apply({}, read)
    for read, message in ((np.zeros((1, 3, 8, 12), np.uint8), "uint8"), ([1], "a list")):
        with pytest.raises(TokenError, match=message):
            check_images(read, (3, 8, 12), "vit")
    with pytest.raises(MergelabError, match="no padding"):
        model.apply({}, pixels, mask=jnp.ones((1, 13), bool))
    with pytest.raises(MergelabError, match="no cache"):
        model.new_cache(1, 4)
    for read in (pixels, (None, None)):
        with pytest.raises(TokenError, match="a pair"):
            both.apply({}, read)
    with pytest.raises(MergelabError, match="reads images"):
        stream_model(open_checkpoint(write(tmp_path, "vit")))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("vit", {"image_size": "large"}, "image_size = 'large'"),
        ("vit", {"patch_size": [4, 4, 4]}, "patch_size"),
        ("vit", {"patch_size": 13}, "patches of"),
        ("vit", {"pooler_act": "relu"}, "pooler_act = 'relu'"),
        ("vit", {"hidden_act": "mish"}, "hidden_act = 'mish'"),
        ("clip", {"text_config": [1]}, "text_config"),
        ("clip", {"vision_config": {"hidden_size": 0}}, "vision_config has hidden_size = 0"),
        ("clip_vision_model", {"num_hidden_layers": -1}, "num_hidden_layers"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused_by_name(
    name: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        model_from_config(VISION[name] | changes)
