"""Files of cross-layer transcoders and crosscoders: circuit-tracer's, and those of Gemma Scope 2.

circuit-tracer keeps two files a layer, `W_enc_{i}.safetensors` (encoder `[n, d]`, biases, thresholds) and
`W_dec_{i}.safetensors` (`[n, layers - i, d]`), and says sites in `config.yaml`. Gemma Scope 2 keeps one,
`params_layer_{i}.safetensors` (`w_enc [d, n]`, `w_dec [n, layers, d]`); `config.json` says the sites, or else
its folder's name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mergelab.checkpoints import TensorSource, open_safetensors, read_whole
from mergelab.checkpoints.text_file import read_text
from mergelab.checkpoints.yaml_data import parse_yaml
from mergelab.errors import CheckpointError, quoted
from mergelab.sae.cross_layer import CrossLayerTranscoder, LayerWeights
from mergelab.sae.formats.file_format import FileFormat, Files, Found
from mergelab.sae.formats.hook_names import site_of
from mergelab.sae.formats.releases import sae_path
from mergelab.sae.formats.settings import FormatSettings, faults_at_once
from mergelab.sae.formats.shared import check_finite
from mergelab.sae.sae import SAE

__all__ = ["CROSS_LAYER", "load_cross_layer_transcoder", "tracer_settings"]

_ENCODER = re.compile(r"W_enc_(\d{1,4})\.safetensors")
_PARAMS = re.compile(r"params_layer_(\d{1,4})\.safetensors")
_SETTINGS = 2**20  # bytes of a config.yaml
_CONFIG = "config.json"


def load_cross_layer_transcoder(place: str | Path) -> CrossLayerTranscoder:
    """Opens a cross-layer transcoder or a crosscoder; its weights stay in their files.

    Args:
        place: folder with circuit-tracer's `W_enc_0.safetensors`, `W_dec_0.safetensors`, ..., or with Gemma
            Scope 2's `params_layer_0.safetensors`, ...; also on the hub, `org/name[@revision][:subfolder]`.

    Raises:
        CheckpointError: there is none, a layer is missing, or tensors do not fit together.

    Example:
        >>> load_cross_layer_transcoder("mntss/clt-gemma-2-2b-426k")                    # doctest: +SKIP
    """
    path = sae_path(place)
    if not is_cross_layer(path):
        raise CheckpointError(
            f"{path}: no cross-layer transcoder (no W_enc_0.safetensors, no params_layer_0.safetensors); "
            "other SAEs are read by load_sae"
        )
    return read_cross_layer(path)


def is_cross_layer(path: Path) -> bool:
    """Whether a folder holds all layers of one."""
    return any((path / name).is_file() for name in ("W_enc_0.safetensors", "params_layer_0.safetensors"))


class _CrossLayer(FileFormat):
    """The files of one layer, read as an SAE; where there are all layers, another function opens them."""

    def find(self, files: Files, reserved: Collection[str] = ()) -> Found | None:
        path = files.path
        if path.is_dir() and is_cross_layer(path):
            raise CheckpointError(
                f"{path}: holds a transcoder across layers; open it with "
                "mergelab.sae.load_cross_layer_transcoder, or name the file of one layer"
            )
        if path.is_file() and (_ENCODER.fullmatch(path.name) or _PARAMS.fullmatch(path.name)):
            return Found(path, path.with_name("config.json"))
        return None


def read_cross_layer(path: Path) -> CrossLayerTranscoder:
    """Reads the headers and biases of a folder.

    Raises:
        CheckpointError: a layer is missing, or tensors do not fit together.
    """
    pattern = _ENCODER if (path / "W_enc_0.safetensors").is_file() else _PARAMS
    found = sorted(int(match[1]) for file in path.iterdir() if (match := pattern.fullmatch(file.name)))
    if missing := sorted(set(range(found[-1] + 1)) - set(found)):
        raise CheckpointError(f"{path}: has layers up to {found[-1]}, but not {missing[0]}; get it again")
    if pattern is _ENCODER:
        layers = [_tracer_layer(path, i) for i in found]
    else:
        layers = [_gemma_layer(path / f"params_layer_{i}.safetensors") for i in found]
    _check_layers(path, layers)
    settings = tracer_settings(path)
    reads, writes = _sites(path, len(layers), settings)
    metadata = {key: value for key, value in settings.items() if isinstance(value, str)}
    if pattern is _PARAMS and (path / _CONFIG).is_file():
        said = _scope_settings(path, range(len(layers)), layers)
        reads, writes, metadata = said[0] or reads, said[1] or writes, metadata | said[2]
    return CrossLayerTranscoder(tuple(layers), reads, writes, metadata)


def read_layer(files: Found) -> SAE:
    """One layer's file as a transcoder that writes the sum over all layers.

    `CrossLayerTranscoder.transcoder` says what that sum means.

    Raises:
        CheckpointError: the decoder's file is missing, or tensors do not fit together.
    """
    file = files.weights
    match = _ENCODER.fullmatch(file.name) or _PARAMS.fullmatch(file.name)
    number = 0 if match is None else int(match[1])
    tracer = match is not None and match.re is _ENCODER
    layer = _tracer_layer(file.parent, number) if tracer else _gemma_layer(file)
    settings = tracer_settings(file.parent)
    reads, _ = _sites(file.parent, number + 1, settings)
    metadata = {key: value for key, value in settings.items() if isinstance(value, str)}
    if not tracer and (file.parent / _CONFIG).is_file():
        said = _scope_settings(file.parent, range(number, number + 1), [layer])
        reads, metadata = said[0] or reads, metadata | said[2]
    # Alone, it is the first of the layers it writes.
    alone = CrossLayerTranscoder((layer,), None if reads is None else (reads[-1],), None, metadata)
    return alone.transcoder(0)


def _tracer_layer(folder: Path, i: int) -> LayerWeights:
    file, decoder = folder / f"W_enc_{i}.safetensors", folder / f"W_dec_{i}.safetensors"
    tensors = {name.removesuffix(f"_{i}"): tensor for name, tensor in open_safetensors(file).tensors.items()}
    tensors |= {
        name.removesuffix(f"_{i}"): tensor for name, tensor in open_safetensors(decoder).tensors.items()
    }
    axes = {
        "W_enc": ("n", "d"), "W_dec": ("n", "targets", "d"), "b_enc": ("n",), "b_dec": ("d",),
        "threshold": ("n",), "W_skip": ("d", "d"),
    }  # fmt: skip
    return _layer(file, tensors, axes, first=i, inputs_first=False)


def _gemma_layer(file: Path) -> LayerWeights:
    renamed = {"w_enc": "W_enc", "w_dec": "W_dec", "affine_skip_connection": "W_skip"}
    tensors = {renamed.get(name, name): tensor for name, tensor in open_safetensors(file).tensors.items()}
    axes = {
        "W_enc": ("d", "n"), "W_dec": ("n", "targets", "d"), "b_enc": ("n",), "b_dec": ("d",),
        "threshold": ("n",), "W_skip": ("d", "d"),
    }  # fmt: skip
    return _layer(file, tensors, axes, first=0, inputs_first=True)


def _layer(
    file: Path, tensors: Mapping[str, TensorSource], axes: Mapping[str, tuple[str, ...]], *, first: int,
    inputs_first: bool,
) -> LayerWeights:  # fmt: skip
    missing = [name for name in ("W_enc", "W_dec", "b_enc", "b_dec") if name not in tensors]
    if missing:
        raise CheckpointError(f"{file}: has no tensor {missing[0]!r}, only {', '.join(sorted(tensors)[:20])}")
    sizes: dict[str, int] = {}
    for name in ("W_enc", *axes):  # the encoder says what the others have to be
        if name not in tensors:
            continue
        shape = tensors[name].shape
        wanted = [sizes.setdefault(axis, size) for axis, size in zip(axes[name], shape, strict=False)]
        if len(shape) != len(axes[name]) or list(shape) != wanted:
            letters = ", ".join(str(sizes.get(axis, "?")) for axis in axes[name])
            raise CheckpointError(
                f"{file}: {name} has shape {list(shape)}, where [{letters}] was expected; get it again"
            )
    small = {}
    for name in ("b_enc", "b_dec", "threshold"):
        if name in tensors:
            small[name] = np.asarray(read_whole(tensors[name])).astype(np.float32)
            check_finite(file, name, small[name])
    return LayerWeights(
        file, tensors["W_enc"], small["b_enc"], small["b_dec"], tensors["W_dec"], first,
        small.get("threshold"), tensors.get("W_skip"), inputs_first,
    )  # fmt: skip


def _check_layers(path: Path, layers: list[LayerWeights]) -> None:
    first = layers[0]
    for i, layer in enumerate(layers):
        if (len(layer.b_enc), len(layer.b_dec)) != (len(first.b_enc), len(first.b_dec)):
            raise CheckpointError(
                f"{layer.path}: layer {i} has {len(layer.b_enc)} latents and width {len(layer.b_dec)}, but "
                f"layer 0 has {len(first.b_enc)} and {len(first.b_dec)}; get it again"
            )
        if layer.targets.stop != len(layers):
            raise CheckpointError(
                f"{layer.path}: layer {i} writes layers {layer.targets.start} to {layer.targets.stop - 1}, "
                f"but the folder has {len(layers)} layers; get it again"
            )


def tracer_settings(folder: Path) -> dict[str, Any]:
    """`config.yaml` of circuit-tracer: `model_name`, `feature_input_hook` and more; empty without one."""
    file = folder / "config.yaml"
    if not file.is_file():
        return {}
    documents = parse_yaml(read_text(file, _SETTINGS), str(file), strict_keys=False)
    data = documents[0].data if documents else {}
    return data if isinstance(data, dict) else {}


def _scope_settings(
    folder: Path, numbers: range, layers: list[LayerWeights]
) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None, dict[str, Any]]:
    """`reads`, `writes` and metadata that `config.json` of Gemma Scope 2 says, None where it does not.

    A hook point is a list with a module for each layer, or one name with `{layer}`, or with the number 0, in
    place of the layer's.

    Raises:
        CheckpointError: what it says is of the wrong kind, or the tensors are others; all faults at once.
    """
    with faults_at_once(FormatSettings.read(folder / _CONFIG)) as told:
        told.word("architecture", ("jump_relu",), "jump_relu")
        if told.flag("affine_connection", False) and any(layer.W_skip is None for layer in layers):
            told.refuse("affine_connection is true, but a layer has no affine_skip_connection")
        reads = _hook_points(told, "hf_hook_point_in", numbers)
        writes = _hook_points(told, "hf_hook_point_out", numbers)
        metadata = {key: value for key, value in told.values.items() if isinstance(value, str)}
    return reads, writes, metadata


def _hook_points(told: FormatSettings, key: str, numbers: range) -> tuple[str, ...] | None:
    said = told.values.get(key)
    if isinstance(said, list) and len(said) >= numbers.stop and all(isinstance(one, str) for one in said):
        names = [said[i] for i in numbers]
    elif isinstance(said, str):
        pattern = said.replace("{layer}", "0").replace("{}", "0")
        if (found := re.search(r"(?<=\.)0(?=\.|$)", pattern)) is None:
            return None  # of another layer: the folder's name may say more
        names = [f"{pattern[: found.start()]}{i}{pattern[found.end() :]}" for i in numbers]
    else:
        if said is not None:
            told.refuse(
                f"{key} is {quoted(said)}, but a module's name for each of {numbers.stop} layers was expected"
            )
        return None
    sites = tuple(site for name in names if (site := site_of(name)) is not None)
    return sites if len(sites) == len(names) else None


def _sites(
    path: Path, layers: int, settings: Mapping[str, Any]
) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
    """`reads` and `writes` by layer, as far as they are sites here."""
    hooks = [settings.get(key) for key in ("feature_input_hook", "feature_output_hook")]
    if any(hooks):
        named = [[site_of(f"blocks.{i}.{hook}") for i in range(layers)] for hook in hooks]
        reads, writes = (tuple(s for s in sites if s is not None) for sites in named)
        return (reads if len(reads) == layers else None), (writes if len(writes) == layers else None)
    parts = path.absolute().parts[-2:]
    if found := re.match(r"layer((?:_\d{1,4})+)_width", parts[-1]):
        numbers = found[1].strip("_").split("_")
        if parts[0].startswith("crosscoder") and len(numbers) >= layers:
            sites = tuple(f"blocks.{int(number)}.resid_post" for number in numbers[:layers])
            return sites, sites
    if parts[0].startswith("clt"):
        return (
            tuple(f"blocks.{i}.mlp.input" for i in range(layers)),
            tuple(f"blocks.{i}.mlp.out" for i in range(layers)),
        )
    return None, None


CROSS_LAYER = _CrossLayer(
    name="cross-layer",
    read=read_layer,
    signatures=(),
    weights="params_layer_0.safetensors",
    settings=None,
    looks_for="one layer's W_enc_0.safetensors or params_layer_0.safetensors",
)
