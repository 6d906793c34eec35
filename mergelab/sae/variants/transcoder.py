"""Transcoders: read one activation and reconstruct another, such as an MLP's output from its input.

Dunefsky et al., arXiv 2406.11944; with `skip`, a linear path beside the latents (Paulo et al., arXiv
2501.18823).
"""

from __future__ import annotations

from typing import Any

from mergelab.sae.variants.top_k import TopK
from mergelab.sae.variants.variant import Variant

__all__ = ["transcoder"]


def transcoder(
    d_in: int, d_out: int, n_latents: int, *, kind: type[Variant] = TopK, skip: bool = False, **options: Any
) -> Variant:
    """A transcoder: any kind of sparse code, with a target of its own.

    Args:
        d_in: width of the activation that is read.
        d_out: width of the one that is reconstructed.
        n_latents: how many latents.
        kind: the kind of code.
        skip: adds `x @ skip`, a `[d_in, d_out]` matrix that starts at zero.
        **options: of the kind, such as `k`.
    """
    return kind(d_in=d_in, n_latents=n_latents, d_out=d_out, skip=skip, **options)
