"""What a folder of `mergelab activations` says of the rows of its files: which of them count."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from mergelab.activations.kept import KeptRows, TokenRule, median_norm, sampled_norms
from mergelab.activations.store import ActivationFiles
from mergelab.activations.stream import ActivationSource
from mergelab.checkpoints import TensorSource, open_safetensors
from mergelab.checkpoints.json_data import read_json_object
from mergelab.errors import CheckpointError

__all__ = ["StoredContexts", "first_contexts", "kept_of_files", "kept_of_rows", "store_facts_of"]

FORMAT = "mergelab-activations"


def store_facts_of(file: Path) -> dict[str, Any]:
    """What `store.json` beside a file of `SITE-NNNNN.safetensors` says; nothing where the file is another's.

    Raises:
        CheckpointError: it is damaged.
    """
    path = file.parent / "store.json"
    if file.suffix != ".safetensors" or not path.is_file():
        return {}
    facts = read_json_object(path)
    sites = facts.get("sites")
    if not str(facts.get("format")).startswith(FORMAT) or not isinstance(sites, Mapping):
        return {}
    return facts if _site(file) in sites else {}


def _site(file: Path) -> str:
    return file.stem.rpartition("-")[0]


@dataclass(frozen=True)
class _Tokens:
    """The tokens of one file of a store.

    Attributes:
        rows: how many there are.
        first: number of its first row among those of the store.
        folder: the store.
        context: tokens in a context.
        special_ids: ids of special tokens.
    """

    rows: int
    first: int
    folder: Path
    context: int
    special_ids: tuple[int, ...]

    @cached_property
    def _tensors(self) -> Mapping[str, TensorSource]:
        return open_safetensors(self.folder / "tokens.safetensors").tensors

    def by_place(self, rule: TokenRule, start: int, stop: int) -> np.ndarray:
        """Which of the file's rows count as far as their place and id decide: bool `[stop - start]`."""
        # Whole contexts, since a file may begin within one.
        begin = (self.first + start) // self.context * self.context
        end = -(-(self.first + stop) // self.context) * self.context
        tokens = self._read("tokens", begin, end)
        counted = self._read("counted", begin, end).astype(bool) if "counted" in self._tensors else None
        kept = rule.by_place(tokens, self.special_ids, counted).reshape(-1)
        return kept[self.first + start - begin : self.first + stop - begin]

    def _read(self, name: str, begin: int, end: int) -> np.ndarray:
        tensor = self._tensors[name]
        found = np.zeros(end - begin, tensor.dtype)
        there = min(end, tensor.shape[0])
        tensor.read_into(begin, found[: there - begin])
        return found.reshape(-1, self.context)


def kept_of_rows(
    source: ActivationSource, rule: TokenRule, target: ActivationSource | None = None
) -> KeptRows:
    """Which rows count of activations of which nothing else is known: their norms alone decide."""

    def limit(of: ActivationSource | None) -> float:
        if of is None or rule.max_norm_multiple is None:
            return math.inf
        return rule.norm_limit(median_norm(sampled_norms(of.rows, of.read)))

    return KeptRows(None, limit(source), limit(target), rule)


def kept_of_files(files: ActivationFiles, rule: TokenRule, target: ActivationFiles | None = None) -> KeptRows:
    """Which rows of files count.

    Of a store the tokens are known, and the median norm where it was written down. Of other files the norm
    alone decides, by a sample of rows.

    Args:
        files: the activations.
        rule: what counts.
        target: the targets of the same tokens, for a transcoder.

    Raises:
        CheckpointError: what a store says of its tokens is damaged.
    """
    tokens = _tokens_of(files)
    by_place = None
    if tokens is not None and (rule.skip_positions or rule.skip_special or _counts_some(tokens)):
        by_place = partial(_by_place, tokens, rule)
    limit = _limit(files, rule, by_place)
    target_limit = math.inf if target is None else _limit(target, rule, by_place)
    return KeptRows(by_place, limit, target_limit, rule, None if tokens is None else tokens[0].context)


@dataclass(frozen=True)
class StoredContexts:
    """Contexts of which activations are stored.

    Attributes:
        tokens: int32 `[contexts, length]`.
        counted: bool `[contexts, length]`, False for tokens that never count; None where all may.
        special_ids: ids of special tokens.
        rows: number of the files' first row that belongs to none of these contexts.
        facts: what the store says of itself.
    """

    tokens: np.ndarray
    counted: np.ndarray | None
    special_ids: tuple[int, ...]
    rows: int
    facts: Mapping[str, Any]


def first_contexts(files: ActivationFiles, count: Callable[[int, int], int]) -> StoredContexts | None:
    """The first whole contexts of files, those of one file; None where their tokens are not known.

    Args:
        files: the activations.
        count: number of contexts, by how many there are and how long they are.

    Raises:
        CheckpointError: what a store says of its tokens is damaged.
    """
    tokens = _tokens_of(files)
    if tokens is None:
        return None
    part, path = tokens[0], Path(files.shards[0].path)
    length = part.context
    first = -(-part.first // length)
    there = (part.first + part.rows) // length - first
    if there < 1:
        return None
    begin, end = first * length, (first + min(count(files.rows // length, length), there)) * length
    counted = part._read("counted", begin, end).astype(bool) if "counted" in part._tensors else None
    return StoredContexts(
        part._read("tokens", begin, end), counted, part.special_ids, end - part.first, store_facts_of(path)
    )


def _by_place(tokens: list[_Tokens], rule: TokenRule, start: int, stop: int) -> np.ndarray:
    """Which rows of all files count as far as their place and id decide: bool `[stop - start]`."""
    found, first = [], 0
    for part in tokens:
        end = first + part.rows
        if start < end and stop > first:
            found.append(part.by_place(rule, max(start, first) - first, min(stop, end) - first))
        first = end
    return np.concatenate(found)


def _counts_some(tokens: list[_Tokens]) -> bool:
    return any("counted" in part._tensors for part in tokens)


def _limit(files: ActivationFiles, rule: TokenRule, by_place: Any) -> float:
    if rule.max_norm_multiple is None:
        return math.inf
    said = [_median(shard.path) for shard in files.shards]
    if None not in said and len(set(said)) == 1:
        return rule.norm_limit(said[0] or 0.0)
    return rule.norm_limit(median_norm(sampled_norms(files.rows, files.read, by_place)))


def _median(file: Path) -> float | None:
    """The median norm that a store has written down for the site of a file."""
    norms = store_facts_of(file).get("median_norms")
    found = norms.get(_site(file)) if isinstance(norms, Mapping) else None
    return float(found) if isinstance(found, int | float) and not isinstance(found, bool) else None


def _tokens_of(files: ActivationFiles) -> list[_Tokens] | None:
    """The tokens of every file; None where those of one are not known."""
    found = []
    firsts: dict[tuple[Path, str], dict[Path, int]] = {}
    for shard in files.shards:
        path = Path(shard.path)
        facts = store_facts_of(path)
        context, special = facts.get("context"), facts.get("special_ids")
        if not isinstance(context, int) or context < 1 or not (path.parent / "tokens.safetensors").is_file():
            return None
        if special is None:
            special = []
        if not isinstance(special, list) or not all(isinstance(one, int) for one in special):
            raise CheckpointError(
                f"{path.parent / 'store.json'}: special_ids is no list of token ids; collect the activations "
                "again."
            )
        key = path.parent, _site(path)
        if key not in firsts:
            firsts[key] = _first_rows(*key)
        found.append(_Tokens(shard.rows, firsts[key][path], path.parent, context, tuple(special)))
    return found


def _first_rows(folder: Path, site: str) -> dict[Path, int]:
    """The number of the first row of every file of a site."""
    found, total = {}, 0
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors" and _site(path) == site:
            found[path] = total
            tensors = open_safetensors(path).tensors
            total += next(iter(tensors.values())).shape[0]
    return found
