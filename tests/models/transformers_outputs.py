"""Runs the tiny models in `transformers`; as a program, records what it computes for the light tests.

Names of `CONFIGS` as arguments record those alone.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.models import neobert_reference
from tests.models.decoder_configs import DECODER_CONFIGS
from tests.models.recurrent_configs import recurrent_configs
from tests.models.tiny_encoders import ENCODERS
from tests.models.tiny_models import sizes

_FOLDER = Path(__file__).parent
RECORDED_SITES = _FOLDER / "family_sites.json"
_OTHERS = {
    "decoder_outputs.json": list(DECODER_CONFIGS),
    "encoder_outputs.json": list(ENCODERS),
    "recurrent_outputs.json": list(recurrent_configs(sizes)),
}
"""Recordings without sites, and the models they are of; all else is in `family_outputs.json`."""


def recorded() -> dict[str, list[dict[str, Any]]]:
    """What was recorded of every tiny model, by name."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name in ("family_outputs.json", *_OTHERS):
        found |= _read(_FOLDER / name)
    return found


def run(folder: Path, tokens: np.ndarray, mask: np.ndarray, **options: Any) -> Any:
    """The output of a folder's model in float32 with eager attention; positions count real tokens.

    Raises:
        AssertionError: a tensor of the folder is not used, or one is missing.
    """
    import torch
    import transformers

    config = json.loads((folder / "config.json").read_text())
    kind = config["model_type"]
    encodes = kind in {"bert", *(one["model_type"] for one in ENCODERS.values())}
    loader = transformers.AutoModel if encodes else transformers.AutoModelForCausalLM
    # Falcon's eager form adds linear biases twice (scores, and the mask that it adds to them).
    form = "sdpa" if config.get("alibi") else "eager"
    model, info = loader.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=form, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    if encodes:
        tokens = np.where(mask, tokens, config["pad_token_id"])  # RoBERTa's positions skip that id
    elif kind not in ("bloom", "mamba", "mamba2"):
        options["position_ids"] = torch.tensor(np.maximum(mask.cumsum(1) - 1, 0))
    with torch.no_grad():
        return model(
            torch.tensor(tokens, dtype=torch.int64),
            attention_mask=torch.tensor(mask.astype(np.int64)),
            **options,
        )


def values(folder: Path, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Logits, or the last hidden states of a model that has none.

    NeoBERT is not among the models of transformers: its authors' code stands in `neobert_reference.py`.
    Rows run one by one where transformers lets the longest row choose the rotary factors of all; and alone
    where biases of a projection (`use_bias`) let padding into its convolutions.
    """
    if "neobert" in (folder / "config.json").read_text():
        return neobert_reference.hidden_states(folder, tokens, mask)
    if '"use_bias": true' in (folder / "config.json").read_text() and not mask.all():
        rows = zip(tokens, mask, strict=True)
        alone = [values(folder, row[real][None], real[real][None])[0] for row, real in rows]
        found = np.zeros((*mask.shape, alone[0].shape[-1]), np.float32)
        found[mask] = np.concatenate(alone)
        return found
    if "longrope" in (folder / "config.json").read_text() and len(tokens) > 1:
        rows = [values(folder, tokens[i : i + 1], mask[i : i + 1]) for i in range(len(tokens))]
        return np.concatenate(rows)
    if '"llama4_text"' in (folder / "config.json").read_text() and not mask.all():
        # transformers counts padding where queries grow with their position: each row without it.
        found = [
            values(folder, row[None, real], real[None, real]) for row, real in zip(tokens, mask, strict=True)
        ]
        whole = np.zeros((*tokens.shape, found[0].shape[-1]), np.float32)
        for row, real, one in zip(whole, mask, found, strict=True):
            row[real] = one[0]
        return whole
    output = run(folder, tokens, mask)
    return (output.logits if "logits" in output else output.last_hidden_state).numpy()


def hidden_states(folder: Path, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """What leaves each block but the last, `[layers - 1, batch, length, width]`; zeros in padding.

    Each row is run alone: where a projection has a bias, padding gets into Mamba's convolutions.
    """
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    rows = []
    for row, real in zip(tokens, mask, strict=True):
        alone = np.ones((1, int(real.sum())), bool)
        found = run(folder, row[real][None], alone, output_hidden_states=True).hidden_states
        inner = found[:-2] if kind in ("mamba", "mamba2") else found[1:-1]  # others begin with the embeddings
        states = np.zeros((len(inner), len(row), inner[0].shape[-1]), np.float32)
        states[:, real] = np.stack([state[0].numpy() for state in inner])
        rows.append(states)
    return np.stack(rows, axis=1)


def continued(folder: Path, prompts: list[list[int]], count: int) -> list[list[int]]:
    """The likeliest next tokens of each prompt by itself, generated with a cache; none ends a text.

    Where steps are limited there is no cache: Mamba 2 of transformers limits them in whole passes alone.
    """
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    limited = "time_step_limit" in json.loads((folder / "config.json").read_text())
    found = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        with torch.no_grad():
            out = model.generate(
                tokens, max_new_tokens=count, do_sample=False, pad_token_id=0, use_cache=not limited
            )
        found.append(out[0, len(prompt) :].tolist())
    return found


def hidden_and_patterns(folder: Path, tokens: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """`states [layers + 1, batch, length, width]` and `patterns [layers, batch, heads, query, key]`."""
    output = run(folder, tokens, mask, output_hidden_states=True, output_attentions=True)
    return {
        "states": np.stack([state.numpy() for state in output.hidden_states]),
        "patterns": np.stack([pattern.numpy() for pattern in output.attentions]),
    }


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def main() -> None:
    """Records the models that the command line names, or all."""
    from tests.models.tiny_models import CONFIGS, MASK, TOKENS, write

    names = sys.argv[1:] or list(CONFIGS)
    outputs, sites = ({}, {}) if names == list(CONFIGS) else (recorded(), _read(RECORDED_SITES))
    elsewhere = {name for names in _OTHERS.values() for name in names}
    with tempfile.TemporaryDirectory() as folder:
        for n, name in enumerate(names):
            written = write(Path(folder) / str(n), name)
            found = values(written, TOKENS, MASK)
            if name not in elsewhere:
                inner = hidden_and_patterns(written, TOKENS, MASK)
                sites[name] = {
                    "states": inner["states"][:, 1, 9, :6].astype(float).round(5).tolist(),
                    "patterns": inner["patterns"][:, 1, :2, 9].astype(float).round(5).tolist(),
                }
            outputs[name] = [
                {
                    "at": at,
                    "argmax": row[real].argmax(-1).tolist(),
                    "values": [round(float(value), 5) for value in row[at, :24]],
                }
                for row, real, at in zip(found, MASK, [9, 9, 5], strict=True)
            ]
    older = [name for name in CONFIGS if name not in elsewhere]
    _write(_FOLDER / "family_outputs.json", outputs, older)
    _write(RECORDED_SITES, sites, older)
    for name, models in _OTHERS.items():
        _write(_FOLDER / name, outputs, models)


def _write(path: Path, content: dict[str, Any], names: list[str]) -> None:
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(content[name])}" for name in names)
    path.write_text("{\n" + lines + "\n}\n")


if __name__ == "__main__":
    main()
