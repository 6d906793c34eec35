"""Runs moved layers in `transformers`; as a program, records what it finds for the light tests."""

from __future__ import annotations

import contextlib
import copy
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

RECORDED = Path(__file__).with_name("moved_layers.json")
LISTS = (
    "layer_types",
    "no_rope_layers",
    "mlp_layer_types",
    "layers_block_type",
    "layers_num_experts",
    "attention_layers",
    "intermediate_size",
    "activation_sparsity_pattern",
)


def kinds(config: Any, count: int) -> dict[str, list[Any]]:
    """What a config object of transformers says of each of its layers."""
    found = {key: getattr(config, key, None) for key in LISTS}
    listed = {k: list(v) for k, v in found.items() if isinstance(v, (list, tuple)) and len(v) == count}
    experts = getattr(config, "moe_layers", None)
    return listed if experts is None else listed | {"moe_layers": [i in experts for i in range(count)]}


def config_of(config: dict[str, Any]) -> Any:
    """A config as transformers reads it."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**copy.deepcopy(config))


def save_random(folder: Path, config: dict[str, Any]) -> Path:
    """A model with large random weights, saved by transformers; its config.json is exactly the one given."""
    import torch

    torch.manual_seed(0)
    model = _auto(config).from_config(config_of(config)).float()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim > 1:
                value.normal_(0, 0.3)
            elif "bias" in name or "norm" in name:
                value.add_(torch.randn_like(value) * 0.1)
    model.save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "architectures": saved["architectures"], "dtype": "float32"})
    )
    return folder


def load(folder: Path) -> Any:
    """A folder's model, every tensor of it used and none missing."""
    config = json.loads((folder / "config.json").read_text())
    model, info = _auto(config).from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def logits(model: Any) -> np.ndarray:
    """Logits of a batch of two rows of twelve tokens."""
    import torch

    tokens = torch.tensor(np.random.default_rng(1).integers(3, 61, (2, 12)))
    options = {} if model.config.model_type == "modernbert" else {"use_cache": False}
    with torch.no_grad():
        return model(tokens, **options).logits.numpy()


def restacked(model: Any, order: list[int]) -> Any:
    """The model with its own layer modules stacked in another order, built without any config file.

    The modules keep what they were built with (masks of attention are chosen by the config's list at run
    time, so the list is put in the same order).
    """
    import torch

    trunk = next(getattr(model, n) for n in ("model", "transformer") if hasattr(model, n))
    name = "layers" if hasattr(trunk, "layers") else "h"
    layers = getattr(trunk, name)
    before = kinds(model.config, len(layers))
    for part, axis in (("embed_tokens_per_layer", 1), ("per_layer_model_projection", 0)):
        if hasattr(trunk, part):
            weight = getattr(trunk, part).weight
            pieces = weight.data.chunk(len(layers), axis)
            weight.data = torch.cat([pieces[i] for i in order], axis)
    setattr(trunk, name, torch.nn.ModuleList([layers[i] for i in order]))
    model.config.num_hidden_layers = len(order)
    for key in before.keys() & {"layer_types", "layers_block_type"}:
        with contextlib.suppress(AttributeError):  # of some it is a property
            setattr(model.config, key, [before[key][i] for i in order])
    return model


def _auto(config: dict[str, Any]) -> Any:
    import transformers

    masked = config["model_type"] == "modernbert"
    return transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from mergelab.merging import merge
    from tests.merging.layer_cases import CONFIGS, SLICES, recipe
    from tests.merging.test_moved_layers import OURS, write_ours

    recorded: dict[str, Any] = {"source": {}, "logits": {}}
    with tempfile.TemporaryDirectory() as scratch:
        for n, (name, config) in enumerate(CONFIGS.items()):
            recorded["source"][name] = kinds(config_of(config), 6)
            if name in OURS:
                source = write_ours(Path(scratch) / f"{n}", name)
                merge(recipe(source, SLICES[name]), Path(scratch) / f"{n} merged")
                built = logits(restacked(load(source), [i for a, b in SLICES[name] for i in range(a, b)]))
                found = built[:, -1, :12].astype(float)
                recorded["logits"][name] = found.round(5).tolist()
    RECORDED.write_text(json.dumps(recorded, indent=None, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
