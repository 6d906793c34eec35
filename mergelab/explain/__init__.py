"""What a merge did, in features: latents that parents gained, their fate, and whether it matters."""

from typing import TYPE_CHECKING

from mergelab.lazy import lazy_names

if TYPE_CHECKING:
    from mergelab.explain.changes import Changes, find_changes, retained
    from mergelab.explain.explanation import Explanation, GainedLatent, SpecialistStory
    from mergelab.explain.fates import FATES, fate_of
    from mergelab.explain.pipeline import explain_merge
    from mergelab.explain.restoration import Restoration

__all__ = [
    "FATES",
    "Changes",
    "Explanation",
    "GainedLatent",
    "Restoration",
    "SpecialistStory",
    "explain_merge",
    "fate_of",
    "find_changes",
    "retained",
]

__getattr__, __dir__ = lazy_names(__name__)
