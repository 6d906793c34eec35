"""The out-of-core runner: blocks, exact selection over blocks, one tensor's passes, the pool, the folder."""

from mergelab.merging.engine.output_folder import WrittenModel, write_model
from mergelab.merging.engine.pool import StreamReport, stream_jobs

__all__ = ["StreamReport", "WrittenModel", "stream_jobs", "write_model"]
