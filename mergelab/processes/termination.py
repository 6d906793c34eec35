"""SIGTERM as an exception. This file imports nothing: a command loads it before all others."""

__all__ = ["Terminated"]


class Terminated(KeyboardInterrupt):
    """SIGTERM was received: what clusters send before they take the machine away."""
