"""The out-of-core runner: blocks, exact selection over blocks, one tensor's passes, and the pool."""

from mergelab.merging.engine.pool import StreamReport, stream_jobs

__all__ = ["StreamReport", "stream_jobs"]
