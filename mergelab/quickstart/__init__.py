"""The embedded main job: train a model family on text every Python carries, merge it, judge it, report it."""
