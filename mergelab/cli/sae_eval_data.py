"""`mergelab sae eval --data`: the reconstruction of stored activations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelab.cli.options import token_rule

if TYPE_CHECKING:
    from mergelab.activations import ActivationFiles
    from mergelab.sae.sae import SAE

__all__ = ["judge_files"]


def judge_files(source: Path, options: Mapping[str, Any]) -> tuple[dict[str, float], SAE]:
    """Reconstruction on stored activations, and the SAE as what it was judged."""
    import numpy as np

    from mergelab.activations import open_activation_files
    from mergelab.activations.stored_tokens import kept_of_files
    from mergelab.cli.options import open_sae
    from mergelab.errors import SAEError
    from mergelab.sae.evaluation.reconstruction import kept_reconstruction
    from mergelab.sae.sae import at_sites
    from mergelab.sae.subject_model import judging_rule
    from mergelab.sae.training.data import store_facts, written_rule

    sae = open_sae(source)
    if options["site"] or options["target_site"]:
        sae = at_sites(sae, options["site"], options["target_site"])
    data = list(options["data"])
    files = open_activation_files(data)
    if files.d_in != sae.d_in:
        raise SAEError(
            f"{source}: the SAE reads activations {sae.d_in} wide, but the data is "
            f"{files.d_in} wide; give activations of the site it was trained on."
        )
    facts = store_facts(data)
    found, reads = facts.get("site"), sae.config.reads
    if found is not None and reads is not None and found != reads[0]:
        raise SAEError(
            f"{source}: the SAE reads {reads[0]}, but the data is of {found}; give activations of its "
            "site, or say that it is to be judged there (--site)."
        )
    recorded, digest = sae.config.metadata.get("model_hash"), facts.get("model_hash")
    if None not in (recorded, digest) and recorded != digest and not options["any_model"]:
        raise SAEError(
            f"{source}: the SAE belongs to a model with SHA-256 {str(recorded)[:12]}..., but the data is of "
            f"one with {str(digest)[:12]}...; give activations of its model, or say that any model will do "
            "(--any-model)."
        )
    sae, target = _targets(source, sae, data, list(options["target_data"]))
    if target is not None and (target.rows, target.d_in) != (files.rows, sae.d_out):
        raise SAEError(
            f"{source}: the targets are {target.rows} rows, {target.d_in} wide, but the SAE writes "
            f"activations {sae.d_out} wide, and the data has {files.rows} rows; give the targets "
            "of the same tokens."
        )
    count = min(options["rows"] or files.rows, files.rows)
    batch = min(options["batch"], count)
    rule = token_rule(options, judging_rule(sae).strictest(written_rule(files)))
    rows = kept_of_files(files, rule, target)

    def pieces() -> Iterator[tuple[Any, Any, np.ndarray, np.ndarray]]:
        for start in range(0, count, batch):
            stop = min(start + batch, count)
            x = files.read(start, stop)
            y = x if target is None else target.read(start, stop)
            place = np.ones(len(x), bool) if rows.by_place is None else rows.by_place(start, stop)
            yield x, y, place & rows.short_enough(x, y), place

    both = kept_reconstruction(sae, pieces(), rows=batch, context=rows.context)
    found = both.kept.scalars()
    if both.every is not None:
        found["left_out"] = 1 - both.left_out.kept / both.left_out.rows
        found |= {f"{name}_all": value for name, value in both.every.scalars().items()}
    return found, sae


def _targets(
    source: Path, sae: SAE, data: list[str], target_data: list[str]
) -> tuple[SAE, ActivationFiles | None]:
    """What a transcoder is compared with, None for an autoencoder; and the SAE as the one it is."""
    import glob
    from dataclasses import replace

    from mergelab.activations import find_activation_files, open_activation_files
    from mergelab.errors import SAEError

    if target_data:
        if sae.is_autoencoder and sae.target_known:
            raise SAEError(
                f"{source}: the SAE is an autoencoder, which is compared with what it reads; omit "
                "--target-data."
            )
        config = sae.config
        if not sae.target_known:
            sae = replace(sae, config=replace(config, transcoder=True))
        return sae, open_activation_files(target_data)
    if sae.is_autoencoder:
        return sae, None
    writes = sae.config.writes
    if writes is not None:
        folders = sorted({file.parent for file in find_activation_files(data)})
        beside = [str(folder / f"{writes[0]}-*.safetensors") for folder in folders]
        if all((folder / "store.json").is_file() for folder in folders) and all(map(glob.glob, beside)):
            return sae, open_activation_files(beside)
    raise SAEError(
        f"{source}: the SAE is a transcoder ({sae.mapping()}), so its output is not to be "
        "compared with the data it reads; give what it is to write of the same tokens (--target-data)."
    )
