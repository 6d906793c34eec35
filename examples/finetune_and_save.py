"""Fine-tune a model, and save a folder that every command and transformers read.

python examples/finetune_and_save.py MODEL TEXT.txt tuned
"""

import sys
from pathlib import Path

import mergelab as ml

source, text, out = sys.argv[1:4]
model, params = ml.load_model(source)
tokenizer = ml.load_tokenizer(source)

tuned, record = ml.finetune(
    model, params, tokenizer, Path(text), learning_rate=1e-3, tokens=2048, context=32, batch=4
)
print(f"held-out loss {record.before:.3f} -> {record.after:.3f} nats a token")

ml.save_model(model, tuned, out, tokenizer=tokenizer)
print(repr(ml.generate(model, tuned, tokenizer, "The", max_new_tokens=8)))
print(f"try: mergelab generate {out} --prompt 'The'")
