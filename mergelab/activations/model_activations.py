"""A model run on text as a source of rows: its sites, token by token in a fixed order."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from threading import Event
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding

from mergelab.activations.batches import filled_batches
from mergelab.activations.harvest import Harvest, side_by_side
from mergelab.activations.kept import DEFAULT_RULE, KeptRows, TokenRule, median_norm, row_norms
from mergelab.checkpoints.folder import open_checkpoint
from mergelab.checkpoints.locations import local_path
from mergelab.errors import NonFiniteError, SAEError
from mergelab.models.families import model_from_config
from mergelab.models.load import load_model
from mergelab.models.model import Model, Params
from mergelab.models.sites import match_sites
from mergelab.models.streamed import StreamedParams, Streaming, stream_model
from mergelab.models.token_checks import check_tokens, window_length
from mergelab.processes.agreement import span_processes
from mergelab.sharding import DISPATCH, named_sharding
from mergelab.text.contexts import TextContexts, text_contexts
from mergelab.text.corpus import TextOptions, documents_of_texts
from mergelab.text.corpus_files import CorpusFile, corpus_files
from mergelab.text.kept_contexts import corpus_contexts, forgotten_if_refused
from mergelab.text.token_rows import StoredTokens
from mergelab.text.tokenizer import load_tokenizer

__all__ = [
    "DEFAULT_CONTEXT",
    "ModelActivations",
    "SiteActivations",
    "contexts_of_texts",
    "halves",
    "open_model_activations",
    "side_by_side",
]

_BY_TOKEN = ("batch", "length")


@partial(jax.jit, static_argnames=("model", "sites"))
def _site_rows(params: Params, tokens: Array, *, model: Model, sites: tuple[str, ...]) -> list[Array]:
    found = model.apply(params, tokens, capture=sites, logits=False).captured
    return [side_by_side(found[site]).astype(jnp.float32) for site in sites]


DEFAULT_CONTEXT = 64
"""Tokens in a context, where nothing says how many."""


@dataclass(frozen=True)
class ModelActivations:
    """Activations at sites of a model, row by row of the tokens.

    Row `r` belongs to `tokens[r // length, r % length]`, which leads back to its text. Any range of rows can
    be read, so a shuffled stream over them stands and goes on exactly as over files; several sites come of
    one forward pass.

    Ids and length are checked against the model's embeddings (`TokenError`).

    Attributes:
        model: the model.
        params: its parameters, on any mesh, or streamed.
        tokens: int32 `[contexts, length]`, whole contexts.
        sites: names of sites of shape `[batch, length, d]`; of those with heads, such as `blocks.3.attn.z`, a
            row has the heads side by side.
        batch: contexts in one forward pass.
        framed: whether the first and the last token of each context are none of its text: `[CLS]`, `[SEP]`.
        rule: which tokens count. All rows can be read; trainings and evaluations take those that count.
        special_ids: ids of special tokens, which the rule may leave out.
        counted: bool `[contexts, length]`, False for tokens that never count, such as padding; None for none.
        text: how the text became these contexts (`mergelab.text.corpus.TextOptions`); None where that is not
            known.
    """

    model: Model
    params: Any
    tokens: np.ndarray
    sites: tuple[str, ...]
    batch: int = 32
    framed: bool = False
    rule: TokenRule = DEFAULT_RULE
    special_ids: tuple[int, ...] = ()
    counted: np.ndarray | None = None
    text: TextOptions | None = None

    def __post_init__(self) -> None:
        if self.tokens.ndim != 2 or not self.tokens.size:
            raise SAEError(
                f"tokens have shape {list(self.tokens.shape)}; expected whole contexts [n, length]."
            )
        if self.counted is not None and (
            self.counted.shape != self.tokens.shape or self.counted.dtype != np.bool_
        ):
            raise SAEError(
                f"counted is {self.counted.dtype} of shape {list(self.counted.shape)}; expected bool "
                f"{list(self.tokens.shape)}, one value for each token."
            )
        # To read all of a large file once more would keep it in memory.
        some = self.tokens[:1] if isinstance(self.tokens, StoredTokens) else self.tokens
        check_tokens(self.model, some, place="the contexts")
        for site in self.sites:
            shape = self.model.sites().get(site)
            if shape is not None and (len(shape) < 3 or shape[:2] != _BY_TOKEN):
                raise SAEError(
                    f"the site {site!r} has shape {list(shape)}; an SAE reads [batch, length, width]."
                )
        object.__setattr__(self, "_last", {})
        object.__setattr__(self, "_waiting", {})

    @property
    def rows(self) -> int:
        """How many tokens there are."""
        return self.tokens.size

    @cached_property
    def _harvest(self) -> Harvest | None:
        """The rows of a model that is streamed from its files; None of one that is loaded."""
        if not isinstance(self.params, StreamedParams):
            return None
        return Harvest(self.model, self.params, self.tokens, self.sites, self.batch)

    def _forward(self, params: Any, tokens: Array) -> list[Array]:
        return _site_rows(params, tokens, model=self.model, sites=self.sites)

    def _run(self, tokens: np.ndarray) -> list[Array]:
        """The sites of some contexts, which the devices of the model's mesh share where they divide."""
        sharding = getattr(jax.tree.leaves(self.params)[0], "sharding", None)
        mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
        if not isinstance(mesh, Mesh) or mesh.size == 1 or span_processes(mesh.devices.flat):
            return self._forward(self.params, jnp.asarray(tokens, jnp.int32))
        split = named_sharding(mesh, tokens.shape, ("batch", "length"))
        with DISPATCH:
            return self._forward(self.params, jax.device_put(np.asarray(tokens, np.int32), split))

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """Width of each site."""
        if self._harvest is not None:
            for site in self.sites:
                match_sites(self.model.sites(), site)
            return tuple(math.prod(map(int, self.model.sites()[site][2:])) for site in self.sites)
        shapes = jax.eval_shape(self._forward, self.params, jnp.zeros((1, self.tokens.shape[1]), jnp.int32))
        return tuple(shape.shape[-1] for shape in shapes)

    def read_sites(self, start: int, stop: int) -> tuple[np.ndarray, ...]:
        """Rows `start` to `stop` of every site: `[stop - start, d]`, float32, in the order of `sites`.

        Raises:
            NonFiniteError: an activation is NaN or infinite.
        """
        last: dict[Any, tuple[np.ndarray, ...]] = getattr(self, "_last")  # noqa: B009
        if (start, stop) not in last:
            last.clear()  # inputs and targets of a transcoder are read one after the other
            last[(start, stop)] = self._compute(start, stop)
        return last[(start, stop)]

    def _compute(self, start: int, stop: int) -> tuple[np.ndarray, ...]:
        length = self.tokens.shape[1]
        first, end = start // length, -(-stop // length)
        parts = list(self._passes(np.arange(first, end)))
        rows = [np.concatenate(site) for site in zip(*parts, strict=True)]
        return tuple(site[start - first * length : stop - first * length] for site in rows)

    def _passes(self, contexts: np.ndarray) -> Iterator[list[np.ndarray]]:
        """Rows of every site of some contexts, `batch` contexts in one forward pass."""
        for start in range(0, len(contexts), self.batch):
            found = self._of_contexts(contexts[start : start + self.batch])
            for name, site in zip(self.sites, found, strict=True):
                if not np.isfinite(site).all():
                    raise NonFiniteError(
                        f"activations of the site {name!r} are not finite; try float32 weights"
                    )
            yield found

    def _of_contexts(self, contexts: np.ndarray) -> list[np.ndarray]:
        """Rows of every site of at most `batch` contexts."""
        if self._harvest is not None:
            length = self.tokens.shape[1]
            each = [self._harvest.rows(int(one) * length, (int(one) + 1) * length) for one in contexts]
            return [np.concatenate(site).astype(np.float32, copy=False) for site in zip(*each, strict=True)]
        ((tokens,), count) = next(filled_batches(self.batch, self.tokens[contexts]))
        return [np.asarray(x)[:count].reshape(-1, x.shape[-1]) for x in self._run(tokens)]

    def site_rows(self, numbers: np.ndarray, index: int) -> np.ndarray:
        """Rows of one site by number, from full forward passes over their contexts: `[len(numbers), d]`.

        Other sites, which a transcoder reads next, are kept until they are asked for.

        Raises:
            NonFiniteError: an activation is NaN or infinite.
        """
        waiting: dict[str, Any] = getattr(self, "_waiting")  # noqa: B009
        if index not in waiting.get("sites", {}) or not np.array_equal(waiting["numbers"], numbers):
            waiting.clear()
            waiting |= {"numbers": numbers, "sites": dict(enumerate(self._gather(numbers)))}
        return waiting["sites"].pop(index)

    def _gather(self, numbers: np.ndarray) -> list[np.ndarray]:
        length = self.tokens.shape[1]
        contexts, which = np.unique(numbers // length, return_inverse=True)
        order = np.argsort(which, kind="stable")
        ends = np.searchsorted(which[order], np.arange(self.batch, len(contexts) + self.batch, self.batch))
        rows = [np.empty((len(numbers), width), np.float32) for width in self.widths]
        begin = 0
        for number, found in enumerate(self._passes(contexts)):
            places = order[begin : ends[number]]
            within = (which[places] - number * self.batch) * length + numbers[places] % length
            for site, of_pass in zip(rows, found, strict=True):
                site[places] = of_pass[within]
            begin = ends[number]
        return rows

    @cached_property
    def by_place(self) -> np.ndarray:
        """Tokens that count as far as their place and id decide: bool `[contexts, length]`."""
        return self.rule.by_place(self.tokens, self.special_ids, self.counted)

    @cached_property
    def median_norms(self) -> tuple[float, ...]:
        """The median norm of each site's rows that count by their place, in contexts spread evenly."""
        contexts = len(self.tokens)
        chosen = np.unique(np.linspace(0, contexts - 1, min(self.batch, contexts)).astype(int))
        there = self.by_place[chosen].reshape(-1)
        return tuple(median_norm(row_norms(site)[there]) for site in self._of_contexts(chosen))

    @property
    def norm_limits(self) -> tuple[float, ...]:
        """The largest norm at which a row of each site counts."""
        if self.rule.max_norm_multiple is None:
            return (math.inf,) * len(self.sites)
        return tuple(map(self.rule.norm_limit, self.median_norms))

    def kept_among(self, rows: Sequence[np.ndarray], start: int) -> np.ndarray:
        """Which of the rows from number `start` on count, of what `read_sites` gave: bool `[rows]`."""
        kept = self.by_place.reshape(-1)[start : start + len(rows[0])]
        for site, limit in zip(rows, self.norm_limits, strict=True):
            if limit < math.inf:
                kept = kept & ~(row_norms(site) > limit)
        return kept

    def kept_rows(self, site: str, target: str | None = None) -> KeptRows:
        """Which rows of a site, and of its target, a training counts."""
        limits = dict(zip(self.sites, self.norm_limits, strict=True))
        by_place = self.by_place.reshape(-1)
        return KeptRows(
            None if by_place.all() else lambda start, stop: by_place[start:stop],
            limits[site],
            math.inf if target is None else limits[target],
            self.rule,
            self.tokens.shape[1],
        )

    def contexts(self, chosen: slice) -> ModelActivations:
        """The same of some of the contexts."""
        counted = None if self.counted is None else self.counted[chosen]
        return replace(self, tokens=self.tokens[chosen], counted=counted)

    def at(self, site: str) -> SiteActivations:
        """One of the sites, as a source."""
        return SiteActivations(self, self.sites.index(site))


@dataclass(frozen=True)
class SiteActivations:
    """One site of `ModelActivations`: a source of rows."""

    of: ModelActivations
    index: int

    @property
    def rows(self) -> int:
        """How many there are."""
        return self.of.rows

    @property
    def d_in(self) -> int:
        """Width of a row."""
        return self.of.widths[self.index]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop`: `[stop - start, d_in]`, float32."""
        return self.of.read_sites(start, stop)[self.index]

    def read_scattered(self, numbers: np.ndarray) -> np.ndarray:
        """Rows by number, from full forward passes over their contexts: `[len(numbers), d_in]`, float32."""
        return self.of.site_rows(numbers, self.index)


def contexts_of_texts(folder: Path, texts: str | Sequence[str], length: int) -> np.ndarray:
    """Texts in the tokens of a model's folder, joined and cut: int32 `[contexts, length]`, without the rest.

    A token that ends texts stands between them; where the tokenizer frames texts, each context is framed, and
    where it begins them with a token, each context and each text begins with it.

    Raises:
        SAEError: the texts do not fill one context.
    """
    return text_contexts(load_tokenizer(folder), documents_of_texts(texts), length).tokens


def open_model_activations(
    model: str | Path,
    sites: str | Sequence[str],
    texts: str | Path | CorpusFile | Sequence[str | Path | CorpusFile],
    *,
    length: int | None = None,
    default: int = DEFAULT_CONTEXT,
    dtype: Any = None,
    mesh: Any = None,
    rule: TokenRule = DEFAULT_RULE,
    text: TextOptions | None = None,
    kept: Path | None = None,
    reading: Callable[[int], object] = lambda tokens: None,
    streamed: Streaming | None = None,
) -> ModelActivations:
    """Activations of a model's folder on a corpus, which is tokenized while the weights are read.

    Args:
        model: a Hugging Face folder with its tokenizer, a model on the hub, or a URL.
        sites: names, such as `blocks.8.resid_post`, or one.
        texts: what `mergelab.text.corpus.documents` takes: files, globs, folders, data sets, URLs; or one.
        length: tokens per context; if None the default, or as many as the model has positions.
        default: what a context has that nobody asked for.
        dtype: dtype of the weights; the stored one if None.
        mesh: devices to spread the model over.
        rule: which tokens count.
        text: how the texts become contexts, and how many are read.
        kept: folder in which the tokens are kept as they are made, for a call that goes on after a kill
            (`mergelab.text.corpus_contexts`).
        reading: function that is called with the tokens read so far, in another thread.
        streamed: how activations wait, where the weights stay in their files; None to load them.

    Raises:
        TokenError: the context is longer than the model's positions, or a token is beyond its vocabulary.
        SAEError: a text cannot be read, or the texts are too short.
        SiteError: the model has no such site.
        CheckpointError: the model cannot be read.
    """
    model, text = local_path(model), text or TextOptions()
    sites = [sites] if isinstance(sites, str) else sites
    given = [texts] if isinstance(texts, str | Path | CorpusFile) else texts
    files = [file for one in given for file in ([one] if isinstance(one, CorpusFile) else corpus_files(one))]
    checkpoint = open_checkpoint(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what there is to say of the configuration is said when it is loaded
        shape = model_from_config(checkpoint.config, str(checkpoint.path / "config.json"))
    size = window_length(shape, length, default)
    stopped = Event()

    def check(ids: np.ndarray) -> None:
        if stopped.is_set():
            raise CancelledError
        check_tokens(shape, ids, place=str(model / "tokenizer.json"))

    tokenizer = load_tokenizer(model)

    def read() -> TextContexts:
        return corpus_contexts(tokenizer, files, size, text, folder=kept, check=check, progress=reading)

    with forgotten_if_refused(kept), ThreadPoolExecutor(1, thread_name_prefix="tokens") as pool:
        made = pool.submit(read)
        try:
            if streamed is None:
                loaded, params = load_model(checkpoint, mesh=mesh, dtype=dtype)
            else:
                loaded, params = stream_model(checkpoint, mesh=mesh, dtype=dtype, **streamed._asdict())
            contexts = made.result()
        except BaseException:
            stopped.set()
            raise
        found = ModelActivations(
            loaded,
            params,
            contexts.tokens,
            tuple(sites),
            framed=contexts.framed,
            rule=rule,
            special_ids=tokenizer.special_ids,
            counted=contexts.counted,
            text=replace(text, bos=contexts.bos is not None),
        )
        _ = found.widths  # names of sites are checked here, before anything is computed
    return found


def halves(source: ModelActivations) -> tuple[ModelActivations, ModelActivations]:
    """The first half of a text's contexts, which fits, and the second, which judges.

    Raises:
        SAEError: there is only one context.
    """
    count = len(source.tokens) // 2
    if not count:
        raise SAEError("one context cannot both fit and judge; give more text.")
    return source.contexts(slice(count)), source.contexts(slice(count, None))
