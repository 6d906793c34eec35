"""How every test runs: eight CPU devices, strict dtype and rank promotion, and the recorded references."""

from __future__ import annotations

import os
import signal
from pathlib import Path

# JAX reads these once, at its first import: they stand before it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "--xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis
import jax
import pytest

# A shell starts its background jobs deaf to Ctrl-C, and a command stays as it was started.
for _number, _handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGTERM, signal.SIG_DFL),
):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, _handler)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# A first example may compile for seconds, and a shared machine stalls: time says nothing about a law.
hypothesis.settings.register_profile(
    "mergelab",
    deadline=None,
    max_examples=25,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("mergelab")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the source checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def goldens() -> Path:
    """Recorded mergekit outputs: the folder `MERGELAB_GOLDENS`, or `shared/goldens` beside the checkout."""
    folder = Path(os.environ.get("MERGELAB_GOLDENS") or REPOSITORY.parent / "shared" / "goldens")
    if not (folder / "op_goldens.json").is_file():
        pytest.skip(f"no recorded mergekit outputs in {folder}: set MERGELAB_GOLDENS to their folder")
    return folder
