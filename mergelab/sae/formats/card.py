"""The card of an SAE on the hub: what it is, how it is loaded, and figures that were measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from mergelab.checkpoints.hub import parse_hub_place
from mergelab.checkpoints.model_card import CardFacts, short_card
from mergelab.sae.sae import SAE
from mergelab.version import __version__

__all__ = ["sae_card"]

_FETCHED = "from huggingface_hub import snapshot_download\n"
_LOADERS: Mapping[str, tuple[str, str]] = {
    "mergelab": ("mergelab", 'import mergelab as ml\n\nsae = ml.load_sae("{repo}")'),
    "saelens": (
        "saelens",
        f'{_FETCHED}from sae_lens import SAE\n\nsae = SAE.load_from_disk(snapshot_download("{{repo}}"))',
    ),
    "sparsify": (
        "sparsify",
        f"{_FETCHED}from sparsify import SparseCoder\n\n"
        'sae = SparseCoder.load_from_disk(snapshot_download("{repo}"))',
    ),
    "dictionary_learning": (
        "dictionary_learning",
        f"{_FETCHED}from dictionary_learning.utils import load_sae\n\n"
        'sae, config = load_sae(snapshot_download("{repo}"), "cpu")',
    ),
}
"""The library of each format's files, and the lines that load them with it; ours loads the others too."""


def sae_card(sae: SAE, format: str = "mergelab", repo: str | None = None) -> bytes:
    """The content of `README.md`.

    Base models are named where the SAE says the id of its model on the hub: paths mean nothing there.

    Args:
        sae: what the repository holds.
        format: format of its files.
        repo: `org/name`; a place to fill in if None.
    """
    said, config = sae.config.metadata, sae.config
    library, lines = _LOADERS.get(format, _LOADERS["mergelab"])
    model = said.get("model", said.get("model_name"))
    bases = (model,) if isinstance(model, str) and parse_hub_place(model) is not None else ()
    kind = "autoencoder" if sae.is_autoencoder else "transcoder"
    paragraphs = [
        f"{_what(sae, kind, model)}, written with mergelab {__version__}.",
        f"```python\n{lines.format(repo=repo or 'ORG/NAME')}\n```",
    ]
    if library != "mergelab":
        paragraphs.append(f'`mergelab.load_sae("{repo or "ORG/NAME"}")` reads it too.')
    figures = _figures(said.get("training"))
    if figures:
        paragraphs.append(f"Measured on the last batch of its training: {', '.join(figures)}.")
    tags = ["mergelab", library, f"sparse-{kind}", config.activation.replace("_", "-"), "interpretability"]
    name = f"Sparse {kind}" if repo is None else repo.partition("/")[2]
    return short_card(name, library, tags, CardFacts(bases), paragraphs)


def _what(sae: SAE, kind: str, model: Any) -> str:
    config = sae.config
    activation = config.activation + (f", k {config.k}" if config.k is not None else "")
    width = f"{sae.d_in:,}" if sae.d_in == sae.d_out else f"{sae.d_in:,} to {sae.d_out:,}"
    reads = "" if config.reads is None else f" on the site `{', '.join(config.reads)}`"
    writes = "" if sae.is_autoencoder or config.writes is None else f", writing `{', '.join(config.writes)}`,"
    # Of a path, which belongs to one machine, the last part is all that may be of use.
    known = isinstance(model, str) and parse_hub_place(model) is not None
    of = f" of `{model if known else PurePath(model).name}`" if isinstance(model, str) else ""
    return f"Sparse {kind} ({activation}) of {sae.n_latents:,} latents, {width} wide{reads}{writes}{of}"


def _figures(training: Any) -> list[str]:
    """`nmse 0.132`, ...: the numbers of a training's summary."""
    if not isinstance(training, Mapping):
        return []
    numbers = {name: value for name, value in training.items() if type(value) in (int, float)}
    return [f"{str(name).replace('_', ' ')} {value:.4g}" for name, value in numbers.items()]
