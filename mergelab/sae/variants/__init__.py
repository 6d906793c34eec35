"""Kinds of sparse autoencoders, one file each: hyper-parameters, how codes are made, what is minimized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from mergelab.errors import SAEError, did_you_mean, quoted
from mergelab.sae.variants.abs_top_k import AbsTopK
from mergelab.sae.variants.batch_top_k import BatchTopK
from mergelab.sae.variants.gated import Gated
from mergelab.sae.variants.group_max import GroupMax
from mergelab.sae.variants.jump_relu import JumpReLU
from mergelab.sae.variants.matryoshka import Matryoshka
from mergelab.sae.variants.options import checked_options
from mergelab.sae.variants.relu import ReLU
from mergelab.sae.variants.top_k import MultiTopK, TopK, crosscoder, transcoder
from mergelab.sae.variants.variant import Context, Encoded, Outcome, SAEParams, Variant

__all__ = [
    "VARIANTS",
    "AbsTopK",
    "BatchTopK",
    "Context",
    "Encoded",
    "Gated",
    "GroupMax",
    "JumpReLU",
    "Matryoshka",
    "MultiTopK",
    "Outcome",
    "ReLU",
    "SAEParams",
    "TopK",
    "Variant",
    "crosscoder",
    "make_variant",
    "transcoder",
]

VARIANTS: Mapping[str, type[Variant]] = {
    kind.name: kind
    for kind in (TopK, MultiTopK, BatchTopK, JumpReLU, Gated, ReLU, Matryoshka, AbsTopK, GroupMax)
}
"""Variants by the name a configuration gives them."""


def make_variant(name: str, /, **options: Any) -> Variant:
    """The variant of this name with these hyper-parameters.

    Raises:
        SAEError: there is no such variant, it has no such option, or a value is out of range.
    """
    if name not in VARIANTS:
        raise SAEError(
            f"there is no SAE variant {quoted(name)}{did_you_mean(name, VARIANTS)}; "
            f"the variants are {', '.join(VARIANTS)}."
        )
    known = [option.name for option in fields(VARIANTS[name])]
    for option in options:
        if option not in known:
            raise SAEError(
                f"the SAE variant {name!r} has no option {quoted(option)}{did_you_mean(option, known)}; "
                f"its options are {', '.join(known)}."
            )
    missing = [option for option in ("d_in", "n_latents") if option not in options]
    if missing:
        raise SAEError(f"the SAE variant {name!r} needs {' and '.join(missing)}.")
    return VARIANTS[name](**checked_options(VARIANTS[name], options, "", most=2**200))
