"""How every test runs: eight CPU devices, programs compiled quickly, strict dtype and rank promotion, and the
recorded references.
"""

from __future__ import annotations

import gc
import os
import resource
import shutil
import signal
import sys
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

from tests.compilation import compile_quickly
from tests.costs import Costs
from tests.goldens.models import write_models
from tests.tiers import THOROUGH

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    """Compiles light tests quickly, unless told otherwise by MERGELAB_TESTS_OPTIMIZED=1 (`.ci/run slow`)."""
    # Where bytecode is not kept, each of the hundreds of processes that tests start compiles the package.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    quick = "not slow" in config.option.markexpr and not os.environ.get("MERGELAB_TESTS_OPTIMIZED")
    if quick:
        compile_quickly()
    config.pluginmanager.register(Costs(quick), "costs")


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of thorough files."""
    for item in items:
        if item.path.relative_to(REPOSITORY).as_posix() in THOROUGH:
            item.add_marker(pytest.mark.thorough)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Frees the collector from what a file's tests leave for good: traced programs, in the end millions of
    objects, which each full collection would walk again.
    """
    if nextitem is None or nextitem.path == item.path:
        return
    if resident_bytes() > PROGRAMS_LIMIT:  # a whole run's programs would fill a small machine
        gc.unfreeze()
        jax.clear_caches()
    gc.collect()
    gc.freeze()


PROGRAMS_LIMIT = 3 * 2**30


def resident_bytes() -> int:
    """The memory of this process, in bytes; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


# A shell starts its background jobs deaf to Ctrl-C, and a command stays as it was started.
for _number, _handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGTERM, signal.SIG_DFL),
):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, _handler)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Commands that tests call in this process turn on a cache of programs: a test compiles what it tests.
jax.config.update("jax_enable_compilation_cache", False)

# A first example may compile for seconds, and a shared machine stalls: time says nothing about a law.
hypothesis.settings.register_profile(
    "mergelab",
    deadline=None,
    max_examples=25,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("mergelab")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the source checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def small_goldens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recorded mergekit outputs in the repository's small form, and the models they came from, made again."""
    folder = tmp_path_factory.mktemp("goldens")
    kept = REPOSITORY / "tests" / "goldens"
    shutil.copytree(kept / "recipes", folder / "recipes")
    for name in ("op_goldens.json", "op_goldens.safetensors", "outputs.json", "outputs.npz", "spectral.npz"):
        shutil.copy(kept / name, folder / name)
    write_models(folder / "models")
    return folder


@pytest.fixture(scope="session")
def goldens(request: pytest.FixtureRequest) -> Path:
    """Recorded mergekit outputs: whole in the folder `MERGELAB_GOLDENS`, or in `shared/goldens` beside the
    checkout; in the small form where there is neither.
    """
    named = os.environ.get("MERGELAB_GOLDENS")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "goldens"
    if (folder / "op_goldens.json").is_file():
        return folder
    if named:
        pytest.fail(
            f"MERGELAB_GOLDENS is {named}, where there are no recorded mergekit outputs", pytrace=False
        )
    return request.getfixturevalue("small_goldens")
