"""Transformer families: one file each = configuration + flax module + the map to HF tensor names."""
