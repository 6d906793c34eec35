"""Layers of several kinds in `config.json`: which are recurrent, and which attend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from mergelab.errors import CheckpointError, quoted
from mergelab.models.decoder import DecoderConfig
from mergelab.models.layers.block import BlockSpec
from mergelab.models.layers.recurrent_block import MixerSpec, RecurrentBlockSpec

__all__ = ["layer_kinds", "recurrent_mixer", "with_mixers"]

AnyMixer = TypeVar("AnyMixer")


def layer_kinds(
    given: Sequence[str] | None, default: Sequence[str], known: Sequence[str], place: str
) -> tuple[str, ...]:
    """The kind of every layer, once all of them are implemented.

    Args:
        given: list of the config, or None.
        default: what it is if not given; one entry a layer.
        known: kinds that the family has.
        place: the config's path, for messages.

    Raises:
        CheckpointError: there are not as many kinds as layers, or some are unknown; all of them are named.
    """
    kinds = default if given is None else given
    faults = []
    if len(kinds) != len(default):
        faults.append(f"{place} has {len(kinds)} layer_types for {len(default)} layers; give one per layer.")
    faults += [
        f"{place} has the layer type {quoted(kind)}, but this model family implements only "
        f"{' or '.join(map(repr, known))}; the model cannot be run here."
        for kind in dict.fromkeys(kinds)
        if kind not in known
    ]
    if faults:
        raise CheckpointError(faults)
    return tuple(kinds)


def with_mixers(
    config: DecoderConfig, kinds: Sequence[str], mixers: Mapping[str, MixerSpec]
) -> DecoderConfig:
    """A decoder with a recurrent layer in place of attention wherever a layer's kind names one."""
    blocks = []
    for block, kind in zip(config.blocks, kinds, strict=True):
        assert isinstance(block, BlockSpec)
        mixer = mixers.get(kind)
        blocks.append(block if mixer is None else RecurrentBlockSpec(mixer, block.mlp, block.norm))
    return replace(config, blocks=tuple(blocks))


def recurrent_mixer(config: DecoderConfig, kind: type[AnyMixer]) -> AnyMixer | None:
    """The recurrent layer of this kind that a decoder has; None where it has none."""
    blocks = [block for block in config.blocks if isinstance(block, RecurrentBlockSpec)]
    return next((block.mixer for block in blocks if isinstance(block.mixer, kind)), None)
