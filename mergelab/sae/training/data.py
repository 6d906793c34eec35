"""Opens what the `data` section of a configuration names."""

from __future__ import annotations

from dataclasses import fields

from mergelab.activations import ActivationSource, open_activation_files
from mergelab.activations.capture import DEFAULT_CONTEXT, open_model_activations
from mergelab.errors import SAEError, did_you_mean, shortened
from mergelab.sae.config import DataSection
from mergelab.sae.memory import machine_memory, readable_bytes
from mergelab.sae.options import checked_options
from mergelab.sae.toy import ToyTruth

__all__ = ["open_data"]


def open_data(section: DataSection, tokens: int) -> tuple[ActivationSource, ActivationSource | None]:
    """The activations, and the targets where they are others.

    Args:
        section: of the configuration.
        tokens: how many rows a generated source should have, if the section does not say.

    Raises:
        CheckpointError: files are missing or malformed.
        SAEError: the section lacks what its kind needs.
    """
    if section.kind == "toy":
        known = [option.name for option in fields(ToyTruth)]
        for name in section.toy:
            if name not in known:
                raise SAEError(f"data.toy.{shortened(name)} is not a known key{did_you_mean(name, known)}.")
        options = checked_options(ToyTruth, section.toy, "data.toy.", most=2**53)
        truth = ToyTruth(**{"rows": tokens, **options})
        # Its features, and the order of its blocks of rows.
        needed = 12 * truth.n_features * truth.d_in + truth.rows // 64
        if needed > machine_memory():
            raise SAEError(
                f"data.toy of {truth.n_features:,} features, {truth.d_in:,} wide, and {truth.rows:,} rows "
                f"takes {readable_bytes(needed)}, more than this machine has; lower n_features, d_in or rows."
            )
        return truth, None
    if section.kind == "model":
        for name in ("model", "site", "text"):
            if getattr(section, name) is None:
                raise SAEError(f"data.{name} is missing: data of kind 'model' needs model, site and text.")
        assert section.model is not None and section.site is not None and section.text is not None
        sites = [section.site, *([section.target_site] if section.target_site else [])]
        texts = [section.text] if isinstance(section.text, str) else section.text
        # A file that repeats the default asks for no more than one that leaves it out.
        length = None if section.context == DEFAULT_CONTEXT else section.context
        found = open_model_activations(section.model, sites, texts, length=length)
        return found.at(section.site), found.at(section.target_site) if section.target_site else None
    if section.path is None:
        raise SAEError("data.path is missing: data of kind 'files' needs the files' path or glob.")
    target = None if section.target_path is None else open_activation_files(section.target_path)
    return open_activation_files(section.path), target
