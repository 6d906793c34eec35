"""How good a dictionary is: reconstruction and sparsity, recovery of known features, baselines."""
