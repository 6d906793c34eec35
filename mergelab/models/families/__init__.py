"""Every supported model family by its `model_type`, and how a `config.json` becomes a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergelab.errors import CheckpointError, quoted
from mergelab.models.families.bert import BERT
from mergelab.models.families.cohere import COHERE, COHERE2
from mergelab.models.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from mergelab.models.families.gemma import GEMMA, GEMMA2, GEMMA3_TEXT
from mergelab.models.families.glm import GLM, GLM4
from mergelab.models.families.glm_moe import GLM4_MOE
from mergelab.models.families.gpt2 import GPT2
from mergelab.models.families.gpt_neox import GPT_NEOX
from mergelab.models.families.gpt_oss import GPT_OSS
from mergelab.models.families.granite import GRANITE
from mergelab.models.families.jamba import JAMBA
from mergelab.models.families.llama import LLAMA
from mergelab.models.families.mamba import MAMBA, MAMBA2
from mergelab.models.families.mistral import MISTRAL, MIXTRAL
from mergelab.models.families.nearest import nearest
from mergelab.models.families.olmo import OLMO, OLMO2, OLMO3
from mergelab.models.families.phi import PHI
from mergelab.models.families.phi3 import PHI3
from mergelab.models.families.qwen import QWEN2, QWEN3
from mergelab.models.families.qwen3_5 import QWEN3_5_MOE_TEXT, QWEN3_5_TEXT
from mergelab.models.families.qwen_moe import QWEN2_MOE, QWEN3_MOE
from mergelab.models.families.qwen_next import QWEN3_NEXT
from mergelab.models.families.smollm3 import SMOLLM3
from mergelab.models.families.stablelm import STABLELM
from mergelab.models.families.starcoder2 import STARCODER2
from mergelab.models.families.wrappers import WRAPPERS, text_config
from mergelab.models.model import Family, Model

__all__ = ["FAMILIES", "model_from_config"]

FAMILIES: dict[str, Family] = {
    "bert": BERT,
    "cohere": COHERE,
    "cohere2": COHERE2,
    "deepseek_v2": DEEPSEEK_V2,
    "deepseek_v3": DEEPSEEK_V3,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3_TEXT,
    "glm": GLM,
    "glm4": GLM4,
    "glm4_moe": GLM4_MOE,
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
    "gpt_oss": GPT_OSS,
    "granite": GRANITE,
    "jamba": JAMBA,
    "llama": LLAMA,
    "mamba": MAMBA,
    "mamba2": MAMBA2,
    "mistral": MISTRAL,
    "mixtral": MIXTRAL,
    "olmo": OLMO,
    "olmo2": OLMO2,
    "olmo3": OLMO3,
    "phi": PHI,
    "phi3": PHI3,
    "qwen2": QWEN2,
    "qwen2_moe": QWEN2_MOE,
    "qwen3": QWEN3,
    "qwen3_5_moe_text": QWEN3_5_MOE_TEXT,
    "qwen3_5_text": QWEN3_5_TEXT,
    "qwen3_moe": QWEN3_MOE,
    "qwen3_next": QWEN3_NEXT,
    "smollm3": SMOLLM3,
    "stablelm": STABLELM,
    "starcoder2": STARCODER2,
}


def model_from_config(config: Mapping[str, Any], place: str = "config.json") -> Model:
    """The model that a parsed `config.json` describes; of one that also sees or hears, its text tower.

    A field that nothing is known of is ignored, as transformers does, with a warning that names it.

    Args:
        config: the parsed file.
        place: its path, for messages.

    Raises:
        CheckpointError: the model type is missing or unknown, or fields are missing or have values that the
            family does not implement; the error names all of them.
    """
    tower = text_config(config, place)
    if tower is not None:
        config, place = tower
    kind = config.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        near = nearest(kind, {*FAMILIES, *WRAPPERS}) if isinstance(kind, str) else ""
        raise CheckpointError(
            f"{place} has model_type {quoted(kind)}{near}, but the supported ones are {', '.join(FAMILIES)}, "
            f"and the text towers of {', '.join(WRAPPERS)}; docs/models.md shows how to add a family."
        )
    return Model(family, family.read(config, place), dict(config), tower=tower is not None)
