"""Orbax checkpoints, whatever is in their folder, are restored or refused by name."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mergelab.errors import CheckpointError
from mergelab.models.orbax import restore_tree, save_tree, tree_shapes

TREE = {"a": {"w": jnp.arange(12.0).reshape(3, 4)}, "b": jnp.ones(5)}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tree(TREE, tmp_path_factory.mktemp("orbax") / "tree")


def test_the_sound_one_is_restored(sound: Path) -> None:
    found = restore_tree(sound, tree_shapes(sound))
    jax.tree.map(np.testing.assert_array_equal, found, TREE)


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("_METADATA", b"{", b""),
        ("_METADATA", b'"key_metadata"', b'"kex_metadata"'),
        ("_METADATA", b"[3, 4]", b'["x", 4]'),
        ("_METADATA", b'"value_metadata"', b'"valux_metadata"'),
        ("_CHECKPOINT_METADATA", b"{", b"\xff"),
        ("_CHECKPOINT_METADATA", b'_timestamp_nsecs": ', b'_timestamp_nsecs": 1.5, "x": '),
        ("_CHECKPOINT_METADATA", b"commit_timestamp_nsecs", b"cocmit_timestamp_nsecs"),
        ("_sharding", b"{", b"["),
        ("array_metadatas/process_0", b"{", b"["),
    ],
)
def test_damaged_descriptions_are_named_or_not_needed(
    sound: Path, tmp_path: Path, name: str, before: bytes, after: bytes
) -> None:
    shutil.copytree(sound, tmp_path / "damaged")
    file = tmp_path / "damaged" / name
    raw = file.read_bytes()
    assert before in raw
    file.write_bytes(raw.replace(before, after, 1))
    try:
        found = restore_tree(tmp_path / "damaged", tree_shapes(sound))
    except CheckpointError as error:
        assert "damaged" in str(error) and len(str(error)) < 2_000
    else:
        jax.tree.map(np.testing.assert_array_equal, found, TREE)


def test_what_is_no_regular_file_is_not_opened(sound: Path, tmp_path: Path) -> None:
    shutil.copytree(sound, tmp_path / "odd")
    (tmp_path / "odd" / "_sharding").unlink()
    os.mkfifo(tmp_path / "odd" / "_sharding")
    with pytest.raises(CheckpointError, match="_sharding is not a regular file"):
        tree_shapes(tmp_path / "odd")
    (tmp_path / "odd" / "_sharding").unlink()
    with (tmp_path / "odd" / "_sharding").open("wb") as file:
        file.truncate(2**31)
    with pytest.raises(CheckpointError, match="of at most 64 MB"):
        tree_shapes(tmp_path / "odd")
    with pytest.raises(CheckpointError, match="is not an Orbax checkpoint"):
        tree_shapes(tmp_path)
