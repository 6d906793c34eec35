"""How good an SAE is: reconstruction and sparsity, recovery of known features, baselines."""
