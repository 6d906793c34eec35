"""What transformers computes for the models of `tiny_vision.VISION`; run as a script, it records that."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

RECORDED = Path(__file__).with_name("vision_outputs.json")


def outputs(folder: Path, tokens: np.ndarray, mask: np.ndarray, images: np.ndarray) -> dict[str, np.ndarray]:
    """States, pooled states, embeddings and logits of a folder's model in float32, by the names of our sites.

    Raises:
        AssertionError: a tensor of the folder is not used, or one is missing.
    """
    import torch
    import transformers

    kind = json.loads((folder / "config.json").read_text())["model_type"]
    loader: Any = transformers.AutoModel
    if kind == "clip_vision_model":
        loader = transformers.CLIPVisionModelWithProjection
    model, info = loader.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    given: dict[str, Any] = {"pixel_values": torch.tensor(images)}
    if kind == "clip":
        given |= {"input_ids": torch.tensor(tokens, dtype=torch.int64)}
        given |= {"attention_mask": torch.tensor(mask.astype(np.int64))}
    with torch.no_grad():
        found = model(**given)
        if kind == "vit":
            return {"hidden": found.last_hidden_state.numpy(), "pooled": found.pooler_output.numpy()}
        if kind == "clip_vision_model":
            return {"hidden": found.last_hidden_state.numpy(), "embedding": found.image_embeds.numpy()}
        return {
            "logits": found.logits_per_image.numpy(),
            "text.embedding": model.get_text_features(
                given["input_ids"], attention_mask=given["attention_mask"]
            ).pooler_output.numpy(),
            "vision.embedding": model.get_image_features(given["pixel_values"]).pooler_output.numpy(),
        }


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from tests.models.tiny_vision import MASK, TOKENS, VISION, images, tiny, write

    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for n, name in enumerate(VISION):
            found = outputs(write(Path(folder) / str(n), name), TOKENS, MASK, images(tiny(name)[0]))
            kept = {
                site: value.reshape(-1, value.shape[-1])[:, :8].astype(float).round(5).tolist()
                for site, value in found.items()
            }
            lines.append(f"{json.dumps(name)}: {json.dumps(kept)}")
    RECORDED.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
