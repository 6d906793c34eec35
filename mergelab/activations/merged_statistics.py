"""Gram matrices of what each model's blocks read behind blocks that are merged already (RegMean++)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mergelab.activations.batches import batches
from mergelab.activations.capture import check_prompts
from mergelab.activations.kept import EVERY_TOKEN, TokenRule, median_norm
from mergelab.activations.running_sums import add_rounded, check_finite, mean_of_sums, squared_rows
from mergelab.activations.statistics import Statistics, counted_rows
from mergelab.checkpoints.new_files import write_tensors
from mergelab.checkpoints.output_target import disk_errors
from mergelab.checkpoints.publish import WorkFolder
from mergelab.errors import SiteError
from mergelab.models.block_programs import require_only_the_stream
from mergelab.models.decoder import ENTRANCE_PARTS, DecoderConfig, Entrance, Exit
from mergelab.models.layers.block import AnyBlock, Pass
from mergelab.models.model import Model, Params
from mergelab.models.residual_stream import require_decoder
from mergelab.models.sites import Tap
from mergelab.models.table import Leaf, tree_from_leaves
from mergelab.operators import OPERATORS

__all__ = ["merged_grams", "write_merged_grams"]

Grams = dict[str, np.ndarray]
"""A Gram matrix `[in, in]` by the name of the site."""

Part = Callable[..., tuple[Array, dict[str, Array]]]
"""A compiled piece of the model: parameters, stream, positions and mask, to the stream and its sites."""


@dataclass
class _Text:
    """One model's text on its way through the blocks.

    Attributes:
        tokens, real, kept: token ids, which are no padding, which count: `[contexts, length]`.
        positions: the tokens' positions.
        stream: what enters the next block, `[contexts, length, d_model]`, on the host.
    """

    tokens: np.ndarray
    real: np.ndarray
    kept: np.ndarray
    positions: np.ndarray
    stream: np.ndarray


def merged_grams(
    model: Model,
    params: Sequence[Params],
    contexts: Sequence[Any],
    *,
    masks: Sequence[Any] | None = None,
    off_diagonal: float = 1.0,
    batch: int = 8,
    rule: TokenRule = EVERY_TOKEN,
    special_ids: Sequence[int] = (),
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> list[Statistics]:
    """Statistics for `regmean_pp`: `mean over tokens of x x^T`, where merged blocks made `x`.

    Block after block: each model's block reads what the merged blocks before it make of that model's text,
    which gives its Gram matrices; the blocks are merged by them, and the merged one takes the texts on
    (RegMean++, arXiv:2508.03121). Embeddings are averaged. Each model's text passes each block twice.

    Args:
        model: the decoder that all parameters are of.
        params: the models' parameters, on one device or a mesh.
        contexts: token ids of each model's text, as `capture` takes them.
        masks: True for real tokens, for each text; all by default.
        off_diagonal: what the merge will multiply off-diagonal entries with.
        batch: contexts in one compiled call.
        rule: which of the real tokens count, at each site by the norms there; all by default.
        special_ids: ids of special tokens, for the rule.
        advance: called with the blocks done and their number, head included.

    Returns:
        One of the kind `merged_gram` per model.

    Raises:
        SiteError: not one text per model, fewer than two models, an encoder, or no token counts.
        TokenError: as `capture`.
        NonFiniteError: a site holds NaN or infinity.
        MergelabError: blocks read more than the stream.
    """
    require_decoder(model)
    require_only_the_stream(model)
    if len(params) != len(contexts) or len(params) < 2:
        raise SiteError(
            f"{len(params)} models and {len(contexts)} texts were given; regmean_pp takes two models or "
            "more, and a text of each."
        )
    config: DecoderConfig = model.config
    texts = [
        _opened(model, text, None if masks is None else masks[i], rule, special_ids)
        for i, text in enumerate(contexts)
    ]
    mean = jax.tree.map(lambda *leaves: _averaged(leaves), *[_outer(one) for one in params])
    for text in texts:
        _enter(config, mean, text, batch)
    found: list[Grams] = [{} for _ in params]
    by_block = _leaves_by_block(model)
    total = len(config.blocks) + 1
    for i, spec in enumerate(config.blocks):
        name, leaves = f"blocks_{i}", by_block.get(f"blocks_{i}", [])
        sites = tuple(dict.fromkeys((leaf.reads or "").split(".", 2)[2] for leaf in leaves))
        run = _block(spec, sites, config.causal)
        for text, own, grams in zip(texts, params, found, strict=True):
            for site, gram in _grams(run, own[name], text, sites, rule, batch).items():
                grams[f"blocks.{i}.{site}"] = gram
        merged = _merged_block(name, leaves, params, found, off_diagonal)
        onward = _block(spec, (), config.causal)
        for text in texts:
            for rows, count in batches(len(text.tokens), batch):
                x, _ = onward(merged, text.stream[rows], text.positions[rows], text.real[rows])
                text.stream[rows[:count]] = np.asarray(x)[:count]
        advance(i + 1, total)
    sites = tuple(dict.fromkeys(leaf.reads or "" for leaf in by_block.get("", [])))
    if sites:
        run = _head(replace(config, blocks=config.blocks[:1]), sites)
        for text, own, grams in zip(texts, params, found, strict=True):
            grams.update(_grams(run, _outer(own), text, sites, rule, batch))
    advance(total, total)
    leaves = [leaf for leaf in model.table() if leaf.reads is not None]
    return [
        Statistics(
            "merged_gram",
            tree_from_leaves({leaf: grams[leaf.reads or ""] for leaf in leaves}),
            int(text.kept.sum()),
        )
        for text, grams in zip(texts, found, strict=True)
    ]


def write_merged_grams(
    model: Model, found: Callable[[], Mapping[str, Statistics]], work: WorkFolder, identity: str = ""
) -> int:
    """Writes `NAME/gram.safetensors` for each model, tensors under their HF names; the folder is published.

    Args:
        model: the model they are of.
        found: makes the statistics, by the name of each model's folder; not called where they are there.
        work: the work folder, entered by the caller.
        identity: SHA-256 of all that decides the content.

    Returns:
        How many tensors each file has.

    Raises:
        OutputError: the disk is full or fails.
    """
    leaves = [leaf for leaf in model.table() if leaf.reads is not None]
    names = [hf for leaf in leaves for hf in leaf.hf_names]
    if work.finished(identity):
        return len(names)
    try:
        _write(leaves, found(), work)
        work.publish(identity)
    except BaseException:
        work.abandon()
        raise
    return len(names)


def _write(leaves: Sequence[Leaf], found: Mapping[str, Statistics], work: WorkFolder) -> None:
    arrays = {
        name: {hf: _at(one.tree, leaf) for leaf in leaves for hf in leaf.hf_names}
        for name, one in found.items()
    }
    work.prepare(sum(array.nbytes for tensors in arrays.values() for array in tensors.values()))
    work.clear()
    with disk_errors(work.out):
        for name, tensors in arrays.items():
            folder = Path(work.path) / name
            folder.mkdir()
            metadata = {"kind": "merged_gram", "tokens": str(found[name].tokens)}
            write_tensors(folder / "gram.safetensors", tensors, metadata)


def _at(tree: Any, leaf: Leaf) -> np.ndarray:
    for key in leaf.path:
        tree = tree[key]
    return np.asarray(tree)


def _opened(model: Model, contexts: Any, mask: Any, rule: TokenRule, special_ids: Sequence[int]) -> _Text:
    tokens, real = check_prompts(model, contexts, mask)
    kept = counted_rows(tokens, real, rule, special_ids)
    positions = np.asarray(model.positions(jnp.asarray(tokens), jnp.asarray(real), None))
    return _Text(tokens, real, kept, positions, np.empty(0, np.float32))


def _enter(config: DecoderConfig, params: Params, text: _Text, batch: int) -> None:
    """Fills the stream with what the averaged embeddings give."""
    entrance = Entrance(replace(config, blocks=config.blocks[:1]))
    run = jax.jit(lambda p, tokens, positions: entrance.apply({"params": p}, tokens, positions, Tap({})))
    named = {name: params[name] for name in ENTRANCE_PARTS if name in params}
    for rows, count in batches(len(text.tokens), batch):
        x = np.asarray(run(named, text.tokens[rows], text.positions[rows]))
        if not text.stream.size:
            text.stream = np.zeros((*text.tokens.shape, x.shape[-1]), x.dtype)
        text.stream[rows[:count]] = x[:count]


def _outer(params: Params) -> Params:
    return {name: leaf for name, leaf in params.items() if not name.startswith("blocks_")}


def _averaged(leaves: Sequence[Array]) -> Array:
    wide = sum(leaf.astype(jnp.float32) for leaf in leaves) / len(leaves)
    return jnp.asarray(wide).astype(leaves[0].dtype)


def _leaves_by_block(model: Model) -> dict[str, list[Leaf]]:
    """Leaves that read a site, by the block of the site; the others under an empty name."""
    found: dict[str, list[Leaf]] = {}
    for leaf in model.table():
        if leaf.reads is not None:
            site = leaf.reads
            block = f"blocks_{site.split('.')[1]}" if site.startswith("blocks.") else ""
            found.setdefault(block, []).append(leaf)
    return found


def _merged_block(
    name: str, leaves: Sequence[Leaf], params: Sequence[Params], found: Sequence[Grams], off_diagonal: float
) -> Params:
    """The block that `regmean_pp` makes of the models' own."""
    beside = [
        tree_from_leaves({leaf: grams[leaf.reads or ""] for leaf in leaves if leaf.path[0] == name})
        for grams in found
    ]
    merge = OPERATORS["regmean_pp"](off_diagonal=off_diagonal)
    return merge([{name: one[name]} for one in params], statistics=beside)[name]


@partial(jax.jit, static_argnums=(0, 1, 2))
def _run_block(
    spec: AnyBlock,
    sites: tuple[str, ...],
    causal: bool,
    params: Params,
    x: Float[Array, "batch length width"],
    positions: Int[Array, "batch length"],
    mask: Bool[Array, "batch length"],
) -> tuple[Array, dict[str, Array]]:
    tap = Tap(dict.fromkeys((f"blocks.0.{site}" for site in sites), ()), [f"blocks.0.{s}" for s in sites])
    module = spec.module(0, 1.0, "block")  # the gain is that of initial weights
    found: Any = module.apply({"params": params}, x, Pass(positions, mask, None, tap, causal=causal))
    return found[0], {name.removeprefix("blocks.0."): kept for name, kept in tap.captured.items()}


def _block(spec: AnyBlock, sites: tuple[str, ...], causal: bool) -> Part:
    return partial(_run_block, spec, sites, causal)


@partial(jax.jit, static_argnums=(0, 1))
def _run_head(
    config: DecoderConfig,
    sites: tuple[str, ...],
    params: Params,
    x: Float[Array, "batch length width"],
    positions: Int[Array, "batch length"],
    mask: Bool[Array, "batch length"],
) -> tuple[Array, dict[str, Array]]:
    tap = Tap(dict.fromkeys(sites, ()), sites)
    logits, _ = Exit(config).apply({"params": params}, x, tap)
    return logits[..., :1], tap.captured


def _head(config: DecoderConfig, sites: tuple[str, ...]) -> Part:
    return partial(_run_head, config, sites)


def _grams(
    run: Part, params: Params, text: _Text, sites: Sequence[str], rule: TokenRule, batch: int
) -> Grams:
    """The Gram matrix of each site of one piece on one text."""
    limits = _limits(run, params, text, sites, rule, batch)
    sums: dict[str, tuple[Array, Array]] = {}
    numbers = dict.fromkeys(sites, 0)
    for found, kept in _captured(run, params, text, batch):
        for site in sites:
            added, number = squared_rows(found[site], kept, limits.get(site))
            zero = jnp.zeros_like(added)
            sums[site] = add_rounded(sums.get(site, (zero, zero)), added)
            numbers[site] += int(number)
    grams = {site: np.asarray(mean_of_sums(*sums[site], numbers[site])) for site in sites}
    check_finite(grams)
    return grams


def _captured(
    run: Part, params: Params, text: _Text, batch: int, chosen: np.ndarray | None = None
) -> Iterator[tuple[dict[str, Array], np.ndarray]]:
    """Sites in batches, with the tokens of them that count; of all contexts or of chosen ones."""
    places = np.arange(len(text.tokens)) if chosen is None else chosen
    for rows, count in batches(len(places), batch):
        at = places[rows]
        kept = text.kept[at] & (np.arange(len(rows)) < count)[:, None]
        yield run(params, text.stream[at], text.positions[at], text.real[at])[1], kept


def _limits(
    run: Part, params: Params, text: _Text, sites: Sequence[str], rule: TokenRule, batch: int
) -> dict[str, Array]:
    """The largest norm of a row that counts, of each site, by contexts spread evenly; empty for no limit."""
    if rule.max_norm_multiple is None:
        return {}
    number = len(text.tokens)
    chosen = np.unique(np.linspace(0, number - 1, min(batch, number)).astype(int))
    found, kept = next(_captured(run, params, text, len(chosen), chosen))
    limits = {}
    for site in sites:
        rows = np.asarray(found[site], np.float64).reshape(*kept.shape, -1)
        limits[site] = jnp.float32(rule.norm_limit(median_norm(np.linalg.norm(rows, axis=-1)[kept])))
    return limits
