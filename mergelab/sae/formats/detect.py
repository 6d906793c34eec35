"""Finds out which library wrote an SAE, and reads it; writes one for another library."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

from jax.sharding import Mesh

from mergelab.checkpoints.locations import exists
from mergelab.checkpoints.new_files import NewFiles
from mergelab.checkpoints.publish import WorkFolder
from mergelab.checkpoints.remote_output import writes_anywhere
from mergelab.errors import CheckpointError, SAEError, did_you_mean
from mergelab.sae.formats.circuit_tracer import CIRCUIT_TRACER
from mergelab.sae.formats.cross_layer import CROSS_LAYER
from mergelab.sae.formats.dictionary_learning import DICTIONARY_LEARNING
from mergelab.sae.formats.file_format import FileFormat, Files, Found, open_weights
from mergelab.sae.formats.gemma_scope import GEMMA_SCOPE, GEMMA_SCOPE_2
from mergelab.sae.formats.llama_scope import LLAMA_SCOPE
from mergelab.sae.formats.many import one_of
from mergelab.sae.formats.openai import OPENAI
from mergelab.sae.formats.own import OWN, read_own, write_own
from mergelab.sae.formats.releases import as_released, overrides_at, sae_path
from mergelab.sae.formats.saelens import SAELENS
from mergelab.sae.formats.shared import refuse
from mergelab.sae.formats.sparsify import SPARSIFY
from mergelab.sae.formats.torch_files import TORCH_RELEASE
from mergelab.sae.sae import SAE, place_sae

__all__ = ["FORMATS", "FileFormat", "load_sae", "recognized", "reserve", "save_sae"]

FORMATS: Mapping[str, FileFormat] = {
    kind.name: kind
    for kind in (
        OWN, CROSS_LAYER, LLAMA_SCOPE, SAELENS, SPARSIFY, DICTIONARY_LEARNING, OPENAI, GEMMA_SCOPE,
        GEMMA_SCOPE_2, TORCH_RELEASE, CIRCUIT_TRACER,
    )
}  # fmt: skip
"""Formats by name; the first whose signature a place has is the one it is read as."""


def load_sae(
    path: str | Path, sae_id: str | None = None, *, format: str | None = None, mesh: Mesh | None = None
) -> SAE:
    """Reads a finished SAE.

    Who wrote it is found out from the names of its tensors and the keys of its settings, not from the names
    of the files.

    Args:
        path: folder of the SAE, or of the training run that made it (its `final` is read); its weights file;
            a folder with several SAEs; a place on the Hugging Face hub, `org/name[@revision][:subfolder]`; a
            URL; or a published release (`mergelab.sae.sae_releases`), also with its SAE, `release:id`.
        sae_id: name of the SAE in the release; of several SAEs in a folder the folder or file of one, such as
            `layers.5`, or its site.
        format: a name of `FORMATS`; found out from the files if omitted.
        mesh: splits the latents over its axis `latents`; of this library's own files each process then reads
            only what its devices hold. JAX's default device if None.

    Raises:
        CheckpointError: there is nothing there, nothing of a known format, several SAEs of which none is
            named, or an unfinished run.
        SAEError: there is no such format.

    Example:
        >>> load_sae("gpt2-small-res-jb", "blocks.8.hook_resid_pre")                    # doctest: +SKIP
    """
    if not exists(Path(path)):
        path, sae_id = sae_path(path, sae_id), None
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such file or folder")
    wanted = None if format is None else _format(format)
    if wanted is None and sae_id is None and (path / "final").is_dir():
        path = path / "final"
    kind, found = _chosen(path, sae_id, wanted)
    if mesh is not None and kind is OWN:
        return read_own(found, mesh)
    try:
        sae = as_released(kind.read(replace(found, overrides=overrides_at(path))), path)
    except SAEError as error:  # of the SAE, which does not know where it comes from
        raise CheckpointError(f"{path}: {error}") from error
    return sae if mesh is None else place_sae(sae, mesh)


def _chosen(path: Path, sae_id: str | None, wanted: FileFormat | None) -> tuple[FileFormat, Found]:
    """The format of a place, or of one SAE in it, and its files."""
    if sae_id is None:
        files = Files(path)
        if wanted is not None:
            return wanted, wanted.find(files) or wanted.expected(files)
        if (found := recognized(files)) is not None:
            return found
        _refuse_unfinished(path)
    found = one_of(path, sae_id, recognized)
    if found is not None and wanted is not None:
        return wanted, found[1]
    if found is not None:
        return found
    if path.is_file():
        open_weights(path)  # which says what is wrong with it, if it is not a file of weights at all
    known = "; ".join(f"{name}: {kind.looks_for}" for name, kind in FORMATS.items())
    raise CheckpointError(
        f"{path}: not an SAE of a known format ({known}), nor a training run with final/; name its format"
    )


def recognized(files: Files) -> tuple[FileFormat, Found] | None:
    """The format of the files at a place, and which of them it reads; None if it is of no known format.

    Where no signature fits, files that are called like those of a format are taken for it, so that what is
    missing in them can be named.

    Raises:
        CheckpointError: there are several SAEs at the place, or its settings are not JSON.
    """
    usual = {kind.weights for kind in FORMATS.values()}
    for kind in FORMATS.values():
        if (found := kind.find(files, usual)) is not None:
            return kind, found
    for kind in FORMATS.values():
        if kind is OWN:  # its settings alone say that it is
            continue
        expected = kind.expected(files)
        complete = kind.settings is None or expected.settings.is_file()
        if expected.weights.name == kind.weights and expected.weights.is_file() and complete:
            return kind, expected
    return None


def _refuse_unfinished(path: Path) -> None:
    if (path / "config.yaml").is_file() and (path / "checkpoints").is_dir():
        raise CheckpointError(
            f"{path}: the training run has not finished, so it has no final/; go on with mergelab sae train "
            "--resume"
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
    if kind is not OWN and sae.config.sites != 1:
        raise refuse(format, f"a crosscoder of {sae.config.sites} sites", "'mergelab'")
    place = Path(path) if isinstance(path, str) else path
    if kind is OWN:
        write_own(sae.checked(), cast("Path | WorkFolder", place), overwrite=overwrite)
    elif kind.write is None:
        writable = ", ".join(repr(name) for name, other in FORMATS.items() if other.write is not None)
        raise SAEError(f"SAEs of the format {format!r} can be read, not written; export to {writable}.")
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
