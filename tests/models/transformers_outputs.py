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

RECORDED = Path(__file__).with_name("family_outputs.json")
RECORDED_SITES = Path(__file__).with_name("family_sites.json")
RECORDED_RECURRENT = Path(__file__).with_name("recurrent_outputs.json")


def run(folder: Path, tokens: np.ndarray, mask: np.ndarray, **options: Any) -> Any:
    """The output of a folder's model in float32 with eager attention; positions count real tokens.

    Raises:
        AssertionError: a tensor of the folder is not used, or one is missing.
    """
    import torch
    import transformers

    kind = json.loads((folder / "config.json").read_text())["model_type"]
    loader = transformers.AutoModel if kind == "bert" else transformers.AutoModelForCausalLM
    model, info = loader.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    if kind not in ("bert", "mamba", "mamba2"):
        options["position_ids"] = torch.tensor(np.maximum(mask.cumsum(1) - 1, 0))
    with torch.no_grad():
        return model(
            torch.tensor(tokens, dtype=torch.int64),
            attention_mask=torch.tensor(mask.astype(np.int64)),
            **options,
        )


def values(folder: Path, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Logits, or the last hidden states of a model that has none.

    Rows run one by one where transformers lets the longest row choose the rotary factors of all; and alone
    where biases of a projection (`use_bias`) let padding into its convolutions.
    """
    if '"use_bias": true' in (folder / "config.json").read_text() and not mask.all():
        rows = zip(tokens, mask, strict=True)
        alone = [values(folder, row[real][None], real[real][None])[0] for row, real in rows]
        found = np.zeros((*mask.shape, alone[0].shape[-1]), np.float32)
        found[mask] = np.concatenate(alone)
        return found
    if "longrope" in (folder / "config.json").read_text() and len(tokens) > 1:
        rows = [values(folder, tokens[i : i + 1], mask[i : i + 1]) for i in range(len(tokens))]
        return np.concatenate(rows)
    output = run(folder, tokens, mask)
    return (output.logits if "logits" in output else output.last_hidden_state).numpy()


def hidden_states(folder: Path, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """What leaves each block but the last, `[layers - 1, batch, length, width]`."""
    found = run(folder, tokens, mask, output_hidden_states=True).hidden_states
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    inner = found[:-2] if kind in ("mamba", "mamba2") else found[1:-1]  # others begin with the embeddings
    return np.stack([state.numpy() for state in inner])


def continued(folder: Path, tokens: np.ndarray, mask: np.ndarray, count: int) -> list[list[int]]:
    """The likeliest next tokens of each row, generated with a cache."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    options = transformers.GenerationConfig(
        max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    with torch.no_grad():
        out = model.generate(
            torch.from_numpy(tokens).long(),
            attention_mask=torch.from_numpy(mask).long(),
            generation_config=options,
        )
    return out[:, tokens.shape[1] :].tolist()


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
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from tests.models.recurrent_configs import recurrent_configs
    from tests.models.tiny_models import CONFIGS, MASK, TOKENS, sizes, write

    names, own = sys.argv[1:] or list(CONFIGS), list(recurrent_configs(sizes))
    recorded, sites, recurrent = {}, {}, {}
    if names != list(CONFIGS):
        recorded, sites, recurrent = map(_read, (RECORDED, RECORDED_SITES, RECORDED_RECURRENT))
    with tempfile.TemporaryDirectory() as folder:
        for n, name in enumerate(names):
            written = write(Path(folder) / str(n), name)
            found = values(written, TOKENS, MASK)
            if name not in own:  # layers without patterns
                inner = hidden_and_patterns(written, TOKENS, MASK)
                sites[name] = {
                    "states": inner["states"][:, 1, 9, :6].astype(float).round(5).tolist(),
                    "patterns": inner["patterns"][:, 1, :2, 9].astype(float).round(5).tolist(),
                }
            (recurrent if name in own else recorded)[name] = [
                {
                    "at": at,
                    "argmax": row[real].argmax(-1).tolist(),
                    "values": [round(float(value), 5) for value in row[at, :24]],
                }
                for row, real, at in zip(found, MASK, [9, 9, 5], strict=True)
            ]
    for path, content in ((RECORDED, recorded), (RECORDED_SITES, sites), (RECORDED_RECURRENT, recurrent)):
        there = [name for name in CONFIGS if name in content]
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(content[name])}" for name in there)
        path.write_text("{\n" + lines + "\n}\n")


if __name__ == "__main__":
    main()
