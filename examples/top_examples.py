"""The strongest examples of one feature, as data.

python examples/top_examples.py MODEL SAE TEXT.txt LATENT
"""

import sys
from pathlib import Path

import numpy as np

import mergelab as ml

model, params = ml.load_model(sys.argv[1])
tokenizer = ml.load_tokenizer(sys.argv[1])
sae = ml.load_sae(sys.argv[2])
latent = int(sys.argv[4])

length = 16
ids = tokenizer.encode(Path(sys.argv[3]).read_text())
tokens = np.asarray(ids[: len(ids) // length * length], np.int32).reshape(-1, length)
source = ml.activations.ModelActivations(model, params, tokens, sae.config.reads)

survey = ml.sae.features.survey(sae, source, latents=[latent], count=5)
for example in survey.examples[latent]:
    strongest = int(np.argmax(example.codes))
    words = [tokenizer.decode([token]) for token in example.tokens]
    words[strongest] = f"**{words[strongest].strip()}**"
    print(f"{example.peak:8.3f}  context {example.context}: {' '.join(words)}")

# As a page to browse: mergelab sae features SAE --model MODEL --text TEXT.txt --out features.html
