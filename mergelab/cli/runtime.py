"""How `mergelab merge` uses JAX: programs are kept on disk, and run in the thread that calls them."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["configure_jax"]


def configure_jax() -> None:
    """Sets JAX up for a process that merges; call it before the first computation.

    Compiled programs go to `$XDG_CACHE_HOME/mergelab/xla`, so that a second run does not compile them again;
    `JAX_COMPILATION_CACHE_DIR` overrides the place.
    """
    # Blocks of a merge already run side by side: XLA splitting each of them among threads only costs.
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_cpu_multi_thread_eigen" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()

    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mergelab" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # The streaming pool calls from its own threads: handing each block to another thread only costs.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
