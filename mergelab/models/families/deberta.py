"""DeBERTa V2 and V3: heads that look at vectors of relative positions beside contents (arXiv:2006.03654)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from mergelab.errors import CheckpointError, quoted
from mergelab.models.encoder import ENCODER, EncoderConfig, bert_blocks
from mergelab.models.families.bert import BERT_OPTIONAL, bert_encoder, read_bert_fields
from mergelab.models.layers.attention import KeysValues
from mergelab.models.layers.block import Block, BlockSpec, Pass, Stream
from mergelab.models.layers.dense import Linear
from mergelab.models.layers.mlp import ACTIVATIONS, MLPSpec
from mergelab.models.layers.norms import Norm, NormKind
from mergelab.models.layers.relative import Disentangled, RelativeVectors
from mergelab.models.model import Family
from mergelab.models.table import Reshaped, Row, linear_rows, norm_rows

__all__ = ["DEBERTA_V2"]

_LAYER = "deberta.encoder.layer.{i}"
_LINEAR = {
    "attn.q": "attention.self.query_proj",
    "attn.k": "attention.self.key_proj",
    "attn.v": "attention.self.value_proj",
    "attn.position_k": "attention.self.pos_key_proj",
    "attn.position_q": "attention.self.pos_query_proj",
    "attn.o": "attention.output.dense",
    "mlp.up": "intermediate.dense",
    "mlp.down": "output.dense",
}
_ROWS = (
    Row("embed.embedding", "deberta.embeddings.word_embeddings.weight"),
    Row("positions.embedding", "deberta.embeddings.position_embeddings.weight"),
    Row("token_types.embedding", "deberta.embeddings.token_type_embeddings.weight"),
    *norm_rows("embed_norm", "deberta.embeddings.LayerNorm"),
    *linear_rows("blocks_{i}", _LAYER, _LINEAR),
    *norm_rows("blocks_{i}.attn_norm", f"{_LAYER}.attention.output.LayerNorm"),
    *norm_rows("blocks_{i}.mlp_norm", f"{_LAYER}.output.LayerNorm"),
    Row("blocks_0.conv_norm.scale", "deberta.encoder.conv.LayerNorm.weight"),
    Row("blocks_0.conv_norm.bias", "deberta.encoder.conv.LayerNorm.bias"),
    Row("blocks_0.conv.bias", "deberta.encoder.conv.conv.bias"),
    Row("relative.embedding", "deberta.encoder.rel_embeddings.weight"),
    *norm_rows("relative.norm", "deberta.encoder.LayerNorm"),
)
_OPTIONAL: Mapping[str, Any] = {
    **BERT_OPTIONAL,
    "type_vocab_size": 0,
    "layer_norm_eps": 1e-7,
    "relative_attention": False,
    "max_relative_positions": -1,
    "position_buckets": -1,
    "position_biased_input": True,
    "share_att_key": False,
    "conv_kernel_size": 0,
    "conv_act": "tanh",
}
_CONVOLUTIONS = {"tanh": jnp.tanh, **ACTIVATIONS}
_FIXED = {"conv_groups": (1,), "conv_act": tuple(_CONVOLUTIONS)}
# Of heads, and sizes that are compared below.
_INERT = ("legacy", "pooler_dropout", "pooler_hidden_act", "pooler_hidden_size")
_INERT += ("attention_head_size", "embedding_size")


@dataclass(frozen=True)
class ConvolvedBlock(BlockSpec):
    """The first block of V2 xlarge: a convolution of what enters is added to what leaves, and normalized.

    Attributes:
        taps: tokens that the convolution sees, an odd number.
        activation: its activation function.
    """

    taps: int = 3
    activation: str = "tanh"

    def module(self, layer: int, gain: float, name: str) -> Block:
        """See `AnyBlock`."""
        return _Convolved(self, layer, gain, name=name)


class _Convolved(Block):
    """A block whose last site, `conv.out`, is what the convolution adds behind `resid_post`."""

    @nn.compact
    def __call__(self, x: Stream, shared: Pass) -> tuple[Stream, KeysValues]:
        spec: Any = self.spec
        real = None if shared.real is None else shared.real[..., None]
        # What is padded is nothing to its neighbors.
        entered = x if real is None else jnp.where(real, x, 0)
        x, seen = super().__call__(x, shared)
        half, length = spec.taps // 2, x.shape[1]
        wide = jnp.pad(entered, ((0, 0), (half, half), (0, 0)))
        near = jnp.stack([wide[:, tap : tap + length] for tap in range(spec.taps)], axis=-1)
        convolve = Linear(x.shape[-1], (None, "embed"), bias=True, name="conv")
        out = _CONVOLUTIONS[spec.activation](convolve(near.reshape(*x.shape[:2], -1)))
        out = shared.tap(f"blocks.{self.layer}.conv.out", out)
        return Norm(spec.norm, name="conv_norm")(x + out), seen


def _rows(config: EncoderConfig) -> Iterator[Row]:
    first, width = config.blocks[0], config.d_model
    if isinstance(first, ConvolvedBlock):
        kernel = Reshaped((width, width, first.taps), transposed=True)
        yield Row("blocks_0.conv.kernel", "deberta.encoder.conv.conv.weight", kernel)
    yield from _ROWS


def _words(value: Any, name: str, place: str) -> tuple[str, ...]:
    """A list of words, or one text of them between bars."""
    words = value.lower().split("|") if isinstance(value, str) else value or []
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise CheckpointError(f"{place} has {name} = {quoted(value)}, but expected words; correct it.")
    return tuple(word.strip() for word in words)


def read_deberta(config: Mapping[str, Any], place: str) -> EncoderConfig:
    """Reads a `config.json`; raises `CheckpointError` for what this family does not implement."""
    looks = _words(config.get("pos_att_type"), "pos_att_type", place)
    norms = _words(config.get("norm_rel_ebd") or "none", "norm_rel_ebd", place)
    unknown = {*looks} - {"c2p", "p2c"} | {*norms} - {"none", "layer_norm"}
    if unknown:
        raise CheckpointError(
            f"{place} has {quoted(min(unknown))} in pos_att_type or norm_rel_ebd, but this model family "
            "implements only 'c2p', 'p2c' and 'layer_norm'; the model cannot be run here."
        )
    rest = {name: value for name, value in config.items() if name not in ("pos_att_type", "norm_rel_ebd")}
    fields = read_bert_fields(rest, place, _OPTIONAL, _FIXED, _INERT)
    width = fields["hidden_size"]
    for name in ("embedding_size", "attention_head_size"):
        expected = width if name == "embedding_size" else fields["head_dim"]
        if config.get(name, expected) != expected:
            raise CheckpointError(
                f"{place} has {name} = {quoted(config[name])}, but this model family implements only "
                f"{expected}; the model cannot be run here."
            )
    norm = NormKind("layer", fields["layer_norm_eps"])
    relative, how = None, None
    if fields["relative_attention"]:
        if not looks:
            raise CheckpointError(f"{place} has relative_attention but no pos_att_type; add it.")
        reach = fields["max_relative_positions"]
        reach = reach if reach > 0 else fields["max_position_embeddings"]
        buckets = fields["position_buckets"]
        span = buckets if buckets > 0 else reach
        if buckets > 0 and not 1 <= buckets // 2 < reach - 1:
            raise CheckpointError(
                f"{place} has position_buckets = {buckets} for {reach} relative positions; there must be two "
                "or more, and half of them must be fewer than those."
            )
        of_vectors = norm if "layer_norm" in norms else None
        relative = RelativeVectors(width, span, reach if buckets > 0 else None, of_vectors)
        how = Disentangled("c2p" in looks, "p2c" in looks, fields["share_att_key"])
    mlp = MLPSpec(fields["intermediate_size"], fields["hidden_act"], gated=False, bias=True)
    # Scores are sums of as many products.
    scale = (fields["head_dim"] * (1 + len({*looks}))) ** -0.5
    layers, heads = fields["num_hidden_layers"], fields["num_attention_heads"]
    blocks = bert_blocks(layers, heads, fields["head_dim"], mlp, norm, scale=scale, disentangled=how)
    taps = fields["conv_kernel_size"]
    if taps and taps % 2 == 0:
        raise CheckpointError(f"{place} has conv_kernel_size = {taps}, but only odd ones can be run here.")
    if taps:
        first = blocks[0]
        parts = first.attention, first.mlp, first.norm, first.placement
        blocks = (ConvolvedBlock(*parts, taps=taps, activation=fields["conv_act"]), *blocks[1:])
    return bert_encoder(
        fields,
        blocks=blocks,
        learned_positions=fields["position_biased_input"],
        relative=relative,
        pooler=False,
    )


DEBERTA_V2 = Family(
    "deberta-v2",
    ENCODER,
    read_deberta,
    _rows,
    prefix="deberta.",
    # Heads of masked language models, and of telling replaced tokens; a table that V3's files hold in vain.
    unused=(
        "lm_predictions.*",
        "mask_predictions.*",
        "cls.*",
        "deberta.embeddings.position_embeddings.weight",
    ),
)
