"""Adds the parts of a LoRA adapter to the tensors of a model, heads tied to embeddings as PEFT does."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mergelab.checkpoints.dtypes import is_float
from mergelab.checkpoints.lora_tensor import BiasedTensor, CastTensor, FactorCache, LowRankTensor
from mergelab.checkpoints.lora_variants import (
    DoraTensor,
    RowsTensor,
    StartFactor,
    StartFactors,
    with_expert_updates,
)
from mergelab.checkpoints.peft import LoraConfig
from mergelab.checkpoints.source import Checkpoint, TensorSource
from mergelab.checkpoints.tied_head import (
    TiedHead,
    conv1d_layers,
    find_tied_head,
    is_token_matrix,
    shared_embedding,
)
from mergelab.errors import CheckpointError, did_you_mean

__all__ = ["LoraMerge"]

_BLOCK = 1 << 20
_WRAPPED = re.compile(r"(\.base_layer)+$")
_TRANSPOSED_EXPERTS = ("gpt_oss", "llama4", "llama4_text", "aria", "aria_text")
"""Model types whose stacks of experts are `[experts, in, out]`; it matters where both are of one size."""
_REGISTERED = {"gate_up_proj": 1, "down_proj": 2}
"""The order in which modules hold these parameters, and PEFT therefore wraps them."""


@dataclass
class LoraMerge:
    """The tensors of a model while an adapter is added to them.

    Attributes:
        tensors: the model's; a tied head is among them until `finish`.
        config: the adapter's.
        folder: the adapter's, for messages.
        conv1d: last names of modules that store `[in, out]`; None where the model's type is not known.
        tied: embedding and head, where they are one.
        stored: names of the tensors that the model stores.
        parted: whether the adapter makes them two.
        warnings: one sentence each.
        model_type: the model's, as its config says.
        replaced: the model's tensors that the adapter stores whole.
        decomposed: the factors that training began with, of so many modules that threads do not decompose a
            weight twice.
    """

    tensors: dict[str, TensorSource]
    config: LoraConfig
    folder: Path
    conv1d: tuple[str, ...] | None
    tied: TiedHead | None
    stored: frozenset[str]
    parted: bool
    warnings: list[str] = field(default_factory=list)
    model_type: str = ""
    decomposed: FactorCache = field(default_factory=lambda: FactorCache(64))
    replaced: set[str] = field(default_factory=set)

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        config: LoraConfig,
        folder: Path,
        saved: Collection[str],
    ) -> LoraMerge:
        tensors = dict(checkpoint.tensors)
        text = checkpoint.config.get("text_config")
        kind = str((text if isinstance(text, Mapping) else checkpoint.config).get("model_type"))
        conv1d = conv1d_layers(checkpoint.config) or None
        tied = find_tied_head(tensors, checkpoint.config)
        if tied is None:
            return cls(tensors, config, folder, conv1d, None, frozenset(tensors), False, model_type=kind)
        stored = frozenset(tensors)
        embedding = tensors[tied.embedding]
        tensors[tied.head] = CastTensor(tied.head, embedding.dtype, embedding)
        if tied.bias is not None:
            bias = tensors[tied.bias[1]]
            tensors.setdefault(tied.bias[0], CastTensor(tied.bias[0], bias.dtype, bias))
        parted = any(_is_one_of(tied, module) for module in saved)
        return cls(tensors, config, folder, conv1d, tied, stored, parted, model_type=kind)

    def place(self, name: str) -> str:
        """Where a tensor's change goes: a tied head's to the embedding, its bias to where that is stored."""
        if self.tied is not None and not self.parted and name == self.tied.head:
            return self.tied.embedding
        if self.tied is not None and self.tied.bias is not None and name == self.tied.bias[0]:
            return self.tied.bias[1]
        return name

    def check_shape(self, name: str, needed: tuple[int, ...]) -> None:
        """Refuses a change that is made for another shape of the tensor called `name`."""
        found = self.tensors[name].shape
        if found == needed:
            return
        remedy = "use the model the adapter was trained on"
        if is_token_matrix(name) and found[1:] == needed[1:]:
            remedy = (
                f"its vocabulary was resized from {found[0]} to {needed[0]} tokens before training: resize "
                f"the model's embeddings to {needed[0]} rows, save it with the adapter's tokenizer, and use "
                "that model"
            )
        raise CheckpointError(
            f"{self.folder}: the adapter needs {name!r} to have shape {needed} but the model's has {found}; "
            f"{remedy}"
        )

    def replace(self, whole: Mapping[str, TensorSource]) -> None:
        """Puts tensors that the adapter saves whole in place of the model's."""
        shared = shared_embedding(self.tensors)
        for name, source in whole.items():
            target = _once(_target(name, self.tensors, self.folder), self.replaced, self.folder)
            if target == shared and self.config.is_saved(name.removesuffix(".weight")):
                raise CheckpointError(
                    f"{self.folder}: {target!r}, which encoder and decoder share, is in modules_to_save, and "
                    "PEFT replaces one of its uses only; train it with factors (target_modules) instead"
                )
            place = self.place(target)
            self.check_shape(place, source.shape)
            self.tensors[place] = CastTensor(place, self.tensors[place].dtype, source)

    def set_tokens(self, tokens: Mapping[str, TensorSource]) -> None:
        """Puts trained rows into embeddings; those of a tied head are the embedding's."""
        if self.config.token_indices and not tokens:
            raise CheckpointError(
                f"{self.folder}: adapter_config.json has trainable_token_indices, but the adapter holds no "
                "trained tokens; finish the download, or correct the config"
            )
        for module, values in tokens.items():
            place = self.place(_target(f"{module}.weight", self.tensors, self.folder))
            weight, rows = self.tensors[place], self.config.tokens_of(module)
            if rows is None or len(weight.shape) != 2 or values.shape != (len(rows), weight.shape[1]):
                found = "no rows" if rows is None else f"{len(rows)} rows"
                raise CheckpointError(
                    f"{self.folder}: {module!r} has trained tokens of shape {values.shape}, but "
                    f"trainable_token_indices gives it {found} of {place!r} {weight.shape}; correct the "
                    "config"
                )
            if rows and max(rows) >= weight.shape[0]:
                raise CheckpointError(
                    f"{self.folder}: token {max(rows)} was trained, but {place!r} has {weight.shape[0]} "
                    f"rows: the vocabulary was resized before training: resize the model's embeddings to "
                    f"{max(rows) + 1} rows or more, save it with the adapter's tokenizer, and use that model"
                )
            self.tensors[place] = RowsTensor(weight, rows, values)

    def update(self, modules: Mapping[str, dict[str, TensorSource]]) -> None:
        """Adds low-rank updates."""
        cache, updated = FactorCache(), set()
        if self.config.start is not None:
            self.warnings.append(
                f"{self.folder}: the adapter began as {self.config.start}, which takes a part of each "
                "weight out of the base: it is computed again, as PEFT does when it loads the adapter; "
                "where the altered base was saved, merge the adapter into that one with init_lora_weights: "
                "true in its adapter_config.json"
            )
        modules = self._update_parameters(modules, cache)
        targets = {
            module: _once(_target(f"{module}.weight", self.tensors, self.folder), updated, self.folder)
            for module in modules
        }
        unread = self._unread(targets)
        for module, parts in modules.items():
            if module not in unread:
                _apply(module, targets[module], parts, self, cache)

    def _update_parameters(
        self, modules: Mapping[str, dict[str, TensorSource]], cache: FactorCache
    ) -> dict[str, dict[str, TensorSource]]:
        """Adds updates of stacks of matrices; returns those of modules with a `weight`."""
        for target in self.config.target_parameters:
            if not any(name == target or name.endswith(f".{target}") for name in self.tensors):
                raise CheckpointError(
                    f"{self.folder}: target_parameters names {target!r}, which the model does not store "
                    "under that name; merge the adapter with PEFT and use the resulting model"
                )
        rest: dict[str, dict[str, TensorSource]] = {}
        stacks: dict[str, list[dict[str, TensorSource]]] = {}
        # PEFT wraps a module once for each parameter, the first innermost, where its name is the longest.
        for module, parts in sorted(modules.items(), key=lambda item: -len(item[0])):
            owner = _WRAPPED.sub("", module)
            if self._parameters_of(owner):
                stacks.setdefault(owner, []).append(parts)
        for module, parts in modules.items():
            if _WRAPPED.sub("", module) not in stacks:
                rest[module] = parts
        for owner, found in stacks.items():
            names = self._parameters_of(owner)
            for parts in found:
                name = self._fitting(owner, parts, names)
                names.remove(name)
                a, b = parts["lora_A.weight"], parts["lora_B.weight"]
                transposed = self.model_type in _TRANSPOSED_EXPERTS
                self.tensors[name] = with_expert_updates(
                    self.tensors[name],
                    a,
                    b,
                    self.config.scale(_parameter(owner, name)),
                    cache,
                    transposed=transposed,
                )
        return rest

    def _parameters_of(self, module: str) -> list[str]:
        """The model's names of a module's parameters that the config targets, as PEFT meets them."""
        found = []
        for target in self.config.target_parameters:
            owner, _, last = target.rpartition(".")
            if not owner or module == owner or module.endswith(f".{owner}"):
                name = _found(f"{module}.{last}", self.tensors)
                if name is not None and len(self.tensors[name].shape) == 3:
                    found.append(name)
        return sorted(found, key=lambda name: _REGISTERED.get(name.rpartition(".")[2], 0))

    def _fitting(self, module: str, parts: dict[str, TensorSource], names: list[str]) -> str:
        """The first parameter that the factors fit."""
        keys = {"lora_A.weight", "lora_B.weight"}
        if parts.keys() == keys and all(len(each.shape) == 2 for each in parts.values()):
            a, b = parts["lora_A.weight"].shape, parts["lora_B.weight"].shape
            for name in names:
                experts, *sizes = self.tensors[name].shape
                count = self.config.rank(_parameter(module, name)) * experts
                if a[0] == b[1] == count and sorted((a[1], b[0])) == sorted(sizes):
                    return name
        raise CheckpointError(
            f"{self.folder}: the factors of {module!r} fit none of the model's parameters that "
            f"target_parameters names ({', '.join(names) or 'none'}); use the model the adapter was trained "
            "on"
        )

    def _unread(self, targets: Mapping[str, str]) -> set[str]:
        """Modules of a tied pair whose factors PEFT leaves unread: the config does not target them."""
        tied = self.tied
        if tied is None or self.parted:
            return set()
        pair = {target: module for module, target in targets.items() if target in (tied.embedding, tied.head)}
        if pair:
            names = " and ".join(map(repr, pair.values()))
            self.warnings.append(
                f"{self.folder}: the adapter has factors for {names} of a model whose head is its embedding; "
                "they are added to the matrix both share, as PEFT's merge does, which is not what the "
                "adapter computed in training"
            )
        # PEFT ties factors anew when it loads them, but finds a tied pair only by this name.
        again = self.config.ensure_weight_tying and tied.embedding.endswith("embed_tokens.weight")
        if len(pair) < 2 or again:
            return set()
        unread = {module for module in pair.values() if not self.config.is_targeted(module)}
        return unread if len(unread) < 2 else set()

    def finish(self) -> bool:
        """Takes out the tied head again, unless the adapter gave it a matrix of its own; returns whether."""
        tied = self.tied
        if tied is None:
            return False
        embedding, head = self.tensors[tied.embedding], self.tensors[tied.head]
        if self.parted and not (
            self.config.ensure_weight_tying
            and {tied.embedding, tied.head} <= self.replaced
            and _same_values(embedding, head)
        ):
            if tied.bias is not None:
                bias = self.tensors[tied.bias[1]]
                self.tensors[tied.bias[0]] = CastTensor(tied.bias[0], bias.dtype, bias)
            self.warnings.append(
                f"{self.folder}: the adapter gives {tied.embedding!r} or {tied.head!r} values of its own, so "
                "they are no longer tied: tie_word_embeddings is set to false"
            )
            return True
        self.tensors[tied.head] = CastTensor(tied.head, embedding.dtype, embedding)
        for name in (tied.head, *(() if tied.bias is None else tied.bias[:1])):
            if name not in self.stored:
                self.tensors.pop(name)
        return False


def _is_one_of(tied: TiedHead, module: str) -> bool:
    """Whether a module of an adapter is the embedding or the head, but for a leading part of its name."""
    return any(
        name == module or name.endswith(f".{module}") or module.endswith(f".{name}") for name in tied.modules
    )


def _target(name: str, tensors: Mapping[str, TensorSource], folder: Path) -> str:
    """Returns the model's name of a tensor: the same one, or the only one that differs by its wrappers."""
    near = _found(name, tensors)
    if near is None:
        raise CheckpointError(
            f"{folder}: the adapter changes {name!r}, which the model does not have"
            f"{did_you_mean(name, tensors)}; "
            "use the model the adapter was trained on"
        )
    return near


def _found(name: str, tensors: Mapping[str, TensorSource]) -> str | None:
    """The model's name of a tensor, or None."""
    if name in tensors:
        return name
    near = [n for n in tensors if n.endswith(f".{name}") or name.endswith(f".{n}")]
    # Wrappers of language models were renamed: `language_model.model.` became `model.language_model.`.
    near = near or [n for n in tensors if _unwrapped(n) == _unwrapped(name)]
    return near[0] if len(near) == 1 else None


def _parameter(module: str, name: str) -> str:
    """What patterns of the config are compared with: the module, and the tensor's last name."""
    return f"{module}.{name.rpartition('.')[2]}"


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in ("model", "language_model"))


def _once(name: str, seen: set[str], folder: Path) -> str:
    """Returns `name`, which two tensors of the adapter must not both change."""
    if name in seen:
        raise CheckpointError(f"{folder}: two modules of the adapter change {name!r}; save the adapter again")
    seen.add(name)
    return name


def _apply(
    module: str, target: str, parts: dict[str, TensorSource], merge: LoraMerge, cache: FactorCache
) -> None:
    """Replaces a module's weight `target` (and its bias) in the merge by the updated one."""
    tensors, config, folder = merge.tensors, merge.config, merge.folder
    embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    keys = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    bias, magnitude = parts.get("lora_B.bias"), parts.get("lora_magnitude_vector")
    keys = (*keys, "lora_magnitude_vector") if config.use_dora else keys
    if any(key not in parts for key in keys) or len(parts) != len(keys) + (bias is not None):
        raise CheckpointError(
            f"{folder}: module {module!r} has {', '.join(sorted(parts))} where {' and '.join(keys)} were "
            "expected; save the adapter again"
        )
    a, b = parts[keys[0]], parts[keys[1]]
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise CheckpointError(
            f"{folder}: module {module!r} has {len(a.shape)}-D factors; only matrices can be merged here: "
            "merge the adapter with PEFT"
        )
    rank = config.rank(module)
    if a.shape[0] != rank or b.shape[1] != rank:
        raise CheckpointError(
            f"{folder}: module {module!r} has factors {a.shape} and {b.shape} but its config gives rank "
            f"{rank}; correct r or rank_pattern in adapter_config.json"
        )
    name = merge.place(target)
    weight = tensors[name]
    if not is_float(weight.dtype) or not (is_float(a.dtype) and is_float(b.dtype)):
        raise CheckpointError(f"{folder}: {name!r} is stored as {weight.dtype}; dequantize the model first")
    linear, transposed = (b.shape[0], a.shape[1]), (a.shape[1], b.shape[0])
    if merge.conv1d is None:
        stored_transposed = weight.shape == transposed and (linear != transposed or config.fan_in_fan_out)
    else:  # PEFT corrects `fan_in_fan_out` by the kind of each module
        last = module.rpartition(".")[2]
        stored_transposed = weight.shape == transposed and (linear != transposed or last in merge.conv1d)
    by_column = embedding or stored_transposed
    merge.check_shape(name, transposed if by_column else linear)
    # A weight that the adapter stores is already without what its training took out.
    plain = embedding or target in merge.replaced
    dtype, scale, start = weight.dtype, config.scale(module), None if plain else config.start
    if (start or config.use_dora) and weight.dtype != np.float64:
        weight = CastTensor(name, np.dtype(np.float32), weight)  # rounded once, at the end
    if start is not None:
        first = StartFactors(weight, stored_transposed, rank, start)
        left, right = StartFactor(first, "left"), StartFactor(first, "right")
        taken = -scale if start == "olora" else -1.0
        weight = LowRankTensor(weight, (left, False), (right, False), taken, merge.decomposed)
    factors = ((a, True), (b, True)) if by_column else ((b, False), (a, False))
    updated: TensorSource = LowRankTensor(weight, *factors, scale, cache)
    if magnitude is not None:
        outputs = linear[0]
        if int(np.prod(magnitude.shape)) != outputs or not is_float(magnitude.dtype):
            raise CheckpointError(
                f"{folder}: module {module!r} has a magnitude of shape {magnitude.shape} where {outputs} "
                "numbers were expected; save the adapter again"
            )
        updated = DoraTensor(updated, magnitude, by_column, dtype)
    tensors[name] = updated if updated.dtype == dtype else CastTensor(name, dtype, updated)
    if bias is not None:
        name = merge.place(_target(f"{module}.bias", tensors, folder))
        merge.check_shape(name, bias.shape)
        tensors[name] = BiasedTensor(tensors[name], bias, config.scale(module))


def _same_values(one: TensorSource, other: TensorSource) -> bool:
    """Whether two tensors hold the same bytes; read in pieces, up to the first that differs."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    total = int(np.prod(one.shape, dtype=np.int64))
    for start in range(0, total, _BLOCK):
        left, right = (np.empty(min(_BLOCK, total - start), one.dtype) for _ in range(2))
        one.read_into(start, left)
        other.read_into(start, right)
        if left.tobytes() != right.tobytes():
            return False
    return True
