"""Sparse autoencoders: variants, training, finished dictionaries, their files, evaluation."""
