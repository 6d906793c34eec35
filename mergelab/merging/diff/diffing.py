"""Models compared: their weights, streamed, and their small files; and with a text, what they compute."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mergelab.checkpoints.publish import WorkFolder
from mergelab.checkpoints.remote_output import writes_anywhere
from mergelab.errors import CheckpointError
from mergelab.merging.diff.block_sums import Sums
from mergelab.merging.diff.comparison import LayerDiff, ModelDiff, MovedRow, TensorDiff
from mergelab.merging.diff.descent import Descent, find_base
from mergelab.merging.diff.measures import Relations, added, relations_of
from mergelab.merging.diff.page import diff_files
from mergelab.merging.diff.pairs import MatchedTensor, Pairing, is_matrix, layer_of, pair_tensors
from mergelab.merging.diff.samples import change_shares, sign_conflict
from mergelab.merging.diff.settings import compare_settings, vocabulary_of
from mergelab.merging.diff.spectra import Spectrum, spectrum_of_change
from mergelab.merging.diff.streaming import Gathered, gather
from mergelab.merging.plan.input_models import FoundModel, find_models
from mergelab.merging.recipe.faults import Origin

if TYPE_CHECKING:
    from mergelab.models.streamed import Streaming

__all__ = ["diff_models"]

_ROWS = 10
_GUESS_SAMPLE = 1 << 14


@writes_anywhere()
def diff_models(
    *models: str | Path,
    base: str | Path | None = None,
    spectra: bool = False,
    text: str | Path | None = None,
    tokens: int | None = None,
    streamed: Streaming | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Callable[[int], object] = lambda nbytes: None,
) -> ModelDiff:
    """Compares models tensor by tensor, streamed: memory is a few megabytes for each thread.

    Sums are exact over all entries (products in float32, or float64 for wider weights, their sums in
    float64); histograms, spreads and sign conflicts are of 65,536 entries of each tensor, spread over it, or
    of all of a smaller one.

    Args:
        models: Two models or more, or one with a base: folders, weight files, hub ids, URLs, `model+adapter`.
        base: Model that the others were tuned from. If None it is looked for among three models or more.
        spectra: Whether the singular values of every change are found; takes minutes for large models.
        text: File of prose on which both first models are run: activations, outputs, losses between them.
        tokens: Tokens of the text that are read.
        streamed: How activations wait, where the models that the text is run on stay in their files
            (`mergelab.models.Streaming`); None to load them.
        out: Folder to write `page.html`, `figure.png` and `diff.json` to.
        overwrite: Whether a folder that mergelab wrote may be replaced.
        threads: Threads that read; as many as there are cores if None.
        progress: Function called with the number of bytes just read.

    Raises:
        CheckpointError: fewer than two models, no tensor in common, or a model that cannot be read.
        RecipeError: models that cannot be found, all named at once.
        OutputError: the folder cannot be written.

    Example:
        >>> diff_models("tuned", "base").total.first.relative_change               # doctest: +SKIP
        0.0132
    """
    given = None if base is None else str(base)
    paths = _named([*map(str, models), *([] if given is None or given in map(str, models) else [given])])
    names = list(paths)
    if len(names) < 2:
        raise CheckpointError(
            f"{len(names)} model to compare{''.join(f' ({name!r})' for name in names)}; name two, or one and "
            "its base"
        )
    found_models = find_models(dict.fromkeys(paths.values(), ()), Origin())
    with ExitStack() as stack:
        work: WorkFolder | None = None
        if out is not None:
            read = [path for model in found_models.values() for path in model.paths]
            read += [] if text is None else [Path(text)]
            work = stack.enter_context(WorkFolder(out, inputs=read, overwrite=overwrite))
            work.prepare()
        opened = {name: found_models[path] for name, path in paths.items()}
        found = _compare(opened, given, spectra, text, tokens, streamed, threads, progress)
        if work is not None:
            work.clear()
            for name, content in diff_files(found).items():
                (work.path / name).write_bytes(content)
            work.publish("")
    return found


def _named(paths: Sequence[str]) -> dict[str, str]:
    """Path of each model by its name: the path itself, with a number where one is given again."""
    found: dict[str, str] = {}
    for path in paths:
        again = sum(known == path for known in found.values())
        found[f"{path} ({again + 1})" if again else path] = path
    return found


def _compare(
    found_models: Mapping[str, FoundModel],
    given: str | None,
    spectra: bool,
    text: str | Path | None,
    tokens: int | None,
    streamed: Streaming | None,
    threads: int | None,
    progress: Callable[[int], object],
) -> ModelDiff:
    names = list(found_models)
    opened = {name: model.checkpoint for name, model in found_models.items()}
    notes: list[str] = []
    vocabularies: dict[str, Mapping[str, int]] = {}
    for name, checkpoint in opened.items():
        vocabulary, note = vocabulary_of(name, checkpoint)
        notes += [note] if note else []
        if vocabulary is not None:
            vocabularies[name] = vocabulary
    pairing = pair_tensors(opened, vocabularies)
    found = _of_weights(names, pairing, given, vocabularies.get(names[0]), spectra, threads, progress)
    against = found.base or names[1]
    settings = tuple(
        compare_settings((name, against), (opened[name], opened[against]), vocabularies)
        for name in names
        if name != against
    )
    found = replace(found, settings=settings, notes=(*notes, *found.notes))
    if text is None:
        return found
    from mergelab.merging.diff.on_text import compare_on_text  # the forward pass takes a second to import

    first, second = names[:2]
    pair = opened[first], opened[second]
    measured = compare_on_text((first, second), pair, Path(text), tokens=tokens, streamed=streamed)
    return replace(found, on_text=measured)


def _of_weights(
    names: list[str],
    pairing: Pairing,
    given: str | None,
    vocabulary: Mapping[str, int] | None,
    spectra: bool,
    threads: int | None,
    progress: Callable[[int], object],
) -> ModelDiff:
    matrices = [tensor for tensor in pairing.tensors if is_matrix(tensor)] or [*pairing.tensors]
    descent: Descent | None = None
    base = given
    if given is None and len(names) > 2:
        # Which one is the base decides what is summed, so a part of the weights is looked at first.
        some = [g.sums for g in gather(matrices, 1, full=False, sample=_GUESS_SAMPLE, threads=threads)]
        descent = find_base(names, some, 1)
        base = descent.base
    reference = names.index(base) if base is not None else 1
    pair = reference > 1
    every: list[tuple[Sums, TensorDiff]] = []
    rows: list[MovedRow] = []
    for gathered in gather(pairing.tensors, reference, pair=pair, threads=threads, progress=progress):
        tensor = gathered.tensor
        relations = relations_of(gathered.sums, names, reference, has_base=base is not None)
        found = _tensor_diff(gathered, relations, len(names), reference, tasks=base is not None)
        if spectra and len(tensor.shape) == 2:
            found = replace(found, spectra=_spectra(tensor, names, reference, tasks=base is not None))
        if tensor.has_tokens:
            rows += _moved(gathered, vocabulary, -1 if pair else 1)
        every.append((replace(gathered.sums, row_norms=np.zeros((0, 0))), found))
    judged = [sums for sums, tensor in every if tensor.name in {m.name for m in matrices}]
    if descent is None:
        descent = find_base(names, judged, reference, given)
        if given is None and descent.base is not None:
            base = descent.base
    layers: dict[str, list[tuple[Sums, TensorDiff]]] = {}
    for sums, tensor in every:
        if (place := layer_of(tensor.name)) is not None:
            layers.setdefault(place[0], []).append((sums, tensor))
    has_base = base is not None and names.index(base) == reference
    return ModelDiff(
        tuple(names),
        base,
        descent,
        relations_of(added(sums for sums, _ in every), names, reference, has_base=has_base),
        tuple(
            LayerDiff(
                layer,
                relations_of(added(sums for sums, _ in inside), names, reference, has_base=has_base),
                _mean_conflict([tensor for _, tensor in inside]),
            )
            for layer, inside in sorted(layers.items(), key=lambda item: _place(item[0], list(layers)))
        ),
        tuple(tensor for _, tensor in every),
        tuple(sorted(rows, key=lambda row: -row.relative_change)[:_ROWS]),
        (),
        pairing.lacking,
        pairing.notes,
        None,
        sum(t.size * sum(s.dtype.itemsize for s in t.sources) for t in pairing.tensors),
    )


def _place(layer: str, layers: Sequence[str]) -> tuple[int, int]:
    """Where a layer stands: files list numbers as words, so that 10 comes before 2."""
    stack, _, number = layer.rpartition(".")
    return next(i for i, each in enumerate(layers) if each.rpartition(".")[0] == stack), int(number)


def _tensor_diff(
    gathered: Gathered, relations: Relations, models: int, reference: int, *, tasks: bool
) -> TensorDiff:
    pair = reference > 1
    tensor, sample = gathered.tensor, gathered.sample
    change = sample[-1] if pair else sample[1]
    finite = bool(np.isfinite(sample).all()) and sample.size > 0
    spread = below = None
    histogram: tuple[float, ...] = ()
    conflict: tuple[float, ...] = ()
    if finite:
        second = sample[0] if reference == 1 else sample[0] + sample[2 if pair else 1]
        spread = float(np.std(second, dtype=np.float64))
        below = float(np.count_nonzero(np.abs(change) < 0.01 * spread) / change.size)
        histogram = tuple(change_shares(change).tolist())
        if tasks and models > 2:
            conflict = tuple(sign_conflict(sample[1:models]))
    dtypes = tuple(str(source.dtype) for source in tensor.sources)
    return TensorDiff(tensor.name, tensor.shape, dtypes, relations, spread, below, histogram, conflict, {})


def _spectra(
    tensor: MatchedTensor, names: Sequence[str], reference: int, *, tasks: bool
) -> dict[str, Spectrum]:
    changed = [i for i in range(len(names)) if i != reference] if tasks else [0]
    against = reference if tasks else 1
    found = {names[i]: spectrum_of_change(tensor.sources[i], tensor.sources[against]) for i in changed}
    return {name: spectrum for name, spectrum in found.items() if spectrum is not None}


def _moved(gathered: Gathered, vocabulary: Mapping[str, int] | None, change: int) -> list[MovedRow]:
    """The rows of one embedding that moved most, relative to the norm they had."""
    norms = gathered.sums.row_norms
    moved, size = norms[change], norms[0]
    with np.errstate(all="ignore"):
        relative = np.where(size > 0, moved / size, np.where(moved > 0, math.inf, 0.0))
    relative = np.where(np.isfinite(relative), relative, 0.0)
    chosen = np.argsort(-relative, kind="stable")[:_ROWS]
    tokens = {} if vocabulary is None else {number: token for token, number in vocabulary.items()}
    aligned = gathered.tensor.rows
    return [
        MovedRow(
            gathered.tensor.name,
            int(row) if aligned is None or vocabulary is None else vocabulary[aligned[row]],
            tokens.get(int(row)) if aligned is None else aligned[row],
            float(relative[row]),
        )
        for row in chosen
        if relative[row] > 0
    ]


def _mean_conflict(tensors: Sequence[TensorDiff]) -> tuple[float, ...]:
    known = [tensor for tensor in tensors if tensor.sign_conflict]
    if not known:
        return ()
    weights = [float(tensor.relations.entries) for tensor in known]
    return tuple(np.average([tensor.sign_conflict for tensor in known], axis=0, weights=weights).tolist())
