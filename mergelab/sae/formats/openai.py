"""OpenAI's `sparse_autoencoder` (version 5): one `.pt` file, read and written without torch."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mergelab.checkpoints.new_files import NewFiles
from mergelab.checkpoints.torch_pickle import write_pickled
from mergelab.errors import CheckpointError
from mergelab.sae.formats.file_format import FileFormat, Found, Signature, open_weights
from mergelab.sae.formats.shared import arrays_of, check_sizes, refuse, subtracting_b_dec, transposed
from mergelab.sae.sae import SAE, SAEConfig

__all__ = ["OPENAI"]


def read_openai(files: Found) -> SAE:
    """Reads an autoencoder of OpenAI's release.

    Its loader normalizes each token exactly where the file says `TopK`, so the SAE does too
    (`normalization` is `layer_norm`).

    Raises:
        CheckpointError: it is another kind of file.
    """
    path = files.weights
    opened = open_weights(path)
    wanted = {"encoder.weight": True, "decoder.weight": True, "pre_bias": True, "latent_bias": True}
    check_sizes(
        path,
        {name: tensor.shape for name, tensor in opened.tensors.items()},
        {
            "encoder.weight": ("n", "d"),
            "decoder.weight": ("d", "n"),
            "pre_bias": ("d",),
            "latent_bias": ("n",),
        },
    )
    found = arrays_of(opened.tensors, wanted, path)
    said = _settings(opened.values)
    kind = said.get("activation", "ReLU")
    k = said.get("k")
    if kind not in ("TopK", "ReLU"):
        raise CheckpointError(f"{path}: activation {kind!r} is not supported; 'TopK' and 'ReLU' are")
    top = kind == "TopK"
    if top and (type(k) is not int or k < 1):
        raise CheckpointError(
            f"{path}: k is {k!r}, but a whole number of at least 1 was expected; get it again"
        )
    return SAE(
        W_enc=found["encoder.weight"].T,
        b_enc=found["latent_bias"],
        W_dec=found["decoder.weight"].T,
        b_dec=found["pre_bias"],
        config=SAEConfig(
            "topk" if top else "relu",
            k if top else None,
            subtract_b_dec=True,
            normalization="layer_norm" if top else "none",
            transcoder=False,
        ),
    ).checked()


def _settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """`activation` and `k`, which stand beside the tensors."""
    inner = values.get("activation_state_dict")
    k = inner.get("k") if isinstance(inner, Mapping) else None
    said: dict[str, Any] = {} if k is None else {"k": k}
    if isinstance(values.get("activation"), str):
        said["activation"] = values["activation"]
    return said


def write_openai(sae: SAE, path: Path | NewFiles) -> None:
    """Writes a `.pt` file for OpenAI's `sparse_autoencoder.Autoencoder.from_state_dict`.

    Raises:
        SAEError: the SAE is neither a top-k one with `layer_norm` nor a ReLU one without.
        OutputError: the file exists, or cannot be written.
    """
    config = sae.config
    fits = (config.activation, config.normalization) in (("topk", "layer_norm"), ("relu", "none"))
    if not fits:
        raise refuse(
            "openai", f"{config.activation!r} with {config.normalization!r}", "'mergelab' or 'saelens'"
        )
    if not sae.is_autoencoder or sae.W_skip is not None:
        raise refuse("openai", f"a transcoder ({sae.mapping()})", "'mergelab' or 'saelens'")
    arrays = subtracting_b_dec(sae).as_numpy()
    n = sae.n_latents
    tree: dict[str, Any] = {
        "pre_bias": arrays["b_dec"],
        "latent_bias": arrays["b_enc"],
        "stats_last_nonzero": np.zeros(n, np.int64),
        "latents_activation_frequency": np.zeros(n, np.float32),
        "latents_mean_square": np.zeros(n, np.float32),
        "encoder.weight": transposed(arrays["W_enc"]),
        "decoder.weight": transposed(arrays["W_dec"]),
        "activation": "TopK" if config.activation == "topk" else "ReLU",
    }
    if config.activation == "topk":
        tree["activation_state_dict"] = {"k": config.k, "postact_fn": "ReLU"}
    with contextlib.nullcontext(path) if isinstance(path, NewFiles) else NewFiles([path]) as files:
        files.publish({files.paths[0]: lambda partial: write_pickled(partial, tree)})


OPENAI = FileFormat(
    name="openai",
    read=read_openai,
    signatures=(Signature(("encoder.weight", "decoder.weight", "pre_bias", "latent_bias")),),
    weights="autoencoder.pt",
    settings=None,
    looks_for="a file NAME.pt",
    write=write_openai,
    one_file=True,
)
