"""Does a merge help? Merge two models without writing the result, and compare it with its parents.

python examples/evaluate_a_merge.py MODEL_A MODEL_B HELD_OUT.txt
"""

import sys
from pathlib import Path

import mergelab as ml

model_a, model_b, text = sys.argv[1:4]

recipe = ml.Recipe(
    merge_method="slerp",
    base_model=model_a,
    models=[{"model": model_b}],
    parameters={"t": 0.5},
)
comparison = ml.compare_models([model_a, model_b, recipe], text=Path(text))
for found in comparison.to_dict()["models"]:
    bits = found["bits_per_byte"]
    print(f"{found['model']:30} {bits['value']:.4f} bits per byte, 95 % interval {bits['interval']}")
for one, other, differences in comparison.differences:  # paired: both models on the same passages
    bits = differences["bits_per_byte"]
    print(f"{one} against {other}: {bits.value:+.4f} bits per byte, p = {bits.p}")

# Worth keeping? Then write it: a folder that any command and transformers read.
# ml.merge(recipe, "merged")
