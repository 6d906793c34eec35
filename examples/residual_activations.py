"""What a model computes on a text: the residual stream after every block.

python examples/residual_activations.py MODEL
"""

import sys

import numpy as np

import mergelab as ml

model, params = ml.load_model(sys.argv[1])
tokenizer = ml.load_tokenizer(sys.argv[1])

tokens = tokenizer.encode("The capital of Japan is")
activations = ml.capture(model, params, tokens, ["blocks.*.resid_post"])  # model.sites() lists all names
for site, values in activations.items():
    print(
        site, values.shape, f"mean norm {np.linalg.norm(values, axis=-1).mean():.2f}"
    )  # batch, length, width
