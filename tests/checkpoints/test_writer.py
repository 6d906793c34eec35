"""The planned writer: the reference library reads what it wrote, in whatever pieces, kills and failures."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections import namedtuple
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors

from mergelab.checkpoints.dtypes import SAFETENSORS
from mergelab.checkpoints.folder import open_checkpoint
from mergelab.checkpoints.journal import LEAF
from mergelab.checkpoints.lora_tensor import read_whole
from mergelab.checkpoints.output_target import MARKER
from mergelab.checkpoints.publish import WorkFolder
from mergelab.checkpoints.shard_plan import ShardPlan, TensorSpec, plan_shards
from mergelab.checkpoints.writer import CheckpointWriter
from mergelab.errors import CheckpointError, OutputError

BF16 = np.dtype(ml_dtypes.bfloat16)


def arrays() -> dict[str, np.ndarray]:
    """One tensor of every kind a model may hold."""
    return {
        "embed": np.arange(300, dtype=np.float32).astype(BF16).reshape(30, 10),
        "ids": np.arange(9, dtype=np.uint8),
        "norm": np.arange(7, dtype=np.float32),
        "scale": np.array(2.5, np.float32),
        "empty": np.zeros((0, 4), np.float16),
        "head": np.arange(300, 600, dtype=np.float32).astype(BF16).reshape(10, 30),
    }


def specs_of(tensors: dict[str, np.ndarray]) -> list[TensorSpec]:
    return [TensorSpec(name, array.dtype, array.shape) for name, array in tensors.items()]


def write_all(writer: CheckpointWriter, tensors: dict[str, np.ndarray], piece: int = 10**9) -> None:
    for name in tensors.keys() - writer.done:
        flat = tensors[name].ravel()
        for start in range(0, flat.size, piece):
            writer.write(name, start, flat[start : start + piece])


def make(out: Path, piece: int = 10**9, shard_bytes: int = 10**9) -> dict[str, bytes]:
    """Writes the sample model and returns its files."""
    with CheckpointWriter(out, plan_shards(specs_of(arrays()), shard_bytes), "id") as writer:
        write_all(writer, arrays(), piece)
        writer.add_file("config.json", b"{}")
        writer.commit()
    return files(out)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("shard_bytes", [1, 700, 10**9])
@pytest.mark.parametrize("piece", [3, 10**9])
def test_the_reference_library_reads_what_was_written(shard_bytes: int, piece: int, tmp_path: Path) -> None:
    written = make(tmp_path / "m", piece, shard_bytes)
    found: dict[str, bytes] = {}
    for name, content in written.items():
        if name.endswith(".safetensors"):
            assert (8 + int.from_bytes(content[:8], "little")) % 64 == 0
            found |= {key: bytes(value["data"]) for key, value in safetensors.deserialize(content)}
            with safetensors.safe_open(tmp_path / "m" / name, "numpy") as file:
                assert file.metadata() == {"format": "pt"}
    assert found == {name: array.tobytes() for name, array in arrays().items()}
    checkpoint = open_checkpoint(tmp_path / "m")
    assert {n: (s.dtype, s.shape) for n, s in checkpoint.tensors.items()} == {
        n: (a.dtype, a.shape) for n, a in arrays().items()
    }
    if shard_bytes < 10**9:
        index = json.loads(written["model.safetensors.index.json"])
        assert index["metadata"]["total_size"] == sum(array.nbytes for array in arrays().values())
        assert index["weight_map"].keys() == arrays().keys()
    else:
        assert set(written) == {"model.safetensors", "config.json", MARKER}
    assert os.listdir(tmp_path) == ["m"]


@pytest.mark.parametrize("name", SAFETENSORS)
def test_every_dtype(name: str, tmp_path: Path) -> None:
    array = (np.arange(12) % 2).astype(np.float32).astype(SAFETENSORS[name]).reshape(3, 4)
    with CheckpointWriter(tmp_path / "m", plan_shards(specs_of({"x": array}), 10**9), "id") as writer:
        writer.write("x", 0, array.ravel())
        writer.commit()
    assert read_whole(open_checkpoint(tmp_path / "m").tensors["x"]).tobytes() == array.tobytes()


@pytest.mark.oracle
def test_torch_reads_the_file(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    make(tmp_path / "m")
    loaded = load_file(tmp_path / "m" / "model.safetensors")
    for name, array in arrays().items():
        assert tuple(loaded[name].shape) == array.shape
        assert np.array_equal(loaded[name].float().numpy(), array.astype(np.float32))


def test_the_plan() -> None:
    specs = [TensorSpec(f"t{i}", np.dtype(np.float32), (25,)) for i in range(5)]
    plan = plan_shards(specs, 200)
    assert [shard.file for shard in plan.shards] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert [plan.places[f"t{i}"].shard for i in range(5)] == [0, 0, 1, 1, 2]
    assert plan.total_size == 500 and plan.nbytes == sum(shard.size for shard in plan.shards)
    assert plan.digest() == plan_shards(specs, 200).digest() != plan_shards(specs, 300).digest()
    assert len(plan_shards(specs, 1).shards) == 5
    mixed = plan_shards(
        [TensorSpec("b", np.dtype(np.uint8), (3,)), TensorSpec("f", np.dtype(np.float64), (2,))], 99
    )
    assert list(mixed.places) == ["f", "b"] and mixed.places["f"].offset % 64 == 0


@pytest.mark.parametrize(
    ("specs", "limit", "message"),
    [
        ([], 9, "no tensor to write"),
        ([TensorSpec("x", BF16, ())], 0, "shard size is 0"),
        ([TensorSpec("x", BF16, ())] * 2, 9, "'x' would be written twice"),
        ([TensorSpec("__metadata__", BF16, ())], 9, "reserves"),
    ],
)
def test_plans_that_make_no_sense(specs: list[TensorSpec], limit: int, message: str) -> None:
    with pytest.raises(OutputError, match=message):
        plan_shards(specs, limit)


def big_plan() -> tuple[ShardPlan, dict[str, np.ndarray]]:
    draw = np.random.default_rng(0)
    tensors = {name: draw.integers(0, 256, 3 * LEAF + 17).astype(np.uint8) for name in ("a", "b")}
    return plan_shards(specs_of(tensors), 4 * LEAF), tensors


def test_threads_and_pieces_change_neither_bytes_nor_digests(tmp_path: Path) -> None:
    plan, tensors = big_plan()
    results = []
    for number, piece in enumerate((10**9, LEAF, 300_001)):
        with CheckpointWriter(tmp_path / f"m{number}", plan, "id") as writer:
            starts = [(name, s) for name in tensors for s in range(0, tensors[name].size, piece)]

            def work(
                part: list[tuple[str, int]], writer: CheckpointWriter = writer, piece: int = piece
            ) -> None:
                for name, start in part:
                    writer.write(name, start, tensors[name][start : start + piece])

            threads = [threading.Thread(target=work, args=(starts[k::3],)) for k in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            digests = writer.digests()
            writer.commit(durable=False)
        results.append((files(tmp_path / f"m{number}"), digests))
    assert results[0] == results[1] == results[2]
    assert len(set(results[0][1].values())) == 2


def test_pieces_that_do_not_fit_are_bugs(tmp_path: Path) -> None:
    plan = plan_shards(specs_of({"x": np.zeros(8, np.float32)}), 10**9)
    with CheckpointWriter(tmp_path / "m", plan, "id") as writer:
        writer.write("x", 2, np.ones(3, np.float32))
        for name, start, array in (
            ("y", 0, np.ones(1, np.float32)),
            ("x", 7, np.ones(2, np.float32)),
            ("x", 0, np.ones(1, np.float64)),
            ("x", 0, np.ones((1, 1), np.float32)),
            ("x", 4, np.ones(2, np.float32)),
            ("x", 1, np.ones(2, np.float32)),
            ("x", 0, np.ones(8, np.float32)),
        ):
            with pytest.raises(ValueError, match="tensor"):
                writer.write(name, start, array)
        with pytest.raises(OutputError, match=r"1 tensors are not completely written, first 'x'"):
            writer.commit()
    assert not (tmp_path / "m").exists()


def test_a_target_is_only_replaced_when_asked_and_complete(tmp_path: Path) -> None:
    out = tmp_path / "m"
    out.mkdir()
    (out / "old.txt").write_text("old")
    plan = plan_shards(specs_of(arrays()), 10**9)
    with pytest.raises(OutputError, match=r"was not written by mergelab \(it has no mergelab\.json\)"):
        CheckpointWriter(out, plan, "id", overwrite=True)
    (out / MARKER).write_text("{}")
    with pytest.raises(OutputError, match=r"is not empty; .* --overwrite"):
        CheckpointWriter(out, plan, "id")
    assert os.listdir(tmp_path) == ["m"]
    with pytest.raises(KeyboardInterrupt), CheckpointWriter(out, plan, "id", overwrite=True) as writer:
        writer.write("norm", 0, arrays()["norm"])
        raise KeyboardInterrupt
    assert set(files(out)) == {"old.txt", MARKER}
    with CheckpointWriter(out, plan, "id", overwrite=True) as writer:
        write_all(writer, arrays())
        assert set(files(out)) == {"old.txt", MARKER}
        writer.commit()
    assert set(files(out)) == {"model.safetensors", MARKER} and os.listdir(tmp_path) == ["m"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file"):
        CheckpointWriter(tmp_path / "file", plan, "id", overwrite=True)


def test_an_empty_target_and_missing_parents_are_fine(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    assert make(tmp_path / "m") == make(tmp_path / "new" / "deep" / "m")


def test_exceptions_keep_only_what_is_reusable(tmp_path: Path) -> None:
    plan = plan_shards(specs_of(arrays()), 10**9)
    with pytest.raises(RuntimeError), CheckpointWriter(tmp_path / "m", plan, "id"):
        raise RuntimeError
    assert os.listdir(tmp_path) == []
    with pytest.raises(RuntimeError), CheckpointWriter(tmp_path / "m", plan, "id") as writer:
        writer.write("norm", 0, arrays()["norm"])
        raise RuntimeError
    assert sorted(os.listdir(tmp_path)) == [".m.journal", ".m.partial"]
    CheckpointWriter(tmp_path / "m", plan, "id").abandon()
    assert os.listdir(tmp_path) == []


def interrupted(out: Path) -> dict[str, np.ndarray]:
    """Leaves an unfinished model: `embed` complete in two pieces, `head` half written."""
    tensors = arrays()
    with (
        pytest.raises(KeyboardInterrupt),
        CheckpointWriter(out, plan_shards(specs_of(tensors), 700), "id") as w,
    ):
        w.write("embed", 100, tensors["embed"].ravel()[100:])
        w.write("embed", 0, tensors["embed"].ravel()[:100])
        w.write("head", 0, tensors["head"].ravel()[:100])
        w.add_file("stale.json", b"{}")
        raise KeyboardInterrupt
    return tensors


def test_resume_is_byte_identical(tmp_path: Path) -> None:
    tensors = interrupted(tmp_path / "m")
    with (tmp_path / ".m.journal").open("ab") as journal:
        journal.write(b'{"name":"norm","start":0,"cou')  # torn by the kill
    plan = plan_shards(specs_of(tensors), 700)
    for _ in range(2):  # interrupted again at once: nothing is lost
        with CheckpointWriter(tmp_path / "m", plan, "id", resume=True) as writer:
            assert writer.done == {"embed", "empty"}
    with CheckpointWriter(tmp_path / "m", plan, "id", resume=True) as writer:
        write_all(writer, tensors, 50)
        resumed = writer.digests()
        writer.add_file("config.json", b"{}")
        writer.commit()
    assert files(tmp_path / "m") == make(tmp_path / "straight", shard_bytes=700)
    with CheckpointWriter(tmp_path / "again", plan, "id") as writer:
        write_all(writer, tensors)
        assert writer.digests() == resumed
        writer.abandon()


def test_without_resume_everything_is_written_anew(tmp_path: Path) -> None:
    tensors = interrupted(tmp_path / "m")
    with CheckpointWriter(tmp_path / "m", plan_shards(specs_of(tensors), 700), "id") as writer:
        assert writer.done == frozenset()
        writer.abandon()


def test_resume_with_nothing_to_resume_starts(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "m", plan_shards(specs_of(arrays()), 9), "id", resume=True) as writer:
        assert writer.done == frozenset()


def test_resume_tells_what_differs(tmp_path: Path) -> None:
    plan = plan_shards(specs_of(arrays()), 700)
    identity = {"recipe": "abc", "seed": "1"}
    with CheckpointWriter(tmp_path / "m", plan, identity) as writer:
        writer.write("norm", 0, arrays()["norm"])
    with pytest.raises(OutputError, match=r"another merge: seed differ; run without --resume"):
        CheckpointWriter(tmp_path / "m", plan, identity | {"seed": "2"}, resume=True)
    with pytest.raises(OutputError, match="layout of the output"):
        CheckpointWriter(tmp_path / "m", plan_shards(specs_of(arrays()), 9), identity, resume=True)
    with CheckpointWriter(tmp_path / "m", plan, identity, resume=True) as writer:
        assert "norm" in writer.done


def test_changed_bytes_are_found_on_resume(tmp_path: Path) -> None:
    tensors = interrupted(tmp_path / "m")
    plan = plan_shards(specs_of(tensors), 700)
    place = plan.places["embed"]
    path = tmp_path / ".m.partial" / plan.shards[place.shard].file
    content = bytearray(path.read_bytes())
    content[place.offset + 250] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"00001-of-.*tensor 'embed' is not as it was written"):
        CheckpointWriter(tmp_path / "m", plan, "id", resume=True)


@pytest.mark.parametrize("line", [b"nonsense", b"[1]", b'{"name":"embed","start":0,"count":5,"leaves":"zz"}'])
def test_a_damaged_journal_is_an_error(line: bytes, tmp_path: Path) -> None:
    tensors = interrupted(tmp_path / "m")
    journal = tmp_path / ".m.journal"
    lines = journal.read_bytes().splitlines()
    journal.write_bytes(b"\n".join([lines[0], line, *lines[1:]]) + b"\n")
    with pytest.raises(CheckpointError, match="line 2 is damaged; run without --resume"):
        CheckpointWriter(tmp_path / "m", plan_shards(specs_of(tensors), 700), "id", resume=True)


def test_a_journal_that_contradicts_itself_is_an_error(tmp_path: Path) -> None:
    tensors = interrupted(tmp_path / "m")
    journal = tmp_path / ".m.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines, lines[1]]))
    with pytest.raises(CheckpointError, match="contradicts itself"):
        CheckpointWriter(tmp_path / "m", plan_shards(specs_of(tensors), 700), "id", resume=True)


def test_two_runs_cannot_share_an_output(tmp_path: Path) -> None:
    plan = plan_shards(specs_of(arrays()), 700)
    with CheckpointWriter(tmp_path / "m", plan, "id") as writer:
        writer.write("norm", 0, arrays()["norm"])
        with pytest.raises(OutputError, match="another run is writing"):
            CheckpointWriter(tmp_path / "m", plan, "id", resume=True)
        write_all(writer, {k: v for k, v in arrays().items() if k != "norm"})
        writer.commit()


@pytest.mark.parametrize("can_exchange", [True, False])
@pytest.mark.parametrize("moment", ["_rename", "_clear_beside"])
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_kill_while_publishing_is_completed_by_the_next_run(
    moment: str, can_exchange: bool, overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, plan = tmp_path / "m", plan_shards(specs_of(arrays()), 700)
    expected = make(tmp_path / "undisturbed", shard_bytes=700)
    if overwrite:
        out.mkdir()
        (out / MARKER).write_text("{}")
    if not can_exchange:
        monkeypatch.setattr("mergelab.checkpoints.publish.exchange", lambda a, b: False)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with (
        monkeypatch.context() as patched,
        pytest.raises(KeyboardInterrupt),
        CheckpointWriter(out, plan, "id", overwrite=overwrite) as writer,
    ):
        write_all(writer, arrays())
        writer.add_file("config.json", b"{}")
        patched.setattr(WorkFolder, moment, killed)
        writer.commit()
    with CheckpointWriter(out, plan, "id", resume=True, overwrite=overwrite) as writer:
        assert writer.done == arrays().keys()
        writer.add_file("config.json", b"{}")
        writer.commit()
    assert files(out) == expected and sorted(os.listdir(tmp_path)) == ["m", "undisturbed"]
    with pytest.raises(OutputError, match="is not empty"):  # once tidied up, the folder is as any other
        CheckpointWriter(out, plan, "id")


def test_a_folder_that_was_moved_aside_is_back_on_the_next_run(tmp_path: Path) -> None:
    out, plan = tmp_path / "m", plan_shards(specs_of(arrays()), 700)
    expected = make(out, shard_bytes=700)
    out.rename(tmp_path / ".m.replaced")
    with pytest.raises(OutputError, match="is not empty"):
        CheckpointWriter(out, plan, "id")
    assert files(out) == expected and os.listdir(tmp_path) == ["m"]


def test_too_little_space_is_found_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")(10**9, 10**9, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match=r"needs 0\.002 GB but only 0\.000 GB are free"):
        CheckpointWriter(
            tmp_path / "m", plan_shards(specs_of({"x": np.zeros(500_000, np.float32)}), 10**9), "id"
        )
    assert os.listdir(tmp_path) == []


def test_a_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_shards(specs_of(arrays()), 700)
    with (
        pytest.raises(OutputError, match="the disk is full"),
        CheckpointWriter(tmp_path / "m", plan, "id") as writer,
    ):
        writer.write("norm", 0, arrays()["norm"])

        def full(*_: object) -> int:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "pwrite", full)
        writer.write("embed", 0, arrays()["embed"].ravel())
    monkeypatch.undo()
    assert not (tmp_path / "m").exists()
    with CheckpointWriter(tmp_path / "m", plan, "id", resume=True) as writer:
        assert "norm" in writer.done
        write_all(writer, arrays())
        writer.commit()


def test_a_failing_commit_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_shards(specs_of(arrays()), 700)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with (
        pytest.raises(OutputError, match="the disk is full"),
        CheckpointWriter(tmp_path / "m", plan, "id") as w,
    ):
        write_all(w, arrays())
        monkeypatch.setattr(os, "fsync", full)
        w.commit()
    monkeypatch.undo()
    assert not (tmp_path / "m").exists()
    with CheckpointWriter(tmp_path / "m", plan, "id", resume=True) as writer:
        assert writer.done == arrays().keys()
        writer.commit()
    assert "model.safetensors.index.json" in files(tmp_path / "m")


def test_a_file_size_limit_is_a_clear_error(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OutputError, match="the disk is full"):
            CheckpointWriter(
                tmp_path / "m", plan_shards(specs_of({"x": np.zeros(10**6, np.uint8)}), 10**9), "id"
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == []


def test_closing_waits_for_writes_and_stops_later_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, tensors = big_plan()
    begun, may_end = threading.Event(), threading.Event()
    pwrite = os.pwrite

    def slow(file: int, data: memoryview, offset: int) -> int:
        begun.set()
        assert may_end.wait(10)
        return pwrite(file, data, offset)

    with CheckpointWriter(tmp_path / "m", plan, "id") as writer:
        monkeypatch.setattr(os, "pwrite", slow)
        late = threading.Thread(target=writer.write, args=("a", 0, tensors["a"]))
        late.start()
        assert begun.wait(10)
        threading.Timer(0.05, may_end.set).start()
    late.join()
    with pytest.raises(OutputError, match="the writer is closed"):
        writer.write("b", 0, tensors["b"])
    monkeypatch.undo()
    with CheckpointWriter(tmp_path / "m", plan, "id", resume=True) as writer:
        assert writer.done == {"a"}
        writer.abandon()


@pytest.mark.parametrize("name", ["../x", "a/b", "model.safetensors", ""])
def test_added_files_stay_in_the_folder(name: str, tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "m", plan_shards(specs_of(arrays()), 10**9), "id") as writer:
        with pytest.raises(CheckpointError, match=r"file name|replace the weights"):
            writer.add_file(name, b"")
        writer.abandon()


def test_files_are_copied(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with CheckpointWriter(tmp_path / "m", plan_shards(specs_of(arrays()), 10**9), "id") as writer:
        write_all(writer, arrays())
        writer.add_file("tokenizer.json", tmp_path / "tokenizer.json")
        with pytest.raises(OutputError, match="writing failed"):
            writer.add_file("x.json", tmp_path / "missing.json")
        writer.commit()
    assert (tmp_path / "m" / "tokenizer.json").read_text() == "{}"


KILLED = """
import os, sys
import numpy as np
from mergelab.checkpoints.shard_plan import TensorSpec, plan_shards
from mergelab.checkpoints.publish import WorkFolder
from mergelab.checkpoints.writer import CheckpointWriter

tensors = {f"t{i}": np.arange(i, i + 50_000, dtype=np.float32) for i in range(12)}
plan = plan_shards([TensorSpec(n, a.dtype, a.shape) for n, a in tensors.items()], 900_000)
kill_after, written = int(sys.argv[2]), 0
with CheckpointWriter(sys.argv[1], plan, "id", resume=True) as writer:
    for name in sorted(tensors.keys() - writer.done):
        for start in range(0, 50_000, 7_000):
            writer.write(name, start, tensors[name][start : start + 7_000])
            written += 1
            if written == kill_after:
                os.kill(os.getpid(), 9)
    writer.commit()
"""


def test_killed_runs_resume_to_the_same_bytes(tmp_path: Path, repository: Path) -> None:
    def run(out: Path, kill_after: int) -> int:
        command = [sys.executable, "-c", KILLED, str(out), str(kill_after)]
        return subprocess.run(command, cwd=repository, check=False).returncode

    assert run(tmp_path / "straight", 0) == 0
    assert [run(tmp_path / "killed", after) for after in (13, 1, 40)] == [-9, -9, -9]
    assert not (tmp_path / "killed").exists()
    assert run(tmp_path / "killed", 0) == 0
    assert files(tmp_path / "killed") == files(tmp_path / "straight")
    assert sorted(os.listdir(tmp_path)) == ["killed", "straight"]
