"""A sparse autoencoder from activations that you have as a numpy array.

python examples/sae_from_array.py [ACTIVATIONS.npy]
"""

import sys

import numpy as np

import mergelab as ml

if len(sys.argv) > 1:
    rows = np.load(sys.argv[1])  # [tokens, width]
else:
    rows = np.random.default_rng(0).normal(size=(4096, 32)).astype(np.float32)

sae = ml.train_sae(rows, n_latents=128, k=8, batch_size=512, steps=200)
print("W_enc", sae.W_enc.shape, "W_dec", sae.W_dec.shape)

codes = sae.encode(rows[:4])  # [tokens, latents], k of them active
print("active latents of the first token:", np.flatnonzero(codes[0]))

scores = ml.evaluate_sae(sae, rows).values()
print(f"unexplained variance {scores['reconstruction.nmse']:.3f}, L0 {scores['reconstruction.l0']:.1f}")
ml.save_sae(sae, "my-sae")  # or format="saelens"
