"""Which files of a model that lies elsewhere are needed here: one form of the weights, and the small ones."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

from mergelab.checkpoints.model_files import check_file_name
from mergelab.errors import CheckpointError, did_you_mean, quoted

__all__ = ["Need", "wanted_files"]

Need = Literal["model", "tokenizer", "sae"]
"""What a place is asked for: all of a model, its tokenizer and config alone, or a sparse autoencoder."""

_SMALL = (".json", ".txt", ".jinja", ".yaml", ".yml", ".tiktoken", ".model", ".spm")
_PAPERS = re.compile(r"(README|LICENSE|LICENCE|NOTICE|USE_POLICY)[\w.-]*", re.IGNORECASE)
# Folders beside the weights that belong to the model: chat templates, and modules of sentence-transformers.
_BESIDE = re.compile(r"(additional_chat_templates|[0-9]+_\w+)/[^/]+")
_PICKLED = (".bin", ".pt", ".pth")
_STATES = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")
_AUTOENCODER = (".safetensors", ".pt", ".pth", ".npz")
# Releases of one autoencoder a layer; and the two files of a layer that circuit-tracer keeps.
_ONE_A_LAYER = re.compile(r"layer_?\d+(\.sae)?\.(safetensors|pt|pth)|.*[-_]l\d+\.pth?")
_ENCODER = re.compile(r"W_enc_(\d+)\.safetensors")


def wanted_files(
    names: Collection[str],
    within: str,
    need: Need,
    place: str,
    read_index: Callable[[str], Mapping[str, Any]],
) -> list[str]:
    """The files to fetch, of all that a repository or folder elsewhere has.

    Of several forms of the same weights one is taken: safetensors before pickles, the form that
    `open_checkpoint` would open. Files that no reader here asks for (`original/`, `onnx/`, pictures) are not.

    Args:
        names: paths of all files, with `/` between their parts.
        within: folder or single file in it that is meant; empty for all.
        need: what they are for.
        place: how the user wrote it, for messages.
        read_index: reads an index of shards by its path in `names`.

    Raises:
        CheckpointError: there is no such folder, there are several sets of weights to choose from, or an
            index names an unsafe file.
    """
    if within in names:  # one weight file, with the small files beside it
        folder, _, single = within.rpartition("/")
        prefix = f"{folder}/" if folder else ""
        decoder = _ENCODER.sub(r"W_dec_\1.safetensors", within)
        both = {within, decoder} & set(names)
        return sorted({*both, *_small(_inside(names, prefix), prefix)} if single else [])
    prefix = f"{within}/" if within else ""
    inside = _inside(names, prefix)
    if not inside:
        folders = sorted({name.rpartition("/")[0] for name in names} - {""})
        near = did_you_mean(within, folders) or (f"; its folders are {_some(folders)}" if folders else "")
        raise CheckpointError(f"{place} has no file or folder {quoted(within)}{near}")
    if need == "sae":
        return sorted(_autoencoder(inside, prefix, place))
    found = set(_small(inside, prefix))
    if need == "model":
        found |= {f"{prefix}{name}" for name in _weights(inside, prefix, place, read_index)}
    return sorted(found)


def _inside(names: Collection[str], prefix: str) -> list[str]:
    return sorted(name.removeprefix(prefix) for name in names if name.startswith(prefix))


def _small(inside: Collection[str], prefix: str) -> list[str]:
    return [f"{prefix}{name}" for name in inside if _is_small(name)]


def _is_small(name: str) -> bool:
    if "/" in name:
        return _BESIDE.fullmatch(name) is not None and name.endswith((*_SMALL, ".safetensors"))
    return name.endswith(_SMALL) or _PAPERS.fullmatch(name) is not None


def _weights(
    inside: Collection[str], prefix: str, place: str, read_index: Callable[[str], Mapping[str, Any]]
) -> set[str]:
    """The weight files among those of one folder, those of an adapter too."""
    top = [name for name in inside if "/" not in name]
    adapter: set[str] = set()
    if "adapter_config.json" in top:
        stored = [n for n in ("adapter_model.safetensors", "adapter_model.bin") if n in top]
        adapter = set(stored[:1])
    families = (
        ("model.safetensors", [name for name in top if name.endswith(".safetensors")]),
        ("pytorch_model.bin", [name for name in top if name.endswith(_PICKLED)]),
        ("model.gguf", [name for name in top if name.endswith(".gguf")]),
    )
    for standard, candidates in families:
        if standard in top:
            return {standard} | adapter
        if (index := f"{standard}.index.json") in top:
            listed = read_index(f"{prefix}{index}").get("weight_map")
            shards = listed.values() if isinstance(listed, dict) else ()
            return {check_file_name(shard, f"{place}: {index}") for shard in shards} | adapter
        candidates = [name for name in candidates if not name.startswith(("adapter_", *_STATES))]
        if len(candidates) > 1 and not adapter:
            raise CheckpointError(
                f"{place} holds {len(candidates)} weight files and no {standard}.index.json to say how they "
                f"belong together ({_some(candidates)}); name one, as in PLACE:{candidates[0]}"
            )
        if len(candidates) == 1:
            return set(candidates) | adapter
    return adapter


def _autoencoder(inside: Collection[str], prefix: str, place: str) -> set[str]:
    """The files of one sparse autoencoder: its folder's own, or those of the run's `final/`."""
    final = [name for name in inside if name.startswith("final/") and "/" not in name.removeprefix("final/")]
    top = [name for name in inside if "/" not in name]
    layers = [name for name in top if _ONE_A_LAYER.fullmatch(name)]
    if len(layers) > 1:
        raise CheckpointError(
            f"{place} holds {len(layers)} autoencoders; name one, as in PLACE:{prefix}{layers[0]} "
            f"({_some(layers)})"
        )
    last = [name for name in inside if name == "checkpoints/final.safetensors" and "hyperparams.json" in top]
    files = [n for n in top if n.endswith((*_AUTOENCODER, *_SMALL))] + final + last
    if not any(name.endswith(_AUTOENCODER) for name in files):
        folders = sorted({n.rpartition("/")[0] for n in inside if n.endswith(_AUTOENCODER)} - {""})
        which = f"; name one of its folders, as in PLACE:{prefix}{folders[0]} ({_some(folders)})"
        raise CheckpointError(f"{place} holds no autoencoder itself{which if folders else ''}")
    return {f"{prefix}{name}" for name in files}


def _some(names: Collection[str]) -> str:
    first = ", ".join(sorted(names)[:4])
    return f"{first} and {len(names) - 4} more" if len(names) > 4 else first
