"""Sites: every activation can be read and edited by name, and reading little computes little."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

from mergelab.errors import MergelabError, SiteError
from mergelab.models.families import model_from_config
from mergelab.models.model import Model, Output, Params
from tests.models.tiny_models import CONFIGS, MASK, TOKENS, tiny, write
from tests.models.transformers_outputs import RECORDED_SITES, hidden_and_patterns
from tests.slow import slow_except

SHOWN = ("llama", "gpt2", "gpt_neox", "gemma2", "mixtral", "bert")


@pytest.fixture(scope="module")
def llama() -> tuple[Model, Params]:
    return tiny("llama")


def forward(model: Model, params: Params, **options: Any) -> Output:
    return model.apply(params, jnp.asarray(TOKENS), mask=jnp.asarray(MASK), **options)


def run(model: Model, params: Params, **options: Any) -> Output:
    return jax.jit(partial(forward, model, **options))(params)


def concrete(shape: tuple[str | int, ...]) -> tuple[int, ...]:
    batch, length = TOKENS.shape
    sizes = {"batch": batch, "length": length, "query": length, "key": length}
    return tuple(sizes[size] if isinstance(size, str) else size for size in shape)


@pytest.mark.parametrize("name", slow_except(["llama", "gpt2", "bert", "gemma3", "mixtral"], CONFIGS))
def test_the_listing_names_every_site_in_order_with_its_shape(name: str) -> None:
    model = model_from_config(CONFIGS[name])
    params = jax.eval_shape(lambda: model.init(0))
    met: list[str] = []

    def meet(x: jax.Array, site: str) -> jax.Array:
        met.append(site)
        return x

    output = jax.eval_shape(partial(forward, model, capture=("*",), edit={"*": meet}), params)
    assert met == list(model.sites())
    found = {site: array.shape for site, array in output.captured.items()}
    assert found == {site: concrete(shape) for site, shape in model.sites().items()}


def sites_of(model: Model, params: Params) -> Mapping[str, Any]:
    """The states between blocks, the patterns, and the last hidden state, as transformers orders them."""
    captured = ("embed", "blocks.*.resid_pre", "blocks.*.attn.pattern")
    output = jax.jit(partial(model.apply, capture=captured))(params, TOKENS, mask=MASK)
    layers = range(model.config.n_layers)
    states = [output.captured[f"blocks.{i}.resid_pre"] for i in layers] + [output.hidden]
    return {
        "states": np.asarray(jnp.stack(states)),
        "patterns": np.stack([np.asarray(output.captured[f"blocks.{i}.attn.pattern"]) for i in layers]),
    }


def compare(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Real tokens of the second row, which is padded on the left."""
    real = np.flatnonzero(MASK[1])
    for key, at in (("states", np.s_[:, 1, real]), ("patterns", np.s_[:, 1, :, real])):
        np.testing.assert_allclose(found[key][at], expected[key][at], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", SHOWN)
def test_states_and_patterns_are_the_recorded_ones(name: str) -> None:
    found = sites_of(*tiny(name))
    recorded = json.loads(RECORDED_SITES.read_text())[name]
    np.testing.assert_allclose(found["states"][:, 1, 9, :6], recorded["states"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(found["patterns"][:, 1, :2, 9], recorded["patterns"], rtol=0, atol=1e-4)
    assert np.abs(found["patterns"][:, 1, 2:, 9] - recorded["patterns"]).max() > 1e-2


@pytest.mark.oracle
@pytest.mark.parametrize("name", SHOWN)
def test_states_and_patterns_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    expected = hidden_and_patterns(write(tmp_path / "model", name), TOKENS, MASK)
    found = sites_of(*tiny(name))
    compare(found, expected)
    with pytest.raises(AssertionError):
        compare({key: value[:, [0, 2, 1]] for key, value in found.items()}, expected)


def test_sites_add_up_to_the_stream(llama: tuple[Model, Params]) -> None:
    c = run(*llama, capture=("blocks.*",)).captured
    for i in range(2):
        added = c[f"blocks.{i}.resid_pre"] + c[f"blocks.{i}.attn.out"]
        np.testing.assert_allclose(added, c[f"blocks.{i}.resid_mid"], atol=1e-5)
        added = c[f"blocks.{i}.resid_mid"] + c[f"blocks.{i}.mlp.out"]
        np.testing.assert_allclose(added, c[f"blocks.{i}.resid_post"], atol=1e-5)
    kernel = llama[1]["blocks_0"]["attn"]["o"]["kernel"]
    through = jnp.einsum("blhd,hdw->blw", c["blocks.0.attn.z"], kernel.reshape(4, 6, 24))
    np.testing.assert_allclose(through, c["blocks.0.attn.out"], atol=1e-5)
    values = jnp.repeat(c["blocks.0.attn.v"], 2, axis=2)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", c["blocks.0.attn.pattern"], values)
    np.testing.assert_allclose(mixed, c["blocks.0.attn.z"], atol=1e-5)


def test_editing_by_the_identity_or_capturing_changes_nothing(llama: tuple[Model, Params]) -> None:
    plain = run(*llama).logits
    assert (run(*llama, edit={"*": lambda x: x}).logits == plain).all()
    np.testing.assert_allclose(run(*llama, capture="*").logits, plain, atol=1e-5)
    assert not (run(*llama, edit={"blocks.0.attn.z": lambda x: 0.9 * x}).logits == plain).all()


def test_edits_ablate_what_they_name_and_reach_what_follows(llama: tuple[Model, Params]) -> None:
    kept = ("blocks.*.resid_*",)
    edit = {"blocks.0.*.out": jnp.zeros_like}
    plain, ablated = run(*llama, capture=kept).captured, run(*llama, capture=kept, edit=edit).captured
    np.testing.assert_array_equal(ablated["blocks.0.resid_post"], plain["blocks.0.resid_pre"])
    assert np.abs(ablated["blocks.1.resid_post"] - plain["blocks.1.resid_post"]).max() > 0.1


def test_edits_of_one_site_apply_in_order_and_capture_sees_the_result(llama: tuple[Model, Params]) -> None:
    site = "blocks.1.mlp.post"
    before = run(*llama, capture=site).captured[site]
    edit = {"blocks.1.mlp.*": lambda x, name: x + 1 if name == site else x, site: lambda x: 2 * x}
    found = run(*llama, capture=site, edit=edit).captured[site]
    np.testing.assert_allclose(found, 2 * (before + 1), atol=1e-5)
    # Replacing a site by a value is patching: the rest of the pass follows it.
    patched = run(*llama, edit={"blocks.*.resid_post": lambda x, name: x if "0" in name else 0 * x}).logits
    assert np.ptp(np.asarray(patched), axis=-1).max() == 0


def test_gradients_flow_through_edits(llama: tuple[Model, Params]) -> None:
    model, params = llama
    direction = jnp.asarray(np.random.default_rng(1).normal(size=24), jnp.float32)

    @jax.jit
    def loss(strength: jax.Array) -> jax.Array:
        edit = {"blocks.0.resid_post": lambda x: x + strength * direction[None, None]}
        logits = forward(model, params, edit=edit).logits
        assert logits is not None
        return jax.nn.log_softmax(logits)[0, -1, 5]

    slope = jax.grad(loss)(jnp.float32(0.3))
    finite = (loss(jnp.float32(0.31)) - loss(jnp.float32(0.29))) / 0.02
    np.testing.assert_allclose(slope, finite, rtol=2e-2)
    assert abs(float(slope)) > 1e-3
    swept = jax.vmap(loss)(jnp.linspace(0.0, 1.0, 3))
    np.testing.assert_allclose(swept[0], loss(jnp.float32(0.0)), rtol=1e-5)


def operations(jaxpr: Any) -> int:
    """Equations of a program, those inside its calls too."""
    values = [value for eqn in jaxpr.eqns for value in jax.tree.leaves([*eqn.params.values()])]
    inner = [value.jaxpr if isinstance(value, ClosedJaxpr) else value for value in values]
    return len(jaxpr.eqns) + sum(operations(sub) for sub in inner if isinstance(sub, Jaxpr))


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_capturing_an_early_site_stops_there(name: str) -> None:
    model, params = tiny(name)

    def count(**options: Any) -> int:
        return operations(jax.make_jaxpr(partial(forward, model, **options))(params).jaxpr)

    everything = count()
    whole_block = count(capture=("blocks.0.resid_post",), logits=False)
    attention = count(capture=("blocks.0.attn.out",), logits=False)
    assert attention < whole_block < 0.65 * everything
    assert count(capture=("blocks.0.resid_post",)) == everything
    output = run(model, params, capture=("blocks.0.resid_post",), logits=False)
    assert output.logits is None and output.hidden is None
    kept = run(model, params, capture=("blocks.0.resid_post",)).captured
    np.testing.assert_allclose(output.captured["blocks.0.resid_post"], kept["blocks.0.resid_post"], atol=1e-6)


def test_wrong_sites_and_edits_are_named(llama: tuple[Model, Params]) -> None:
    with pytest.raises(SiteError, match=r"'blocks.0.resid_mids' \(did you mean 'blocks.0.resid_mid'\?\)"):
        run(*llama, capture=("blocks.0.resid_mids",))
    with pytest.raises(SiteError, match=r"matches 'blocks.7.\*'"):
        run(*llama, edit={"blocks.7.*": lambda x: x})
    with pytest.raises(SiteError, match=r"'embed' returned float32 \(24,\) for float32 \(3, 10, 24\)"):
        run(*llama, edit={"embed": lambda x: x[0, 0]})
    with pytest.raises(SiteError, match="'embed' returned bfloat16"):
        run(*llama, edit={"embed": lambda x: x.astype(jnp.bfloat16)})
    model, params = tiny("bert")
    with pytest.raises(MergelabError, match="no cache"):
        model.new_cache(1, 4)
    with pytest.raises(MergelabError, match="no token types"):
        run(*llama, token_types=jnp.asarray(TOKENS))
    types = jnp.asarray((TOKENS > 30).astype(np.int32))
    zero, mixed = run(model, params).hidden, run(model, params, token_types=types).hidden
    assert zero is not None and mixed is not None and float(jnp.abs(zero - mixed).max()) > 1e-2
