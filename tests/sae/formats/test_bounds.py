"""Files of SAEs, whatever is in them, are read or refused by name: quickly, and in little memory."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mergelab.checkpoints.torch_pickle import write_pickled
from mergelab.errors import CheckpointError, MergelabError
from mergelab.sae.formats import load_sae, save_sae
from mergelab.sae.formats.settings import FormatSettings
from mergelab.sae.sae import SAE, SAEConfig

D, N = 4, 6
WRONG: list[Any] = [float("nan"), "x", [], {}, 1.5, 0, -1, True, 1e300, 10**30]


def _sae(activation: str, **config: Any) -> SAE:
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((D, N), (N,), (N, D), (D,))]
    k = 2 if activation == "topk" else None
    threshold = jnp.ones(N) if activation == "jump_relu" else None
    return SAE(*arrays, SAEConfig(activation, k, **config), threshold=threshold).checked()


def _write_batch_top_k(path: Path) -> None:
    """What dictionary_learning itself saves, which is only read here."""
    path.mkdir()
    arrays = _sae("topk").as_numpy()
    tree = {
        "encoder.weight": arrays["W_enc"].T.copy(), "encoder.bias": arrays["b_enc"],
        "decoder.weight": arrays["W_dec"].T.copy(), "b_dec": arrays["b_dec"],
        "threshold": np.array(0.5, np.float32), "k": np.array(2, np.int64),
    }  # fmt: skip
    write_pickled(path / "ae.pt", tree)
    (path / "config.json").write_text(json.dumps({"trainer": {"dict_class": "BatchTopKSAE", "k": 2}}))


def _write(kind: str, path: Path) -> Path:
    """A sound SAE of a format; returns what is to be loaded."""
    if kind == "batch_topk":
        _write_batch_top_k(path)
    elif kind == "gemma-scope-2":
        path.mkdir()
        lower = {"W_enc": "w_enc", "W_dec": "w_dec"}
        arrays = _sae("jump_relu").as_numpy()
        save_file({lower.get(k, k): v for k, v in arrays.items()}, path / "params.safetensors")
    elif kind == "openai":
        save_sae(_sae("topk", normalization="layer_norm"), path / "sae.pt", kind)
        return path / "sae.pt"
    else:
        activation = "jump_relu" if kind == "gemma-scope" else "topk"
        save_sae(_sae(activation, subtract_b_dec=activation == "topk"), path, kind)
    return path


KINDS = (
    "mergelab", "saelens", "sparsify", "dictionary_learning", "batch_topk", "openai", "gemma-scope",
    "gemma-scope-2",
)  # fmt: skip


def _settings_of(path: Path) -> Path:
    return next(file for name in ("cfg.json", "config.json") if (file := path / name).is_file())


def _refused(path: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_sae(path)
    for word in words:
        assert word in str(caught.value)
    assert len(str(caught.value)) < 2_000


@pytest.mark.parametrize("kind", KINDS)
def test_any_damage_is_refused_or_read(tmp_path: Path, kind: str) -> None:
    sound = _write(kind, tmp_path / "sound")
    load_sae(sound)
    rng, refused = random.Random(kind), 0
    for _ in range(80):
        shutil.rmtree(tmp_path / "broken", ignore_errors=True)
        shutil.copytree(tmp_path / "sound", tmp_path / "broken")
        files = [
            p for p in sorted((tmp_path / "broken").rglob("*")) if p.is_file() and p.name != "mergelab.json"
        ]
        file = rng.choice(files)
        raw = bytearray(file.read_bytes())
        if rng.random() < 0.2:
            del raw[rng.randrange(len(raw)) :]
        for _ in range(rng.randint(1, 3)):
            if raw:
                # Most often where headers and directories lie: weights may have any bytes.
                end = rng.choice([len(raw), min(len(raw), 200)])
                raw[rng.randrange(end)] = rng.randrange(256)
        file.write_bytes(raw)
        try:
            load_sae(tmp_path / "broken" / sound.relative_to(tmp_path / "sound"))
        except MergelabError as error:
            refused += 1
            assert "broken" in str(error) and len(str(error)) < 3_000
    assert refused > 15


@pytest.mark.parametrize("kind", ["mergelab", "saelens", "sparsify", "batch_topk"])
def test_k_is_a_whole_number(tmp_path: Path, kind: str) -> None:
    path = _write(kind, tmp_path / "sae")
    file = _settings_of(path)
    said = json.loads(file.read_text())
    inner = said.get("trainer", said)
    missing = [None] if kind in ("saelens", "batch_topk") else []
    for wrong in [*WRONG, *missing]:
        inner["k"] = wrong
        file.write_text(json.dumps(said))
        _refused(path, file.name, "k is ")
    inner["k"] = 2.0
    file.write_text(json.dumps(said))
    assert load_sae(path).config.k == 2
    del inner["k"]
    file.write_text(json.dumps(said))
    if kind == "sparsify":  # whose own default is 32
        _refused(path, "k is 32, but the SAE has only 6")
    else:
        _refused(path, "sae")


@pytest.mark.parametrize(
    ("kind", "key", "wrong"),
    [
        *[("saelens", "architecture", wrong) for wrong in ([], {}, 1, "x", True)],
        *[("saelens", "metadata", wrong) for wrong in (1, [], "x", True)],
        *[("saelens", "normalize_activations", wrong) for wrong in ([], 1, "x")],
        *[("saelens", "apply_b_dec_to_input", wrong) for wrong in ([], 1, "no")],
        *[("saelens", "rescale_acts_by_decoder_norm", wrong) for wrong in ([], 1, "no")],
        *[("sparsify", "activation", wrong) for wrong in ([], {}, 1, "groupmax")],
        *[("sparsify", "transcode", wrong) for wrong in ([], 1, "no")],
        *[("mergelab", "activation", wrong) for wrong in ([], {}, 1, "x", None)],
        *[("mergelab", "normalization", wrong) for wrong in ([], {}, 1, "x")],
        *[("mergelab", "metadata", wrong) for wrong in ([], 1, "x")],
        *[("mergelab", "sites", wrong) for wrong in ([], 0, "x", float("nan"))],
        *[("mergelab", "subtract_b_dec", wrong) for wrong in ([], 1, "no")],
        *[("mergelab", "n_latents", wrong) for wrong in ([], 1, "no", float("nan"))],
        *[("dictionary_learning", "trainer", wrong) for wrong in ([], 1, "x", None, {}, {"dict_class": []})],
    ],
)
def test_settings_of_the_wrong_type_are_named(tmp_path: Path, kind: str, key: str, wrong: Any) -> None:
    path = _write(kind, tmp_path / "sae")
    file = _settings_of(path)
    file.write_text(json.dumps({**json.loads(file.read_text()), key: wrong}))
    _refused(path, "sae", key.split("_")[0])


def _with_pickled(path: Path, **changes: Any) -> None:
    arrays = _sae("topk").as_numpy()
    tree: dict[str, Any] = {
        "encoder.weight": arrays["W_enc"].T.copy(), "encoder.bias": arrays["b_enc"],
        "decoder.weight": arrays["W_dec"].T.copy(), "b_dec": arrays["b_dec"],
        "threshold": np.array(0.5, np.float32), "k": np.array(2, np.int64),
    }  # fmt: skip
    write_pickled(path / "ae.pt", {**tree, **changes})


@pytest.mark.parametrize(
    "change",
    [
        {"k": np.array([2, 3])},
        {"k": np.array(0)},
        {"k": np.array(-1)},
        {"k": np.array(1.5, np.float32)},
        {"k": np.array(np.nan, np.float32)},
        {"k": np.array(2**62)},
        {"k": np.array([], np.int64)},
        {"threshold": np.ones(N, np.float32)},
        {"threshold": np.array([], np.float32)},
        {"threshold": np.array(np.inf, np.float32)},
        {"encoder.bias": np.array(1, np.float32)},
        {"encoder.bias": np.ones((N, 1), np.float32)},
        {"b_dec": np.array(1, np.float32)},
        {"encoder.weight": np.array(1, np.float32)},
        {"encoder.weight": np.ones((N, D, 1), np.float32)},
        {"decoder.weight": np.ones((D, N), np.int64)},
        {"decoder.weight": np.ones((D, 0), np.float32)},
    ],
)
def test_tensors_of_the_wrong_form_are_named(tmp_path: Path, change: dict[str, Any]) -> None:
    name = next(iter(change))
    for kind in ("AutoEncoderTopK",) if name == "k" else ("BatchTopKSAE",):
        path = tmp_path / kind
        path.mkdir()
        _with_pickled(path, **change)
        (path / "config.json").write_text(json.dumps({"trainer": {"dict_class": kind, "k": 2}}))
        _refused(path, kind, name)


@pytest.mark.parametrize("k", [None, float("nan"), "x", 1.5, 0, -3, True])
def test_openai_files_say_k_as_a_number(tmp_path: Path, k: Any) -> None:
    arrays = _sae("topk").as_numpy()
    tree: dict[str, Any] = {
        "pre_bias": arrays["b_dec"], "latent_bias": arrays["b_enc"], "activation": "TopK",
        "encoder.weight": arrays["W_enc"].T.copy(), "decoder.weight": arrays["W_dec"].T.copy(),
        "activation_state_dict": {"k": k},
    }  # fmt: skip
    write_pickled(tmp_path / "sae.pt", tree)
    _refused(tmp_path / "sae.pt", "sae.pt", "k")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("W_enc", np.array(1, np.float32)),
        ("W_enc", np.ones(0, np.float32)),
        ("W_enc", np.ones((D, N, 1), np.float32)),
        ("W_dec", np.array(1, np.float32)),
        ("b_enc", np.array(1, np.float32)),
        ("b_dec", np.ones(D + 1, np.float32)),
        ("threshold", np.ones(N + 1, np.float32)),
        ("threshold", np.ones(N, np.int64)),
        ("W_dec", np.array([[{}]], object)),
    ],
)
def test_arrays_of_gemma_scope_fit_together(tmp_path: Path, name: str, value: np.ndarray) -> None:
    arrays = _sae("jump_relu").as_numpy() | {name: value}
    np.savez(tmp_path / "params.npz", **arrays)
    _refused(tmp_path, "params.npz", name)


def test_arrays_that_do_not_fit_are_never_inflated(tmp_path: Path) -> None:
    import resource

    arrays = _sae("jump_relu").as_numpy() | {"W_dec": np.zeros((4_000, 3_000), np.float32)}  # 48 MB
    np.savez_compressed(tmp_path / "params.npz", **arrays)
    del arrays
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=r"W_dec is float32 of shape \[4000, 3000\]"):
        load_sae(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10_000  # kB


def test_a_file_that_only_begins_like_a_zip_gets_no_advice_to_unpickle(tmp_path: Path) -> None:
    (tmp_path / "params.npz").write_bytes(b"PK")
    with pytest.raises(CheckpointError) as caught:
        load_sae(tmp_path)
    assert "allow_pickle" not in str(caught.value) and "params.npz" in str(caught.value)


def test_what_the_library_refuses_of_a_sae_names_its_file(tmp_path: Path) -> None:
    path = _write("saelens", tmp_path / "sae")
    arrays = load_file(path / "sae_weights.safetensors")
    save_file({**arrays, "W_dec": arrays["W_dec"][:-1].copy()}, path / "sae_weights.safetensors")
    _refused(path, "sae", "W_dec", str([N - 1, D]))


def test_settings_say_where_they_stand(tmp_path: Path) -> None:
    told = FormatSettings(tmp_path / "x.json", {"trainer": {"k": [1], "huge": "9" * 10_000}}).inner("trainer")
    calls: list[Callable[[], Any]] = [lambda: told.whole("k"), lambda: told.whole("huge")]
    for call in calls:
        with pytest.raises(CheckpointError, match=r"x\.json: trainer\.(k|huge) is .*whole number") as caught:
            call()
        assert len(str(caught.value)) < 500
    with pytest.raises(CheckpointError, match=r"trainer\.none is missing"):
        told.whole("none")


@pytest.mark.parametrize("kind", ["mergelab", "saelens", "sparsify", "dictionary_learning", "gemma-scope"])
def test_any_setting_may_hold_anything(tmp_path: Path, kind: str) -> None:
    path = _write(kind, tmp_path / "sae")
    names = (
        "hook_name",
        "hook_name_out",
        "hf_hook_point_in",
        "hookpoint",
        "site",
        "target_site",
        "hook_mode",
    )
    extra: dict[str, Any] = {name: "blocks.0.hook_resid_post" for name in names}
    extra |= {"reads": ["x"], "writes": ["y"], "transcoder": True, "buffer": {"io": "in"}, "model_name": "m"}
    if kind == "gemma-scope":
        (path / "config.json").write_text("{}")
    file = _settings_of(path)
    sound = json.loads(file.read_text())
    inner = sound["trainer"] if kind == "dictionary_learning" else sound
    for key in {**inner, **extra}:
        for wrong in (None, float("inf"), [], {"a": 1}, True, 10**30, "blocks.9999999999.x"):
            changed = {**inner, key: wrong}
            file.write_text(json.dumps({"trainer": changed, key: wrong} if inner is not sound else changed))
            try:
                load_sae(path)
            except MergelabError as error:
                assert "sae" in str(error) and len(str(error)) < 2_100
