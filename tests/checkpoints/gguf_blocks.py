"""Blocks of GGUF's types decoded one element at a time in float64, after the layouts of `ggml-common.h`.

Slow and plain on purpose: a reference for the `gguf` package's vectorized arithmetic and for ours around it.
"""

from __future__ import annotations

import struct

__all__ = ["decode"]


def _half(raw: bytes, at: int) -> float:
    return struct.unpack_from("<e", raw, at)[0]


def _signed(byte: int) -> int:
    return byte - 256 if byte > 127 else byte


def _nibbles(raw: bytes) -> list[int]:
    """The low halves of 16 bytes, then the high ones."""
    return [byte & 15 for byte in raw] + [byte >> 4 for byte in raw]


def _k_scales(raw: bytes) -> list[tuple[int, int]]:
    """Eight 6-bit scales and minima packed into 12 bytes (`get_scale_min_k4`)."""
    found = []
    for j in range(8):
        if j < 4:
            found.append((raw[j] & 63, raw[j + 4] & 63))
        else:
            low, high = raw[j + 4] & 15, raw[j + 4] >> 4
            found.append((low | (raw[j - 4] >> 6) << 4, high | (raw[j] >> 6) << 4))
    return found


def decode(name: str, raw: bytes) -> list[float]:
    """The elements of one block of a type."""
    return globals()[f"_{name.lower()}"](raw)


def _q4_0(raw: bytes) -> list[float]:
    return [_half(raw, 0) * (q - 8) for q in _nibbles(raw[2:])]


def _q4_1(raw: bytes) -> list[float]:
    return [_half(raw, 0) * q + _half(raw, 2) for q in _nibbles(raw[4:])]


def _q5_0(raw: bytes) -> list[float]:
    high = int.from_bytes(raw[2:6], "little")
    return [_half(raw, 0) * ((q | (high >> i & 1) << 4) - 16) for i, q in enumerate(_nibbles(raw[6:]))]


def _q5_1(raw: bytes) -> list[float]:
    high = int.from_bytes(raw[4:8], "little")
    return [
        _half(raw, 0) * (q | (high >> i & 1) << 4) + _half(raw, 2) for i, q in enumerate(_nibbles(raw[8:]))
    ]


def _q8_0(raw: bytes) -> list[float]:
    return [_half(raw, 0) * _signed(q) for q in raw[2:]]


def _q2_k(raw: bytes) -> list[float]:
    scales, quants, d, least = raw[:16], raw[16:80], _half(raw, 80), _half(raw, 82)
    found = []
    for i in range(256):
        half, within = divmod(i, 128)
        shift, byte = divmod(within, 32)
        scale = scales[i // 16]
        found.append(d * (scale & 15) * (quants[32 * half + byte] >> 2 * shift & 3) - least * (scale >> 4))
    return found


def _q3_k(raw: bytes) -> list[float]:
    high, quants, packed, d = raw[:32], raw[32:96], raw[96:108], _half(raw, 108)
    found = []
    for i in range(256):
        half, within = divmod(i, 128)
        shift, byte = divmod(within, 32)
        j = i // 16
        low = packed[j] & 15 if j < 8 else packed[j - 8] >> 4
        scale = (low | (packed[8 + j % 4] >> 2 * (j // 4) & 3) << 4) - 32
        bit = high[byte] >> (4 * half + shift) & 1
        found.append(d * scale * ((quants[32 * half + byte] >> 2 * shift & 3) - 4 * (1 - bit)))
    return found


def _q4_k(raw: bytes) -> list[float]:
    d, least, scales, quants = _half(raw, 0), _half(raw, 2), _k_scales(raw[4:16]), raw[16:]
    found = []
    for i in range(256):
        group, byte = divmod(i, 32)
        q = quants[32 * (group // 2) + byte] >> 4 * (group % 2) & 15
        found.append(d * scales[group][0] * q - least * scales[group][1])
    return found


def _q5_k(raw: bytes) -> list[float]:
    d, least, scales = _half(raw, 0), _half(raw, 2), _k_scales(raw[4:16])
    high, quants = raw[16:48], raw[48:]
    found = []
    for i in range(256):
        group, byte = divmod(i, 32)
        q = (quants[32 * (group // 2) + byte] >> 4 * (group % 2) & 15) | (high[byte] >> group & 1) << 4
        found.append(d * scales[group][0] * q - least * scales[group][1])
    return found


def _q6_k(raw: bytes) -> list[float]:
    low, high, scales, d = raw[:128], raw[128:192], raw[192:208], _half(raw, 208)
    found = []
    for i in range(256):
        half, within = divmod(i, 128)
        quarter, byte = divmod(within, 32)
        q = low[64 * half + 32 * (quarter % 2) + byte] >> 4 * (quarter // 2) & 15
        q |= (high[32 * half + byte] >> 2 * quarter & 3) << 4
        found.append(d * _signed(scales[8 * half + 2 * quarter + byte // 16]) * (q - 32))
    return found
