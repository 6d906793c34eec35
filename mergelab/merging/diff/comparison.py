"""What a comparison of models found: of tensors, layers and all together, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mergelab.merging.diff.descent import Descent
from mergelab.merging.diff.measures import Relations
from mergelab.merging.diff.samples import DENSITIES, EDGES
from mergelab.merging.diff.settings import SettingsDiff
from mergelab.merging.diff.spectra import Spectrum

if TYPE_CHECKING:
    from mergelab.merging.diff.on_text import TextDiff

__all__ = ["LayerDiff", "ModelDiff", "MovedRow", "TensorDiff"]


@dataclass(frozen=True)
class TensorDiff:
    """What was found of one tensor.

    Attributes:
        name: Name in the first model.
        shape: Shape that is compared.
        dtypes: Stored dtype of each model's.
        relations: Relative changes, cosines and norms.
        spread: Standard deviation of the second model's entries, from a sample.
        below_spread: Fraction of entries that changed by less than a hundredth of the spread, from a sample.
        histogram: Fractions of entries by size of the change, one for each bin of `EDGES`, from a sample.
        sign_conflict: Fraction of entries in which trimmed task vectors disagree, for each of `DENSITIES`;
            empty with fewer than two task vectors.
        spectra: Spectrum of each change from the base, or of the first model from the second, by model.
    """

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    relations: Relations
    spread: float | None
    below_spread: float | None
    histogram: tuple[float, ...]
    sign_conflict: tuple[float, ...]
    spectra: Mapping[str, Spectrum]


@dataclass(frozen=True)
class LayerDiff:
    """The tensors of one layer together.

    Attributes:
        layer: Name, such as `model.layers.3`.
        relations: Relative changes, cosines and norms of all of them as one vector.
        sign_conflict: Mean over its tensors, weighted by their sizes.
    """

    layer: str
    relations: Relations
    sign_conflict: tuple[float, ...]


@dataclass(frozen=True)
class MovedRow:
    """A row of an embedding that moved.

    Attributes:
        tensor: Name of the embedding.
        row: Its number in the first model; that of the token where models number tokens differently.
        token: The token; None without a tokenizer.
        relative_change: Norm of the change between the first two models, over that of the row in the base, or
            in the second model.
    """

    tensor: str
    row: int
    token: str | None
    relative_change: float


@dataclass(frozen=True)
class ModelDiff:
    """A comparison of models.

    Attributes:
        models: Names, in the order given; a base that was given apart comes last.
        base: Model that task vectors are from; None where there is none.
        descent: What the weights say of the base.
        total: All tensors together.
        layers: Layers, in the order of their numbers.
        tensors: Tensors, in the order of the first model.
        moved_rows: Rows of embeddings that moved most, the farthest first.
        settings: Small files of each model against those of the base, or of the first against the second.
        lacking: Names of tensors that not all models have, by a model that has them.
        notes: Sentences about what is not compared.
        on_text: Activations and losses on a text; None where none was given.
        nbytes: Bytes of the tensors that were compared, of all models.
    """

    models: tuple[str, ...]
    base: str | None
    descent: Descent
    total: Relations
    layers: tuple[LayerDiff, ...]
    tensors: tuple[TensorDiff, ...]
    moved_rows: tuple[MovedRow, ...]
    settings: tuple[SettingsDiff, ...]
    lacking: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...]
    on_text: TextDiff | None
    nbytes: int

    def as_data(self) -> dict[str, Any]:
        """Plain data, as `mergelab diff --json` prints it."""
        return {
            "models": list(self.models),
            "base": asdict(self.descent) | {"base": self.base},
            **_relations_data(self.total),
            "tensors": [_tensor_data(tensor) for tensor in self.tensors],
            "layers": [
                {"layer": layer.layer, **_relations_data(layer.relations), **_conflict(layer.sign_conflict)}
                for layer in self.layers
            ],
            "histogram_edges": list(EDGES),
            "moved_rows": [asdict(row) for row in self.moved_rows],
            "settings": [asdict(each) for each in self.settings],
            "lacking": {model: list(names) for model, names in self.lacking.items()},
            "notes": list(self.notes),
            "text": None if self.on_text is None else self.on_text.as_data(),
        }


def _relations_data(relations: Relations) -> dict[str, Any]:
    """The first pair's numbers on top, so that two models read simply; further pairs in lists."""
    first = asdict(relations.first)
    found: dict[str, Any] = {
        **{key: value for key, value in first.items() if key not in ("model", "other")},
        "entries": relations.entries,
        "equal": relations.equal,
        "unchanged": relations.unchanged,
        "below_1e-3": relations.small,
        "nonfinite": relations.nonfinite,
    }
    if len(relations.pairs) > 1:
        found["pairs"] = [asdict(pair) for pair in relations.pairs]
    if relations.tasks:
        found["task_vectors"] = [asdict(task) for task in relations.tasks]
    if relations.task_cosines:
        found["task_cosines"] = [
            {"model": a, "other": b, "cosine": cosine} for a, b, cosine in relations.task_cosines
        ]
    return found


def _conflict(shares: Sequence[float]) -> dict[str, Any]:
    if not shares:
        return {}
    return {
        "sign_conflict": {f"{density:g}": share for density, share in zip(DENSITIES, shares, strict=True)}
    }


def _tensor_data(tensor: TensorDiff) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": tensor.name,
        "shape": list(tensor.shape),
        "dtypes": list(tensor.dtypes),
        **_relations_data(tensor.relations),
        "spread": tensor.spread,
        "below_spread": tensor.below_spread,
        "histogram": list(tensor.histogram),
        **_conflict(tensor.sign_conflict),
    }
    if tensor.spectra:
        found["spectra"] = {
            model: asdict(s) | {"energy": {str(k): share for k, share in s.energy.items()}}
            for model, s in tensor.spectra.items()
        }
    return found
