"""The parameters of a decoder: path, shape and logical axes of every leaf, without building the module."""

from __future__ import annotations

from mergelab.models.decoder_config import DecoderConfig
from mergelab.models.table import Parameter, Parameters

__all__ = ["decoder_parameters"]


def decoder_parameters(config: DecoderConfig) -> Parameters:
    """Every parameter, keyed by its path; what `Decoder(config).init` makes."""
    c = config
    embedding = Parameter((c.vocab_size, c.width), ("vocab", "embed"))
    found: Parameters = {("embed", "embedding"): embedding}
    if not c.rotary:
        found["positions", "embedding"] = Parameter((c.max_length, c.width), (None, "embed"))
    for i in range(c.layers):
        block = f"blocks_{i}"
        _norm(found, c, block, "attn_norm")
        _attention(found, c, block)
        _norm(found, c, block, "mlp_norm")
        _mlp(found, c, block)
    _norm(found, c, "final_norm")
    if not c.tied:
        found["unembed", "kernel"] = Parameter((c.width, c.vocab_size), ("embed", "vocab"))
    return found


def _norm(found: Parameters, c: DecoderConfig, *path: str) -> None:
    found[*path, "scale"] = Parameter((c.width,), ("embed",))
    if c.norm.kind == "layer":
        found[*path, "bias"] = Parameter((c.width,), ("embed",))


def _linear(
    found: Parameters, path: tuple[str, ...], shape: tuple[int, int], axes: tuple[str, str], bias: bool
) -> None:
    found[*path, "kernel"] = Parameter(shape, axes)
    if bias:
        found[*path, "bias"] = Parameter(shape[1:], axes[1:])


def _attention(found: Parameters, c: DecoderConfig, block: str) -> None:
    for name, heads, axis in (
        ("q", c.heads, "heads"),
        ("k", c.kv_heads, "kv_heads"),
        ("v", c.kv_heads, "kv_heads"),
    ):
        shape = (c.width, heads * c.head_dim)
        _linear(found, (block, "attn", name), shape, ("embed", axis), c.qkv_bias)
    if c.qk_norm is not None:
        for name in ("q_norm", "k_norm"):
            found[block, "attn", name, "scale"] = Parameter((c.head_dim,), (None,))
    shape = (c.heads * c.head_dim, c.width)
    _linear(found, (block, "attn", "o"), shape, ("heads", "embed"), c.out_bias)
    if c.block == "sandwich":
        _norm(found, c, block, "attn", "out_norm")


def _mlp(found: Parameters, c: DecoderConfig, block: str) -> None:
    width, hidden = c.width, c.mlp_width
    inward, outward = ("embed", "mlp"), ("mlp", "embed")
    if c.experts is not None:
        count = c.experts.count
        found[block, "mlp", "router"] = Parameter((width, count), ("embed", None))
        for name in ("gate", "up"):
            found[block, "mlp", name] = Parameter((count, width, hidden), ("experts", *inward))
        found[block, "mlp", "down"] = Parameter((count, hidden, width), ("experts", *outward))
        return
    for name in ("gate", "up") if c.gated else ("up",):
        _linear(found, (block, "mlp", name), (width, hidden), inward, c.mlp_bias)
    _linear(found, (block, "mlp", "down"), (hidden, width), outward, c.mlp_bias)
    if c.block == "sandwich":
        _norm(found, c, block, "mlp", "out_norm")
