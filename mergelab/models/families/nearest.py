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
    "camembert": ("bert", "its positions start after the padding id"),
    "deberta": ("bert", "its attention also reads relative positions"),
    "deberta-v2": ("bert", "its attention also reads relative positions"),
    "distilbert": ("bert", "it has no segments and other names"),
    "electra": ("bert", "its embeddings may be narrower than its layers"),
    "modernbert": ("bert", "its positions are rotated, its norms come first and its layers are gated"),
    "mpnet": ("bert", "its attention adds a bias by relative position"),
    "neobert": ("bert", "its positions are rotated, its norms come first and its layers are gated"),
    "nomic_bert": ("bert", "its positions are rotated and its layers are gated"),
    "roberta": ("bert", "its positions start after the padding id"),
    "xlm-roberta": ("bert", "its positions start after the padding id"),
    # Like GPT-2.
    "bloom": ("gpt2", "its attention adds a bias by distance in place of positions"),
    "gpt_bigcode": ("gpt2", "its heads share one key and value"),
    "gpt_neo": ("gpt2", "every other layer sees a window, and scores are not scaled"),
    "mpt": ("gpt2", "its attention adds a bias by distance in place of positions"),
    "opt": ("gpt2", "its positions start at 2 and its activation is ReLU"),
    "xglm": ("gpt2", "its positions are sines"),
    # Like GPT-NeoX.
    "codegen": ("gpt_neox", "it rotates neighboring components and its projections are fused otherwise"),
    "falcon": ("gpt_neox", "its heads share keys and values and its projections are fused otherwise"),
    "gptj": ("gpt_neox", "it rotates neighboring components and has one norm a block"),
    "persimmon": ("gpt_neox", "it normalizes queries and keys"),
    # Like Llama.
    "arcee": ("llama", "its layers are not gated and square their activation"),
    "exaone4": ("llama", "it normalizes queries, keys and what layers add"),
    "internlm2": ("llama", "its projections are fused"),
    "llama4_text": ("llama", "it has experts and layers without rotation"),
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
    "gemma4_text": ("gemma3_text", "heads differ by layer"),
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
