"""What a text says of each parameter: Gram matrices of what matrices read, and diagonal Fishers."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mergelab.activations.batches import batches
from mergelab.activations.capture import check_prompts
from mergelab.activations.kept import EVERY_TOKEN, TokenRule, short_enough
from mergelab.activations.running_sums import add_rounded, check_finite, log_likelihood, mean_of_sums
from mergelab.activations.streamed_statistics import norm_limits, streamed_fisher, streamed_grams
from mergelab.checkpoints.new_files import write_tensors
from mergelab.checkpoints.output_target import disk_errors
from mergelab.checkpoints.publish import WorkFolder
from mergelab.errors import NonFiniteError, SiteError
from mergelab.models.model import Model, Params
from mergelab.models.residual_stream import require_decoder
from mergelab.models.save import save_params
from mergelab.models.streamed import StreamedParams
from mergelab.models.table import Leaf, get_leaf, tree_from_leaves

__all__ = [
    "Kind",
    "Statistics",
    "add_rounded",
    "counted_rows",
    "counted_tokens",
    "fisher",
    "gram",
    "mean_of_sums",
    "write_statistics",
]

Kind = Literal["gram", "fisher", "merged_gram"]
Progress = Callable[[int, int], None]

GROUP_BYTES = 4 << 30
"""Bytes of the sums that are kept at a time; more Gram matrices take further passes over the text."""


@dataclass(frozen=True)
class Statistics:
    """One kind of statistics of a model on a text.

    Attributes:
        kind: `gram`, `fisher`, or `merged_gram` (`mergelab.activations.merged_statistics`).
        tree: float32 arrays at the paths of the parameters; parameters that have none are absent.
        tokens: number of tokens they were taken on.
    """

    kind: Kind
    tree: dict[str, Any]
    tokens: int


def gram(
    model: Model,
    params: Params,
    contexts: Any,
    *,
    mask: Any = None,
    batch: int = 8,
    rule: TokenRule = EVERY_TOKEN,
    special_ids: Sequence[int] = (),
) -> Statistics:
    """`mean over tokens of x x^T`, where `x` is what a matrix reads: `[in, in]` for each matrix.

    Sums run in float32 with the rounding of each addition carried along. Matrices that read one site share
    one array. Parameters that read no site (`Leaf.reads`) have none.

    Args:
        model: the model.
        params: its parameters, on any mesh.
        contexts: token ids, as `capture` takes them.
        mask: True for real tokens, the others count for nothing; all by default.
        batch: contexts in one forward pass.
        rule: which of the real tokens count, at each site by the norms there; all by default.
        special_ids: ids of special tokens, for the rule.

    Raises:
        SiteError, TokenError: as `capture`, or no token counts by the rule.
        NonFiniteError: a site holds NaN or infinity.

    Example:
        >>> from mergelab.models import model_from_config
        >>> model = model_from_config({
        ...     "model_type": "llama", "vocab_size": 96, "hidden_size": 16, "intermediate_size": 32,
        ...     "num_hidden_layers": 2, "num_attention_heads": 2,
        ... })
        >>> found = gram(model, model.init(0), [[5, 6, 7], [8, 9]])
        >>> found.tree["blocks_0"]["mlp"]["down"]["kernel"].shape, found.tokens
        ((32, 32), 5)
    """
    tokens, real = check_prompts(model, contexts, mask)
    kept = counted_rows(tokens, real, rule, special_ids)
    leaves = [leaf for leaf in model.table() if leaf.reads is not None]
    sites = tuple(dict.fromkeys(leaf.reads for leaf in leaves if leaf.reads))
    grams: dict[str, np.ndarray] = {}
    given = (tokens, real, kept, sites)
    if isinstance(params, StreamedParams):
        streamed_grams(model, params, *given, rule=rule, batch=batch, deliver=grams.update)
    else:
        _grams(model, params, *given, rule=rule, batch=batch, deliver=grams.update)
    tree = tree_from_leaves({leaf: grams[leaf.reads or ""] for leaf in leaves})
    return Statistics("gram", tree, int(kept.sum()))


def counted_tokens(
    tokens: np.ndarray, mask: np.ndarray | None, rule: TokenRule, special_ids: Sequence[int] = ()
) -> int:
    """How many tokens `[contexts, length]` count as far as their place and id decide."""
    real = np.ones(tokens.shape, bool) if mask is None else mask
    return int(counted_rows(tokens, real, rule, special_ids).sum())


def counted_rows(
    tokens: np.ndarray, real: np.ndarray, rule: TokenRule, special_ids: Sequence[int]
) -> np.ndarray:
    """The real tokens that count as far as their place and id decide: bool `[contexts, length]`."""
    # Prompts of several lengths are padded on the left: positions are those of real tokens.
    later = real & (np.cumsum(real, axis=1) > rule.skip_positions)
    kept = later & replace(rule, skip_positions=0).by_place(tokens, special_ids)
    if not kept.any():
        raise SiteError(
            "no token of the text counts by the rule for tokens (skip_positions, skip_special); relax it, or "
            "give longer contexts."
        )
    return kept


def fisher(
    model: Model,
    params: Params,
    contexts: Any,
    *,
    mask: Any = None,
    batch: int = 8,
    rule: TokenRule = EVERY_TOKEN,
    special_ids: Sequence[int] = (),
) -> Statistics:
    """`mean over sequences of (d log p(sequence) / d parameter)^2`, in the shape of each parameter.

    The logarithm is the sum over a sequence of `ln p(token | the tokens before it)`: the diagonal of the
    empirical Fisher matrix (arXiv:2111.09832), in float32, with the rounding of each addition carried along.
    It takes four times the memory of float32 parameters.

    Args:
        model: a decoder.
        params: its parameters, on any mesh.
        contexts: token ids, as `capture` takes them; each is one sequence.
        mask: True for real tokens; all by default.
        batch: sequences in one compiled call.
        rule: which tokens have their logarithms taken, as far as place and id decide; all by default.
        special_ids: ids of special tokens, for the rule.

    Raises:
        SiteError, TokenError: as `capture`, the model is not a decoder, or no token counts by the rule.
        NonFiniteError: a gradient is NaN or infinite.
    """
    require_decoder(model)
    tokens, real = check_prompts(model, contexts, mask)
    kept = counted_rows(tokens, real, rule, special_ids)
    if isinstance(params, StreamedParams):
        tree: dict[str, Any] = {}
        streamed_fisher(model, params, tokens, real, kept, batch, deliver=tree.__setitem__)
    else:
        tree = _fisher(model, params, tokens, real, kept, batch, lambda done: None)
    return Statistics("fisher", tree, int(kept.sum()))


def write_statistics(
    model: Model,
    params: Params,
    contexts: Any,
    out: Path | WorkFolder,
    *,
    kind: Literal["gram", "fisher"],
    mask: Any = None,
    batch: int = 8,
    group_bytes: int = GROUP_BYTES,
    overwrite: bool = False,
    identity: str = "",
    progress: Progress = lambda done, total: None,
    rule: TokenRule = EVERY_TOKEN,
    special_ids: Sequence[int] = (),
) -> int:
    """Writes safetensors files with one float32 tensor for each HF tensor, under its name.

    A Gram matrix is `[in, in]`, one for a tensor that fuses several parameters; a Fisher has the HF tensor's
    shape. The files' `__metadata__` tells `kind`, `tokens` and, where some do not count, the `rule`. The
    folder appears when it is complete.

    Args:
        model: the model; a decoder for `fisher`.
        params: its parameters, on any mesh.
        contexts: token ids, as `capture` takes them.
        out: a new folder; or the work folder of one, which the caller has entered and leaves.
        kind: `gram` or `fisher`.
        mask: True for real tokens; all by default.
        batch: contexts in one compiled call.
        group_bytes: memory of Gram matrices that are summed at a time; more take further passes.
        overwrite: replace a folder that mergelab wrote.
        identity: SHA-256 of all that decides the content, where the caller can tell.
        progress: called with contexts done and contexts in all, those of further passes among them.
        rule: which of the real tokens count; all by default.
        special_ids: ids of special tokens, for the rule.

    Returns:
        How many tensors were written.

    Raises:
        OutputError: the folder is taken, or the disk is full or fails.
        MergelabError: as `gram` and `fisher`.
    """
    if kind == "fisher":
        require_decoder(model)
    tokens, real = check_prompts(model, contexts, mask)
    kept = counted_rows(tokens, real, rule, special_ids)
    metadata = {"kind": kind, "tokens": str(int(kept.sum()))}
    if rule != EVERY_TOKEN:
        metadata["rule"] = json.dumps(rule.facts())
    given = isinstance(out, WorkFolder)
    with contextlib.nullcontext(out) if given else WorkFolder(out, overwrite=overwrite) as work:
        leaves = [leaf for leaf in model.table() if kind == "fisher" or leaf.reads is not None]
        if not work.finished(identity):
            try:
                streamed = isinstance(params, StreamedParams)
                if kind == "gram":
                    grams = streamed_grams if streamed else _grams
                    run = partial(grams, model, params, tokens, real, kept, rule=rule, batch=batch)
                    # Sites of streamed models are finished block by block, in one pass over the text.
                    at_once = None if streamed else group_bytes
                    _write_grams(model, leaves, run, len(tokens), work, at_once, metadata, progress)
                    work.publish(identity)
                elif streamed:
                    work.prepare(sum(4 * leaf.size for leaf in leaves))
                    work.clear()
                    squares = partial(streamed_fisher, model, params, tokens, real, kept, batch)
                    _write_parts(leaves, squares, work, metadata, progress)
                    work.publish(identity)
                else:
                    work.prepare()
                    tree = _fisher(
                        model, params, tokens, real, kept, batch, lambda done: progress(done, len(tokens))
                    )
                    options: dict[str, Any] = {"stem": "fisher", "identity": identity, "metadata": metadata}
                    save_params(tree, leaves, work, files={}, **options)
            except BaseException:
                work.abandon()
                raise
        return len({name for leaf in leaves for name in leaf.hf_names})


def _write_grams(
    model: Model,
    leaves: Sequence[Leaf],
    run: Callable[..., None],
    contexts: int,
    work: WorkFolder,
    group_bytes: int | None,
    metadata: Mapping[str, str],
    progress: Progress,
) -> None:
    """One file for each group of sites whose sums have room in memory together."""
    names: dict[str, dict[str, None]] = {}
    for leaf in leaves:
        names.setdefault(leaf.reads or "", {}).update(dict.fromkeys(leaf.hf_names))
    widths = {site: _width(model, site) for site in names}
    groups = [tuple(widths)] if group_bytes is None else list(_groups(widths, group_bytes))
    files = itertools.count()
    work.prepare(sum(4 * widths[site] ** 2 * len(names[site]) for site in names))
    work.clear()
    for number, sites in enumerate(groups):
        start = number * contexts

        def advance(done: int, start: int = start) -> None:
            progress(start + done, len(groups) * contexts)

        def deliver(grams: Mapping[str, np.ndarray]) -> None:
            with disk_errors(work.out):
                write_tensors(
                    work.path / f"gram-{next(files):05d}.safetensors",
                    {name: matrix for site, matrix in grams.items() for name in names[site]},
                    metadata,
                )

        run(sites, advance=advance, deliver=deliver)


def _write_parts(
    leaves: Sequence[Leaf],
    run: Callable[..., None],
    work: WorkFolder,
    metadata: Mapping[str, str],
    progress: Progress,
) -> None:
    """One file for each part of a model, of arrays in the shapes of its parameters."""
    by_part: dict[str, list[Leaf]] = {}
    for leaf in leaves:
        by_part.setdefault(leaf.path[0], []).append(leaf)
    files = itertools.count()

    def deliver(part: str, tree: Any) -> None:
        tensors: dict[str, np.ndarray] = {}
        for leaf in by_part[part]:
            for name in leaf.hf_names:
                tensors.setdefault(name, np.empty(leaf.hf_shape, np.float32))
            array = np.asarray(get_leaf({part: tree}, leaf))
            leaf.inverse(array, [tensors[name] for name in leaf.hf_names])
        with disk_errors(work.out):
            write_tensors(work.path / f"fisher-{next(files):05d}.safetensors", tensors, metadata)

    run(deliver=deliver, progress=progress)


def _width(model: Model, site: str) -> int:
    return int(np.prod([int(size) for size in model.sites()[site][2:]]))


def _groups(widths: Mapping[str, int], group_bytes: int) -> Iterator[tuple[str, ...]]:
    """Sites in forward order, as many at a time as have room for a sum and its rounding; at least one."""
    group: list[str] = []
    filled = 0
    for site, width in widths.items():
        needed = 8 * width**2
        if group and filled + needed > group_bytes:
            yield tuple(group)
            group, filled = [], 0
        group.append(site)
        filled += needed
    if group:
        yield tuple(group)


def _grams(
    model: Model,
    params: Params,
    tokens: np.ndarray,
    real: np.ndarray,
    kept: np.ndarray,
    sites: Sequence[str],
    *,
    rule: TokenRule,
    batch: int,
    deliver: Callable[[dict[str, np.ndarray]], None],
    advance: Callable[[int], None] = lambda done: None,
) -> None:
    """The Gram matrix of each site, on the host."""
    limits = norm_limits(model, params, tokens, real, kept, tuple(sites), rule, batch)
    zeros = {site: jnp.zeros((_width(model, site),) * 2, jnp.float32) for site in sites}
    sums = zeros, jax.tree.map(jnp.copy, zeros)
    numbers = {site: jnp.zeros((), jnp.int32) for site in sites}
    done = 0
    for rows, count in batches(len(tokens), batch):
        counted = kept[rows] & (np.arange(len(rows)) < count)[:, None]
        sums, added = _add_grams(model, params, tokens[rows], real[rows], counted, tuple(sites), limits, sums)
        numbers = jax.tree.map(jnp.add, numbers, added)
        done += count
        jax.block_until_ready(sums)
        advance(done)
    found = {
        site: np.asarray(mean_of_sums(sums[0][site], sums[1][site], int(numbers[site]))) for site in sites
    }
    check_finite(found)
    deliver(found)


@partial(jax.jit, static_argnames=("model", "sites"), donate_argnames="sums")
def _add_grams(
    model: Model,
    params: Params,
    tokens: Int[Array, "batch length"],
    mask: Bool[Array, "batch length"],
    counted: Bool[Array, "batch length"],
    sites: tuple[str, ...],
    limits: dict[str, Array] | None,
    sums: tuple[dict[str, Array], dict[str, Array]],
) -> tuple[tuple[dict[str, Array], dict[str, Array]], dict[str, Array]]:
    """The sums with those of some contexts, and how many rows of each site these are."""
    found = model.apply(params, tokens, mask=mask, capture=sites, logits=False).captured
    added, numbers = {}, {}
    for site in sites:
        x = found[site].astype(jnp.float32).reshape(tokens.size, -1)
        kept = counted.reshape(-1)
        if limits is not None:
            kept = kept & short_enough(x, limits[site])
        x = jnp.where(kept[:, None], x, 0.0)
        added[site] = jnp.matmul(x.T, x, precision="highest")
        numbers[site] = kept.sum(dtype=jnp.int32)
    return add_rounded(sums, added), numbers


def _fisher(
    model: Model,
    params: Params,
    tokens: np.ndarray,
    real: np.ndarray,
    kept: np.ndarray,
    batch: int,
    advance: Callable[[int], None],
) -> dict[str, Any]:
    """The mean squared gradients, where the parameters lie."""
    params = jax.tree.map(jnp.asarray, params)
    sums = tuple(
        jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32, device=p.sharding), params) for _ in range(2)
    )
    done = 0
    for rows, count in batches(len(tokens), batch):
        counted = np.arange(len(rows)) < count
        sums = _add_squares(model, params, tokens[rows], real[rows], kept[rows], counted, sums)
        done += count
        jax.block_until_ready(sums)
        advance(done)
    tree: dict[str, Any] = jax.tree.map(partial(mean_of_sums, count=len(tokens)), *sums)
    for path, array in jax.tree.leaves_with_path(tree):
        if not bool(jnp.isfinite(array).all()):
            name = ".".join(str(key.key) for key in path)
            raise NonFiniteError(f"gradients of the parameter {name!r} are not finite; try float32 weights")
    return tree


@partial(jax.jit, static_argnames="model", donate_argnames="sums")
def _add_squares(
    model: Model,
    params: Params,
    tokens: Int[Array, "batch length"],
    mask: Bool[Array, "batch length"],
    kept: Bool[Array, "batch length"],
    counted: Bool[Array, " batch"],
    sums: tuple[Params, Params],
) -> tuple[Params, Params]:
    def step(sums: Any, row: Any) -> tuple[Any, None]:
        tokens, mask, kept, counted = row
        gradient = jax.grad(partial(_log_likelihood, model))(params, tokens, mask, kept)
        squares = jax.tree.map(lambda g: jnp.where(counted, jnp.square(g.astype(jnp.float32)), 0.0), gradient)
        return add_rounded(sums, squares), None

    # One sequence after the other: side by side each would need gradients of its own.
    return jax.lax.scan(step, sums, (tokens, mask, kept, counted))[0]


def _log_likelihood(
    model: Model,
    params: Params,
    tokens: Int[Array, " length"],
    mask: Bool[Array, " length"],
    kept: Bool[Array, " length"],
) -> Float[Array, ""]:
    """`sum of ln p(token | the tokens before it)` of one sequence, over tokens that are kept."""
    logits = model.apply(params, tokens[None], mask=mask[None]).logits
    assert logits is not None
    return log_likelihood(logits[0], tokens, mask, kept)
