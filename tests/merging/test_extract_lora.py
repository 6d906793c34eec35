"""Extracted adapters: applied to the base they give the best approximation of the fine-tuned model."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from mergelab.checkpoints import (
    CheckpointWriter,
    TensorSpec,
    open_checkpoint,
    plan_shards,
    read_whole,
    with_lora,
)
from mergelab.checkpoints.publish import WorkFolder
from mergelab.errors import CheckpointError, NonFiniteError, OperatorError, OutputError
from mergelab.merging.engine import pool
from mergelab.merging.lora_extraction import extract_lora
from mergelab.merging.lora_factors import ChangeFactors, FactorSetting

RNG = np.random.default_rng(0)
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
SHAPES = {
    "model.embed_tokens.weight": (31, 12),
    "model.layers.0.self_attn.q_proj.weight": (12, 12),
    "model.layers.0.self_attn.q_proj.bias": (12,),
    "model.layers.0.mlp.up_proj.weight": (20, 12),
    "model.layers.0.input_layernorm.weight": (12,),
    "model.layers.1.self_attn.q_proj.weight": (12, 12),
    "model.layers.1.self_attn.q_proj.bias": (12,),
    "model.layers.1.mlp.up_proj.weight": (20, 12),
    "model.layers.1.input_layernorm.weight": (12,),
    "lm_head.weight": (31, 12),
}
MATRICES = [name for name, shape in SHAPES.items() if len(shape) == 2 and "embed" not in name]


def draw(shape: tuple[int, ...]) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def write(folder: Path, tensors: dict[str, np.ndarray], config: dict[str, Any] = LLAMA) -> Path:
    specs = [TensorSpec(name, array.dtype, array.shape) for name, array in tensors.items()]
    with CheckpointWriter(folder, plan_shards(specs, 10**9), "test") as writer:
        for name, array in tensors.items():
            writer.write(name, 0, np.ascontiguousarray(array).reshape(-1))
        writer.add_file("config.json", json.dumps(config).encode())
        writer.commit(durable=False)
    return folder


def restored(base: Path, adapter: Path) -> dict[str, np.ndarray]:
    merged = with_lora(open_checkpoint(base), adapter)
    return {name: read_whole(source) for name, source in merged.tensors.items()}


@pytest.fixture
def base(tmp_path: Path) -> dict[str, np.ndarray]:
    """The base's tensors, also written to `tmp_path / "base"`."""
    tensors = {name: draw(shape) for name, shape in SHAPES.items()}
    write(tmp_path / "base", tensors)
    return tensors


@pytest.fixture
def tuned(tmp_path: Path, base: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The fine-tuned tensors: layer 1's `up_proj` and norm are the base's."""
    same = ("model.layers.1.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight")
    tensors = {name: v if name in same else v + 0.1 * draw(v.shape) for name, v in base.items()}
    write(tmp_path / "tuned", tensors)
    return tensors


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_error_is_the_tail_of_the_spectrum(
    rank: int, tmp_path: Path, base: dict[str, np.ndarray], tuned: dict[str, np.ndarray]
) -> None:
    found = extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=rank)
    merged = restored(tmp_path / "base", tmp_path / "out")
    assert set(found.ranks) == {n.removesuffix(".weight") for n in MATRICES} - {"model.layers.1.mlp.up_proj"}
    for name, weight in merged.items():
        if name in MATRICES:
            delta = tuned[name].astype(np.float64) - base[name]
            spectrum = np.linalg.svd(delta, compute_uv=False)
            tail = np.linalg.norm(spectrum[rank:])
            np.testing.assert_allclose(np.linalg.norm(tuned[name] - weight), tail, rtol=1e-4, atol=1e-6)
            if (module := name.removesuffix(".weight")) in found.errors:
                relative = tail / np.linalg.norm(spectrum)
                np.testing.assert_allclose(found.errors[module], relative, rtol=1e-4)
        else:
            assert np.array_equal(weight, tuned[name]), f"{name} should be stored whole"
    assert found.whole == ("model.embed_tokens", "model.layers.0.input_layernorm")
    assert (found.skipped, found.nbytes) == ((), (tmp_path / "out/adapter_model.safetensors").stat().st_size)


def test_full_rank_is_exact_to_rounding(tmp_path: Path, tuned: dict[str, np.ndarray]) -> None:
    found = extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=100)
    assert set(found.ranks.values()) == {12}
    for name, weight in restored(tmp_path / "base", tmp_path / "out").items():
        np.testing.assert_allclose(weight, tuned[name], rtol=0, atol=2e-6)
    truncated = extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "cut", rank=6)
    assert min(truncated.errors.values()) > 1e-2  # the control: a lower rank is visibly not exact


def test_a_low_rank_change_is_found_with_its_rank(tmp_path: Path, base: dict[str, np.ndarray]) -> None:
    tuned = dict(base)
    for rank, name in enumerate(MATRICES, start=1):
        tuned[name] = base[name] + draw((base[name].shape[0], rank)) @ draw((rank, base[name].shape[1]))
    write(tmp_path / "tuned", tuned)
    found = extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", energy=0.99999)
    assert list(found.ranks.values()) == [1, 2, 3, 4, 5]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert sorted([config["r"], *config["rank_pattern"].values()]) == [1, 2, 3, 4, 5]
    assert config["alpha_pattern"] == config["rank_pattern"]
    for name, weight in restored(tmp_path / "base", tmp_path / "out").items():
        np.testing.assert_allclose(weight, tuned[name], rtol=0, atol=1e-5)


def test_energy_takes_the_least_rank_and_rank_caps_it(tmp_path: Path, tuned: dict[str, np.ndarray]) -> None:
    found = extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", energy=0.8)
    assert all(error**2 <= 0.2 + 1e-5 for error in found.errors.values())
    assert len(set(found.ranks.values())) > 1
    capped = extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "cap", energy=0.8, rank=3)
    assert set(capped.ranks.values()) == {3}
    fewer = extract_lora(
        tmp_path / "tuned", tmp_path / "base", tmp_path / "few", rank=min(found.ranks.values()) - 1
    )
    assert all(error**2 > 0.2 for error in fewer.errors.values())


def test_the_randomized_one_is_nearly_as_good_and_repeatable(
    tmp_path: Path, tuned: dict[str, np.ndarray]
) -> None:
    exact = extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "exact", rank=4)
    for out in ("one", "two"):
        found = extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / out, rank=4, randomized=True)
        for name, error in found.errors.items():
            assert exact.errors[name] * (1 - 1e-5) <= error <= exact.errors[name] * 1.01
    one, two = ((tmp_path / out / "adapter_model.safetensors").read_bytes() for out in ("one", "two"))
    assert one == two


def conv1d_models(folder: Path) -> dict[str, np.ndarray]:
    """A base and a tuned GPT-2 shaped pair with square `[in, out]` weights; returns the tuned tensors."""
    shapes = {"h.0.attn.c_proj.weight": (8, 8), "h.0.mlp.c_fc.weight": (8, 32), "wte.weight": (20, 8)}
    base = {name: draw(shape) for name, shape in shapes.items()}
    tuned = {name: value + draw(value.shape) for name, value in base.items()}
    write(folder / "base", base, {"model_type": "gpt2"})
    write(folder / "tuned", tuned, {"model_type": "gpt2"})
    return tuned


def test_conv1d_and_embedding_factors_are_transposed(tmp_path: Path) -> None:
    tuned = conv1d_models(tmp_path)
    found = extract_lora(
        tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=8, embeddings="low_rank"
    )
    assert set(found.ranks) == {"h.0.attn.c_proj", "h.0.mlp.c_fc", "wte"}
    names = open_checkpoint(tmp_path / "out" / "adapter_model.safetensors").tensors
    assert names["base_model.model.h.0.mlp.c_fc.lora_A.weight"].shape == (8, 8)
    assert names["base_model.model.h.0.mlp.c_fc.lora_B.weight"].shape == (32, 8)
    assert names["base_model.model.wte.lora_embedding_A"].shape == (8, 20)
    for name, weight in restored(tmp_path / "base", tmp_path / "out").items():
        np.testing.assert_allclose(weight, tuned[name], rtol=0, atol=1e-5)
    # PEFT corrects the switch by the kind of each module; so the model's type decides before it.
    config = tmp_path / "out" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"fan_in_fan_out": False}))
    name = "h.0.attn.c_proj.weight"
    np.testing.assert_allclose(restored(tmp_path / "base", tmp_path / "out")[name], tuned[name], atol=1e-5)
    # The control: read as if the square weight were [out, in], it is not the tuned one.
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "linear"}))
    assert np.abs(restored(tmp_path / "base", tmp_path / "out")[name] - tuned[name]).max() > 0.1


def test_targets_choose_modules_and_the_rest_is_reported(
    tmp_path: Path, base: dict[str, np.ndarray], tuned: dict[str, np.ndarray]
) -> None:
    found = extract_lora(
        tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=12,
        targets=["*.self_attn.*", "*embed*"], embeddings="skip",
    )  # fmt: skip
    assert set(found.ranks) == {f"model.layers.{i}.self_attn.q_proj" for i in range(2)}
    assert set(found.skipped) == {
        "model.embed_tokens", "model.layers.0.mlp.up_proj", "model.layers.0.input_layernorm", "lm_head",
    }  # fmt: skip
    merged = restored(tmp_path / "base", tmp_path / "out")
    assert np.array_equal(merged["lm_head.weight"], base["lm_head.weight"])
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["target_modules"], config["modules_to_save"], config["bias"]) == (["q_proj"], None, "all")


def test_names_that_other_modules_share_are_written_in_full(
    tmp_path: Path, base: dict[str, np.ndarray]
) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    write(tmp_path / "tuned", base | {name: base[name] + 1})
    extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=1)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.0.mlp.up_proj"]


def test_factors_may_be_stored_in_half_the_bytes(tmp_path: Path, tuned: dict[str, np.ndarray]) -> None:
    extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=4, dtype="bfloat16")
    factors = open_checkpoint(tmp_path / "out" / "adapter_model.safetensors").tensors
    assert {str(t.dtype) for n, t in factors.items() if "lora_" in n} == {"bfloat16"}


def test_bfloat16_models_and_tied_heads(tmp_path: Path) -> None:
    config = LLAMA | {"tie_word_embeddings": True}
    tensors = {n: draw(s).astype(ml_dtypes.bfloat16) for n, s in SHAPES.items() if n != "lm_head.weight"}
    changed = {n: v + v * v for n, v in tensors.items()}
    write(tmp_path / "base", tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, config)
    write(tmp_path / "tuned", changed, config)
    found = extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=12)
    # PEFT gives an embedding stored whole a matrix of its own: the head has to come along.
    assert {"model.embed_tokens", "lm_head"} <= set(found.whole)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["ensure_weight_tying"]
    assert not with_lora(open_checkpoint(tmp_path / "base"), tmp_path / "out").untied
    merged = restored(tmp_path / "base", tmp_path / "out")
    for name, value in changed.items():
        assert merged[name].dtype == ml_dtypes.bfloat16
        np.testing.assert_allclose(
            merged[name].astype(np.float32), value.astype(np.float32), rtol=2**-8, atol=1e-5
        )


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (lambda t: t.pop("lm_head.weight"), CheckpointError, "lacks the tensor 'lm_head.weight'"),
        (lambda t: t.update({"x.weight": draw((2, 2))}), CheckpointError, "lacks the tensor 'x.weight'"),
        (
            lambda t: t.update({"lm_head.weight": draw((32, 12))}),
            CheckpointError,
            r"\[32, 12\] but \[31",
        ),
        (
            lambda t: t["lm_head.weight"].__setitem__((0, 0), np.nan),
            NonFiniteError,
            "'lm_head.weight': 1 of 372",
        ),
    ],
)
def test_models_that_do_not_belong_together(
    edit: Any, error: type[Exception], message: str, tmp_path: Path, base: dict[str, np.ndarray]
) -> None:
    tensors = {name: value.copy() for name, value in base.items()}
    edit(tensors)
    write(tmp_path / "tuned", tensors)
    with pytest.raises(error, match=message):
        extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "neither a rank nor an energy"),
        ({"rank": 0}, "rank is 0"),
        ({"energy": 1.5}, "energy to keep is 1.5"),
        ({"energy": 0.5, "randomized": True}, "randomized SVD needs a rank"),
    ],
)
def test_sizes_that_make_no_sense(
    options: dict[str, Any], message: str, tmp_path: Path, base: dict[str, np.ndarray]
) -> None:
    with pytest.raises(OperatorError, match=message):
        extract_lora(tmp_path / "base", tmp_path / "base", tmp_path / "out", **options)


def test_nothing_to_extract_and_nothing_overwritten(tmp_path: Path, tuned: dict[str, np.ndarray]) -> None:
    with pytest.raises(CheckpointError, match="there is no adapter to extract"):
        extract_lora(tmp_path / "base", tmp_path / "base", tmp_path / "out", rank=1)
    extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=1)
    with pytest.raises(OutputError, match="is not empty"):
        extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=1)
    extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=2, overwrite=True)


@pytest.mark.parametrize("options", [{"rank": 2}, {"energy": 0.5}], ids=["rank", "energy"])
def test_an_interrupted_extraction_is_resumed_to_the_same_bytes(
    options: dict[str, Any], tmp_path: Path, tuned: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    models = tmp_path / "tuned", tmp_path / "base"
    told: list[int] = []
    whole = extract_lora(*models, tmp_path / "whole", **options, progress=told.append)
    assert sum(told) == sum(4 * int(np.prod(shape)) for shape in SHAPES.values())
    svds: list[str] = []
    factors = FactorSetting.factors

    def failing(self: FactorSetting, name: str, delta: np.ndarray) -> Any:
        svds.append(name)
        if len(svds) == 3 and "rank" in options:
            raise KeyboardInterrupt
        return factors(self, name, delta)

    monkeypatch.setattr(FactorSetting, "factors", failing)
    monkeypatch.setattr(pool, "default_threads", lambda: 1)  # two modules are whole when the third fails

    def stopped(self: WorkFolder, *_: Any, **options: Any) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(WorkFolder, "publish", stopped)
        extract_lora(*models, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    with pytest.raises(OutputError, match="another merge: settings"):
        extract_lora(*models, tmp_path / "out", rank=1, resume=True)
    told.clear()
    first = len(svds)
    found = extract_lora(*models, tmp_path / "out", **options, resume=True, progress=told.append)
    assert (found.ranks, found.errors, found.nbytes) == (whole.ranks, whole.errors, whole.nbytes)
    assert sum(told) == sum(4 * int(np.prod(shape)) for shape in SHAPES.values())
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    done = len(svds)
    assert "energy" in options or done - first <= len(whole.ranks) - 2, "what was written is not found again"
    again = extract_lora(*models, tmp_path / "out", **options, resume=True)
    assert again.errors == whole.errors and len(svds) == done, "a finished output is left alone"


def test_one_svd_gives_both_factors_and_is_forgotten(tmp_path: Path, tuned: dict[str, np.ndarray]) -> None:
    name = "model.layers.0.mlp.up_proj"
    new, old = (open_checkpoint(tmp_path / x).tensors[f"{name}.weight"] for x in ("tuned", "base"))
    setting = FactorSetting(3, None, False, 0, np.dtype(np.float32))
    found = ChangeFactors(name, new, old, False, setting, threading.Lock(), lambda count: None)
    assert (found.rank, found.error, found.held) == (3, None, {})
    b, a = (read_whole(job.sources[0]) for job in found.jobs("m", ("B", "A")))
    assert found.held == {} and found.error is not None
    delta = tuned[f"{name}.weight"] - read_whole(old)
    np.testing.assert_allclose(np.linalg.norm(delta - b @ a) / np.linalg.norm(delta), found.error, rtol=1e-5)
    assert found.error > 0.1


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")  # peft's and transformers' own
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("embeddings", ["whole", "low_rank"])
def test_peft_loads_and_merges_the_same(kind: str, embeddings: Any, tmp_path: Path) -> None:
    import peft
    import torch
    import transformers

    if kind == "llama":
        config = transformers.LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, attention_bias=True, tie_word_embeddings=False,
        )  # fmt: skip
    else:
        config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(tmp_path / "tuned")
    extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=3, embeddings=embeddings)

    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    applied = peft.PeftModel.from_pretrained(loaded, tmp_path / "out")
    assert applied.peft_config["default"].r == 3
    merged = applied.merge_and_unload().state_dict()
    ours = restored(tmp_path / "base", tmp_path / "out")
    tuned = open_checkpoint(tmp_path / "tuned").tensors
    assert any(not np.array_equal(ours[name], read_whole(tuned[name])) for name in ours)
    for name, weight in ours.items():
        np.testing.assert_allclose(merged[name].numpy(), weight, rtol=0, atol=1e-6, err_msg=name)


def vllm_adapter(tmp_path: Path, **options: Any) -> tuple[Any, dict[str, Any], dict[str, tuple[int, ...]]]:
    """An adapter for vLLM: what was said of it, its config, and the shapes of its tensors."""
    found = extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", runtime="vllm", **options)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    tensors = open_checkpoint(tmp_path / "out" / "adapter_model.safetensors").tensors
    return found, config, {name: tensor.shape for name, tensor in tensors.items()}


@pytest.mark.parametrize("options", [{"rank": 3}, {"rank": 20}, {"energy": 0.8}])
def test_vllm_takes_the_adapter(
    options: dict[str, Any], tmp_path: Path, tuned: dict[str, np.ndarray]
) -> None:
    """What `vllm/lora/peft_helper.py` and `vllm/lora/utils.py` check: one rank, no more than factors."""
    found, config, shapes = vllm_adapter(tmp_path, **options)
    assert config["modules_to_save"] is None and config["bias"] == "none" and not config.get("use_dora")
    assert config["rank_pattern"] == config["alpha_pattern"] == {} and config["lora_alpha"] == config["r"]
    assert config["r"] == max(found.ranks.values()) <= 512
    for name, shape in shapes.items():
        assert name.endswith((".lora_A.weight", ".lora_B.weight"))
        assert "embed" not in name and "lm_head" not in name
        assert (shape[0] if "lora_A" in name else shape[1]) == config["r"]
    named = {name.rpartition(".")[2] for name in config["target_modules"]}
    assert {name.split(".")[-3] for name in shapes} == named == {"q_proj", "up_proj"}


def test_what_vllm_does_not_take_is_measured(
    tmp_path: Path, base: dict[str, np.ndarray], tuned: dict[str, np.ndarray]
) -> None:
    found, _, _ = vllm_adapter(tmp_path, rank=12)
    squares = {name: float(np.sum(np.square(tuned[name] - base[name], dtype=np.float64))) for name in base}
    total = sum(squares.values())
    expected = {
        "model.embed_tokens": squares["model.embed_tokens.weight"],
        "model.layers.0.self_attn.q_proj.bias": squares["model.layers.0.self_attn.q_proj.bias"],
        "model.layers.0.input_layernorm": squares["model.layers.0.input_layernorm.weight"],
        "model.layers.1.self_attn.q_proj.bias": squares["model.layers.1.self_attn.q_proj.bias"],
        "lm_head": squares["lm_head.weight"],
    }
    assert found.whole == () and set(found.skipped) == set(found.lost) == set(expected)
    for module, square in expected.items():
        assert found.lost[module] == pytest.approx(square / total, rel=1e-6)
    # At full rank the linear layers are the fine-tuned ones, and all else is the base's.
    for name, value in restored(tmp_path / "base", tmp_path / "out").items():
        linear = name.endswith("proj.weight")
        np.testing.assert_allclose(value, (tuned if linear else base)[name], rtol=0, atol=2e-6)


def test_a_tied_head_is_lost_with_its_embedding_or_by_itself(tmp_path: Path) -> None:
    tied = LLAMA | {"tie_word_embeddings": True}
    tensors = {name: draw(shape) for name, shape in SHAPES.items() if name != "lm_head.weight"}
    write(tmp_path / "base", tensors, tied)
    changed = {name: value + 0.1 * draw(value.shape) for name, value in tensors.items()}
    write(tmp_path / "tuned", changed, tied)
    assert "lm_head" not in vllm_adapter(tmp_path, rank=2)[0].lost
    head = {"lm_head.weight": draw((31, 12))}
    write(tmp_path / "parted", changed | head, LLAMA | {"tie_word_embeddings": False})
    found = extract_lora(tmp_path / "parted", tmp_path / "base", tmp_path / "b", rank=2, runtime="vllm")
    assert found.lost["lm_head"] > 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 513}, "the rank is 513, and vLLM takes at most 512"),
        ({"rank": 2, "embeddings": "low_rank"}, "vLLM takes no factors of embeddings"),
    ],
)
def test_what_vllm_cannot_take_is_refused(
    options: dict[str, Any], message: str, tmp_path: Path, tuned: dict[str, np.ndarray]
) -> None:
    with pytest.raises(OperatorError, match=message):
        vllm_adapter(tmp_path, **options)
    assert not (tmp_path / "out").exists()


def test_an_extraction_for_another_runtime_is_not_taken_for_this_one(
    tmp_path: Path, tuned: dict[str, np.ndarray]
) -> None:
    extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=2, embeddings="skip")
    with pytest.raises(OutputError):
        vllm_adapter(tmp_path, rank=2, resume=True)
    assert (
        vllm_adapter(tmp_path, rank=2, overwrite=True)[0].lost
        == vllm_adapter(tmp_path, rank=2, resume=True)[0].lost
    )
