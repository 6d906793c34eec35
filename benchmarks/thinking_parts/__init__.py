"""A small transformer that adds digits step by step, and what more compute at test time does for it."""
