"""Names of activations in other libraries, and the sites they are here.

Three ways of naming are known: hooks of TransformerLens (`blocks.3.hook_resid_post`), which SAELens uses;
modules of transformers (`layers.3.mlp`), whose outputs sparsify takes; and submodules of dictionary_learning
(`resid_post_layer_3`). Each is a table from suffixes to sites, so that for every site that has a name `name`,

    site_of(name(site)) == site

A name that is not a site here, or may be several, has none: `ln2.hook_normalized` is what the MLP reads
with or without the norm's weights, as the norm and the version have it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["hook_of", "module_of", "said_or", "site_of", "submodule_of"]

_SITES = (
    "resid_pre",
    "resid_mid",
    "resid_post",
    "attn.out",
    "attn.z",
    "attn.v",
    "mlp.input",
    "mlp.pre",
    "mlp.post",
    "mlp.out",
)
"""Suffixes of `blocks.{i}.` that SAEs are trained on."""

_HOOKS: Mapping[str, str] = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "hook_attn_out": "attn.out",
    "hook_mlp_out": "mlp.out",
    "attn.hook_z": "attn.z",
    "attn.hook_v": "attn.v",
    "mlp.hook_in": "mlp.input",
    "mlp.hook_pre": "mlp.pre",
    "mlp.hook_post": "mlp.post",
}
_HOOK_ALIASES: Mapping[str, str] = {
    "hook_mlp_in": "resid_mid",  # a copy of it, before the norm
    "hook_in": "resid_pre",  # of the bridge
    "hook_out": "resid_post",
    "mlp.hook_out": "mlp.out",
}
_MODULES: Mapping[str, str] = {"": "resid_post", ".mlp": "mlp.out", ".self_attn": "attn.out"}
_MODULE_ALIASES: Mapping[str, str] = {
    ".output": "resid_post",
    ".input": "resid_pre",
    ".mlp.output": "mlp.out",
    ".mlp.down_proj.input": "mlp.post",
    ".attn": "attn.out",
    ".attention": "attn.out",
    ".self_attn.output": "attn.out",
    ".self_attn.o_proj.input": "attn.z",
    # Of blocks that normalize what is added to the stream: the site holds what is really added.
    ".mlp.input": "mlp.input",
    ".pre_feedforward_layernorm.output": "mlp.input",
    ".post_feedforward_layernorm": "mlp.out",
    ".post_feedforward_layernorm.output": "mlp.out",
}
_SUBMODULES: Mapping[str, str] = {
    "resid_pre": "resid_pre",
    "resid_mid": "resid_mid",
    "resid_post": "resid_post",
    "attn_out": "attn.out",
    "mlp_out": "mlp.out",
}

_BLOCK = re.compile(r"blocks\.(\d{1,6})\.([a-z0-9_.]+)")
_LAYER = re.compile(
    r"(?:(?:base_)?model\.)?(?:(?:transformer|gpt_neox|decoder|language_model)\.)?(?:model\.)?"
    r"(?:layers|h)\.(\d{1,6})((?:\.[a-z_0-9]+)*)"
)
_ENCODER_LAYER = re.compile(r"(?:[a-z]+\.)?encoder\.layer\.(\d{1,6})")
_SUBMODULE = re.compile(r"([a-z]+_[a-z]+)_layer_(\d{1,6})")


def site_of(name: Any) -> str | None:
    """The site that a name of this or another library means; None where it has none, or is not a name."""
    if not isinstance(name, str):
        return None
    if name in ("embed", "hook_embed"):
        return "embed"
    if found := _BLOCK.fullmatch(name):
        layer, rest = found.groups()
        site = rest if rest in _SITES else _HOOKS.get(rest) or _HOOK_ALIASES.get(rest)
        return None if site is None else f"blocks.{int(layer)}.{site}"
    if found := _LAYER.fullmatch(name):
        layer, rest = found.groups()
        site = _MODULES.get(rest) or _MODULE_ALIASES.get(rest)
        return None if site is None else f"blocks.{int(layer)}.{site}"
    if found := _ENCODER_LAYER.fullmatch(name):
        return f"blocks.{int(found[1])}.resid_post"
    if found := _SUBMODULE.fullmatch(name):
        site = _SUBMODULES.get(found[1])
        return None if site is None else f"blocks.{int(found[2])}.{site}"
    return None


def hook_of(site: str | None) -> str | None:
    """TransformerLens' hook of a site: `blocks.3.resid_post` -> `blocks.3.hook_resid_post`."""
    return _named(site, _HOOKS, "blocks.{layer}.{name}")


def module_of(site: str | None) -> str | None:
    """The module whose output a site is, as transformers' Llama names them: `layers.3`, `layers.3.mlp`."""
    return _named(site, _MODULES, "layers.{layer}{name}")


def submodule_of(site: str | None) -> str | None:
    """dictionary_learning's submodule of a site: `resid_post_layer_3`."""
    return _named(site, _SUBMODULES, "{name}_layer_{layer}")


def _named(site: str | None, table: Mapping[str, str], form: str) -> str | None:
    found = _BLOCK.fullmatch(site) if site is not None else None
    if found is None:
        return None
    names = {inner: name for name, inner in table.items()}
    name = names.get(found[2])
    return None if name is None else form.format(layer=found[1], name=name)


def said_or(metadata: Mapping[str, Any], key: str, site: str | None, name: str | None) -> str | None:
    """The name under which a site is written: the one it was read with, as long as it means this site.

    Args:
        metadata: metadata of the SAE, where readers keep names as they were.
        key: key of the name.
        site: that the SAE reads or writes; None where it is not known.
        name: name of the site in the other library.
    """
    said = metadata.get(key)
    return said if isinstance(said, str) and site_of(said) == site else name
