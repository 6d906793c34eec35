"""Jobs to a published model folder: weights, config and further files, resumable, renamed when complete."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergelab.checkpoints import CheckpointWriter, TensorSpec, plan_shards
from mergelab.checkpoints.output_target import disk_errors
from mergelab.checkpoints.publish import WorkFolder
from mergelab.merging.engine.job import Job
from mergelab.merging.engine.pool import StreamReport, stream_jobs

__all__ = ["SHA256SUMS", "WrittenModel", "sha256_sums", "write_model"]

SHA256SUMS = "SHA256SUMS"


@dataclass(frozen=True)
class WrittenModel:
    """A model folder that has been published.

    Attributes:
        out: Folder, under its final name.
        report: Counts and wall time of the tensors that were streamed.
        sha256: Digests of the weight files by name, if they were asked for.
    """

    out: Path
    report: StreamReport
    sha256: Mapping[str, str] = field(default_factory=dict)


def write_model(
    out: Path | str | WorkFolder,
    jobs: Sequence[Job],
    config: Mapping[str, Any],
    identities: Mapping[str, str],
    files: Callable[[Mapping[str, str]], Mapping[str, bytes]] = lambda digests: {},
    *,
    seed: int = 0,
    shard_bytes: int = 5 * 10**9,
    stem: str = "model",
    memory: int = 10**9,
    threads: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    inputs: Iterable[Path | str] = (),
    allow_nonfinite: bool = False,
    sha256: bool = False,
    progress: Callable[[int], None] = lambda count: None,
) -> WrittenModel:
    """Makes every tensor of `jobs` and publishes them as one folder, which appears only when complete.

    Args:
        out: Folder to write; or its work folder, which the caller has entered and leaves.
        jobs: One job per tensor, in the order they are stored.
        config: Content of `config.json`; none is written if it is empty.
        identities: Digest of each thing that determines the output's bytes, by a name for messages. Only a
            run with equal ones may resume this one.
        files: Further files by name, given the digest of every tensor's bytes by tensor name. Called once,
            when all tensors are written. A `mergelab.json` among them replaces the writer's own.
        seed: Seed of every random draw.
        shard_bytes: Size at which a new weight file is begun.
        stem: Beginning of the weight files' names.
        memory: Bytes of tensors held at once.
        threads: Number of threads that read, compute and write; one per core if None. The bytes do not
            depend on it.
        resume: Whether to go on with an interrupted run of equal identities.
        overwrite: Whether a non-empty `out` that mergelab wrote may be replaced.
        inputs: Files and folders that are read, which the output must not endanger.
        allow_nonfinite: Whether NaN and infinity are accepted in what is merged.
        sha256: Whether `SHA256SUMS` of the weight files is written too.
        progress: Function called with the number of bytes just written; never twice at a time.

    Raises:
        CheckpointError: an input cannot be read (`NonFiniteError`: holds NaN or infinity).
        OutputError: `out` is not empty, could cost an input, is being written by another run, or the disk is
            full.
    """
    layout = plan_shards([TensorSpec(job.name, job.dtype, job.shape) for job in jobs], shard_bytes, stem=stem)
    telling = threading.Lock()

    def tell(count: int) -> None:
        with telling:
            progress(count)

    with contextlib.ExitStack() as stack:
        if not isinstance(out, WorkFolder):
            out = stack.enter_context(WorkFolder(out, inputs=inputs, overwrite=overwrite))
        writer = stack.enter_context(CheckpointWriter(out, layout, identities, resume=resume))
        report = stream_jobs(
            jobs,
            writer,
            seed=seed,
            memory=memory,
            threads=threads,
            allow_nonfinite=allow_nonfinite,
            progress=tell,
        )
        sums: dict[str, str] = {}
        if not writer.finished:
            added = dict(files(writer.digests()))
            if config:
                added["config.json"] = (json.dumps(dict(config), indent=2) + "\n").encode()
            if sha256:
                sums, added[SHA256SUMS] = sha256_sums(out.path)
            for name, content in added.items():
                writer.add_file(name, content)
        elif sha256:
            sums, _ = sha256_sums(out.out)
        return WrittenModel(writer.commit(), report, sums)


def sha256_sums(folder: Path) -> tuple[dict[str, str], bytes]:
    """Digests of the weight files of `folder` by name, and the same as `sha256sum -c` reads it.

    Raises:
        OutputError: a file cannot be read.
    """
    digests = {}
    with disk_errors(folder):
        for file in sorted(folder.glob("*.safetensors")):
            with file.open("rb") as stream:
                digests[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return digests, "".join(f"{digest}  {name}\n" for name, digest in digests.items()).encode()
