"""Gemma 4, text: heads of two widths, values that are keys, a number that scales each block, experts beside.

E2B and E4B have embeddings per layer, and late blocks that read the keys and values of earlier ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from flax import linen as nn

from mergelab.errors import CheckpointError, quoted
from mergelab.models.decoder import DECODER, DecoderConfig
from mergelab.models.derived import param
from mergelab.models.families.config_fields import layer_types_of, read_usual_fields
from mergelab.models.families.expert_fields import check_experts
from mergelab.models.families.llama import LLAMA_FILES, LLAMA_LINEAR, llama_rows
from mergelab.models.families.rotary_config import rotary_from
from mergelab.models.layers.attention import Attention, AttentionSpec, KeysValues
from mergelab.models.layers.block import Pass, Stream
from mergelab.models.layers.experts import MixtureOfExperts
from mergelab.models.layers.mlp import MLP, MLPSpec
from mergelab.models.layers.norms import Norm, NormKind
from mergelab.models.layers.per_layer import PerLayer, PerLayerGate
from mergelab.models.layers.routing import Experts
from mergelab.models.model import Family
from mergelab.models.table import Fused, Row, linear_rows

__all__ = ["GEMMA4_TEXT"]

_OWN = ("head_dim", "num_key_value_heads")
_LAYER = "model.layers.{i}"
_NORMS = {
    "attn_norm": "input_layernorm",
    "attn.out_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "experts_norm": "pre_feedforward_layernorm_2",
    "experts.out_norm": "post_feedforward_layernorm_2",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "per_layer.out_norm": "post_per_layer_input_norm",
}
_LINEAR = {
    **LLAMA_LINEAR,
    "per_layer.gate": "per_layer_input_gate",
    "per_layer.down": "per_layer_projection",
}


@dataclass(frozen=True)
class Gemma4Block:
    """Attention, then a layer with experts beside it or none; the stream is multiplied by a learned number.

    Attributes:
        attention: heads, window, rotation.
        mlp: the layer that every token passes.
        experts: the mixture that reads the stream beside it, or None.
        norm: the norm of what each reads, of what each adds, and of the sum of the two.
        per_layer: whether a vector of its own is added, gated, to what leaves them.
        placement: name of this form, beside those of `BlockSpec`.
    """

    attention: AttentionSpec
    mlp: MLPSpec
    experts: Experts | None = None
    norm: NormKind = field(default_factory=NormKind)
    per_layer: bool = False
    placement: Literal["scaled"] = "scaled"

    @property
    def kept(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """See `AnyBlock`."""
        return self.attention.kept

    @property
    def tensors(self) -> int:
        """See `AnyBlock`."""
        return 1

    def outline(self) -> Gemma4Block:
        """See `AnyBlock`."""
        experts = None if self.experts is None else self.experts.outline()
        return replace(self, attention=self.attention.outline(), experts=experts)

    def module(self, layer: int, gain: float, name: str) -> nn.Module:
        """See `AnyBlock`."""
        return _Block(self, layer, gain, name=name)


class _Block(nn.Module):
    spec: Gemma4Block
    layer: int
    gain: float

    @nn.compact
    def __call__(self, x: Stream, shared: Pass) -> tuple[Stream, KeysValues]:
        spec, tap, site = self.spec, shared.tap, f"blocks.{self.layer}"
        x = tap(f"{site}.resid_pre", x)
        attention = Attention(spec.attention, spec.norm, self.gain, name="attn")
        attended, seen = attention(
            Norm(spec.norm, name="attn_norm")(x, tap, f"{site}.attn_norm"),
            shared.visible(spec.attention.window),
            shared.rotation(spec.attention.rotary),
            shared.cache,
            self.layer,
            tap,
            f"{site}.attn",
            lent=shared.lent(spec.attention),
        )
        if spec.attention.borrows is not None and shared.cache is not None:
            seen = shared.cache.keys[self.layer], shared.cache.values[self.layer]  # of its own it keeps none
        if tap.done:
            return x, seen
        x = tap(f"{site}.resid_mid", x + attended)
        read = Norm(spec.norm, name="mlp_norm")(x, tap, f"{site}.mlp_norm")
        added = MLP(spec.mlp, spec.norm, self.gain, name="mlp")(read, tap, f"{site}.mlp")
        if spec.experts is not None:
            mixture = MixtureOfExperts(spec.experts, spec.norm, self.gain, name="experts")
            read = Norm(spec.norm, name="experts_norm")(x)
            added = added + mixture(read, tap, f"{site}.experts", self._routed(x))
            added = Norm(spec.norm, name="sum_norm")(added)
        x = x + added
        if spec.per_layer:
            gate = PerLayerGate(spec.mlp.activation, spec.norm, self.gain, name="per_layer")
            x = x + gate(x, shared.vector(self.layer), tap, f"{site}.per_layer")
        number = param(self, "scalar", nn.initializers.ones, (1,), (None,))
        return tap(f"{site}.resid_post", x * number.astype(x.dtype)[None, None]), seen

    def _routed(self, x: Stream) -> Stream:
        """What the router reads: the stream, normalized and scaled by coordinate."""
        plain = Norm(replace(self.spec.norm, scaled=False), name="router_norm")(x)
        scale = param(self, "router_scale", nn.initializers.ones, (x.shape[-1],), ("embed",))
        return plain * (scale * x.shape[-1] ** -0.5).astype(x.dtype)[None, None]


def gemma4_rows(c: DecoderConfig) -> tuple[Row, ...]:
    """The table: one tensor `[experts, out, in]` holds gate and up, one after the other."""
    mixed = any(block.experts is not None for block in c.blocks if isinstance(block, Gemma4Block))
    last = "post_feedforward_layernorm"
    norms = (
        {**_NORMS, "mlp.out_norm": f"{last}_1", "sum_norm": last}
        if mixed
        else {**_NORMS, "mlp.out_norm": last}
    )
    mixtures = [block.experts for block in c.blocks if isinstance(block, Gemma4Block) and block.experts]
    hidden = mixtures[0].hidden if mixtures else 0
    return llama_rows(
        Row("layer_embed.embedding", "model.embed_tokens_per_layer.weight"),
        Row("layer_projection.kernel", "model.per_layer_model_projection.weight", "transpose"),
        Row("layer_norm.scale", "model.per_layer_projection_norm.weight"),
        *(Row(f"blocks_{{i}}.{ours}.scale", f"{_LAYER}.{hf}.weight") for ours, hf in norms.items()),
        *linear_rows("blocks_{i}", _LAYER, _LINEAR),
        Row("blocks_{i}.router_scale", f"{_LAYER}.router.scale"),
        Row("blocks_{i}.experts.router", f"{_LAYER}.router.proj.weight", "transpose"),
        Row("blocks_{i}.experts.expert_scale", f"{_LAYER}.router.per_expert_scale"),
        *(
            Row(f"blocks_{{i}}.experts.{name}", f"{_LAYER}.experts.gate_up_proj", Fused(start, 2 * hidden))
            for name, start in (("gate", 0), ("up", hidden))
        ),
        Row("blocks_{i}.experts.down", f"{_LAYER}.experts.down_proj", "transpose"),
        Row("blocks_{i}.scalar", f"{_LAYER}.layer_scalar"),
    )


def read_gemma4(config: Mapping[str, Any], place: str) -> DecoderConfig:
    """Reads a `config.json`; raises `CheckpointError` for what this family does not implement."""
    optional = {
        "num_key_value_heads": 4,
        "head_dim": 256,
        "global_head_dim": 512,
        "num_global_key_value_heads": None,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "attention_k_eq_v": False,
        "sliding_window": 512,
        "layer_types": None,
        "final_logit_softcapping": None,
        "hidden_size_per_layer_input": 256,
        "vocab_size_per_layer_input": 262144,
        "num_kv_shared_layers": 0,
        "use_double_wide_mlp": False,
        "enable_moe_block": False,
        "per_layer_config": None,
        "num_experts": None,
        "top_k_experts": None,
        "moe_intermediate_size": None,
    }
    fixed = {
        "hidden_activation": ("gelu_pytorch_tanh",),
        # Tokens of images alone see both ways.
        "use_bidirectional_attention": (None, False, "vision"),
        "rope_scaling": (None,),
    }
    fields = read_usual_fields(config, place, optional, fixed)
    count = fields["num_hidden_layers"]
    default = ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(count)]
    types = list(fields["layer_types"] or default)
    if len(types) == count:
        types[-1] = "full_attention"  # as transformers reads it
    windows = layer_types_of(types, default, fields["sliding_window"], place)
    lenders = _lenders(windows, fields["num_kv_shared_layers"], place)
    made = [
        _block({**fields, **own}, window, place, lender)
        for window, own, lender in zip(windows, _own(fields, windows, place), lenders, strict=True)
    ]
    if unlike := [
        (i, lender)
        for i, lender in enumerate(lenders)
        if lender is not None and _keys(made[i]) != _keys(made[lender])
    ]:
        (i, lender), *_ = unlike
        raise CheckpointError(
            f"{place} has layer {i} read the keys of layer {lender} (num_kv_shared_layers), but the two have "
            f"{' and '.join('{} heads of {}'.format(*_keys(made[n])) for n in (i, lender))}; give them the "
            "same in per_layer_config."
        )
    blocks = tuple({block: block for block in made}[block] for block in made)  # equal ones are one object
    return DecoderConfig(
        vocab_size=fields["vocab_size"],
        d_model=fields["hidden_size"],
        max_length=fields["max_position_embeddings"],
        blocks=blocks,
        norm=blocks[0].norm,
        embed_scale=fields["hidden_size"] ** 0.5,
        per_layer=_per_layer(fields, blocks[0].norm, place),
        logit_cap=fields["final_logit_softcapping"],
        tied=fields["tie_word_embeddings"],
        causal=fields["is_causal"],
    )


def _lenders(windows: Sequence[int | None], sharing: int, place: str) -> list[int | None]:
    """The layer whose keys each layer reads: of the `sharing` last ones the last such before them."""
    own = len(windows) - sharing
    if not 0 < own <= len(windows):
        raise CheckpointError(
            f"{place} has num_kv_shared_layers = {sharing} for {len(windows)} layers, but expected a number "
            "from 0 to one less; correct one of the two."
        )
    last = {window: i for i, window in enumerate(windows[:own])}
    if missing := [i for i in range(own, len(windows)) if windows[i] not in last]:
        raise CheckpointError(
            f"{place} has layer {missing[0]} read the keys of an earlier layer of its layer type "
            f"(num_kv_shared_layers = {sharing}), but none of the first {own} is of that type; correct "
            "layer_types or num_kv_shared_layers."
        )
    return [None if i < own else last[window] for i, window in enumerate(windows)]


def _keys(block: Gemma4Block) -> tuple[int, int]:
    """Number and width of the heads whose keys a block reads."""
    return block.attention.n_kv_heads, block.attention.head_dim


def _per_layer(fields: Mapping[str, Any], norm: NormKind, place: str) -> PerLayer | None:
    if not fields["hidden_size_per_layer_input"]:
        return None
    rows, vocab = fields["vocab_size_per_layer_input"], fields["vocab_size"]
    if rows < vocab:
        raise CheckpointError(
            f"{place} has embeddings per layer for {rows:,} tokens (vocab_size_per_layer_input) of "
            f"{vocab:,} (vocab_size), but this family implements those of all; the model cannot be run here."
        )
    return PerLayer(rows, fields["hidden_size_per_layer_input"], fields["num_hidden_layers"], norm)


def _own(fields: Mapping[str, Any], windows: Sequence[int | None], place: str) -> list[dict[str, int]]:
    """The sizes that each layer has for itself: by its number, or those of all global layers."""
    if fields["per_layer_config"] is None:
        wide = {"head_dim": fields["global_head_dim"]}
        if fields["attention_k_eq_v"] and fields["num_global_key_value_heads"]:
            wide["num_key_value_heads"] = fields["num_global_key_value_heads"]
        return [dict(wide) if window is None else {} for window in windows]
    found: list[dict[str, int]] = [{} for _ in windows]
    for number, own in fields["per_layer_config"].items():
        fits = number.isdecimal() and int(number[:9]) < len(windows) and isinstance(own, Mapping)
        if not fits or not all(name in _OWN and type(size) is int and size > 0 for name, size in own.items()):
            raise CheckpointError(
                f"{place} has per_layer_config[{quoted(number)}] = {quoted(own)}, but this model family "
                f"implements only {' and '.join(_OWN)}, whole numbers above 0, of layers 0 to "
                f"{len(windows) - 1}; the model cannot be run here."
            )
        found[int(number)] = dict(own)
    return found


def _block(fields: Mapping[str, Any], window: int | None, place: str, lender: int | None) -> Gemma4Block:
    """The block of a local layer, or of a global one (`window` None); `lender` is whose keys it reads."""
    norm, heads = NormKind("rms", fields["rms_norm_eps"]), fields["num_attention_heads"]
    head_dim, key_heads = fields["head_dim"], fields["num_key_value_heads"] or heads
    shared = fields["attention_k_eq_v"] and window is None
    if heads % key_heads:
        raise CheckpointError(
            f"{place} has {heads} heads for {key_heads} key-value heads, which cannot share them evenly; "
            "correct one of the two."
        )
    length, theta, given = fields["max_position_embeddings"], 10000.0, {}
    if window is None:
        theta, given = 1e6, {"rope_type": "proportional", "partial_rotary_factor": 0.25}
    kind = "full_attention" if window is None else "sliding_attention"
    given = (fields["rope_parameters"] or {}).get(kind) or given
    rotary = rotary_from(given, place, head_dim=head_dim, max_length=length, theta=theta)
    bias, experts = fields["attention_bias"], None
    attention = AttentionSpec(
        heads,
        key_heads,
        head_dim,
        1.0,
        rotary,
        window,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=norm,
        v_norm=replace(norm, scaled=False),
        values_of_keys=shared,
        borrows=lender,
    )
    if fields["enable_moe_block"]:
        experts = _experts(fields, place)
    wide = 2 if fields["use_double_wide_mlp"] and lender is not None else 1
    mlp = MLPSpec(wide * fields["intermediate_size"], "gelu_pytorch_tanh")
    return Gemma4Block(attention, mlp, experts, norm, per_layer=bool(fields["hidden_size_per_layer_input"]))


def _experts(fields: Mapping[str, Any], place: str) -> Experts:
    names = ("num_experts", "top_k_experts", "moe_intermediate_size")
    lacking = [name for name in names if not fields[name]]
    if lacking:
        raise CheckpointError(
            [f"{place} has enable_moe_block but lacks the field {name!r}; add it." for name in lacking]
        )
    count, chosen, hidden = (fields[name] for name in names)
    return check_experts(Experts(count, chosen, hidden, "gelu_pytorch_tanh", expert_scale=True), place)


GEMMA4_TEXT = Family("gemma4_text", DECODER, read_gemma4, gemma4_rows, **LLAMA_FILES)
