"""Models compared: how far weights moved and in which direction, what the base is, and what they compute."""

from typing import TYPE_CHECKING

from mergelab.lazy import lazy_names

if TYPE_CHECKING:
    from mergelab.merging.diff.comparison import LayerDiff, ModelDiff, TensorDiff
    from mergelab.merging.diff.descent import Descent
    from mergelab.merging.diff.diffing import diff_models
    from mergelab.merging.diff.measures import Relation, Relations
    from mergelab.merging.diff.spectra import Spectrum

__all__ = [
    "Descent",
    "LayerDiff",
    "ModelDiff",
    "Relation",
    "Relations",
    "Spectrum",
    "TensorDiff",
    "diff_models",
]

__getattr__, __dir__ = lazy_names(__name__)
