"""How files spell a model's tensors: saved without a head, by trainers, inside a wrapper, or years ago.

A family's table gives one spelling, that of transformers' model with a language-model head. Files differ in
what stands before the names: nothing (saved from the base class: `layers.0...`), `module.` or `_orig_mod.`
(wrapped for several devices, or compiled), or the way to the text tower of a model that also sees or hears
(`language_model.model.`, since transformers 5 `model.language_model.`). A `Spelling` is found by where the
embedding stands, and the table follows it, so that whatever reads the table reads the file.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable
from dataclasses import dataclass

__all__ = [
    "BUFFERS",
    "OTHER_HEADS",
    "Spelling",
    "has_old_norms",
    "in_todays_spelling",
    "is_buffer",
    "is_other_head",
    "spelling_of",
]

BUFFERS = (
    "*rotary_emb.inv_freq",
    "*rotary_emb.*_cached",
    "*.attn.masked_bias",
    "*.attention.masked_bias",
    "*embeddings.position_ids",
    "position_ids",
    "*embeddings.token_type_ids",
)
"""Tensors that modules compute from their configuration, and that some versions of transformers stored."""

_MASKS = ("*.attn.bias", "*.attention.bias")

OTHER_HEADS = (
    "score.*",
    "classifier.*",
    "pre_classifier.*",
    "text_projection.*",
    "classification_head.*",
    "regression_head.*",
    "reward_head.*",
    "rm_head.*",
    "v_head.*",
    "value_head.*",
    "critic_head.*",
    "qa_outputs.*",
    "multiple_choice_head.*",
    "sequence_summary.*",
    "medusa_head.*",
    "pooler.*",
    "cls.*",
)
"""Heads that take the place of the language model's, or stand beside it."""


_NORMS = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))
"""Today's names of a norm's parameters, and those of the first BERT files."""


def has_old_norms(names: Iterable[str]) -> bool:
    """Whether a file calls the weights of its norms `gamma`, as the first BERT files."""
    return any(name.endswith("LayerNorm.gamma") for name in names)


def in_todays_spelling(name: str) -> str:
    """A tensor's name with `weight` and `bias` for a norm's `gamma` and `beta`."""
    return next((name.removesuffix(old) + new for new, old in _NORMS if name.endswith(old)), name)


def is_buffer(name: str, rank: int | None = None) -> bool:
    """Whether a tensor is computed from the configuration wherever it is needed, so that none must be stored.

    Args:
        name: the tensor's name, in whatever family.
        rank: its number of axes, where known. The causal masks of GPT-2 and GPT-NeoX (`attn.bias`) are named
            as biases are, but have more than one axis.
    """
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in BUFFERS):
        return True
    return rank != 1 and any(fnmatch.fnmatchcase(name, pattern) for pattern in _MASKS)


def is_other_head(name: str) -> bool:
    """Whether a tensor, named without what stands before it, belongs to a head that is not loaded."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in OTHER_HEADS)


@dataclass(frozen=True)
class Spelling:
    """What stands before the names of a file.

    Attributes:
        prefix: what the family's table puts before the names of the base model; may be empty.
        lead: what the file puts there.
        head: what the file puts before the other names, those of the head.
        old_norms: whether norms have `gamma` and `beta`, as the first BERT files.
    """

    prefix: str = ""
    lead: str = ""
    head: str = ""
    old_norms: bool = False

    @property
    def is_standard(self) -> bool:
        """Whether the file spells names as the table does."""
        return self == Spelling(self.prefix, self.prefix)

    @property
    def is_bare(self) -> bool:
        """Whether the file was saved from the base class, which puts nothing before its names."""
        return bool(self.prefix) and not self.lead

    def in_file(self, name: str) -> str:
        """A name of the table (or a pattern of several) as the file spells it."""
        if self.old_norms:
            for new, old in _NORMS:
                name = name.replace(new, old)
        inside = name.startswith(self.prefix)
        return self.lead + name.removeprefix(self.prefix) if inside else self.head + name

    def readings(self, name: str) -> tuple[str, ...]:
        """What a name of the file may mean: as a name of the base model, and as one beside it."""
        found = [self.prefix + name.removeprefix(self.lead)] if name.startswith(self.lead) else []
        if name.startswith(self.head):
            found.append(name.removeprefix(self.head))
        return tuple(dict.fromkeys(found))


def spelling_of(names: Collection[str], table: Iterable[str], prefix: str, embedding: str) -> Spelling:
    """The spelling of a file.

    Args:
        names: the names of its tensors.
        table: the names of the family's table.
        prefix: what the table puts before the names of the base model.
        embedding: the table's name of the embedding, by which the place of the model is found.
    """
    old_norms = has_old_norms(names)
    leads = _leads(names, embedding.removeprefix(prefix))
    if prefix in leads or (len(leads) != 1 and "" not in leads):
        return Spelling(prefix, prefix, old_norms=old_norms)
    lead = leads.pop() if len(leads) == 1 else ""
    heads = {head for name in table if not name.startswith(prefix) for head in _leads(names, name)}
    before = lead.removesuffix(prefix) if prefix and lead.endswith(prefix) else ""
    return Spelling(prefix, lead, heads.pop() if prefix and len(heads) == 1 else before, old_norms)


def _leads(names: Iterable[str], end: str) -> set[str]:
    """What stands before the names that end so."""
    return {name[: -len(end)] for name in names if name == end or name.endswith("." + end)}
