"""TIES at several densities in one compiled program: merges are functions of their hyper-parameters.

python examples/sweep_a_density.py BASE TUNED_A TUNED_B
"""

import sys

import jax
import jax.numpy as jnp
import optax

import mergelab as ml

model, base = ml.load_model(sys.argv[1])
tuned = [ml.load_model(path)[1] for path in sys.argv[2:4]]
tokens = jnp.asarray([ml.load_tokenizer(sys.argv[1]).encode("The quick brown fox jumps over the lazy dog.")])


def loss(density):
    merged = ml.operators.ties(weight=[1.0, 0.5], density=density)(tuned, base=base)
    logits = model.apply(merged, tokens[:, :-1]).logits
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


densities = jnp.asarray([0.2, 0.5, 1.0])
for density, value in zip(densities, jax.jit(jax.vmap(loss))(densities), strict=True):
    print(f"density {density:.1f}: {value:.4f} nats a token")
