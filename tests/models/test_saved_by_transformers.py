"""Files that transformers saves of its base classes, other heads and vision models give what it computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from mergelab.models.load import load_model
from tests.models.tiny_models import CONFIGS, MASK, TOKENS, sizes

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore:.*(other towers|another head)")]

_VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
_QWEN_VISION: dict[str, Any] = {"depth": 1, "num_heads": 2, "patch_size": 14}


def _text(kind: str, **changes: Any) -> dict[str, Any]:
    return {**CONFIGS[kind], **changes}


def _sections(kind: str) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 1]}
    text = {**sizes(), "model_type": kind, "rope_parameters": rope, "rms_norm_eps": 1e-6}
    return {**text, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}


WRAPPERS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": _text("gemma3"),
        "vision_config": {**_VISION, "model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14},
        "mm_tokens_per_image": 4,
        "image_token_index": 5,
    },
    "mistral3": {
        "text_config": _text("mistral", head_dim=6),
        "vision_config": {
            **_VISION,
            "model_type": "pixtral",
            "image_size": 28,
            "patch_size": 14,
            "head_dim": 8,
        },
        "image_token_index": 5,
        "tie_word_embeddings": False,
    },
    "llava": {
        "text_config": _text("llama"),
        "vision_config": {**_VISION, "model_type": "clip_vision_model", "image_size": 28, "patch_size": 14},
        "image_token_index": 5,
    },
    "qwen2_vl": {
        "text_config": _sections("qwen2_vl_text"),
        "vision_config": {**_QWEN_VISION, "embed_dim": 16, "hidden_size": 24},
    },
    "qwen2_5_vl": {
        "text_config": _sections("qwen2_5_vl_text"),
        "vision_config": {**_QWEN_VISION, "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 24},
    },
}


def _randomize(model: Any) -> Any:
    """Weights large enough that attention is far from uniform, and that no norm is the identity."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.4
            parameter.copy_(noise + (parameter.ndim == 1))
    return model.eval()


def _compute(model: Any) -> Any:
    import torch

    positions = torch.tensor(np.maximum(MASK.cumsum(1) - 1, 0))
    with torch.no_grad():
        return model(
            torch.tensor(TOKENS, dtype=torch.int64),
            attention_mask=torch.tensor(MASK.astype(np.int64)),
            position_ids=positions,
        )


@pytest.mark.parametrize("kind", WRAPPERS)
def test_the_text_tower_gives_the_logits_of_the_whole_model(kind: str, tmp_path: Path) -> None:
    import transformers

    config = transformers.AutoConfig.for_model(kind, **WRAPPERS[kind])
    config._attn_implementation = "eager"
    model = _randomize(transformers.AutoModelForImageTextToText.from_config(config))
    model.save_pretrained(tmp_path)
    tower, params = load_model(tmp_path)
    assert tower.tower  # how names are spelled differs: Qwen-VL keeps those of a plain text model
    found, expected = (
        tower.apply(params, jnp.asarray(TOKENS), mask=jnp.asarray(MASK)).logits,
        _compute(model).logits.numpy(),
    )
    np.testing.assert_allclose(np.asarray(found)[MASK], expected[MASK], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "phi3", "gemma3", "gpt_neox", "gpt2"])
def test_a_base_class_gives_its_last_hidden_state(kind: str, tmp_path: Path) -> None:
    import transformers

    config = transformers.AutoConfig.for_model(**CONFIGS[kind])
    model = _randomize(transformers.AutoModel.from_config(config, attn_implementation="eager"))
    model.save_pretrained(tmp_path)
    ours, params = load_model(tmp_path)
    found = np.asarray(ours.apply(params, jnp.asarray(TOKENS), mask=jnp.asarray(MASK)).hidden)
    expected = _compute(model).last_hidden_state.numpy()
    np.testing.assert_allclose(found[MASK], expected[MASK], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "bert"])
def test_a_classifier_gives_the_hidden_states_below_its_head(kind: str, tmp_path: Path) -> None:
    import transformers

    config = transformers.AutoConfig.for_model(**CONFIGS[kind])
    model = _randomize(transformers.AutoModelForSequenceClassification.from_config(config))
    model.save_pretrained(tmp_path)
    ours, params = load_model(tmp_path)
    found = np.asarray(ours.apply(params, jnp.asarray(TOKENS), mask=jnp.asarray(MASK)).hidden)
    base = _compute(model.base_model) if kind != "bert" else None
    if base is None:
        import torch

        with torch.no_grad():
            base = model.base_model(torch.tensor(TOKENS).long(), torch.tensor(MASK.astype(np.int64)))
    np.testing.assert_allclose(found[MASK], base.last_hidden_state.numpy()[MASK], rtol=0, atol=1e-4)
