"""What a `cfg.json` of SAELens says, of any version from 3 to 6."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergelab.errors import CheckpointError
from mergelab.sae.formats.hook_names import site_of
from mergelab.sae.formats.settings import FormatSettings, faults_at_once

__all__ = ["OF_THE_MODEL", "SaeLensSettings", "read_settings"]

_ACTIVATIONS = {
    "standard": "relu", "gated": "gated", "topk": "topk", "jumprelu": "jump_relu", "abstopk": "abs_topk",
    "batchtopk": "batch_topk", "matryoshka_batchtopk": "batch_topk", "transcoder": "relu",
    "skip_transcoder": "relu", "jumprelu_transcoder": "jump_relu", "jumprelu_skip_transcoder": "jump_relu",
}  # fmt: skip
"""Architectures that are read; batch-top-k stands in checkpoints of a training, never in finished SAEs."""

_NORMALIZATIONS = {
    "none": "none",
    "layer_norm": "layer_norm",
    "constant_norm_rescale": "constant_norm",
    "expected_average_only_in": "expected_average",
    "covariance_whitening": "whitening",
}
OF_THE_MODEL = (
    "model_name", "hook_name", "model_class_name", "hook_head_index", "model_from_pretrained_kwargs",
    "prepend_bos", "exclude_special_tokens", "neuronpedia_id", "context_size", "seqpos_slice", "dataset_path",
    "sae_lens_version", "sae_lens_training_version", "hook_name_out", "hook_head_index_out", "hf_hook_name",
    "hf_hook_name_out",
)  # fmt: skip
"""What versions before 6 say beside the architecture, and version 6 under `metadata`."""


@dataclass(frozen=True)
class SaeLensSettings:
    """How the tensors of a file are used.

    Attributes:
        architecture: name in SAELens; older files that say `standard` with a top-k function are `topk`.
        activation: name of our activation function.
        k: latents per token, where the file says a whole number.
        maps: whether it is a transcoder.
        skip: whether it has a skip path.
        subtract_b_dec: whether `b_dec` is subtracted from the input.
        rescale: whether codes count in units of the decoder's norms.
        normalization: one of ours, or `expected_average` or `whitening`, which a file folds into its weights.
        norm_scaling: factor of `expected_average`, where the file says it.
        sites: `reads`, `writes`, `transcoder` and `metadata` of our configuration.
        sizes: `d_in`, `d_sae` and, of transcoders, `d_out`, as far as the file says them.
    """

    architecture: str
    activation: str
    k: int | None
    maps: bool
    skip: bool
    subtract_b_dec: bool
    rescale: bool
    normalization: str
    norm_scaling: float | None
    sites: Mapping[str, Any]
    sizes: Mapping[str, Any]

    @property
    def trains(self) -> bool:
        """Whether the file is a checkpoint of a batch-top-k training, which keeps one running threshold."""
        return self.activation == "batch_topk"


def read_settings(told: FormatSettings) -> SaeLensSettings:
    """What the settings say.

    Raises:
        CheckpointError: an architecture, function or normalization that is not supported, a value of the
            wrong type, or a top-k function without k.
    """
    with faults_at_once(told) as told:
        return _settings(told)


def _settings(told: FormatSettings) -> SaeLensSettings:
    cfg = told.values
    _refuse_temporal(told)
    architecture = told.word("architecture", _ACTIVATIONS, "standard")
    kwargs = told.inner("activation_fn_kwargs") if cfg.get("activation_fn_kwargs") else None
    function = _function(told, kwargs)
    if function == "topk" and architecture == "standard":  # versions 3 to 5
        architecture = "topk"
    activation = _ACTIVATIONS[architecture]
    if function == "topk" and activation != "topk":
        told.refuse(f"activation_fn is 'topk', but the architecture is {architecture!r}")
    maps = "transcoder" in architecture
    if maps and told.flag("apply_b_dec_to_input", False):
        told.refuse("apply_b_dec_to_input is true, which SAELens has for no transcoder")
    k = cfg.get("k")
    if activation in ("topk", "abs_topk"):
        k = kwargs.whole("k") if kwargs is not None and "k" in kwargs.values else told.whole("k")
    elif activation == "batch_topk":
        k = int(k) if isinstance(k, int | float) and 1 <= k < 2**31 and k == int(k) else None
    else:
        k = None
    sizes = ("d_in", "d_sae", "d_out") if maps else ("d_in", "d_sae")
    return SaeLensSettings(
        architecture,
        activation,
        k,
        maps,
        "skip" in architecture,
        told.flag("apply_b_dec_to_input", not maps),
        told.flag("rescale_acts_by_decoder_norm", activation == "batch_topk") and "topk" in architecture,
        _normalization(told),
        told.positive("norm_scaling_factor") if cfg.get("norm_scaling_factor") is not None else None,
        _sites(told, maps),
        {name: cfg.get(name) for name in sizes},
    )


def _refuse_temporal(told: FormatSettings) -> None:
    if told.values.get("architecture") == "temporal":
        raise CheckpointError(
            f"{told.path}: architecture is 'temporal', whose codes of a token depend on the tokens before it "
            "through attention layers of its own; an SAE here maps each token alone, so use SAELens for it"
        )


def _function(told: FormatSettings, kwargs: FormatSettings | None) -> str:
    """The activation function of versions before 6: `relu`, or `topk` with its k beside."""
    key = "activation_fn_str" if told.values.get("activation_fn_str") is not None else "activation_fn"
    function = told.word(key, ("relu", "topk"), "relu")
    if kwargs is not None and kwargs.flag("signed", False):
        told.refuse("activation_fn_kwargs.signed is true, which SAELens itself does not compute")
    return function


def _normalization(told: FormatSettings) -> str:
    said = told.values.get("normalize_activations")
    if said is None or said is False:  # before version 6
        return "none"
    if said is True:
        return "expected_average"
    return _NORMALIZATIONS[told.word("normalize_activations", _NORMALIZATIONS)]


def _sites(told: FormatSettings, maps: bool) -> dict[str, Any]:
    """`reads`, `writes`, `transcoder` and `metadata` of a configuration, whose hooks become sites."""
    cfg, own = told.values, told.mapping("metadata")
    said = {key: cfg[key] for key in OF_THE_MODEL if cfg.get(key) is not None}
    older = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index"}
    said |= {new: cfg[old] for old, new in older.items() if cfg.get(old) is not None and new not in said}
    metadata = {**said, **own}
    if _before_6(metadata.get("sae_lens_version")) and not own:
        metadata.setdefault("prepend_bos", True)  # what those versions did where the file says nothing
    hook, target = metadata.get("hook_name"), metadata.get("hook_name_out")
    # A dictionary of one head reads a part of the site.
    reads = site_of(hook) if metadata.get("hook_head_index") is None else None
    writes = site_of(target) if metadata.get("hook_head_index_out") is None else None
    reads, writes = reads or site_of(metadata.get("site")), writes or site_of(metadata.get("target_site"))
    reshape = told.word("reshape_activations", ("none", "hook_z"), "none")
    if reshape == "hook_z" and reads is not None and not reads.endswith(".attn.z"):
        told.refuse(f"reshape_activations is 'hook_z', but hook_name is {hook!r}")
    if hook is not None and target is not None:
        maps = hook != target  # also where the hooks are not sites here
    known = reads is not None and writes is not None
    return {
        "reads": None if reads is None else (reads,),
        "writes": None if writes is None else (writes,),
        "transcoder": None if known else maps,
        "metadata": metadata,
    }


def _before_6(version: Any) -> bool:
    found = re.match(r"\d{1,4}", version) if isinstance(version, str) else None
    return found is None or int(found[0]) < 6
