"""The sections of `benchmarks/world.py`, one file each."""
