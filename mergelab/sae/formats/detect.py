"""Finds out which library wrote an SAE, and reads it; writes one for another library."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from jax.sharding import Mesh

from mergelab.checkpoints.new_files import NewFiles
from mergelab.checkpoints.publish import WorkFolder
from mergelab.checkpoints.remote_output import writes_anywhere
from mergelab.errors import CheckpointError, SAEError, did_you_mean
from mergelab.sae.formats.circuit_tracer import is_circuit_tracer, read_circuit_tracer
from mergelab.sae.formats.cross_layer import is_cross_layer, is_layer, read_layer
from mergelab.sae.formats.dictionary_learning import read_dictionary_learning, write_dictionary_learning
from mergelab.sae.formats.gemma_scope import read_gemma_scope, read_gemma_scope_2, write_gemma_scope
from mergelab.sae.formats.llama_scope import is_llama_scope, read_llama_scope
from mergelab.sae.formats.openai import read_openai, write_openai
from mergelab.sae.formats.own import FORMAT, read_own, write_own
from mergelab.sae.formats.releases import as_released, sae_path
from mergelab.sae.formats.saelens import WEIGHTS, read_saelens, write_saelens
from mergelab.sae.formats.shared import refuse
from mergelab.sae.formats.sparsify import read_sparsify, write_sparsify
from mergelab.sae.formats.torch_files import is_torch_release, read_torch_release
from mergelab.sae.sae import SAE, place_sae

__all__ = ["FORMATS", "FileFormat", "load_sae", "reserve", "save_sae"]


@dataclass(frozen=True)
class FileFormat:
    """One library's files.

    Attributes:
        read: makes an SAE of a folder or file.
        write: writes an SAE to a new folder or file, or to the locked place of one (`reserve`).
        recognize: whether a folder or file is of this format.
        looks_for: files that `recognize` looks for, in words.
        one_file: whether it is a file, not a folder.
    """

    read: Callable[[Path], SAE]
    write: Callable[[SAE, Any], None]
    recognize: Callable[[Path], bool]
    looks_for: str
    one_file: bool = False


def _no_writer(sae: SAE, path: Any) -> None:
    raise SAEError("SAEs of this format can be read, not written; export to 'saelens' or 'gemma-scope'.")


FORMATS: Mapping[str, FileFormat] = {
    "mergelab": FileFormat(read_own, write_own, lambda p: _says(p, FORMAT), "cfg.json of this library"),
    "llama-scope": FileFormat(
        read_llama_scope, _no_writer, is_llama_scope, "hyperparams.json and checkpoints/final.safetensors"
    ),
    "saelens": FileFormat(
        read_saelens, write_saelens, lambda p: (p / WEIGHTS).is_file(), f"cfg.json and {WEIGHTS}"
    ),
    "sparsify": FileFormat(
        read_sparsify,
        write_sparsify,
        lambda p: (p / "sae.safetensors").is_file() and _says(p, '"expansion_factor"'),
        "cfg.json and sae.safetensors",
    ),
    "dictionary_learning": FileFormat(
        read_dictionary_learning,
        write_dictionary_learning,
        lambda p: (p / "ae.pt").is_file(),
        "ae.pt and config.json",
    ),
    "torch-release": FileFormat(
        read_torch_release, _no_writer, is_torch_release, "a .pt or .pth file of Qwen-Scope or Goodfire"
    ),
    "circuit-tracer": FileFormat(
        read_circuit_tracer, _no_writer, is_circuit_tracer, "a file layer_0.safetensors of a transcoder"
    ),
    "cross-layer": FileFormat(
        read_layer, _no_writer, is_layer, "one layer's W_enc_0.safetensors or params_layer_0.safetensors"
    ),
    "openai": FileFormat(
        read_openai,
        write_openai,
        lambda p: p.is_file() and p.suffix == ".pt",
        "a file NAME.pt",
        one_file=True,
    ),
    "gemma-scope": FileFormat(
        read_gemma_scope,
        write_gemma_scope,
        lambda p: p.suffix == ".npz" or (p / "params.npz").is_file(),
        "params.npz",
    ),
    "gemma-scope-2": FileFormat(
        read_gemma_scope_2,
        _no_writer,
        lambda p: (p / "params.safetensors").is_file(),
        "params.safetensors",
    ),
}
"""Formats by the name `mergelab sae export --format` gives them."""


def _says(path: Path, words: str) -> bool:
    cfg = path / "cfg.json"
    if not cfg.is_file():
        return False
    with cfg.open("rb") as file:
        return words.encode() in file.read(4096)


def load_sae(
    path: str | Path, sae_id: str | None = None, *, format: str | None = None, mesh: Mesh | None = None
) -> SAE:
    """Reads a finished SAE.

    Args:
        path: folder of the SAE, or of the training run that made it (its `final` is read); a file for formats
            that are one; a place on the Hugging Face hub, `org/name[@revision][:subfolder]`; a URL; or the
            name of a published release (`mergelab.sae.formats.sae_releases`), also as `release:id`.
        sae_id: name of the SAE in the release; of any other place, the folder or file in it.
        format: a name of `FORMATS`; found out from the files if omitted.
        mesh: splits the latents over its axis `latents`; of this library's own files each process then reads
            only what its devices hold. JAX's default device if None.

    Raises:
        CheckpointError: there is nothing there, nothing of a known format, or an unfinished run.
        SAEError: there is no such format.

    Example:
        >>> load_sae("gpt2-small-res-jb", "blocks.8.hook_resid_pre")                    # doctest: +SKIP
    """
    path = sae_path(path, sae_id)
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such file or folder")
    if format is None and (path / "final").is_dir():
        path = path / "final"
    kind = _format(format) if format is not None else _recognized(path)
    if mesh is not None and kind is FORMATS["mergelab"]:
        return read_own(path, mesh)
    try:
        found = kind.read(path)
    except SAEError as error:  # of the SAE, which does not know where it comes from
        raise CheckpointError(f"{path}: {error}") from error
    found = as_released(found, path)
    return found if mesh is None else place_sae(found, mesh)


def _recognized(path: Path) -> FileFormat:
    for kind in FORMATS.values():
        if kind.recognize(path):
            return kind
    if (path / "config.yaml").is_file() and (path / "checkpoints").is_dir():
        raise CheckpointError(
            f"{path}: the training run has not finished, so it has no final/; go on with mergelab sae train "
            "--resume"
        )
    if is_cross_layer(path):
        raise CheckpointError(
            f"{path}: holds a transcoder across layers; open it with "
            "mergelab.sae.load_cross_layer_transcoder, or name the file of one layer"
        )
    wanted = "; ".join(f"{name}: {kind.looks_for}" for name, kind in FORMATS.items())
    raise CheckpointError(
        f"{path}: not an SAE of a known format ({wanted}), nor a training run with final/; name its format"
    )


@writes_anywhere("path")
def save_sae(
    sae: SAE,
    path: str | Path | WorkFolder | NewFiles,
    format: str = "mergelab",
    *,
    overwrite: bool = False,
) -> None:
    """Writes a finished SAE.

    This library's own files can be written from devices of several processes, all of which then make this
    call; those of others are written by one process that has all of the SAE.

    Args:
        sae: SAE to write.
        path: a new folder, or a new file for formats that are one; or the locked place of one (`reserve`).
        format: a name of `FORMATS`.
        overwrite: permission, for this library's own files, to replace a folder that mergelab wrote.

    Raises:
        SAEError: there is no such format, or it cannot express this SAE.
        OutputError: the path is taken, is being written by another run, or cannot be written.
    """
    kind = _format(format)
    if kind is not FORMATS["mergelab"] and sae.config.sites != 1:
        raise refuse(format, f"a crosscoder of {sae.config.sites} sites", "'mergelab'")
    place = Path(path) if isinstance(path, str) else path
    if kind.write is write_own:
        write_own(sae.checked(), cast("Path | WorkFolder", place), overwrite=overwrite)
    else:
        kind.write(sae.checked(), place)


def reserve(path: str | Path, format: str, *, inputs: Iterable[str | Path] = ()) -> WorkFolder | NewFiles:
    """The place of an SAE's files: a context manager that checks it and holds its lock.

    Args:
        path: a new folder, or a new file for formats that are one.
        format: a name of `FORMATS`.
        inputs: files that are read, which the output must not endanger.

    Raises:
        SAEError: there is no such format.
        OutputError: on entering, that the path is taken or cannot be written.
    """
    return NewFiles([path], inputs=inputs) if _format(format).one_file else WorkFolder(path, inputs=inputs)


def _format(name: str) -> FileFormat:
    if name not in FORMATS:
        raise SAEError(
            f"there is no SAE format {name!r}{did_you_mean(name, FORMATS)}; "
            f"the formats are {', '.join(FORMATS)}."
        )
    return FORMATS[name]
