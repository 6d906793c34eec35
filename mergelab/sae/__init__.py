"""Sparse autoencoders: variants, training, finished SAEs, their files, evaluation."""
