"""Counter-based random bits: every draw is a function of seed, tensor name, model and element index.

Nothing depends on the order in which tensors are visited, how they are cut into pieces, how many devices
hold them, or the process's hash seed. The cipher is Threefry-2x32-20 (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC 2011), the one behind `jax.random`, written out here because jax offers no
public way to evaluate it at an arbitrary 64-bit counter.
"""

from __future__ import annotations

import hashlib

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["tensor_key", "threefry", "uniform"]

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def threefry(
    key: tuple[jax.Array, jax.Array], counter: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Encrypts a 64-bit counter under a 64-bit key: two uint32 words in, two uniform uint32 words out."""
    a, b = key
    schedule = (a, b, a ^ b ^ jnp.uint32(_PARITY))
    x, y = counter[0] + schedule[0], counter[1] + schedule[1]
    for block in range(5):
        for distance in _ROTATIONS[block % 2]:
            x = x + y
            y = (y << jnp.uint32(distance)) | (y >> jnp.uint32(32 - distance))
            y = x ^ y
        x = x + schedule[(block + 1) % 3]
        y = y + schedule[(block + 2) % 3] + jnp.uint32(block + 1)
    return x, y


def uniform(bits: jax.Array) -> jax.Array:
    """Maps 21 random bits to float32 in [0, 1), each value exactly representable."""
    return bits.astype(jnp.float32) * jnp.float32(2.0**-21)


def tensor_key(seed: int, name: str) -> np.ndarray:
    """The uint32 `[2]` key of a tensor: a hash of the seed and the tensor's name."""
    digest = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()
    return np.frombuffer(digest, dtype="<u4").astype(np.uint32)
