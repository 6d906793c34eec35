"""A training loop of your own: parameters are a pytree, and `model.apply` is a pure function.

python examples/train_with_optax.py MODEL
"""

import sys

import jax
import jax.numpy as jnp
import optax

import mergelab as ml

model, params = ml.load_model(sys.argv[1], dtype="float32")
tokenizer = ml.load_tokenizer(sys.argv[1])
tokens = jnp.asarray([tokenizer.encode("A loop of one's own is short. " * 8)[:32]])
optimizer = optax.adam(1e-3)


@jax.jit
def step(params, state):
    def loss(params):
        logits = model.apply(params, tokens[:, :-1]).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    value, gradients = jax.value_and_grad(loss)(params)
    with jax.numpy_dtype_promotion("standard"):
        updates, state = optimizer.update(gradients, state)
    return optax.apply_updates(params, updates), state, value


state = optimizer.init(params)
for number in range(20):
    params, state, loss = step(params, state)
    if number % 5 == 4:
        print(f"step {number + 1}: {loss:.3f}")
