"""Interpretability on named sites: edits, patching, lenses, attribution, probes, abliteration."""
