"""A model: its configuration, module and table, applied to tokens; and what a family is."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from mergelab.compat import register_dataclass
from mergelab.errors import CheckpointError, MergelabError, TokenError
from mergelab.models.cache import ArrayLeaf, Cache, new_cache
from mergelab.models.derived import Derived, derive_blocks, draw, zeros_for
from mergelab.models.saved_names import Spelling, is_buffer, is_other_head, spelling_of
from mergelab.models.sites import Edit, Shape, Tap, TokenPlaces
from mergelab.models.table import Leaf, Row, build_table
from mergelab.models.token_checks import (
    check_ids,
    check_images,
    check_length,
    check_positions,
    check_token_array,
    concrete,
    learned_positions,
)

__all__ = ["Architecture", "Family", "Model", "Output", "Params", "token_places"]


@dataclass(frozen=True)
class Architecture:
    """A flax module that several families share.

    Attributes:
        module: makes the module of a configuration, a hashable `mergelab.models.derived.Configuration`.
        causal: whether tokens see only earlier ones (it can keep a cache, and has logits).
    """

    module: Callable[[Any], nn.Module]
    causal: bool

    def derived(self, config: Any) -> Derived:
        """Parameters and sites of the module of a configuration, without running or filling it."""
        return derive_blocks(self.module, config)


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        model_type: model type in `config.json`'s spelling.
        architecture: the module it runs on.
        read: `(config, place) -> configuration`; raises `CheckpointError` for what it cannot compute.
        rows: the table that maps parameters to HF tensors, for one configuration.
        prefix: what HF puts before tensor names in models with a head, and omits without one.
        unused: glob patterns of tensors that files may hold and that the model does not need, beside the
            buffers and heads of `saved_names`.
        adapt: `(configuration, tensor names) -> configuration`, where files of one config differ.
    """

    model_type: str
    architecture: Architecture
    read: Callable[[Mapping[str, Any], str], Any]
    rows: Callable[[Any], Iterable[Row]]
    prefix: str = ""
    unused: tuple[str, ...] = ()
    adapt: Callable[[Any, Collection[str]], Any] = lambda config, names: config


Params = dict[str, Any]
_Texts = Int[Array, "batch length"]
_Images = Float[Array, "batch channels tall wide"]
_Beside = Float[Array, "images channels tall wide"]
Tokens = _Texts | _Images | tuple[_Texts | None, _Beside | None]
"""Token ids, or pixel values of a model of images, or a pair of both."""
_PAIRS = [False, False], [False, True], [True, False]


@runtime_checkable
class RunsItself(Protocol):
    """Parameters that know how a pass over them is run, such as those that stay in their files."""

    def run_pass(self, tokens: Any, **given: Any) -> Output:
        """A pass, with the arguments of `Model.apply`, which has checked them."""
        ...


@register_dataclass
@dataclass(frozen=True)
class Output:
    """What a forward pass returns.

    Attributes:
        logits: `[batch, length, vocab]` float32; None for encoders and where the pass stopped before them.
        hidden: the last hidden state, after the final norm, `[batch, length, width]`; None where the pass
            stopped before it.
        captured: the sites asked for.
        cache: the cache with the new tokens, if one was given.
    """

    logits: ArrayLeaf | None
    hidden: ArrayLeaf | None
    captured: dict[str, ArrayLeaf]
    cache: Cache | None


# Names that people try who come from TransformerLens and transformers: what to write instead.
_ELSEWHERE = {
    "run_with_cache": "model.apply(params, tokens, capture=[...]) returns the sites asked for as `.captured`",
    "run_with_hooks": "pass functions by site, model.apply(params, tokens, edit={site: function})",
    "add_hook": "pass functions by site, model.apply(params, tokens, edit={site: function})",
    "hooks": "pass functions by site, model.apply(params, tokens, edit={site: function})",
    "reset_hooks": "edits are arguments of one call, so there are no hooks to remove",
    "hook_dict": "model.sites() lists every site with its shape",
    "hook_points": "model.sites() lists every site with its shape",
    "to_tokens": "mergelab.load_tokenizer(path).encode(text) gives a text's ids",
    "to_str_tokens": "mergelab.load_tokenizer(path) reads and writes text",
    "to_string": "mergelab.load_tokenizer(path).decode(ids) gives the text of ids",
    "to_single_token": "mergelab.load_tokenizer(path).encode(text) gives a text's ids",
    "tokenizer": "a model has no tokenizer; mergelab.load_tokenizer(path) opens the one beside its weights",
    "generate": "mergelab.generate(model, params, tokens, max_new_tokens=...) continues prompts",
    "from_pretrained": "model, params = mergelab.load_model(path) opens a folder",
    "save_pretrained": "mergelab.save_model(model, params, path) writes a folder",
    "state_dict": "parameters are a separate tree, the second value of mergelab.load_model(path)",
    "parameters": "parameters are a separate tree; model.table() describes each of them",
    "params": "parameters are a separate tree, the second value of mergelab.load_model(path)",
    "forward": "model.apply(params, tokens) is the forward pass",
    "cfg": "model.config is the configuration",
    "blocks": "model.config.blocks describes the blocks; params['blocks_0'] are the first one's parameters",
    "W_E": "params['embed']['embedding'] is the embedding, [vocab, width]",
    "W_U": "mergelab.models.residual_stream.unembedding(model, params) is [width, vocab]",
    "W_pos": "params['positions']['embedding'] holds learned positions, where there are any",
    "unembed": "mergelab.models.residual_stream.unembedding(model, params) is [width, vocab]",
    **{
        f"W_{name.upper()}": f"params['blocks_0']['attn']['{name}']['kernel'] is block 0's, [in, out]"
        for name in "qkvo"
    },
    "W_in": "params['blocks_0']['mlp']['up']['kernel'] is block 0's, [in, out]",
    "W_gate": "params['blocks_0']['mlp']['gate']['kernel'] is block 0's, [in, out]",
    "W_out": "params['blocks_0']['mlp']['down']['kernel'] is block 0's, [in, out]",
    **dict.fromkeys(
        ("to", "cuda", "cpu", "eval", "train"), "a model holds no arrays; move or cast its parameters"
    ),
}


@dataclass(frozen=True, repr=False)
class Model:
    """A family and a configuration; hashable, without parameters.

    Attributes:
        family: the family's declaration.
        config: its `DecoderConfig`, `EncoderConfig` or `VisionConfig`.
        hf_config: the `config.json` it was read from.
        spelling: how a file spells the names of tensors; that of the family's table if None.
        tower: whether the files may hold other towers beside this model, as those of a wrapper do.
    """

    family: Family
    config: Any
    hf_config: Mapping[str, Any] = field(compare=False, repr=False)
    spelling: Spelling | None = None
    tower: bool = False

    def __repr__(self) -> str:
        # One line: a configuration describes every layer.
        c, count = self.config, sum(leaf.size for leaf in self._table)
        size = f"n_layers={c.n_layers}, d_model={c.d_model}, vocab_size={c.vocab_size}"
        return f"Model({self.family.model_type!r}, {size}, parameters={count:,})"

    def __getattr__(self, name: str) -> Any:
        # Only names that are not there come here.
        message = f"{type(self).__name__!r} object has no attribute {name!r}"
        hint = _ELSEWHERE.get(name)
        raise AttributeError(f"{message}: {hint}." if hint else message, name=name, obj=self)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # Every call of a compiled function looks its model up, and a configuration describes every layer.
        return hash((self.family, self.config, self.spelling))

    @property
    def causal(self) -> bool:
        """Whether tokens see only earlier ones: false of encoders, and of decoders that make embeddings."""
        return self.family.architecture.causal and getattr(self.config, "causal", True)

    @property
    def predicts(self) -> bool:
        """Whether there are logits of next tokens: of causal models whose weights hold that head."""
        return self.causal and getattr(self.config, "head", True)

    @property
    def skips_padding(self) -> bool:
        """Whether positions count real tokens alone: of decoders, and of encoders such as RoBERTa."""
        return self.family.architecture.causal or self.config.skips_padding

    @property
    def reads_images(self) -> bool:
        """Whether it reads pixel values in place of token ids."""
        return getattr(self.config, "image", None) is not None

    @property
    def reads_both(self) -> bool:
        """Whether it reads a pair of token ids and pixel values."""
        return getattr(self.config, "reads_both", False)

    def _told_apart(self, tokens: Any) -> tuple[Any, Any]:
        """Token ids and pixel values, None for what is not read.

        Raises:
            TokenError: something other than a pair is given to a model that reads both, or an empty one.
        """
        if not self.reads_both:
            return (None, tokens) if self.reads_images else (tokens, None)
        if not isinstance(tokens, tuple) or [one is None for one in tokens] not in _PAIRS:
            raise TokenError(
                f"a {self.family.model_type!r} model reads a pair (token ids, pixel values), of which one "
                "may be None; give it one."
            )
        return tokens

    def table(self) -> tuple[Leaf, ...]:
        """Every parameter: its path, shape and logical axes, and the HF tensors that store it."""
        return self._table

    @cached_property
    def _table(self) -> tuple[Leaf, ...]:
        rows = list(self.family.rows(self.config))
        if self.spelling is not None:
            rows = [row._replace(hf_name=self.spelling.in_file(row.hf_name)) for row in rows]
        return build_table(
            rows, self.family.architecture.derived(self.config).parameters, self.config.n_layers
        )

    def for_tensors(self, names: Collection[str]) -> Model:
        """The same model with the table that fits a file: as it spells names, without a head it lacks.

        Raises:
            CheckpointError: the configuration has more layers than there are tensors.
        """
        layers, least = self.config.n_layers, self.config.least_tensors
        if least > len(names):
            # Said before a table of so many rows is made.
            each = "" if least == layers else f" of {least:,} experts in all"
            raise CheckpointError(
                f"the model's config.json has {layers:,} layers{each}, but its weights hold only "
                f"{len(names):,} tensors; use the config.json that belongs to them."
            )
        rows = {row.path: row.hf_name for row in self.family.rows(self.config)}
        embedding = rows.get("embed.embedding", rows.get("embed.kernel", ""))
        spelling = spelling_of(names, rows.values(), self.family.prefix, embedding)
        config = self.family.adapt(self.config, names)
        head = rows.get("unembed.kernel")
        if head is not None and not config.tied and spelling.in_file(head) not in names:
            bare = spelling.is_bare and embedding.removeprefix(self.family.prefix) in names
            other = any(is_other_head(reading) for name in names for reading in spelling.readings(name))
            if bare or other or not self._claims_a_head():
                config = replace(config, head=False)
        return replace(self, config=config, spelling=None if spelling.is_standard else spelling)

    @cached_property
    def _stored(self) -> frozenset[str]:
        return frozenset(name for leaf in self._table for name in leaf.hf_names)

    def _claims_a_head(self) -> bool:
        """Whether the config says that the weights were saved with a head of next tokens, or does not say."""
        classes = self.hf_config.get("architectures")
        if not isinstance(classes, list) or not classes:
            return True
        heads = ("CausalLM", "LMHeadModel", "ConditionalGeneration")
        return any(str(name).endswith(head) for name in classes for head in heads)

    def standard(self) -> Model:
        """The same model with the names that its family writes; those of the base class stay as they are."""
        if self.spelling is None or self.spelling == Spelling(self.family.prefix):
            return self
        bare = self.spelling.is_bare and not self.tower
        return replace(self, spelling=Spelling(self.family.prefix) if bare else None)

    def is_unused(self, hf_name: str) -> bool:
        """Whether files may hold this tensor though the model does not need it.

        Buffers, tied copies of the embedding, other heads, and the other towers of a wrapper.
        """
        return self.why_unused(hf_name) is not None

    def why_unused(self, hf_name: str) -> Literal["buffer", "head", "tower"] | None:
        """What a tensor is that files may hold and the model does not need; None for any other."""
        if hf_name in self._stored:
            return None
        spelling = self.spelling or Spelling(self.family.prefix, self.family.prefix)
        readings = (*spelling.readings(hf_name), hf_name)
        if any(fnmatch.fnmatchcase(name, pattern) for name in readings for pattern in self.family.unused):
            return "buffer"
        if any(is_buffer(name) or self._lent(name) for name in readings):
            return "buffer"
        if any(is_other_head(name) for name in readings):
            return "head"
        if any(self._predicts_further(name) for name in readings):
            return "head"
        inside = hf_name.startswith(spelling.lead) if spelling.lead else True
        return "tower" if self.tower and not inside else None

    def _predicts_further(self, name: str) -> bool:
        """Whether a tensor is of a layer behind the last one, which predicts the token after the next."""
        more = self.hf_config.get("num_nextn_predict_layers")
        found = re.match(r"model\.layers\.(\d{1,9})\.", name) if type(more) is int else None
        return found is not None and 0 <= int(found[1]) - self.config.n_layers < (more or 0)

    def _lent(self, name: str) -> bool:
        """Whether a tensor projects keys or values of a layer that reads those of an earlier one."""
        found = re.match(r"model\.layers\.(\d{1,9})\.self_attn\.(?:[kv]_proj|[kv]_norm)\.", name)
        return found is not None and int(found[1]) in getattr(self.config, "borrowing", ())

    def sites(self) -> Mapping[str, Shape]:
        """Name and symbolic shape of every site, in the order of the forward pass.

        Numbers are fixed by the configuration; `batch` and `length` by the tokens of a call; `query` and
        `key` are `length` too, but with a cache `key` is its number of slots.
        """
        return self._sites

    @cached_property
    def _sites(self) -> dict[str, Shape]:
        return self.family.architecture.derived(self.config).sites

    def init(self, seed: int) -> Params:
        """Fresh float32 parameters: embeddings of deviation 0.02, norm scales 1, kernels as in `Linear`."""
        module = self.family.architecture.module(self.config)
        key = jax.random.key(seed)
        if not isinstance(key, Tracer):
            return draw(module, key)
        made: Any = module.init(key, *zeros_for(module), None, None, Tap({}), mutable=["params"])
        return made["params"]

    def apply(
        self,
        params: Params,
        tokens: Tokens,
        *,
        positions: Int[Array, "batch length"] | None = None,
        mask: Bool[Array, "batch length"] | None = None,
        capture: str | Sequence[str] = (),
        edit: Mapping[str, Edit] | None = None,
        cache: Cache | None = None,
        logits: bool = True,
        token_types: Int[Array, "batch length"] | None = None,
        places: TokenPlaces | None = None,
    ) -> Output:
        """One forward pass: pure, and so jittable, differentiable, vmappable and shardable.

        Args:
            params: the parameters, as `table()` describes them.
            tokens: token ids; padding may hold any valid id. Those that are not traced are checked, which
                waits for them where they are on a device. Of a model of images, pixel values
                `[batch, channels, height, width]`, normalized as its `preprocessor_config.json` says; of
                CLIP, a pair of both, of which one may be None.
            positions: positions of the tokens. By default a decoder counts each row's real tokens from 0 (on
                from those in the cache), and so does RoBERTa; other encoders count all tokens.
            mask: True for real tokens, False for padding on either side. Outputs at padding are meaningless.
            capture: names or glob patterns of sites to return.
            edit: functions by site name or glob pattern: `f(array)`, or `f(array, site)`, to an array of the
                same shape and dtype. Parameters named `positions`, `mask`, `columns` or `generated` are given
                what `TokenPlaces` says of them. A captured site holds the edited value.
            cache: earlier tokens of a decoder, with room for the new ones (`new_cache`).
            logits: False to stop after the last captured site, and not to compute the rest.
            token_types: the segment of each token, of encoders that have segments; 0 by default.
            places: what edits are told of the tokens, where a generation knows more than this pass does.

        Raises:
            SiteError: no site matches a name or pattern, or an edit changes shape or dtype.
            TokenError: a text or a list in place of an array of ids; ids or segments beyond their embeddings,
                or more tokens than learned positions; images of another shape.
            MergelabError: a cache is given to an encoder, token types to a model that has none, or a mask to
                images.
        """
        decoder = self.family.architecture.causal
        if cache is not None and not self.causal:
            raise self._no_cache()
        if token_types is not None and (decoder or not self.config.token_types):
            raise MergelabError(f"a {self.family.model_type!r} model has no token types; omit them.")
        texts, images = self._told_apart(tokens)
        if images is not None:
            sizes = self.config.image if self.reads_images else self.config.vision.image
            check_images(images, sizes, self.family.model_type)
        if texts is not None:
            check_token_array(texts)
            self._check(texts, positions, mask, cache, token_types)
        elif mask is not None:
            raise MergelabError(f"a {self.family.model_type!r} model is given images, which have no padding.")
        if type(params) is not dict and isinstance(params, RunsItself):
            given: dict[str, Any] = {"capture": capture, "edit": edit, "cache": cache, "logits": logits}
            tokens_given = {"positions": positions, "mask": mask, "token_types": token_types}
            return params.run_pass(tokens, places=places, **given, **tokens_given)
        placed: Any = images if self.reads_images else texts
        if positions is None and placed is not None:
            positions = self.positions(placed, mask, cache)
        # A cache must be filled in every layer, so it carries the pass to the end.
        if edit and places is None and positions is not None:
            places = token_places(positions, mask, cache)
        tap = Tap(self._sites, capture, edit, to_the_end=logits or cache is not None, places=places)
        extra: dict[str, Any] = {} if decoder else {"token_types": token_types}
        module = self.family.architecture.module(self.config)
        found: Any = module.apply({"params": params}, tokens, positions, mask, cache, tap, **extra)
        out, hidden, cache = found
        return Output(out if logits else None, hidden, tap.captured, cache)

    def _check(
        self,
        tokens: Int[Array, "batch length"],
        positions: Int[Array, "batch length"] | None,
        mask: Bool[Array, "batch length"] | None,
        cache: Cache | None,
        token_types: Int[Array, "batch length"] | None,
    ) -> None:
        """Refuses what no embedding exists for, as far as it can be known before the program runs."""
        check_ids(tokens, self.config.vocab_size, "the model's vocabulary", "tokens")
        if token_types is not None:
            check_ids(token_types, self.config.token_types, "the model's token types", "token_types")
        if positions is not None:
            check_positions(self, positions)
        elif cache is not None:
            # Slots may outnumber positions, as padding takes slots too.
            if mask is None:
                check_length(self, tokens.shape[1])
            known = concrete(cache.mask) is not None and (mask is None or concrete(mask) is not None)
            if learned_positions(self) is not None and known:
                check_positions(self, self.positions(tokens, mask, cache))
        else:
            real = None if mask is None or not self.skips_padding else concrete(mask)
            longest = tokens.shape[1] if real is None else int(real.sum(axis=1).max(initial=0))
            check_length(self, longest)

    def positions(
        self,
        tokens: _Texts | _Images,
        mask: Bool[Array, "batch length"] | None,
        cache: Cache | None,
    ) -> Int[Array, "batch positions"]:
        """The positions that `apply` gives tokens (of images, the class token and the patches) by default."""
        if self.reads_images:
            steps = jnp.arange(self.config.max_length, dtype=jnp.int32)
            return jnp.broadcast_to(steps[None], (tokens.shape[0], len(steps)))
        if cache is not None:
            return cache.positions(jnp.ones(tokens.shape, jnp.bool_) if mask is None else mask)
        if mask is None or not self.skips_padding:
            return jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
        return jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)

    def new_cache(self, batch: int, max_length: int, dtype: Any = jnp.float32) -> Cache:
        """An empty cache with `max_length` slots a row (padding takes slots too).

        Raises:
            MergelabError: the model sees all tokens at once.
        """
        if not self.causal:
            raise self._no_cache()
        c = self.config
        return new_cache([block.kept for block in c.blocks], batch, max_length, dtype)

    def _no_cache(self) -> MergelabError:
        kind = self.family.model_type
        return MergelabError(
            f"a {kind!r} model sees all tokens at once and has no cache; call it without one."
        )


def token_places(
    positions: Int[Array, "batch length"], mask: Bool[Array, "batch length"] | None, cache: Cache | None
) -> TokenPlaces:
    """What a pass by itself can tell edits of its tokens: none is generated."""
    columns = None
    if cache is not None:
        new = jnp.arange(positions.shape[1], dtype=jnp.int32)[None]
        columns = cache.length[:, None] + jnp.broadcast_to(new, positions.shape)
    real = jnp.ones(positions.shape, jnp.bool_) if mask is None else mask
    return TokenPlaces(positions, real, columns, jnp.zeros(positions.shape, jnp.bool_))
