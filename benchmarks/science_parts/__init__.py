"""The parts of benchmarks/merging_science.py: each experiment in a file of its own."""
