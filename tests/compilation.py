"""How the tests compile: light tests quickly, the others as users do."""

from __future__ import annotations

import os
from importlib.metadata import version

# Most of what a test costs is the compilation of programs that run once, for milliseconds: these flags of XLA
# make it take a seventh of the time. Values stay within tolerances.
QUICKLY: dict[str, int | bool] = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_parallel_codegen_split_count": 1,
}
# Options of `jax.jit` and `compile` for a light test of what the compiler makes of a program: those of users.
AS_USERS: dict[str, int | bool] = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    "xla_cpu_parallel_codegen_split_count": 32,
}
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):  # XLA ends at a flag that it does not know
    QUICKLY["xla_cpu_use_fusion_emitters"], AS_USERS["xla_cpu_use_fusion_emitters"] = False, True
# The same down to the text of the optimized program, which LLVM has not seen yet.
TEXT_AS_USERS = {name: value for name, value in AS_USERS.items() if name == "xla_cpu_use_fusion_emitters"}


def compile_quickly() -> None:
    """Sets the flags, beside those that are set, for this process and those it starts.

    XLA reads them at the first program.
    """
    flags = os.environ.get("XLA_FLAGS", "").split()
    named = {flag.partition("=")[0].lstrip("-") for flag in flags}
    flags += [f"--{name}={str(value).lower()}" for name, value in QUICKLY.items() if name not in named]
    os.environ["XLA_FLAGS"] = " ".join(flags)


def flags_without_devices() -> str:
    """The `XLA_FLAGS` of this process, for a process that has a number of devices of its own."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    return " ".join(flag for flag in flags if "device_count" not in flag)
