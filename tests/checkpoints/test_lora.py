"""LoRA adapters: equal to peft's merge, in any pieces; what cannot be merged is refused by name."""

from __future__ import annotations

import itertools
import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from mergelab.checkpoints.folder import open_checkpoint
from mergelab.checkpoints.lora import with_lora
from mergelab.checkpoints.lora_tensor import BiasedTensor, CastTensor, LowRankTensor, read_whole
from mergelab.checkpoints.lora_variants import decomposition_bytes
from mergelab.errors import CheckpointError

CASES = sorted(path.name for path in (Path(__file__).parent / "data" / "lora").iterdir())
DATA = Path(__file__).parent / "data" / "lora"


def assert_merged(folder: Path, adapter: Path, expected: Path) -> None:
    """Every tensor equals the recorded one to float32 rounding of a short sum (1 ulp in bfloat16)."""
    checkpoint = with_lora(open_checkpoint(folder), adapter)
    reference = open_checkpoint(expected).tensors
    assert checkpoint.tensors.keys() == reference.keys()
    for name, source in checkpoint.tensors.items():
        ours, theirs = read_whole(source), read_whole(reference[name])
        assert (ours.dtype, ours.shape, source.name) == (theirs.dtype, theirs.shape, name)
        if ours.dtype == ml_dtypes.bfloat16:
            assert np.array_equal(ours, theirs)
        else:
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-7)


@pytest.mark.parametrize("case", CASES)
def test_recorded_merges(case: str) -> None:
    assert_merged(DATA / case, DATA / case / "adapter", DATA / case / "merged.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_the_recorded_merge_differs_from_the_base(case: str) -> None:
    base = open_checkpoint(DATA / case / "model.safetensors").tensors
    merged = open_checkpoint(DATA / case / "merged.safetensors").tensors
    assert any(not np.array_equal(read_whole(base[n]), read_whole(merged[n])) for n in base)


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")  # peft's and transformers' own
@pytest.mark.parametrize("case", CASES)
def test_peft_merges_the_same(case: str, tmp_path: Path) -> None:
    runpy.run_path(str(Path(__file__).parent / "record.py"))["make_lora"](case, tmp_path)
    assert_merged(tmp_path, tmp_path / "adapter", tmp_path / "merged.safetensors")


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")  # peft's and transformers' own
def test_peft_merges_the_golden_adapter_the_same(goldens: Path, tmp_path: Path) -> None:
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(goldens / "models" / "llama-base")
    merged = peft.PeftModel.from_pretrained(model, goldens / "models" / "llama-lora").merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert_merged(goldens / "models" / "llama-base", goldens / "models" / "llama-lora", tmp_path)


def test_golden_adapter_by_its_definition(goldens: Path) -> None:
    base = open_checkpoint(goldens / "models" / "llama-base")
    merged = with_lora(base, goldens / "models" / "llama-lora")
    adapter = open_checkpoint(goldens / "models" / "llama-lora" / "adapter_model.safetensors").tensors
    changed = [name for name, source in merged.tensors.items() if isinstance(source, LowRankTensor)]
    assert len(changed) == 8 and merged.config is base.config and merged.path == base.path
    for name in changed:
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = (read_whole(adapter[f"{stem}.lora_{part}.weight"]).astype(np.float64) for part in "AB")
        expected = read_whole(base.tensors[name]) + 2.0 * b @ a
        np.testing.assert_allclose(read_whole(merged.tensors[name]), expected, rtol=0, atol=1e-7)
    assert merged.fingerprint() != base.fingerprint()


PIECES = [
    "linear",
    "conv1d",
    "embedding",
    "bfloat16",
    "lora_bias",
    "dora",
    "dora_columns",
    "pissa",
    "tokens",
    "experts",
]


@pytest.mark.parametrize("case", PIECES)
@pytest.mark.parametrize("size", [7, 31])
def test_pieces_equal_the_whole(case: str, size: int) -> None:
    for source in with_lora(open_checkpoint(DATA / case), DATA / case / "adapter").tensors.values():
        whole = read_whole(source).ravel()
        for start in range(0, whole.size, size):
            out = np.empty(min(size, whole.size - start), source.dtype)
            source.read_into(start, out)
            assert out.tobytes() == whole[start : start + size].tobytes()


def write_case(folder: Path, rows: int, columns: int, rank: int) -> None:
    draw = np.random.default_rng(0)
    weight = draw.standard_normal((rows, columns), np.float32).astype(ml_dtypes.bfloat16)
    # Written through float32: the numpy side of the reference library knows no bfloat16.
    safetensors.numpy.save_file({"p.weight": weight.astype(np.float32)}, folder / "model.safetensors")
    factors = {
        "base_model.model.p.lora_A.weight": draw.standard_normal((rank, columns), np.float32),
        "base_model.model.p.lora_B.weight": draw.standard_normal((rows, rank), np.float32),
    }
    safetensors.numpy.save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 1}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_pieces_of_a_large_matrix_do_not_change_its_bits(tmp_path: Path) -> None:
    write_case(tmp_path, 700, 513, 16)
    source = with_lora(open_checkpoint(tmp_path / "model.safetensors"), tmp_path).tensors["p.weight"]
    whole = read_whole(source).ravel()
    cuts = [0, 1, 513 * 3 + 5, 200_000, 262_143, 262_145, 300_001, whole.size]
    for low, high in itertools.pairwise(cuts):
        out = np.empty(high - low, source.dtype)
        source.read_into(low, out)
        assert out.tobytes() == whole[low:high].tobytes()


@pytest.fixture
def case(tmp_path: Path) -> Path:
    """A private copy of the plain case, to be damaged."""
    shutil.copytree(DATA / "linear", tmp_path / "linear")
    return tmp_path / "linear"


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, **changes: np.ndarray | None) -> None:
    path = folder / "adapter" / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(path) | changes
    safetensors.numpy.save_file({k: v for k, v in tensors.items() if v is not None}, path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"use_dora": True}, "lora_B.weight where .* and lora_magnitude_vector were expected"),
        ({"use_qalora": True}, "use_qalora"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        (
            {"trainable_token_indices": [1]},
            "trainable_token_indices, but the adapter holds no trained tokens",
        ),
        ({"trainable_token_indices": {"embed": [1.5]}}, "where a list of token ids was expected"),
        ({"trainable_token_indices": {"embed": [-1]}}, "where a list of token ids was expected"),
        ({"target_parameters": ["x"]}, "target_parameters names 'x', which the model does not store"),
        ({"some_new_option": 1}, "some_new_option = 1"),
        ({"init_lora_weights": "corda"}, "'corda' trains against an altered base"),
        ({"init_lora_weights": "loftq"}, "'loftq' trains against an altered base"),
        ({"init_lora_weights": "pissa_niter_"}, "'pissa_niter_' trains against an altered base"),
        ({"r": "4"}, "r is '4' where a number was expected"),
        ({"r": 0}, "rank is below 1"),
        ({"r": 3}, r"factors \(2, 6\) and .* its config gives rank 3"),
        ({"alpha_pattern": {"(": 1}}, "invalid pattern"),
        ({"alpha_pattern": {"(?i)q": 1}}, r"invalid pattern '\(\?i\)q' \(it uses '\(\?i'\)"),
        ({"rank_pattern": [1]}, "rank_pattern is"),
        ({"rank_pattern": {"up": 10**400}}, "has 401 digits"),
        ({"modules_to_save": "head"}, "modules_to_save is 'head' where a list"),
        ({"target_modules": [1]}, "target_modules is"),
        ({"lora_alpha": True}, "lora_alpha is True"),
    ],
)
def test_configs_that_cannot_be_merged(changes: dict[str, Any], message: str, case: Path) -> None:
    edit_config(case, **changes)
    with pytest.raises(CheckpointError, match=message):
        with_lora(open_checkpoint(case), case / "adapter")


M = "base_model.model."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({M + "layers.0.up.lora_magnitude_vector": np.ones(10, np.float32)}, "DoRA"),
        ({M + "layers.0.up.lora_mixing": np.ones(10, np.float32)}, "not plain LoRA"),
        ({M + "embed.token_adapter.trainable_tokens_delta": np.ones(3, np.float32)}, "gives it no rows of"),
        ({M + "layers.0.up.lora_B.weight": None}, "module 'layers.0.up' has lora_A.weight where"),
        (
            {
                M + "layers.0.upp.lora_A.weight": np.ones((2, 6), np.float32),
                M + "layers.0.upp.lora_B.weight": np.ones((10, 2), np.float32),
            },
            r"'layers.0.upp.weight', which the model does not have \(did you mean 'layers.0.up.weight'",
        ),
        (
            {
                M + "x.layers.0.up.lora_A.weight": np.ones((2, 6), np.float32),
                M + "x.layers.0.up.lora_B.weight": np.ones((10, 2), np.float32),
            },
            r"two modules of the adapter change 'layers\.0\.up\.weight'",
        ),
        ({M + "heads.weight": np.ones((11, 6), np.float32)}, r"'heads.weight', .*did you mean 'head.weight'"),
        ({M + "head.weight": np.ones((12, 6), np.float32)}, r"'head.weight' to have shape \(12, 6\)"),
        ({M + "layers.0.up.lora_B.weight": np.ones((9, 2), np.float32)}, r"to have shape \(9, 6\)"),
        ({M + "layers.0.up.lora_B.weight": np.ones((10, 2, 1), np.float32)}, "2-D factors|3-D factors"),
        ({M + "layers.0.up.lora_A.default.weight": np.ones((2, 6), np.float32)}, "says the same as another"),
    ],
)
def test_adapter_tensors_are_used_exactly_once(
    changes: dict[str, np.ndarray | None], message: str, case: Path
) -> None:
    edit_tensors(case, **changes)
    with pytest.raises(CheckpointError, match=message):
        with_lora(open_checkpoint(case), case / "adapter")


def test_a_leading_part_of_the_name_may_differ(case: Path) -> None:
    tensors = safetensors.numpy.load_file(case / "model.safetensors")
    safetensors.numpy.save_file({f"model.{k}": v for k, v in tensors.items()}, case / "model.safetensors")
    merged = with_lora(open_checkpoint(case / "model.safetensors"), case / "adapter").tensors
    expected = open_checkpoint(case / "merged.safetensors").tensors["layers.1.up.weight"]
    np.testing.assert_allclose(
        read_whole(merged["model.layers.1.up.weight"]), read_whole(expected), atol=5e-7
    )


def test_adapters_stack(case: Path) -> None:
    base = open_checkpoint(case / "model.safetensors")
    twice = with_lora(with_lora(base, case / "adapter"), case / "adapter").tensors["head.weight"]
    assert np.array_equal(read_whole(twice), read_whole(base.tensors["head.weight"]))
    name = "layers.0.up.weight"
    once = with_lora(base, case / "adapter")
    step = read_whole(once.tensors[name]) - read_whole(base.tensors[name])
    both = read_whole(with_lora(once, case / "adapter").tensors[name])
    np.testing.assert_allclose(both, read_whole(base.tensors[name]) + 2 * step, atol=2e-6)


def test_folders_that_are_no_adapters(tmp_path: Path, case: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no adapter_config\.json"):
        with_lora(open_checkpoint(case / "model.safetensors"), tmp_path)
    (case / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no adapter_model\.safetensors or adapter_model\.bin"):
        with_lora(open_checkpoint(case / "model.safetensors"), case / "adapter")


def test_integer_weights_are_refused(case: Path) -> None:
    tensors = safetensors.numpy.load_file(case / "model.safetensors")
    tensors["layers.0.up.weight"] = tensors["layers.0.up.weight"].astype(np.int8)
    safetensors.numpy.save_file(tensors, case / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'layers\.0\.up\.weight' is stored as int8; dequantize"):
        with_lora(open_checkpoint(case / "model.safetensors"), case / "adapter")


WRAPPED = {
    "language_model.model.layers.0.self_attn.q_proj": "model.language_model.layers.0.self_attn.q_proj",
    "model.language_model.layers.0.self_attn.q_proj": "language_model.model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.q_proj": "model.language_model.layers.0.self_attn.q_proj",
    "model.language_model.layers.0.self_attn.v_proj": "model.layers.0.self_attn.v_proj",
}
"""Modules of a language model in a wrapper, as one version of transformers calls them and as another does."""


@pytest.mark.parametrize("stored", WRAPPED)
def test_a_language_model_is_found_in_any_wrapper(stored: str, tmp_path: Path) -> None:
    tower = "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight"
    model = {f"{stored}.weight": np.zeros((2, 2), np.float32), tower: np.zeros((2, 2), np.float32)}
    safetensors.numpy.save_file(model, tmp_path / "model.safetensors")
    factors = {"lora_A.weight": np.ones((1, 2), np.float32), "lora_B.weight": np.ones((2, 1), np.float32)}
    names = (WRAPPED[stored], f"model.{tower.removesuffix('.weight')}")
    adapter = {f"{M}{name}.{part}": value for name in names for part, value in factors.items()}
    safetensors.numpy.save_file(adapter, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    found = with_lora(open_checkpoint(tmp_path / "model.safetensors"), tmp_path).tensors
    assert [read_whole(tensor).tolist() for tensor in found.values()] == [[[1, 1], [1, 1]]] * 2


def test_what_pissa_takes_out_is_warned_of() -> None:
    for case, warned in (("pissa", True), ("olora", True), ("linear", False)):
        found = with_lora(open_checkpoint(DATA / case), DATA / case / "adapter").warnings
        assert any("takes a part of each weight out of the base" in warning for warning in found) == warned


@pytest.mark.parametrize(
    ("case", "copies"), [("pissa", 17.0), ("olora", 10.0), ("dora", 0.0), ("linear", 0.0)]
)
def test_the_memory_of_decompositions_is_known_before_they_are_made(case: str, copies: float) -> None:
    """Of a square float32 weight, 17 times it at least (a singular value decomposition), or 10 times (QR)."""
    base = open_checkpoint(DATA / case)
    found = with_lora(base, DATA / case / "adapter").tensors
    changed = [name for name, source in found.items() if source != base.tensors[name]]
    for name in changed:
        source = CastTensor(name, np.dtype(np.float16), found[name])  # views of it cost the same
        size = 4 * np.prod(source.shape)
        taken = decomposition_bytes(source)
        rows, columns = source.shape
        square = min(rows, columns) / max(rows, columns)
        assert copies * square * size <= taken <= 2 * copies * size
        assert (
            taken
            == decomposition_bytes(found[name])
            == decomposition_bytes(BiasedTensor(source, source, 1.0))
        )
    assert changed and not any(map(decomposition_bytes, base.tensors.values()))


def test_an_altered_base_makes_a_difference() -> None:
    """The control: the same adapter, had it begun plainly."""
    base = open_checkpoint(DATA / "pissa")
    adapter = open_checkpoint(DATA / "pissa" / "adapter" / "adapter_model.safetensors")
    stem, name = f"{M}layers.0.up", "layers.0.up.weight"
    a, b = (read_whole(adapter.tensors[f"{stem}.lora_{part}.weight"]) for part in "AB")
    plain = read_whole(base.tensors[name]) + 2 * b @ a
    merged = read_whole(open_checkpoint(DATA / "pissa" / "merged.safetensors").tensors[name])
    assert np.abs(plain - merged).max() > 0.1


@pytest.mark.parametrize("case", ["dora", "pissa", "tokens", "experts", "lora_bias"])
def test_an_adapter_may_be_put_on_a_model_that_is_not_there_yet(case: str) -> None:
    """Every view of a tensor follows it to another one: the result of a merge, once it has run."""
    merged = with_lora(open_checkpoint(DATA / case), DATA / case / "adapter").tensors
    expected = open_checkpoint(DATA / case / "merged.safetensors").tensors
    seen: list[str] = []

    def change(tensor: Any) -> Any:
        over = getattr(tensor, "over", None)
        if over is None:
            seen.append(tensor.name)
            return tensor
        return over(change)

    for name, tensor in merged.items():
        again = read_whole(change(tensor))
        np.testing.assert_allclose(again, read_whole(expected[name]), rtol=0, atol=5e-7)
        assert name in seen


def test_factors_of_experts_that_fit_no_parameter_are_refused(tmp_path: Path) -> None:
    shutil.copytree(DATA / "experts", tmp_path / "experts")
    edit_tensors(tmp_path / "experts", **{f"{M}layers.0.experts.lora_B.weight": np.ones((7, 6), np.float32)})
    with pytest.raises(CheckpointError, match=r"factors of 'layers.0.experts' fit none of the model's"):
        with_lora(open_checkpoint(tmp_path / "experts"), tmp_path / "experts" / "adapter")


def test_tokens_beyond_the_vocabulary_say_that_it_was_resized(tmp_path: Path) -> None:
    shutil.copytree(DATA / "tokens", tmp_path / "tokens")
    edit_config(tmp_path / "tokens", trainable_token_indices={"embed": [7, 0, 30], "head": [2]})
    with pytest.raises(CheckpointError, match=r"token 30 was trained, but .* has 11 rows: the vocabulary"):
        with_lora(open_checkpoint(tmp_path / "tokens"), tmp_path / "tokens" / "adapter")
    edit_config(tmp_path / "tokens", trainable_token_indices={"embed": [7], "head": [2]})
    with pytest.raises(CheckpointError, match=r"trainable_token_indices gives it 1 rows of"):
        with_lora(open_checkpoint(tmp_path / "tokens"), tmp_path / "tokens" / "adapter")


@pytest.mark.parametrize("transposed", [False, True])
def test_square_experts_are_told_by_the_models_type(transposed: bool, tmp_path: Path) -> None:
    weight = np.zeros((2, 2, 2), np.float32)
    safetensors.numpy.save_file({"mlp.experts.gate_up_proj": weight}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt_oss" if transposed else "mixtral"}))
    a, b = np.array([[1, 2], [3, 4]], np.float32), np.array([[1, 0], [0, 1]], np.float32)
    adapter = {f"{M}mlp.experts.lora_A.weight": a, f"{M}mlp.experts.lora_B.weight": b}
    safetensors.numpy.save_file(adapter, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_parameters": ["experts.gate_up_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (found,) = with_lora(open_checkpoint(tmp_path / "model.safetensors"), tmp_path).tensors.values()
    expected = np.stack([np.outer(b[:, e], a[e]) for e in range(2)])
    assert np.array_equal(read_whole(found), expected.transpose(0, 2, 1) if transposed else expected)
