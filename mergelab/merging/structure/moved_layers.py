"""The config of a model whose layers were moved, cut or repeated: every layer keeps its kind."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergelab.errors import RecipeError
from mergelab.merging.structure.architecture import layer_counts
from mergelab.merging.structure.layer_fields import layer_fields
from mergelab.merging.structure.layer_kinds import Kinds, LayerField, same_kind

__all__ = ["Tower", "move_layers", "unlike_sources"]

Block = tuple[str, int]
"""A model and the number of one of its layers."""

_NOT_PER_LAYER = re.compile(
    r"((?<!layer)_ids?|_tokens|_limit|_multipliers|_token_index|^architectures|^id2label|^label2id|^mtp_|^time_step_|_size|_sizes|_config|"
    r"^torch_dtype|^dtype|^rope_scaling|^rope_parameters|^out_features|^out_indices|^stage_names|"
    r"^supported_aspect_ratios|^vision_feature_layer|^keys_to_ignore_at_inference|^tags|"
    r"^conv_(dim|kernel|stride)|^depths|^mrope_section|_mean|_std)$"
)
_PER_LAYER_SIZE = re.compile(r"^(moe_)?(shared_)?(intermediate|ffn|mlp)_(hidden_)?size$|_per_layer")
_LISTS_LAYERS = re.compile(r"layer|block|pattern|idxs|indices|indexes")
_LISTS_NUMBERS = re.compile(r"idxs|indices|indexes|_ids$|_layers$")
_GOES_BY_NUMBER = re.compile(
    r"(_period|_interval|_freq|_frequency|_step|_offset|_per_layer|_pattern|every_\w+)$"
)
# Steps and offsets of things that are not layers, and what says the same of every layer.
_HARMLESS = re.compile(
    r"^(time_step|rope_|position_|hidden_size_per_layer|vocab_size_per_layer|decoder_start|image_|patch_)"
)


@dataclass(frozen=True)
class Tower:
    """What is known of one module's layers.

    Attributes:
        donor: the model whose config is the starting point.
        configs: every model's config.
        path, keys: where the donor's config states the number of layers; there is no key where a list does.
        counts: how many layers each model's weights have.
    """

    donor: str
    configs: Mapping[str, Mapping[str, Any]]
    path: tuple[str, ...]
    keys: tuple[str, ...]
    counts: Mapping[str, int]

    def place(self, model: str) -> tuple[Mapping[str, Any], tuple[str, ...]]:
        """The config that speaks of a model's layers, and where in it; the donor's if the model has none."""
        config = self.configs.get(model) or {}
        here = _at(config, self.path)
        if here and (not self.keys or any(isinstance(here.get(key), int) for key in self.keys)):
            return config, self.path
        counts = [path for path, _, count in layer_counts(config) if count == self.counts.get(model)]
        return (config, counts[0]) if counts else (self.configs[self.donor], self.path)

    def part(self, model: str) -> Mapping[str, Any]:
        """The part of a model's config that speaks of these layers."""
        return _at(*self.place(model))

    def count(self, model: str) -> int:
        """How many layers a model has."""
        return self.counts.get(model, self.counts[self.donor])

    def fields(self, model: str) -> Mapping[str, LayerField]:
        """The fields that tell a model's layers apart, by name."""
        return {field.name: field for field in layer_fields(*self.place(model))}

    def kinds(self, model: str, field: LayerField) -> Kinds:
        """The kind of each of a model's layers, by a field of the donor or the model's own of that name."""
        own = self.fields(model).get(field.name, field)
        try:
            return own.read(self.part(model), self.count(model))
        except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
            keys = ", ".join(repr(key) for key in own.uses if key in self.part(model))
            place = f"config.json of model {model!r}"
            raise RecipeError(
                f"{place}: the kinds of its layers cannot be read from {keys} ({error}); correct them"
            ) from error


def move_layers(part: dict[str, Any], tower: Tower, blocks: Sequence[Block]) -> tuple[list[str], list[str]]:
    """Makes a config part describe the given layers; returns faults and warnings.

    Every list as long as the number of layers and every dict by layer number is mapped, and each field of the
    model type is set so that every layer is of the kind it is in its own model. Then the kinds are read off
    the result again: what the config cannot say is a fault.

    Args:
        part: the part of the output's config at `tower.path`, equal to the donor's; it is changed.
        tower: the layers.
        blocks: the layer that each output layer is.
    """
    fields = tower.fields(tower.donor)
    kinds = {model: {name: tower.kinds(model, f) for name, f in fields.items()} for model, _ in blocks}
    wanted = {name: tuple(_nth(kinds[model][name], i) for model, i in blocks) for name in fields}
    lists = _mapped(tower, blocks, fields)
    in_order = tuple(i for _, i in blocks) == tuple(range(tower.count(tower.donor)))
    if in_order and not any(
        _unlike(wanted[name], tower.kinds(tower.donor, field)) for name, field in fields.items()
    ):
        part.update({key: value for key, value in lists.items() if value != part.get(key)})
        return [], []
    part.update(lists)
    handled = {key for field in fields.values() for key in field.uses} | set(lists)
    warnings = _doubts(part, tower, handled, len(blocks))
    part.update(dict.fromkeys(tower.keys, len(blocks)))
    for name, field in fields.items():
        if field.write is not None:
            field.write(part, wanted[name])
    faults = []
    for name, field in fields.items():
        found = field.read(part, len(blocks))
        if wrong := _unlike(wanted[name], found):
            sentence = _contradiction(name, blocks, wrong, wanted[name], found)
            (faults if field.strict else warnings).append(sentence)
    return faults, warnings


def unlike_sources(tower: Tower, sources: Sequence[Sequence[Block]]) -> list[str]:
    """One sentence per field by which layers of unlike kinds are merged into one."""
    found = []
    models = {model for blocks in sources for model, _ in blocks}
    for name, field in tower.fields(tower.donor).items():
        if field.write is None:
            continue
        try:
            kinds = {model: tower.kinds(model, field) for model in models}
        except RecipeError:
            continue  # only layers that move must have a kind
        unlike = {
            i: (first, other)
            for i, (first, *others) in enumerate(sources)
            for other in reversed(others)
            if not same_kind(_nth(kinds[first[0]], first[1]), _nth(kinds[other[0]], other[1]))
        }
        if unlike:
            i, pair = next(iter(unlike.items()))
            a, b = (f"layer {j} of {m!r} is {_named(_nth(kinds[m], j))}" for m, j in pair)
            more = f" (and so for layers {_shown([*unlike][1:])})" if len(unlike) > 1 else ""
            found.append(
                f"layer {i} is merged from layers of unlike kinds: by {name!r}, {a} and {b}{more}; "
                "the merged layer is of the kind that config.json says, which may not suit both"
            )
    return found


def _nth(kinds: Kinds, index: int) -> Any:
    return kinds[min(index, len(kinds) - 1)] if kinds else None


def _unlike(wanted: Kinds, found: Kinds) -> list[int]:
    """The layers whose kinds differ."""
    return [i for i, kind in enumerate(wanted) if i >= len(found) or not same_kind(kind, found[i])]


def _contradiction(
    name: str, blocks: Sequence[Block], wrong: Sequence[int], wanted: Kinds, found: Kinds
) -> str:
    i = wrong[0]
    model, index = blocks[i]
    rest = f"; the same holds for layers {_shown(wrong[1:])}" if len(wrong) > 1 else ""
    return (
        f"config.json: layer {i} of the output is layer {index} of {model!r} and {_named(wanted[i])} there, "
        f"but {name!r} can only make it {_named(found[i])} in this place{rest}; choose slices that keep such "
        "layers where the field can state them"
    )


def _named(value: object) -> str:
    """A value for a sentence, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:56]}...{text[-1]}"


def _shown(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")


def _mapped(tower: Tower, blocks: Sequence[Block], fields: Mapping[str, LayerField]) -> dict[str, Any]:
    """The lists and dicts that have an entry per layer, with the entries of the given layers."""
    written = {key for field in fields.values() for key in (field.name, *field.uses)}
    models = dict.fromkeys((tower.donor, *(model for model, _ in blocks)))
    keys = {
        key: value
        for model in models
        for key, value in tower.part(model).items()
        if key not in written and _per_layer(key, value, tower.count(model))
    }
    result: dict[str, Any] = {}
    for key, example in keys.items():
        entries = [(j, _entry(tower, key, block)) for j, block in enumerate(blocks)]
        if isinstance(example, Mapping):
            result[key] = {str(j): entry for j, entry in entries if entry is not None}
        elif isinstance(example, str):
            result[key] = "".join(str(entry) for _, entry in entries)
        else:
            result[key] = [entry for _, entry in entries]
    return result


def _per_layer(key: str, value: object, count: int) -> bool:
    """Whether a value has one entry per layer."""
    if _NOT_PER_LAYER.search(key) and not _PER_LAYER_SIZE.search(key):
        return False
    if isinstance(value, Mapping):
        return bool(value) and all(str(k).isdecimal() and int(k) < count for k in value)
    if isinstance(value, str):
        return "pattern" in key and len(value) == count
    return isinstance(value, (list, tuple)) and len(value) == count and not _lists_numbers(key, value, count)


def _lists_numbers(key: str, value: Sequence[Any], count: int) -> bool:
    """Whether a list looks like numbers of layers and not like one entry per layer."""
    whole = all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < count for i in value)
    return bool(_LISTS_NUMBERS.search(key)) and whole and list(value) == sorted(set(value))


def _entry(tower: Tower, key: str, block: Block) -> Any:
    """One layer's entry, from its own model's config; from the donor's if that has nothing for it."""
    model, index = block
    for owner in (model, tower.donor):
        value = tower.part(owner).get(key)
        if isinstance(value, Mapping):
            return value.get(str(index), value.get(index))
        if isinstance(value, (list, tuple)) and value:
            return value[min(index, len(value) - 1)]
        if isinstance(value, str) and value:
            return value[min(index, len(value) - 1)] if "pattern" in key else value
        if value is not None:
            return value
    return None


def _doubts(part: Mapping[str, Any], tower: Tower, handled: set[str], count: int) -> list[str]:
    """One sentence per key that looks as if it went by layer number and is not known here."""
    found = []
    for key, value in part.items():
        if key in handled or key in tower.keys or _HARMLESS.search(key) or _NOT_PER_LAYER.search(key):
            continue
        layers = isinstance(value, (list, tuple)) and value and _LISTS_LAYERS.search(key)
        period = _GOES_BY_NUMBER.search(key) and (
            (isinstance(value, str) and value) or (isinstance(value, int) and value > 1)
        )
        if layers:
            found.append(f"config.json: {key!r} may list layer numbers of {tower.donor!r}; check it")
        elif period:
            found.append(
                f"config.json: {key!r} = {_named(value)} may choose layers by number, which are not those of "
                f"{tower.donor!r} any more; check it"
            )
        elif key == "scale_depth" and count != tower.count(tower.donor):
            found.append(
                f"config.json: {key!r} is divided by the root of the layer count, which changes; check it"
            )
    return found


def _at(config: Any, path: Sequence[str]) -> Mapping[str, Any]:
    for key in path:
        config = config.get(key, {}) if isinstance(config, Mapping) else {}
    return config if isinstance(config, Mapping) else {}
