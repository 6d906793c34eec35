"""`mergelab convert`: a model in another form, another dtype, or other files."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import click

from mergelab.cli.joined import joins_run
from mergelab.cli.options import MESH, SIZE, load_either, read_model, readable
from mergelab.cli.verbosity import warn

__all__ = ["command"]


@click.command("convert")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--to",
    type=click.Choice(["huggingface", "orbax", "gguf"]),
    default="huggingface",
    show_default=True,
    help="Format to write.",
)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32", "q8_0"]),
    help="Stored dtype; q8_0, of GGUF files alone, has 8 bits and a scale for every 32 weights.",
)
@click.option("--shard-size", type=SIZE, default="5GB", show_default=True, help="Size of one weight file.")
@click.option("--mesh", type=MESH, metavar="AXES", help="Mesh to spread the model over on the way: fsdp=8.")
@click.option("--overwrite", is_flag=True, help="Replace the output folder if it is not empty.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@joins_run
def command(
    source: Path,
    out: Path,
    to: str,
    dtype: str | None,
    shard_size: int,
    mesh: dict[str, int] | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write the model in SOURCE to the folder OUT in another format, dtype or file size.

    SOURCE is a Hugging Face or an Orbax folder, or a GGUF file; each can be written (--to gguf makes OUT a
    file, with config and tokenizer in it). Tokenizer and other small files come along. Whatever is not
    asked to change keeps its bytes; quantized weights are stored as float32.

    \b
    Examples:
      mergelab convert model half --dtype bfloat16
      mergelab convert model parts --shard-size 1GB
      mergelab convert model model.orbax --to orbax --mesh fsdp=8
      mergelab convert model.orbax model --to huggingface
      mergelab convert model model.gguf --to gguf --dtype q8_0
      mergelab convert model.gguf model
    """
    started = time.perf_counter()
    if to == "gguf":
        if mesh is not None:
            raise click.UsageError("--to gguf streams from disk to disk and takes no --mesh")
        nbytes = _to_gguf(source, out, dtype, overwrite)
        _report(out, to, nbytes, time.perf_counter() - started, as_json)
        return
    if dtype == "q8_0":
        raise click.UsageError("--dtype q8_0 is a type of GGUF files: add --to gguf, or choose another dtype")
    import jax

    from mergelab.checkpoints.companion_files import companion_warnings, donor_files
    from mergelab.checkpoints.folder import open_checkpoint, stat_sha256
    from mergelab.checkpoints.gguf.model_file import is_gguf
    from mergelab.checkpoints.locations import local_path
    from mergelab.checkpoints.publish import WorkFolder
    from mergelab.checkpoints.remote_output import local_output
    from mergelab.checkpoints.writer import identity_digest
    from mergelab.models.orbax import save_orbax
    from mergelab.models.plain_tensors import rewrite_tensors
    from mergelab.models.save import save_model

    source = local_path(source)
    with (
        local_output(out, overwrite=overwrite) as folder,
        WorkFolder(folder, inputs=[source], overwrite=overwrite) as work,
    ):
        settings = {"to": to, "dtype": str(dtype), "shard_size": str(shard_size), "mesh": str(mesh)}
        identity = identity_digest({"source": stat_sha256(source), **settings})
        done = work.finished(identity)
        if not done:
            work.prepare()
        plain = to == "huggingface" and mesh is None and _is_foreign(source)
        loaded: tuple[Any, Any] = (None, {}) if plain else load_either(source, mesh, dtype)
        model, params = loaded
        files: dict[str, Any] = donor_files(source, None) if source.is_dir() or is_gguf(source) else {}
        nbytes = sum(array.nbytes for array in jax.tree.leaves(params))
        checkpoint = None
        if plain:
            checkpoint = open_checkpoint(folder if done else source)
            nbytes = sum(math.prod(t.shape) * t.dtype.itemsize for t in checkpoint.tensors.values())
        if done:
            pass
        elif checkpoint is not None:
            nbytes = rewrite_tensors(
                checkpoint, work, dtype=dtype, files=files, shard_bytes=shard_size, identity=identity
            )
        elif to == "orbax":
            save_orbax(model, params, work, files=files, identity=identity)
        else:
            save_model(model, params, work, files=files, shard_bytes=shard_size, identity=identity)
    for warning in companion_warnings(source, files) if source.is_dir() else ():
        warn(warning)
    _report(out, to, nbytes, time.perf_counter() - started, as_json)


def _is_foreign(source: Path) -> bool:
    """Whether this is a folder of no supported model, whose tensors can be rewritten all the same."""
    from mergelab.errors import CheckpointError
    from mergelab.models.orbax import is_orbax_model

    if is_orbax_model(source) or not (source / "config.json").is_file():
        return False
    try:
        read_model(source)
    except CheckpointError:
        return True
    return False


def _to_gguf(source: Path, out: Path, dtype: Any, overwrite: bool) -> int:
    """Writes a GGUF file; returns the bytes of its tensors."""
    from mergelab.checkpoints.folder import open_checkpoint
    from mergelab.checkpoints.gguf.write import write_gguf
    from mergelab.checkpoints.locations import is_url, local_path
    from mergelab.models.orbax import is_orbax_model

    if is_url(out):
        raise click.UsageError(f"{out}: a GGUF file is written to this machine; name a file of its own")
    if out.suffix != ".gguf":  # by which every command knows it again
        raise click.UsageError(f"{out}: the name of a GGUF file ends in .gguf; choose {out.name}.gguf")
    source = local_path(source)
    if is_orbax_model(source):
        raise click.UsageError(
            f"{source} is an Orbax folder; convert it with --to huggingface first, and that folder to GGUF"
        )
    return write_gguf(open_checkpoint(source), out, dtype=dtype, overwrite=overwrite)


def _report(out: Path, to: str, nbytes: int, seconds: float, as_json: bool) -> None:
    from mergelab.checkpoints.remote_output import shown

    if as_json:
        click.echo(json.dumps({"out": shown(out), "form": to, "bytes": nbytes, "seconds": seconds}))
    else:
        click.echo(f"{shown(out)}: {readable(nbytes)} of parameters in {to} form, in {seconds:.1f} s")
