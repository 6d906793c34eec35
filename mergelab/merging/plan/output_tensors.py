"""Which output tensors a recipe makes, and which input tensor of each model goes into each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from mergelab.errors import did_you_mean, quoted, shortened
from mergelab.merging.recipe.faults import FieldPath
from mergelab.merging.recipe.scopes import ScopedSlice
from mergelab.merging.structure.architecture import (
    FURTHER,
    BlockRun,
    Module,
    Structure,
    counterpart,
    renumbered,
)

__all__ = ["OutputLayout", "OutputPlace", "lay_out"]


MAX_LAYERS = 10_000
"""Far beyond any model: a few slices of aliases ask for as many as they like."""


@dataclass(frozen=True)
class OutputPlace:
    """One output tensor.

    Attributes:
        name: its name in the output.
        piece: the slice it belongs to, whose parameters apply.
        names: what it is called in each of `piece.sources`; the model may lack it.
        t: the layer coordinate at which gradients are read; 0 outside the blocks.
        module: the module it belongs to.
        copied: the one model whose tensor it is, where the others lack the whole module.
    """

    name: str
    piece: ScopedSlice
    names: tuple[str, ...]
    t: float
    module: str = "default"
    copied: str | None = None


@dataclass
class OutputLayout:
    """All output tensors, in the donor's order.

    Attributes:
        places: one per output tensor.
        layers: (model, block) of each output block's first source, per module with blocks.
        sources: every (model, block) that each output block is merged from, per module with blocks.
        faults: `(path, message)` of what made a module impossible to lay out.
        warnings: what the user should know, one sentence each.
    """

    places: list[OutputPlace] = field(default_factory=list)
    layers: dict[str, tuple[tuple[str, int], ...]] = field(default_factory=dict)
    sources: dict[str, list[tuple[tuple[str, int], ...]]] = field(default_factory=dict)
    faults: list[tuple[FieldPath, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def lay_out(
    parts: Mapping[str | None, Sequence[ScopedSlice]], models: Mapping[str, Structure], donor: str
) -> OutputLayout:
    """Lays out every module.

    Args:
        parts: slices per module, from `scoped_parts`; the key None applies to all modules.
        models: the architecture of each model, by its reference.
        donor: the model whose spelling of names the output takes.
    """
    layout = OutputLayout()
    known = dict.fromkeys(name for model in (donor, *models) for name in models[model].modules)
    wanted = _match_modules(parts, list(known), models[donor], layout)
    for name, slices in wanted.items():
        _lay_out_module(name, slices, models, donor, layout)
    _move_further_layers(models, donor, layout)
    return layout


def _move_further_layers(models: Mapping[str, Structure], donor: str, layout: OutputLayout) -> None:
    """Numbers the layers that predict further tokens on from the output's last, and says what is copied."""
    further = [place for place in layout.places if place.module == FURTHER]
    if not further:
        return
    owner = next(model for model in (donor, *models) if FURTHER in models[model].modules)
    tower = models[owner].main
    if tower.stack is not None and tower.name in layout.layers:
        prefix, by = tower.stack.prefix, len(layout.layers[tower.name]) - tower.stack.count
        layout.places = [
            replace(place, name=renumbered(place.name, prefix, by)) if place.module == FURTHER else place
            for place in layout.places
        ]
    copied = dict.fromkeys(place.copied for place in further if place.copied is not None)
    if copied:
        layout.warnings.append(
            f"the {len(further)} tensors of layers that predict further tokens (multi-token prediction) are "
            f"copied from {', '.join(map(repr, copied))}, as other models have none"
        )


def _match_modules(
    parts: Mapping[str | None, Sequence[ScopedSlice]],
    known: list[str],
    donor: Structure,
    layout: OutputLayout,
) -> dict[str, Sequence[ScopedSlice]]:
    """The slices of every known module, in order; faults for unknown names and for modules left out."""
    everywhere = parts.get(None)
    if everywhere is not None:
        sliced = any(source.layer_range is not None for piece in everywhere for source in piece.sources)
        if sliced and len(donor.towers) > 1:
            towers = ", ".join(module.name for module in donor.towers)
            layout.faults.append(
                (
                    ("slices",),
                    f"the model has several towers ({towers}): put the slices of each under 'modules:'",
                )
            )
            return {}
        return dict.fromkeys(known, everywhere)
    found: dict[str, Sequence[ScopedSlice]] = {}
    for name, slices in parts.items():
        if name in known and name is not None:
            found[name] = slices
        elif len(known) == 1 and len(parts) == 1:
            found[known[0]] = slices
        else:
            near = did_you_mean(str(name), known) or f" (it has {', '.join(known)})"
            layout.faults.append((("modules", str(name)), f"the models have no module of this name{near}"))
    for name in known:
        if name not in found and not layout.faults:
            layout.faults.append(
                (("modules",), f"module {name!r} of the models is left out: add it, so no tensor is lost")
            )
    return found


def _lay_out_module(
    name: str,
    slices: Sequence[ScopedSlice],
    models: Mapping[str, Structure],
    donor: str,
    layout: OutputLayout,
) -> None:
    owners = (donor, *models)
    spelling = next(models[model].modules[name] for model in owners if name in models[model].modules)
    first, last = slices[0], slices[-1]
    places = _loose(first, [m.pre for m in _modules(first, models, name)], models, donor)
    if spelling.stack is not None:
        blocks, sources = _blocks(slices, spelling.stack, models, name, layout)
        places += blocks
        layout.sources[name] = sources
        layout.layers[name] = tuple(each[0] for each in sources)
    places += _loose(last, [m.post for m in _modules(last, models, name)], models, donor)
    if _listed(first) != _listed(last) and (spelling.pre or spelling.post):
        layout.warnings.append(
            f"tensors before the first block come from the first slice ({_listed(first)}), those after the "
            f"last block from the last slice ({_listed(last)})"
        )
    alone = {id(piece): _alone(piece, models, name) for piece in slices}
    layout.places += [replace(place, module=name, copied=alone[id(place.piece)]) for place in places]


def _alone(piece: ScopedSlice, models: Mapping[str, Structure], name: str) -> str | None:
    """The model whose module is copied: the only one that has it, or the first where the base lacks it."""
    owners = [source.model for source in piece.sources if name in models[source.model].modules]
    if len(owners) == len(piece.sources) or not owners:
        return None
    without_base = piece.base is not None and piece.base.model not in owners
    return owners[0] if len(set(owners)) == 1 or without_base else None


def _listed(piece: ScopedSlice) -> str:
    return ", ".join(source.model for source in piece.sources)


def _modules(piece: ScopedSlice, models: Mapping[str, Structure], name: str) -> list[Module]:
    """The module in each source of a slice; an empty one where the model has none."""
    empty = Module(name, None, (), ())
    return [models[source.model].modules.get(name, empty) for source in piece.sources]


def _loose(
    piece: ScopedSlice, names: Iterable[tuple[str, ...]], models: Mapping[str, Structure], donor: str
) -> list[OutputPlace]:
    """Places for tensors outside the blocks, spelled as the donor spells them."""
    found: dict[str, None] = {}
    for source, each in zip(piece.sources, names, strict=True):
        found.update(dict.fromkeys(counterpart(name, models[source.model], models[donor]) for name in each))
    return [
        OutputPlace(
            name,
            piece,
            tuple(counterpart(name, models[donor], models[source.model]) for source in piece.sources),
            t=0.0,
        )
        for name in found
    ]


def _blocks(
    slices: Sequence[ScopedSlice],
    spelling: BlockRun,
    models: Mapping[str, Structure],
    module: str,
    layout: OutputLayout,
) -> tuple[list[OutputPlace], list[tuple[tuple[str, int], ...]]]:
    """The places of all blocks, and per output block the (model, block) of each of its sources."""
    places: list[OutputPlace] = []
    layers: list[tuple[tuple[str, int], ...]] = []
    for piece in slices:
        ranges = _ranges(piece, models, module, layout)
        length = max((stop - start for _, start, stop in ranges.values()), default=0)
        if len(layers) + length > MAX_LAYERS:
            message = (
                f"with this slice the output has {len(layers) + length:,} layers; at most {MAX_LAYERS:,}"
            )
            layout.faults.append((piece.path, f"{message} are made"))
            return [], []
        for offset in range(length):
            t = offset / (length - 1) if length > 1 else 1.0
            found: dict[str, None] = {}
            prefixes = []
            for i in range(len(piece.sources)):
                stack, start, _ = ranges.get(i, (spelling, 0, 0))
                prefixes.append(f"{stack.prefix}{start + offset}.")
                found.update(dict.fromkeys(stack.suffixes[start + offset] if i in ranges else ()))
            layers.append(tuple((piece.sources[i].model, ranges[i][1] + offset) for i in sorted(ranges)))
            output = f"{spelling.prefix}{len(layers) - 1}."
            places += [OutputPlace(output + s, piece, tuple(p + s for p in prefixes), t) for s in found]
    return places, layers


def _ranges(
    piece: ScopedSlice, models: Mapping[str, Structure], module: str, layout: OutputLayout
) -> dict[int, tuple[BlockRun, int, int]]:
    """`(stack, start, stop)` of each source that has the module, all of one length, or none and a fault."""
    ranges: dict[int, tuple[BlockRun, int, int]] = {}
    for i, source in enumerate(piece.sources):
        part = models[source.model].modules.get(module)
        if part is None or part.stack is None:
            continue
        start, stop = source.layer_range or (0, part.stack.count)
        if stop > part.stack.count:
            path = (*source.path, "layer_range") if "sources" in source.path else source.path
            has = f"it has {part.stack.count} layers"
            message = f"layer range [{start}, {stop}] is beyond model {quoted(source.model)}: {has}"
            layout.faults.append((path, message))
            return {}
        ranges[i] = (part.stack, start, stop)
    if len({stop - start for _, start, stop in ranges.values()}) > 1:
        listed = ", ".join(f"{piece.sources[i].model}: {b - a}" for i, (_, a, b) in ranges.items())
        found = shortened(listed, 400)
        layout.faults.append(
            (piece.path, f"the models have different numbers of layers ({found}): choose them with 'slices:'")
        )
        return {}
    return ranges
