"""Which rows of a batch each process reads, on meshes over many processes, and how they become the batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import pytest

from mergelab.errors import MeshError
from mergelab.sae.training import state
from mergelab.sae.training.state import batch_part, handed_on, whole_batch


@dataclass(frozen=True)
class Device:
    number: int
    process_index: int


class Laid:
    """What is asked of a mesh, over devices of processes that are not there."""

    def __init__(self, sizes: dict[str, int], order: list[int], each: int) -> None:
        self.axis_names, self.shape, self.size = tuple(sizes), sizes, math.prod(sizes.values())
        devices = np.empty(self.size, object)
        devices[:] = [Device(number, number // each) for number in order]
        self.devices = devices.reshape(tuple(sizes.values()))


CASES: dict[str, tuple[dict[str, int], int, int, bool]] = {
    "three on data": ({"data": 6}, 2, 96, False),
    "five": ({"data": 5, "latents": 2}, 2, 35, False),
    "a hundred": ({"data": 100}, 1, 400, False),
    "latents of all": ({"latents": 6}, 2, 96, True),
    "pairs across": ({"data": 2, "latents": 3}, 2, 96, True),
    "latents first": ({"latents": 3, "data": 2}, 2, 96, True),
    "uneven shares": ({"data": 2, "latents": 4}, 2, 20, True),
    "fewer rows than devices": ({"latents": 8}, 2, 3, True),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("scattered", [False, True])
def test_each_row_is_read_once_and_all_are_the_batch(
    name: str, scattered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, each, size, handed = CASES[name]
    count = math.prod(sizes.values())
    order = list(range(count))
    if scattered:  # a machine's devices need not be neighbors in a mesh
        order = np.random.default_rng(0).permutation(count).tolist()
    mesh: Any = Laid(sizes, order, each)
    if not scattered:
        assert handed_on(mesh) is handed
    batch = np.random.default_rng(1).normal(size=(size, 3)).astype(np.float32)
    parts = mesh.shape.get("data", 1)
    shares = count // parts if handed_on(mesh) else 1
    rows = -(-(size // parts) // shares)
    laid = np.zeros((rows * shares * parts, 3), np.float32)
    read = np.zeros(size, int)
    places = {device: place for place, device in np.ndenumerate(state._by_data(mesh))}
    for process in range(count // each):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        part = batch_part(mesh, size)
        assert (np.diff(part) > 0).all()
        read[part] += 1
        for device, (start, stop) in state._pieces(mesh, size).items():
            assert np.isin(np.arange(start, stop), part).all()
            data, latents = places[device]
            first = (data * shares + (latents if shares > 1 else 0)) * rows
            laid[first : first + stop - start] = batch[start:stop]
    if handed_on(mesh):
        assert (read == 1).all()
    else:  # devices of one process share its rows
        assert (read == 1).all() or len(places) > parts
    found = jax.jit(lambda x: whole_batch(x, mesh, size))(laid)
    np.testing.assert_array_equal(np.asarray(found), batch)


def test_a_process_without_a_device_is_told() -> None:
    mesh: Any = Laid({"data": 2}, [2, 3], 1)
    with pytest.raises(MeshError, match="has no device of process 0"):
        batch_part(mesh, 8)
