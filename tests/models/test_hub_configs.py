"""Configs as published: supported families are read, others refused with the family nearest in truth."""

from __future__ import annotations

import json
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import jax
import pytest

from mergelab.errors import CheckpointError
from mergelab.models.families import FAMILIES, model_from_config
from mergelab.models.families.nearest import NEAREST
from mergelab.models.families.wrappers import WRAPPERS

# Real `config.json` files, some rebuilt from printed copies; private paths replaced.
PATH = Path(__file__).with_name("hub_configs.json")
NAMES = list(json.loads(PATH.read_text()))


@cache
def configs() -> dict[str, dict[str, Any]]:
    return json.loads(PATH.read_text())


SUPPORTED = [name for name in NAMES if configs()[name]["model_type"] in {*FAMILIES, *WRAPPERS}]
# Of one published config alone a field is unknown: vLLM reads it, transformers does not.
UNKNOWN = {"Qwen/Qwen2.5-7B-Instruct-1M": "dual_chunk_attention_config"}


@pytest.mark.parametrize("name", SUPPORTED)
def test_a_published_config_of_a_supported_family_is_a_model(name: str) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model_from_config(configs()[name])
    assert [UNKNOWN[name] in str(warning.message) for warning in said] == [True] * (name in UNKNOWN)


@pytest.mark.slow
@pytest.mark.parametrize("name", SUPPORTED)
@pytest.mark.filterwarnings("ignore:.*unknown here")
def test_its_parameters_and_sites_come_of_an_abstract_run(name: str) -> None:
    model = model_from_config(configs()[name])
    assert model.sites().keys() > {"embed"}
    made = jax.eval_shape(lambda: model.init(0))
    assert len(jax.tree.leaves(made)) == len(model.table())


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("HuggingFaceTB/SmolLM2-135M", 134_515_008),
        ("openai-community/gpt2", 124_439_808),
        ("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248),
        ("Qwen/Qwen2.5-0.5B", 494_032_768),
        ("mistralai/Mistral-7B-v0.1", 7_241_732_096),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", 46_702_792_704),
        ("google/gemma-2-2b", 2_614_341_888),
        ("google/gemma-3-270m", 268_098_176),
        ("google/gemma-3-4b-it", 3_880_263_168),  # the text tower
        ("google-bert/bert-base-uncased", 109_482_240),
    ],
)
def test_its_model_has_as_many_parameters_as_published(name: str, count: int) -> None:
    assert sum(leaf.size for leaf in model_from_config(configs()[name]).table()) == count


@pytest.mark.parametrize("kind", sorted(NEAREST))
def test_other_types_are_refused_with_the_family_nearest_in_truth(kind: str) -> None:
    family, difference = NEAREST[kind]
    assert family in FAMILIES and kind not in FAMILIES
    with pytest.raises(CheckpointError) as error:
        model_from_config({"model_type": kind})
    assert f"model_type {kind!r} (nearest to {family!r}, but {difference})" in str(error.value)


def test_a_slip_of_the_pen_is_told_from_another_family() -> None:
    config = configs()["HuggingFaceTB/SmolLM2-135M"]
    with pytest.raises(CheckpointError, match=r"'lama' \(did you mean 'llama'\?\), but the supported"):
        model_from_config(config | {"model_type": "lama"})
    with pytest.raises(CheckpointError, match="model_type 'phimera', but the supported"):
        model_from_config(config | {"model_type": "phimera"})


def test_a_whole_dump_of_a_config_means_what_its_short_form_means() -> None:
    dump = configs()["user/llama-full-to_dict-dump"]
    short = {name: dump[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "model_type")}
    short |= {name: dump[name] for name in ("num_hidden_layers", "num_attention_heads", "rms_norm_eps")}
    assert model_from_config(dump) == model_from_config(short | {"max_position_embeddings": 4096})


def test_a_quantization_refuses_no_config() -> None:
    config = configs()["HuggingFaceTB/SmolLM2-135M"]
    for method in ("gptq", "awq", "bitsandbytes", "compressed-tensors", "fp8", "mxfp4", "unheard-of"):
        quantized = config | {"quantization_config": {"quant_method": method, "bits": 4}}
        assert model_from_config(quantized) == model_from_config(config)


@pytest.mark.oracle
def test_no_field_that_transformers_writes_of_a_model_is_unknown() -> None:
    """Whole dumps of every family's default config, as `to_dict` gives them, are read in silence."""
    import transformers

    for kind in FAMILIES.keys() - {"neobert"}:  # which is not among the models of transformers
        # The default heads of GLM-4.5 are of a width that cannot be rotated by half.
        given = {"head_dim": 128} if kind == "glm4_moe" else {}
        config = transformers.AutoConfig.for_model(kind, **given)
        # What only the tensors of a real checkpoint settle is left as it is.
        model_from_config(json.loads(json.dumps(config.to_dict(), default=str)), kind)
        generation = transformers.GenerationConfig().to_dict()
        model_from_config(json.loads(json.dumps(config.to_dict() | generation, default=str)), kind)
