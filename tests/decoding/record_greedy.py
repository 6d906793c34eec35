"""Writes greedy.json: what transformers generates from the tiny models (needs torch and transformers).

Run it as `python -m tests.decoding.record_greedy`.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from mergelab.decoding import pad_prompts
from tests.decoding.tiny import CONFIGS, NEW_TOKENS, PROMPTS, write_folder

RECORDED = Path(__file__).with_name("greedy.json")


def transformers_greedy(kind: str, end_id: int | None = None, penalty: float = 1.0) -> list[list[int]]:
    """The new tokens of every prompt, all in one left-padded batch; 0 after a row's end."""
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        path = write_folder(kind, Path(folder))
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokens, mask = pad_prompts(PROMPTS, pad_id=PROMPTS[1][0])
    options = transformers.GenerationConfig(
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=end_id,
        pad_token_id=0,
        repetition_penalty=penalty,
    )
    with torch.no_grad():
        out = model.generate(
            torch.from_numpy(tokens).long(),
            attention_mask=torch.from_numpy(mask).long(),
            generation_config=options,
        )
    new = out[:, tokens.shape[1] :].tolist()
    return [row + [0] * (NEW_TOKENS - len(row)) for row in new]


if __name__ == "__main__":
    from mergelab.models.families import FAMILIES

    recorded = {kind: transformers_greedy(kind) for kind in CONFIGS if kind in FAMILIES}
    RECORDED.write_text(json.dumps(recorded) + "\n")
