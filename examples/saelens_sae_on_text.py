"""An SAE of SAELens (a release on the hub or a folder) on a text, spliced into its model.

python examples/saelens_sae_on_text.py MODEL SAE_FOLDER
python examples/saelens_sae_on_text.py gpt2 gpt2-small-res-jb blocks.8.hook_resid_pre
"""

import sys

import mergelab as ml

model, params = ml.load_model(sys.argv[1])
tokenizer = ml.load_tokenizer(sys.argv[1])
sae = ml.load_sae(*sys.argv[2:])  # a folder, or a release and an id; five other libraries' files are read too
print("reads", sae.config.reads)

text = "The quick brown fox jumps over the lazy dog. " * 40
site = sae.config.reads[0]
codes = sae.encode(ml.capture(model, params, tokenizer.encode(text)[:32], [site])[site])
print("codes", codes.shape)  # batch, length, latents

card = ml.evaluate_sae(
    sae, model, params, tokenizer, text, length=32, metrics=["reconstruction", "downstream"]
)
for name, value in card.values().items():
    print(f"{name:35} {value:.4f}")
