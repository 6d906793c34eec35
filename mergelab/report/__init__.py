"""Draws results (tables, figures, pages); computes none."""
