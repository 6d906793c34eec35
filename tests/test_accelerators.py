"""A GPU or TPU beside a jax that cannot use it is a warning with its cure; everything else is silence."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
from click.testing import CliRunner

from mergelab import sharding
from mergelab.accelerators import idle_accelerator
from mergelab.cli import main

CURE = f'pip install "jax[cuda12]=={version("jax")}"'
GPU = f"this machine has an NVIDIA GPU, but the installed jax computes on the CPU: {CURE}"
TPU = GPU.replace("an NVIDIA GPU", "a TPU").replace("cuda12", "tpu")


def machine(root: Path, *files: str) -> Path:
    """A root of a file system with some devices; `name=content` is a file of the kernel's."""
    for file in files:
        name, _, content = file.partition("=")
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


PCI = "sys/bus/pci/devices/0000:00:05.0"


@pytest.mark.parametrize(
    ("files", "variables", "installed", "sentence"),
    [
        ((), {}, set(), None),
        (("dev/nvidia0",), {}, set(), GPU),
        (("dev/dxg",), {}, {"libtpu"}, GPU),
        (("dev/nvidia0",), {}, {"jax_cuda13_plugin"}, None),
        (("dev/nvidia0",), {"JAX_PLATFORMS": "cpu"}, set(), None),
        (("dev/nvidia0",), {"CUDA_VISIBLE_DEVICES": ""}, set(), None),
        (("dev/accel0",), {}, set(), TPU),
        (("dev/accel0",), {}, {"libtpu"}, None),
        ((), {"TPU_ACCELERATOR_TYPE": "v5litepod-1"}, {"jax_cuda12_plugin"}, TPU),
        (("dev/vfio/0", f"{PCI}/vendor=0x1ae0\n", f"{PCI}/device=0x0063\n"), {}, set(), TPU),
        (
            ("dev/vfio/0", f"{PCI}/vendor=0x1ae0\n", f"{PCI}/device=0x0042\n"),
            {},
            set(),
            None,
        ),  # a network card
        (("dev/vfio/0", f"{PCI}/vendor=0x10de\n", f"{PCI}/device=0x0063\n"), {}, set(), None),
    ],
)
def test_an_accelerator_is_idle_where_jax_cannot_use_it(
    tmp_path: Path,
    files: tuple[str, ...],
    variables: dict[str, str],
    installed: set[str],
    sentence: str | None,
) -> None:
    root = machine(tmp_path, *files)
    assert idle_accelerator(variables, root, frozenset(installed)) == sentence


@pytest.mark.parametrize(("command", "warns"), [("generate", True), ("operators", False)])
def test_the_command_line_warns_once_and_on_standard_error(
    monkeypatch: pytest.MonkeyPatch, command: str, warns: bool
) -> None:
    monkeypatch.setattr(main, "idle_accelerator", lambda: GPU)
    done = CliRunner().invoke(main.cli, [command])
    assert done.stderr.count(f"warning: {GPU}\n") == warns and GPU not in done.stdout
    assert GPU not in CliRunner().invoke(main.cli, [command, "--help"]).output
    monkeypatch.setattr(main, "idle_accelerator", lambda: None)
    assert "warning" not in CliRunner().invoke(main.cli, [command]).output


def test_devices_are_described_with_a_warning_about_idle_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "idle_accelerator", lambda: GPU)
    with pytest.warns(UserWarning, match="an NVIDIA GPU"):
        assert sharding.describe_devices() == "8 x cpu"
    monkeypatch.setattr(sharding, "idle_accelerator", lambda: None)
    assert sharding.describe_devices() == "8 x cpu"
