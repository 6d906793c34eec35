"""EleutherAI's sparsify: `cfg.json` and `sae.safetensors` (`sparsify.SparseCoder.load_from_disk`)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergelab.checkpoints.publish import WorkFolder
from mergelab.sae.formats.file_format import FileFormat, Found, Signature, open_weights
from mergelab.sae.formats.hook_names import module_of, said_or, site_of
from mergelab.sae.formats.own import write_folder
from mergelab.sae.formats.settings import FormatSettings, faults_at_once
from mergelab.sae.formats.shared import (
    arrays_of,
    check_sizes,
    not_subtracting_b_dec,
    refuse,
    subtracting_b_dec,
    transposed,
)
from mergelab.sae.sae import SAE, SAEConfig

__all__ = ["SPARSIFY"]

_CFG, _WEIGHTS = "cfg.json", "sae.safetensors"
_ACTIVATIONS = {"topk": "topk", "groupmax": "group_max"}


def read_sparsify(files: Found) -> SAE:
    """Reads a folder of sparsify.

    Raises:
        CheckpointError: a file is missing, or the activation is neither top-k nor groupmax.
    """
    file = files.weights
    with faults_at_once(files.told) as settings:
        activation = _ACTIVATIONS[settings.word("activation", _ACTIVATIONS, "topk")]
        if settings.flag("signed", False):  # of early versions
            activation = "abs_topk"
        k, transcodes, latents = (
            settings.whole("k", 32),
            settings.flag("transcode", False),
            _latents(settings),
        )
    cfg = settings.values
    wanted = {"encoder.weight": True, "encoder.bias": True, "W_dec": True, "b_dec": True, "W_skip": False}
    tensors = open_weights(file).tensors
    check_sizes(
        file,
        {name: tensor.shape for name, tensor in tensors.items()},
        {
            "encoder.weight": ("n", "d"), "encoder.bias": ("n",), "W_dec": ("n", "d"), "b_dec": ("d",),
            "W_skip": ("d", "d"),
        },
        files.settings,
        {"d": ("d_in", cfg.get("d_in")), "n": latents},
    )  # fmt: skip
    found = arrays_of(tensors, wanted, file)
    return SAE(
        W_enc=found["encoder.weight"].T,
        b_enc=found["encoder.bias"],
        W_dec=found["W_dec"],
        b_dec=found["b_dec"],
        W_skip=found["W_skip"].T if "W_skip" in found else None,
        config=SAEConfig(
            activation,
            k,
            subtract_b_dec=not transcodes,
            **_sites(files.folder, cfg),
        ),
    ).checked()


def _latents(settings: FormatSettings) -> tuple[str, Any]:
    """The number of latents as the configuration says it, and the key that does."""
    if settings.values.get("num_latents"):
        return "num_latents", settings.values["num_latents"]
    if settings.values.get("expansion_factor") is None or settings.values.get("d_in") is None:
        return "num_latents", None
    return "expansion_factor * d_in", settings.whole("expansion_factor") * settings.whole("d_in")


def _sites(path: Path, cfg: Mapping[str, Any]) -> dict[str, Any]:
    """`reads`, `writes`, `transcoder` and `metadata`: sparsify names a module by the folder of its coder.

    An autoencoder is of the module's output. A transcoder reads the module's input, which stands behind a
    norm and is not a site here, and writes its output. `hook_mode` is how early versions said it.
    """
    transcodes = bool(cfg.get("transcode", False)) or cfg.get("hook_mode") == "transcode"
    folder = path.absolute()
    folder = folder.parent if re.fullmatch(r"seed\d+", folder.name) else folder
    hookpoint = cfg.get("hookpoint") or (folder.name if site_of(folder.name) else None)
    target = site_of(hookpoint) if cfg.get("hook_mode") != "input" else None
    reads, writes = site_of(cfg.get("site")), site_of(cfg.get("target_site")) or target
    if not transcodes:
        reads = reads or target
        writes = reads
    known = reads is not None and writes is not None
    # The name this library made up for its own site says nothing more.
    own = module_of(site_of(cfg.get("target_site" if transcodes else "site")))
    return {
        "reads": None if reads is None else (reads,),
        "writes": None if writes is None else (writes,),
        "transcoder": None if known and transcodes == (reads != writes) else transcodes,
        "metadata": {} if hookpoint is None or hookpoint == own else {"hookpoint": hookpoint},
    }


def write_sparsify(sae: SAE, path: Path | WorkFolder) -> None:
    """Writes a folder for sparsify.

    Raises:
        SAEError: the SAE is neither of top-k nor of group maxima, or maps between different widths.
        OutputError: the folder is taken, or cannot be written.
    """
    config = sae.config
    names = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
    if config.activation not in names:
        raise refuse("sparsify", f"the activation {config.activation!r}", "'mergelab' or 'saelens'")
    if config.normalization != "none":
        raise refuse(
            "sparsify", f"normalization {config.normalization!r}", "'mergelab', 'saelens' or 'openai'"
        )
    if sae.d_in != sae.d_out:
        raise refuse("sparsify", f"widths {sae.d_in} and {sae.d_out}", "'mergelab'")
    skip, transcodes = sae.W_skip is not None, not sae.is_autoencoder
    given = (not_subtracting_b_dec if transcodes else subtracting_b_dec)(sae)
    arrays = given.as_numpy()
    tensors = {
        "encoder.weight": transposed(arrays["W_enc"]),
        "encoder.bias": arrays["b_enc"],
        "W_dec": arrays["W_dec"],
        "b_dec": arrays["b_dec"],
    }
    if skip:
        tensors["W_skip"] = transposed(arrays["W_skip"])
    cfg = {
        "activation": names[config.activation],
        "expansion_factor": max(sae.n_latents // sae.d_in, 1),
        "normalize_decoder": True,
        "num_latents": sae.n_latents,
        "k": config.k,
        "multi_topk": False,
        "skip_connection": skip,
        "transcode": transcodes,
        "d_in": sae.d_in,
        **_named(sae),
    }
    write_folder(path, {_CFG: json.dumps(cfg, indent=2) + "\n"}, {_WEIGHTS: tensors})


def _named(sae: SAE) -> dict[str, str]:
    """The module and the sites, which sparsify itself leaves to the folder's name and does not read."""
    config = sae.config
    reads = None if config.reads is None else config.reads[0]
    writes = None if config.writes is None else config.writes[0]
    hookpoint = said_or(config.metadata, "hookpoint", writes, module_of(writes))
    names = {"hookpoint": hookpoint, "site": reads, "target_site": writes}
    if sae.is_autoencoder:
        del names["target_site"]
    return {key: name for key, name in names.items() if name is not None}


SPARSIFY = FileFormat(
    name="sparsify",
    read=read_sparsify,
    signatures=(Signature(("encoder.weight", "encoder.bias", "W_dec", "b_dec"), ("d_in",)),),
    weights=_WEIGHTS,
    settings=_CFG,
    looks_for="cfg.json and sae.safetensors",
    write=write_sparsify,
)
