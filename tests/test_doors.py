"""The front door and the faces: ten tasks of a first day with `import mergelab as ml`; where names are."""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import types
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tokenizers
from click.testing import CliRunner

import mergelab as ml
from mergelab.names_elsewhere import NAMES, ForeignName, advice

WORDS = ["<unk>", "<end>", *(f"w{i}" for i in range(2, 48))]
SITE = "blocks.1.resid_post"
TEXT = " ".join(np.random.default_rng(0).choice(WORDS[2:], 400))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer of words, as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("doors") / "model"
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = ml.Tokenizer(backend, {"eos_token": "<end>"}, (1,), {}, Path("nowhere"))
    model = ml.model_from_config(
        {
            "model_type": "llama",
            "vocab_size": len(WORDS),
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
        }
    )
    return ml.save_model(model, model.init(0), folder, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[ml.Model, Any, ml.Tokenizer]:
    return *ml.load_model(folder), ml.load_tokenizer(folder)


@pytest.fixture(scope="module")
def activations(loaded: tuple[ml.Model, Any, ml.Tokenizer]) -> np.ndarray:
    """`[tokens, width]` of the text at a site."""
    model, params, tokenizer = loaded
    prompts = np.reshape(tokenizer.encode(TEXT), (20, 20))
    return ml.capture(model, params, prompts, [SITE])[SITE].reshape(-1, 16)


@pytest.fixture(scope="module")
def sae(activations: np.ndarray) -> ml.SAE:
    options: dict[str, Any] = {"n_latents": 32, "k": 4, "steps": 150, "batch_size": 128, "seed": 1}
    return ml.train_sae(activations, metadata={"site": SITE}, **options)


def shifted(params: Any, seed: int) -> Any:
    """The parameters, moved a little."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moved = [x + 0.02 * jax.random.normal(key, x.shape, x.dtype) for x, key in zip(leaves, keys, strict=True)]
    return tree.unflatten(moved)


# The ten tasks.


def test_two_models_are_merged_by_slerp_and_the_merge_is_evaluated(
    loaded: tuple[ml.Model, Any, ml.Tokenizer], tmp_path: Path
) -> None:
    model, params, tokenizer = loaded
    other = shifted(params, 1)
    merged = ml.operators.slerp(t=0.5)([other], base=params)
    apart = [
        jnp.abs(merged["embed"]["embedding"] - tree["embed"]["embedding"]).max() for tree in (params, other)
    ]
    assert min(apart) > 1e-3
    saved = ml.save_model(model, merged, tmp_path / "merged", tokenizer=tokenizer)
    (tmp_path / "held-out.txt").write_text(TEXT)
    evaluate = ml.merging.soups.TextLoss(tmp_path / "held-out.txt")
    bits = evaluate(saved)["bits_per_byte"]
    assert 0 < bits < 10
    assert (
        evaluate(ml.save_model(model, other, tmp_path / "other", tokenizer=tokenizer))["bits_per_byte"]
        != bits
    )


@pytest.mark.slow
def test_the_density_of_ties_is_swept_in_one_program(loaded: tuple[ml.Model, Any, ml.Tokenizer]) -> None:
    model, params, tokenizer = loaded
    tuned, tokens = [shifted(params, 1), shifted(params, 2)], jnp.asarray([tokenizer.encode("w3 w4 w5")])

    def logits(density: jax.Array) -> Any:
        merged = ml.operators.ties(weight=[1.0, 0.5], density=density)(tuned, base=params)
        return model.apply(merged, tokens).logits

    swept = jax.jit(jax.vmap(logits))(jnp.asarray([0.2, 0.5, 1.0]))
    assert swept.shape == (3, 1, 3, len(WORDS))
    np.testing.assert_allclose(swept[1], logits(jnp.asarray(0.5)), atol=1e-4)
    assert jnp.abs(swept[0] - swept[1]).max() > 1e-3


def test_a_site_is_captured_for_a_text(loaded: tuple[ml.Model, Any, ml.Tokenizer]) -> None:
    model, params, tokenizer = loaded
    found = ml.capture(model, params, tokenizer.encode("w3 w4 w5"), [SITE, "blocks.*.mlp.out"])
    assert sorted(found) == ["blocks.0.mlp.out", "blocks.1.mlp.out", SITE]
    tokens = jnp.asarray([[3, 4, 5]])
    expected = model.apply(params, tokens, capture=[SITE]).captured[SITE]
    assert found[SITE].shape == (1, 3, 16)
    np.testing.assert_allclose(found[SITE], expected, atol=1e-5)
    assert np.abs(found[SITE] - model.apply(params, tokens + 1, capture=[SITE]).captured[SITE]).max() > 1e-2


def test_an_sae_trained_on_an_array_reconstructs_it(sae: ml.SAE, activations: np.ndarray) -> None:
    scores = ml.evaluate_sae(sae, activations).values()
    elsewhere = ml.evaluate_sae(sae, activations[:, ::-1]).values()
    assert scores["reconstruction.nmse"] < 0.35 < elsewhere["reconstruction.nmse"]
    assert scores["reconstruction.l0"] <= 4
    assert (sae.n_latents, sae.d_in, sae.config.k, sae.config.reads) == (32, 16, 4, (SITE,))


@pytest.mark.parametrize("dtype", [np.float64, jnp.bfloat16], ids=["float64", "bfloat16"])
def test_an_array_may_have_any_float_dtype(activations: np.ndarray, dtype: Any) -> None:
    sae = ml.train_sae(np.asarray(activations, dtype), n_latents=32, k=4, steps=1, batch_size=128)
    assert sae.W_enc.dtype == jnp.float32 and jnp.isfinite(sae.W_enc).all()


def test_an_array_gives_the_sae_that_its_file_gives(activations: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", activations)
    config: dict[str, Any] = {
        "sae": {"n_latents": 32, "k": 4},
        "data": {"kind": "files", "path": str(tmp_path / "rows.npy")},
        "train": {"batch_size": 128, "tokens": 1280},
    }
    stored = ml.train_sae(config, tmp_path / "run")
    in_memory = ml.train_sae(activations, tmp_path / "memory", n_latents=32, k=4, batch_size=128, tokens=1280)
    for name, array in stored.as_numpy().items():
        np.testing.assert_array_equal(array, in_memory.as_numpy()[name])
    other = ml.train_sae(config, seed=1)
    assert np.abs(np.asarray(other.W_enc) - np.asarray(stored.W_enc)).max() > 1e-3
    for folder in ("run", "memory"):
        np.testing.assert_array_equal(ml.load_sae(tmp_path / folder / "final").W_dec, stored.W_dec)


def test_an_sae_of_another_library_is_scored_on_a_text(
    sae: ml.SAE, loaded: tuple[ml.Model, Any, ml.Tokenizer], folder: Path, tmp_path: Path
) -> None:
    ml.save_sae(sae, tmp_path / "saelens", format="saelens")
    (tmp_path / "text.txt").write_text(TEXT)
    found = ml.load_sae(tmp_path / "saelens")
    options: dict[str, Any] = {"site": SITE, "length": 16, "metrics": ["reconstruction", "downstream"]}
    card = ml.evaluate_sae(found, *loaded, TEXT, **options)
    assert 0 < card.values()["reconstruction.nmse"] < 1 and card.values()["downstream.kl"] > 0
    again = ml.evaluate_sae(tmp_path / "saelens", folder, text=tmp_path / "text.txt", **options)
    assert again.values() == pytest.approx(card.values())
    with pytest.raises(ml.errors.SAEError, match="give text="):
        ml.evaluate_sae(found, *loaded, site=SITE)


def test_a_text_is_steered_by_a_feature(sae: ml.SAE, loaded: tuple[ml.Model, Any, ml.Tokenizer]) -> None:
    plain = ml.generate(*loaded, "w3 w4", max_new_tokens=8)
    steered = ml.generate(*loaded, "w3 w4", max_new_tokens=8, edit={SITE: ml.steer(sae.W_dec[3], 50.0)})
    unmoved = ml.generate(*loaded, "w3 w4", max_new_tokens=8, edit={SITE: ml.steer(sae.W_dec[3], 0.0)})
    assert isinstance(plain, str) and plain == unmoved != steered
    # One prompt is one prompt, as text or ids; several give as many.
    assert ml.generate(*loaded, [3, 4], max_new_tokens=8) == plain
    assert ml.generate(*loaded, ["w3 w4", [3, 4]], max_new_tokens=8) == [plain, plain]
    with pytest.raises(ml.errors.DecodingError, match="expected the tokenizer there"):
        ml.generate(*loaded[:2], "w3 w4", loaded[2])  # type: ignore[call-overload]


def test_the_strongest_examples_of_one_feature_are_found(
    sae: ml.SAE, loaded: tuple[ml.Model, Any, ml.Tokenizer]
) -> None:
    model, params, tokenizer = loaded
    tokens = np.asarray(tokenizer.encode(TEXT), np.int32).reshape(20, 20)
    source = ml.activations.ModelActivations(model, params, tokens, (SITE,))
    codes = np.asarray(sae.encode(jnp.asarray(source.read_sites(0, 400)[0]))).reshape(20, 20, 32)
    latent = int(codes.max(axis=(0, 1)).argmax())
    found = ml.sae.features.survey(sae, source, latents=[latent], count=3)
    examples = next(iter(found.examples.values()))
    assert examples[0].context == codes[:, :, latent].max(axis=1).argmax()
    assert examples[0].peak == pytest.approx(codes[:, :, latent].max(), rel=1e-4)


def test_a_model_is_trained_with_optax_and_saved_with_its_tokenizer(
    loaded: tuple[ml.Model, Any, ml.Tokenizer], tmp_path: Path
) -> None:
    model, params, tokenizer = loaded
    tokens = jnp.asarray(np.reshape(tokenizer.encode(TEXT), (20, 20)))
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params: Any, state: Any) -> tuple[Any, Any, jax.Array]:
        def loss(params: Any) -> jax.Array:
            logits = model.apply(params, tokens[:, :-1]).logits
            assert logits is not None
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        value, gradients = jax.value_and_grad(loss)(params)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, value

    trained, state, losses = params, optimizer.init(params), []
    for _ in range(20):
        trained, state, value = step(trained, state)
        losses.append(float(value))
    assert losses[-1] < losses[0] - 0.3
    ml.save_model(model, trained, tmp_path / "trained", tokenizer=tokenizer)
    ml.save_model(model, trained, tmp_path / "bare")
    text = ml.generate(model, trained, tokenizer, "w3 w4", max_new_tokens=6)
    arguments = ["--prompt", "w3 w4", "--max-new-tokens", "6", "--greedy", "--json"]
    from mergelab.cli.main import cli

    done = CliRunner().invoke(cli, ["generate", str(tmp_path / "trained"), *arguments])
    assert done.exit_code == 0 and json.loads(done.stdout)["text"] == text
    bare = CliRunner().invoke(cli, ["generate", str(tmp_path / "bare"), *arguments])
    assert bare.exit_code == 2 and "tokenizer.json" in bare.stderr


def test_a_direction_is_removed_from_a_model_that_refuses(folder: Path, tmp_path: Path) -> None:
    harmful, harmless = (
        [f"w{i} w{i + j}" for i in range(start, start + 12)] for j, start in ((3, 4), (5, 20))
    )
    room = ml.abliteration
    settings = room.AbliterationSettings(
        phrases=["w9"], filters=room.Filters(max_kl=99, min_induced=-99, max_depth=1), max_new_tokens=2
    )
    report = ml.abliterate(folder, tmp_path / "out", harmful, harmless, settings=settings)
    direction = report.selection.direction
    before, after = (
        ml.load_model(at)[1]["embed"]["embedding"] @ direction for at in (folder, tmp_path / "out")
    )
    assert np.abs(after).max() < 1e-3 < np.abs(before).max()
    with pytest.raises(ml.errors.MergelabError, match="give at least 5"):
        ml.abliterate(folder, tmp_path / "none", harmful[:2], harmless)


def test_a_merge_on_eight_devices_is_saved(folder: Path, tmp_path: Path) -> None:
    assert len(jax.devices()) == 8, "XLA_FLAGS=--xla_force_host_platform_device_count=8, see docs/loading.md"
    mesh = ml.make_mesh({"fsdp": 2, "tensor": 4})
    model, params = ml.load_model(folder, mesh=mesh)
    merge = ml.operators.task_arithmetic(weight=[0.5])
    merged = jax.jit(lambda tuned, base: merge([tuned], base=base))(shifted(params, 1), params)
    kernel = merged["embed"]["embedding"]
    assert len(kernel.sharding.device_set) == 8 and kernel.addressable_shards[0].data.shape != kernel.shape
    ml.save_model(model, merged, tmp_path / "merged", tokenizer=folder)
    alone = ml.load_model(folder)[1]
    expected = merge([shifted(alone, 1)], base=alone)
    again = ml.load_model(tmp_path / "merged")[1]
    chex.assert_trees_all_close(again, expected, rtol=1e-7, atol=1e-6)
    assert ml.load_tokenizer(tmp_path / "merged").encode("w3") == [3]


# Edits, soups, and what the calls refuse.


def test_ablation_removes_and_patching_replaces(
    sae: ml.SAE, loaded: tuple[ml.Model, Any, ml.Tokenizer]
) -> None:
    model, params, _ = loaded
    tokens, other = jnp.asarray([[3, 4, 5]]), jnp.asarray([[9, 8, 7]])
    last = {"capture": [SITE], "logits": False}
    direction = np.arange(1.0, 17.0)
    removed = model.apply(params, tokens, edit={SITE: ml.ablate(direction)}, **last).captured[SITE]
    assert np.abs(removed @ (direction / np.linalg.norm(direction))).max() < 1e-5
    first = jnp.asarray([[True, False, False]])
    half = model.apply(params, tokens, edit={SITE: ml.ablate(direction, where=first)}, **last).captured[SITE]
    plain = model.apply(params, tokens, **last).captured[SITE]
    np.testing.assert_array_equal(half[:, 1:], plain[:, 1:])
    assert jnp.abs(half[:, 0] - plain[:, 0]).max() > 1e-3
    taken = ml.capture(model, params, other, [SITE])[SITE]
    patched = model.apply(params, tokens, edit={SITE: ml.patch(taken)}).logits
    np.testing.assert_allclose(patched, model.apply(params, other).logits, atol=1e-5)
    both = model.apply(params, tokens, edit={SITE: ml.patch(taken, where=first)}).logits
    np.testing.assert_allclose(both[:, 1:], model.apply(params, tokens).logits[:, 1:], atol=1e-5)
    lensed = ml.logit_lens(model, params, tokens)[SITE]
    np.testing.assert_allclose(lensed, model.apply(params, tokens).logits, atol=1e-4)
    latents = model.apply(params, tokens, edit={SITE: ml.ablate(sae, [0, 1, 2])}, **last).captured[SITE]
    assert latents.shape == plain.shape
    with pytest.raises(ml.errors.SAEError, match=r"name them: ablate\(sae"):
        ml.ablate(sae)  # type: ignore[call-overload]
    with pytest.raises(ml.errors.SiteError, match="cannot take the place"):
        model.apply(params, tokens, edit={SITE: ml.patch(jnp.zeros((1, 2, 16)))})


def test_a_soup_is_the_mean_of_trees_or_of_folders(
    folder: Path, loaded: tuple[ml.Model, Any, ml.Tokenizer], tmp_path: Path
) -> None:
    model, params, _ = loaded
    other = shifted(params, 4)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, params, other)
    soup = ml.soup([params, other])
    chex.assert_trees_all_close(soup, mean, rtol=1e-7, atol=1e-6)
    ml.save_model(model, other, tmp_path / "other", tokenizer=folder)
    written = ml.soup([folder, tmp_path / "other"], tmp_path / "soup")
    chex.assert_trees_all_close(ml.load_model(written)[1], mean, rtol=1e-7, atol=1e-6)
    last = ml.soup([folder, tmp_path / "other"], last=1)
    np.testing.assert_allclose(last["model.embed_tokens.weight"], other["embed"]["embedding"], atol=1e-7)
    with pytest.raises(ml.errors.RecipeError, match="give folders"):
        ml.soup([params, other], tmp_path / "none")


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (np.zeros((4, 4, 4)), {}, r"shape \[4, 4, 4\]; expected floats of shape \[rows, width\]"),
        (np.zeros((64, 4), int), {}, "int64"),
        (np.full((64, 4), np.nan), {}, "row 0 is NaN or infinite"),
        (np.full((64, 4), 1e300), {}, "row 0 is NaN or infinite in float32"),
        (np.ones((64, 4)), {"n_latent": 8}, "did you mean 'n_latents'"),
        (np.ones((64, 4)), {"batch_size": 65}, "batch_size is 65"),
    ],
)
def test_an_array_that_cannot_be_trained_on_is_refused(
    rows: np.ndarray, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ml.errors.MergelabError, match=message):
        ml.train_sae(rows, **{"n_latents": 8, "k": 2, "steps": 2, **options})


# Where names are.


def faces() -> list[str]:
    found = pkgutil.walk_packages(ml.__path__, "mergelab.")
    return ["mergelab", *(m.name for m in found if m.ispkg and not m.name.startswith("mergelab.cli"))]


PRIVATE = {
    *(
        "mergelab.merging.engine",
        "mergelab.merging.plan",
        "mergelab.merging.recipe",
        "mergelab.merging.structure",
    ),
    *(
        "mergelab.operators.named",
        "mergelab.models.families",
        "mergelab.models.layers",
        "mergelab.sae.kernels",
    ),
}
"""Folders inside a room whose names the room offers itself."""


@pytest.mark.parametrize("name", sorted({*faces()} - PRIVATE))
def test_a_face_gives_every_name_it_lists(name: str) -> None:
    face = importlib.import_module(name)
    for module in pkgutil.walk_packages(face.__path__, f"{name}."):
        if name != "mergelab":
            importlib.import_module(module.name)  # files that take a name's place would do it now
    assert face.__all__ and len(set(face.__all__)) == len(face.__all__)
    assert sorted(face.__all__) == dir(face) or name in {"mergelab.operators", "mergelab.sae.variants"}
    for public in face.__all__:
        value = getattr(face, public)
        room = isinstance(value, types.ModuleType) and public in {"errors", "sharding", "trees"}
        assert not isinstance(value, types.ModuleType) or hasattr(value, "__path__") or room, (
            f"{public} is a file"
        )


def test_a_file_in_place_of_a_name_would_be_seen() -> None:
    """Files are modules without a `__path__`, which is how the test above tells them."""
    file = importlib.import_module("mergelab.interp.path_patching")
    assert isinstance(file, types.ModuleType) and not hasattr(file, "__path__")
    assert ml.interp.path_patching is not file


def test_the_front_door_is_flat_and_its_help_is_a_table_of_contents() -> None:
    expected = {
        *("load_model", "save_model", "Model", "load_tokenizer", "generate", "make_mesh", "errors"),
        *("capture", "steer", "ablate", "patch", "logit_lens", "abliterate"),
        *("merge", "plan_merge", "Recipe", "load_recipe", "operators", "soup", "extract_lora"),
        *("SAE", "load_sae", "save_sae", "train_sae", "evaluate_sae"),
        *("interp", "aot", "activations", "text", "abliteration"),
    }
    assert expected <= set(ml.__all__) == set(dir(ml))
    assert ml.__doc__ is not None
    assert [name for name in ml.__all__ if name not in ml.__doc__ and not name.startswith("_")] == []
    assert ml.capture is ml.activations.capture and ml.merge is ml.merging.merge


# What other libraries call things.


@pytest.mark.parametrize(
    "foreign", [name for name in NAMES if "." not in name.theirs], ids=lambda n: n.theirs
)
def test_a_name_of_another_library_leads_to_the_right_one(foreign: ForeignName) -> None:
    for place in (ml, ml.sae, ml.interp):
        if foreign.theirs not in place.__all__:
            with pytest.raises(AttributeError) as error:
                getattr(place, foreign.theirs)
            assert f"; write {advice(foreign.theirs)[8:]}" in str(error.value)
            assert "ml" in str(error.value) or "model" in str(error.value)


@pytest.mark.parametrize("foreign", NAMES, ids=lambda n: n.theirs)
def test_what_stands_beside_a_foreign_name_exists(foreign: ForeignName) -> None:
    for dotted in re.findall(r"\bml\.([\w.]+\w)", foreign.ours):
        value: Any = ml
        for part in dotted.split("."):
            value = getattr(value, part)
    first = re.match(r"model\.(\w+)", foreign.ours)
    assert first is None or first[1] in {"apply", "init", "sites", "config"}


def test_recipes_answer_for_what_they_do_not_have() -> None:
    with pytest.raises(AttributeError, match=r"write ml.load_recipe\('recipe.yaml'\)"):
        ml.Recipe.load("recipe.yaml")  # type: ignore[attr-defined]
    recipe = ml.merging.parse_recipe(
        "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}"
    )
    with pytest.raises(AttributeError, match=r"write ml.merging.recipe_yaml\(recipe\)"):
        recipe.to_yaml()  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match=r"'Recipe' object has no attribute 'nonsense'$"):
        recipe.nonsense  # type: ignore[attr-defined] # noqa: B018
    assert recipe.origin is not None


def test_a_room_is_named_for_what_the_front_door_lacks() -> None:
    with pytest.raises(AttributeError, match=r"'clamp'; write mergelab.interp.clamp$"):
        _ = ml.clamp  # type: ignore[attr-defined]


def table_rows(page: str) -> list[tuple[str, str, str]]:
    """`(heading, left, right)` of the rows of a page's two-column tables of code."""
    rows, heading = [], ""
    for line in page.splitlines():
        heading = line.removeprefix("## ") if line.startswith("## ") else heading
        if row := re.fullmatch(r"\| `(.+)` \| `(.+)` \|", line):
            rows.append((heading, row[1], row[2]))
    return rows


def test_the_page_for_those_who_come_from_elsewhere_has_every_name(repository: Path) -> None:
    page = (repository / "docs" / "coming_from.md").read_text("utf-8")
    table = [(name.library, name.theirs, name.ours) for name in NAMES]
    assert table_rows(page) == table
    assert table_rows(page.replace("| `HookPoint` |", "| `Hook` |")) != table


# Pages and examples go through the faces.


def private_paths(text: str) -> list[str]:
    """Dotted names of mergelab in a page or an example that reach into a room, past its face."""
    found = []
    for path in re.findall(r"\bmergelab(?:\.\w+)+", text.replace("mergelab.json", "")):  # a file
        parts = path.split(".")
        place: Any = ml
        for n, part in enumerate(parts[1:], 1):
            offered = part in getattr(place, "__all__", ())
            own = isinstance(place, types.ModuleType) and not hasattr(place, "__path__")
            if not offered and not own and isinstance(place, types.ModuleType):
                found.append(path)
                break
            place = getattr(place, part, None)
            if place is None or not isinstance(place, types.ModuleType):
                break
            assert n <= 2, f"{path} has more than two dots"
    for module, names in re.findall(r"from (mergelab[\w.]*) import (\([^)]*\)|[\w, ]+)", text):
        if module not in found:
            face = importlib.import_module(module)
            wanted = [item.split(" as ")[0].strip() for item in names.strip("()").split(",")]
            found += [f"{module}.{name}" for name in wanted if name and name not in face.__all__]
    return found


def public_texts(repository: Path) -> dict[str, str]:
    """Pages, the code of notebooks, and the examples of docstrings, by place."""
    pages = [*repository.glob("*.md"), *repository.glob("docs/*.md")]
    texts = {page.name: page.read_text("utf-8") for page in pages if page.name != "CHANGELOG.md"}
    for notebook in repository.glob("colab/*.ipynb"):
        cells = json.loads(notebook.read_text("utf-8"))["cells"]
        texts[notebook.name] = "\n".join("".join(cell["source"]) for cell in cells)
    for file in (repository / "mergelab").rglob("*.py"):
        examples = re.findall(r"^\s*(?:>>>|\.\.\.) (.*)$", file.read_text("utf-8"), flags=re.MULTILINE)
        texts[str(file)] = "\n".join(examples)
    return texts


def test_pages_notebooks_and_examples_import_through_faces(repository: Path) -> None:
    texts = public_texts(repository)
    assert {"README.md", "interp.md", "sae.ipynb", "CONTRIBUTING.md"} <= texts.keys()
    assert {place: found for place, text in texts.items() if (found := private_paths(text))} == {}


def test_a_path_past_a_face_would_be_seen() -> None:
    assert private_paths("from mergelab.models.load import load_model") == ["mergelab.models.load"]
    assert private_paths("`mergelab.models.load.load_model` reads") == ["mergelab.models.load.load_model"]
    assert private_paths("from mergelab.sae import load_dictionary_x") == ["mergelab.sae.load_dictionary_x"]
    assert private_paths("from mergelab.sae import load_sae\n`mergelab.sae.evaluation.scorecard`") == []
    assert private_paths("from mergelab.errors import SAEError; mergelab.sharding.DEFAULT_RULES") == []
