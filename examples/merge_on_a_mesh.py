"""A merge of models that are spread over many devices; without any, over eight that the CPU plays.

XLA_FLAGS=--xla_force_host_platform_device_count=8 python examples/merge_on_a_mesh.py MODEL_A MODEL_B merged
"""

import sys

import jax

import mergelab as ml

mesh = ml.make_mesh({"fsdp": -1})  # every device there is
model, a = ml.load_model(sys.argv[1], mesh=mesh)
_, b = ml.load_model(sys.argv[2], mesh=mesh)

merge = ml.operators.linear(weight=[0.5, 0.5])
merged = jax.jit(lambda a, b: merge([a, b]))(a, b)
leaf = jax.tree.leaves(merged)[0]
print(f"{leaf.shape} on {len(leaf.sharding.device_set)} devices")
ml.save_model(model, merged, sys.argv[3], tokenizer=sys.argv[1])
