"""Published SAEs by their names, from the hub to what their libraries make of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

import mergelab as ml
from mergelab.cli.main import cli
from mergelab.errors import CheckpointError
from mergelab.sae import load_cross_layer_transcoder
from tests.hub_server import HubServer

FORMATS = Path(__file__).parents[1] / "sae" / "formats"
RELEASED = FORMATS / "released"

NAMES: dict[str, tuple[str, str | None]] = {
    "gemma_scope": ("gemma-scope-2b-pt-res", "layer_3/width_16k/average_l0_59"),
    "gemma_scope_transcoder": ("gemma-scope-2b-pt-transcoders:layer_3/width_16k/average_l0_54", None),
    "gemma_scope_2_resid": ("google/gemma-scope-2-1b-pt", "resid_post/layer_3_width_16k_l0_medium"),
    "llama_scope": ("llama_scope_lxr_8x", "l3r_8x"),
    "llama_scope_r1": ("llama_scope_r1_distill", "l3r_400m_slimpajama_400m_openr1_math"),
    "goodfire": ("goodfire-llama-3.1-8b-instruct", "layer_19"),
    "deepseek_r1": ("deepseek-r1-distill-llama-8b-qresearch", "blocks.19.hook_resid_post"),
    "qwen_scope": ("Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_4:layer3.sae.pt", None),
    "mwhanna": ("mwhanna-qwen3-1.7b-transcoders-lowl0", "layer_3"),
    "clt_layer": ("mntss-gemma-2-2b-2.5m-clt-as-per-layer", "layer_1"),
}
"""Names by recorded answer."""


@pytest.fixture
def published(hub: HubServer) -> HubServer:
    for owner in RELEASED.iterdir():
        if owner.is_dir():
            for repo in owner.iterdir():
                hub.add(f"{owner.name}/{repo.name}", repo)
    return hub


@pytest.mark.parametrize("name", NAMES)
def test_a_release_is_fetched_by_name_and_means_the_same(published: HubServer, name: str) -> None:
    place, sae_id = NAMES[name]
    expected = load_file(RELEASED / f"{name}.safetensors")
    sae = ml.load_sae(place, sae_id)
    np.testing.assert_allclose(sae.encode(jnp.asarray(expected["x"])), expected["codes"], atol=2e-5)
    np.testing.assert_allclose(sae(jnp.asarray(expected["x"])), expected["out"], atol=5e-5, rtol=2e-5)
    fetched = published.fetched()
    assert 1 <= len(fetched) <= 5 and not any("layer_4" in file or "_2." in file for file in fetched)
    if not place.startswith(("google/", "Qwen/")):
        assert sae.config.metadata["release"] == place.partition(":")[0]
        assert sae.config.metadata["model_name"]


def test_a_release_in_saelens_files_keeps_what_its_table_says(hub: HubServer, tmp_path: Path) -> None:
    shutil.copytree(FORMATS / "recorded" / "saelens_standard", tmp_path / "repo" / "blocks.8.hook_resid_pre")
    shutil.copytree(FORMATS / "recorded" / "saelens_topk", tmp_path / "repo" / "blocks.9.hook_resid_pre")
    hub.add("jbloom/GPT2-Small-SAEs-Reformatted", tmp_path / "repo")
    sae = ml.load_sae("gpt2-small-res-jb", "blocks.8.hook_resid_pre")
    expected = load_file(FORMATS / "recorded" / "saelens_standard" / "expected.safetensors")
    np.testing.assert_allclose(sae(jnp.asarray(expected["x"])), expected["out"], atol=5e-5, rtol=2e-5)
    assert not any("blocks.9" in file for file in hub.fetched())
    told = sae.config.metadata
    assert told["model_from_pretrained_kwargs"] == {"center_writing_weights": True}
    assert (told["release"], told["sae_id"]) == ("gpt2-small-res-jb", "blocks.8.hook_resid_pre")
    done = CliRunner().invoke(
        cli,
        [
            "sae",
            "export",
            "gpt2-small-res-jb:blocks.8.hook_resid_pre",
            "--format",
            "mergelab",
            "--out",
            "own",
        ],
    )
    assert done.exit_code == 0, done.output
    np.testing.assert_array_equal(ml.load_sae("own").W_dec, sae.W_dec)


def test_a_release_says_what_its_files_do_not(hub: HubServer, tmp_path: Path) -> None:
    for repo, folder, normalization in (
        ("JoshEngels/Mistral-7B-Residual-Stream-SAEs", "mistral_7b_layer_8", "none"),
        (
            "tommmcgrath/gpt2-small-mlp-out-saes",
            "sae_group_gpt2_blocks.0.hook_mlp_out_24576:v1",
            "expected_average_only_in",
        ),
    ):
        place = tmp_path / repo / folder
        shutil.copytree(FORMATS / "recorded" / "saelens_standard", place)
        said = json.loads((place / "cfg.json").read_text())
        (place / "cfg.json").write_text(json.dumps({**said, "normalize_activations": normalization}))
        hub.add(repo, tmp_path / repo)
    plain = ml.load_sae(FORMATS / "recorded" / "saelens_standard")
    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, plain.d_in)), jnp.float32)
    mistral = ml.load_sae("mistral-7b-res-wg", "blocks.8.hook_resid_pre")
    scale = np.sqrt(plain.d_in) / np.linalg.norm(x, axis=1, keepdims=True)
    np.testing.assert_allclose(mistral(x), plain(x * scale) / scale, atol=2e-5)
    gpt2 = ml.load_sae("gpt2-small-mlp-tm", "blocks.0.hook_mlp_out")
    np.testing.assert_allclose(gpt2(x), plain(x * 1.0493173) / 1.0493173, atol=2e-5)


def test_whole_repositories_of_layers_are_asked_about_before_anything_is_fetched(
    published: HubServer,
) -> None:
    for repo, said in (
        ("mwhanna/qwen3-1.7b-transcoders-lowl0", r"3 autoencoders; name one, as in .*:layer_3\.saf"),
        ("google/gemma-scope-2b-pt-res", "name one of its folders"),
    ):
        with pytest.raises(CheckpointError, match=said):
            ml.load_sae(repo)
    assert published.fetched() == []
    with pytest.raises(CheckpointError, match="the hub has no model"):
        ml.load_sae("goodfire-llama-3.3-70b-instruct", "layer_50")


def test_a_transcoder_across_layers_is_opened_from_the_hub(published: HubServer) -> None:
    expected = load_file(RELEASED / "clt_relu.safetensors")
    model = load_cross_layer_transcoder("mntss/clt-gemma-2-2b-2.5M")
    np.testing.assert_allclose(model(expected["x"]), expected["out"], atol=5e-5, rtol=2e-5)
    expected = load_file(RELEASED / "gemma_scope_2_crosscoder.safetensors")
    place = "google/gemma-scope-2-1b-pt:crosscoder/layer_7_13_17_width_262k_l0_medium"
    model = load_cross_layer_transcoder(place)
    np.testing.assert_allclose(model(expected["x"]), expected["out"], atol=5e-5, rtol=2e-5)
    assert model.is_crosscoder
