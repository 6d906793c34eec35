"""Every family streamed from its files: the sites, edits and outputs of the pass in memory."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mergelab.checkpoints.folder import open_checkpoint
from mergelab.errors import MergelabError
from mergelab.models.load import load_model
from mergelab.models.model import Output
from mergelab.models.streamed import StreamedParams, stream_model
from mergelab.models.weights_by_part import HeldWeights
from tests.models.tiny_models import CONFIGS, MASK, TOKENS, write

AMPLIFIED = (
    *("gemma", "gemma2", "gemma3", "gemma3, both directions", "gemma4", "gemma4, experts", "granite"),
    *("mamba, untied, no biases", "mamba2"),
)
"""They scale embeddings up, divide small numbers in norms of what a block adds, or read a memory that
products of products wrote: compiled as a whole and run operation by operation, the pass in memory differs
from itself by 0.9e-6 (mamba, untied) to 4.6e-6 (gemma)."""


def half(x: jax.Array, site: str, mask: jax.Array) -> jax.Array:
    """An edit that differs by layer and by token."""
    factor = 0.5 if site.startswith("blocks.1") else 1.5
    return jnp.where(mask[..., None], x * factor, x)


def outputs(found: Output) -> dict[str, np.ndarray]:
    last = found.hidden if found.logits is None else found.logits
    assert last is not None
    return {name: np.asarray(value) for name, value in found.captured.items()} | {"last": np.asarray(last)}


SHARING = "gemma4, embeddings per layer, shared keys"


def test_blocks_that_read_more_than_the_stream_are_not_streamed(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", SHARING)
    with pytest.raises(MergelabError, match=r"blocks of this 'gemma4_text' .* load it whole"):
        stream_model(open_checkpoint(folder))


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != SHARING])
def test_a_streamed_pass_is_the_pass_in_memory(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", name)
    model, params = load_model(folder)
    _, streamed = stream_model(open_checkpoint(folder), spill=tmp_path)
    written = "mlp" if "blocks.0.mlp.out" in model.sites() else "mixer"  # Mamba's blocks have no other layer
    edit = {f"blocks.*.{written}.out": half}

    def run(params: object) -> Output:
        return model.apply(params, jnp.asarray(TOKENS), mask=jnp.asarray(MASK), capture="*", edit=edit)  # pyright: ignore[reportArgumentType]

    expected, found = outputs(jax.jit(run)(params)), outputs(run(streamed))
    # The same programs on parameters in memory: the files change no bit.
    held = outputs(run(StreamedParams(model, HeldWeights(params))))
    assert all(np.array_equal(found[site], held[site], equal_nan=True) for site in held)
    tolerance = 1e-5 if name in AMPLIFIED else 1e-6
    assert sorted(found) == sorted([*model.sites(), "last"])
    for site, values in expected.items():
        scale = max(1.0, float(np.abs(values[MASK] if values.shape[:2] == MASK.shape else values).max()))
        kept = MASK if values.shape[:2] == MASK.shape else slice(None)
        np.testing.assert_allclose(
            found[site][kept], values[kept], rtol=0, atol=tolerance * scale, err_msg=site
        )
    assert not list(tmp_path.glob("mergelab-spill-*"))
