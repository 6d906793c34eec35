"""Model types that are not supported: the family that each is nearest to in truth, and what sets it apart.

Names mislead: `vaultgemma` normalizes less than Gemma 2, and `falcon_mamba` is Mamba with norms inside. Facts
are those of the modeling files of transformers 5.24.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from mergelab.errors import did_you_mean

__all__ = ["NEAREST", "nearest"]

NEAREST: Mapping[str, tuple[str, str]] = {
    # Encoders.
    "albert": ("bert", "its layers share their weights"),
    "deberta": ("bert", "its attention also reads relative positions"),
    "electra": ("bert", "its embeddings may be narrower than its layers"),
    "nomic_bert": ("bert", "its positions are rotated and its layers are gated"),
    # Like GPT-2.
    "gpt_bigcode": ("gpt2", "its heads share one key and value"),
    "mpt": ("gpt2", "its attention adds a bias by distance in place of positions"),
    "xglm": ("gpt2", "its positions are sines"),
    # Like GPT-NeoX.
    "codegen": ("gpt_neox", "it rotates neighboring components and its projections are fused otherwise"),
    "persimmon": ("gpt_neox", "it normalizes queries and keys"),
    # Like Llama.
    "arcee": ("llama", "its layers are not gated and square their activation"),
    "exaone4": ("llama", "it normalizes queries, keys and what layers add"),
    "internlm2": ("llama", "its projections are fused"),
    "nemotron": ("llama", "its norms center and its layers square their activation"),
    # Like Mistral.
    "ministral": ("mistral", "its windows differ by layer"),
    # With experts.
    "dbrx": ("mixtral", "its norms center and its projections are fused"),
    "granitemoe": (
        "mixtral",
        "it multiplies embeddings, scores, layers and logits by constants of its config",
    ),
    "olmoe": ("mixtral", "it normalizes queries and keys"),
    "phimoe": ("mixtral", "its norms center and it chooses experts otherwise"),
    # With recurrent layers.
    "bamba": ("mamba2", "some of its layers are attention, and each has a feed-forward layer"),
    "falcon_h1": ("mamba2", "attention stands beside each of its layers"),
    "falcon_mamba": ("mamba", "it normalizes what steps, writing and reading are made of"),
    "nemotron_h": ("mamba2", "its layers take turns with attention, feed-forward layers and experts"),
    # Like Gemma.
    "gemma3n_text": ("gemma3_text", "it keeps several streams and embeddings per layer"),
    "vaultgemma": ("gemma2", "it does not normalize what layers add"),
}
"""By `model_type`: the nearest family, and in what it differs from that."""


def nearest(kind: str, families: Collection[str]) -> str:
    """Half a sentence on the nearest family, `""` where none is known to be near.

    A near name is offered only where it may be a slip of the pen.
    """
    if kind in NEAREST:
        family, difference = NEAREST[kind]
        return f" (nearest to {family!r}, but {difference})"
    slip = did_you_mean(kind, families)
    return slip if any(abs(len(kind) - len(name)) < 2 and f"{name!r}" in slip for name in families) else ""
