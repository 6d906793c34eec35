"""Generated text, pushed along a feature of an SAE.

python examples/steer_with_a_feature.py MODEL SAE LATENT
"""

import sys

import mergelab as ml

model, params = ml.load_model(sys.argv[1])
tokenizer = ml.load_tokenizer(sys.argv[1])
sae = ml.load_sae(sys.argv[2])
site, direction = sae.config.reads[0], sae.W_dec[int(sys.argv[3])]

for strength in (0.0, 4.0, 16.0):
    edit = {site: ml.steer(direction, strength=strength)}
    print(
        f"{strength:5.1f}", repr(ml.generate(model, params, tokenizer, "The", max_new_tokens=12, edit=edit))
    )

# Instead of a push, a value: the latent is held there, whatever it was.
edit = {site: ml.interp.clamp(sae, [int(sys.argv[3])], 5.0)}
print("clamp", repr(ml.generate(model, params, tokenizer, "The", max_new_tokens=12, edit=edit)))
