"""What commands share: option types, folders opened, and jax settings."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergelab.cli.numbers import Number, WholeNumber
from mergelab.cli.program_cache import program_cache
from mergelab.cli.verbosity import note
from mergelab.errors import quoted

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from mergelab.activations.kept import TokenRule
    from mergelab.models.streamed import Streaming
    from mergelab.sae.sae import SAE

__all__ = [
    "LOCAL_PATH",
    "MESH",
    "PUSH",
    "SIZE",
    "TEXT",
    "check_push_option",
    "configure_jax",
    "judged_text",
    "load_either",
    "model_mesh",
    "open_sae",
    "push_output",
    "read_model",
    "readable",
    "stream_layers",
    "streaming",
    "text_options",
    "token_options",
    "token_rule",
]


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
}


class _Size(click.ParamType):
    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", value) if len(value) < 60 else None
        if match is None or match[2].upper() not in _UNITS:
            self.fail(f"{quoted(value)} is not a size; write 5GB, 512MiB or a number of bytes", param, ctx)
        size = int(float(match[1]) * _UNITS[match[2].upper()])
        if size >= 2**63:
            self.fail(f"{value!r} is more than any disk holds; write a size such as 5GB", param, ctx)
        if size < 1:
            self.fail(f"{value!r} is not a number of bytes; write a size such as 5GB", param, ctx)
        return size


SIZE = _Size()


class _LocalPath(click.Path):
    """A path of this machine; a URL is refused before it becomes a folder called `gs:`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from mergelab.checkpoints.locations import is_url

        if is_url(value):
            self.fail(f"{quoted(str(value))} is a URL; give a path of this machine", param, ctx)
        return super().convert(value, param, ctx)


LOCAL_PATH = _LocalPath(path_type=Path)


def readable(count: float) -> str:
    """`1234567` as `1.23 MB`, with decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.4g} TB"


class _Mesh(click.ParamType):
    name = "mesh"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, int]:
        if isinstance(value, dict):
            return value
        from mergelab.errors import MeshError
        from mergelab.sharding import read_sizes

        try:
            return read_sizes(value)
        except MeshError as error:
            self.fail(str(error).removesuffix("."), param, ctx)


MESH = _Mesh()


def _text_settings(command: Any) -> Any:
    """Options on how texts become contexts of tokens; `text_options` reads them."""
    options = (
        click.option(
            "--field",
            metavar="NAME",
            help="Field of JSON, parquet and arrow records that is read (default: text, else messages).",
        ),
        click.option(
            "--bos",
            type=click.Choice(["auto", "true", "false"]),
            help="Token that begins texts, before each text and context (default: as in the training of an "
            "SAE, else auto: as the tokenizer does).",
        ),
        click.option(
            "--packing",
            type=click.Choice(["packed", "documents"]),
            help="Texts joined and cut (packed), or kept apart and padded (documents) (default: as in the "
            "training of an SAE, else packed).",
        ),
        click.option(
            "--roles",
            type=click.Choice(["all", "assistant"]),
            help="Tokens of conversations that count (default: as in the training of an SAE, else all).",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


TEXT = _text_settings


def text_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `mergelab.text.corpus.TextOptions` that were given on the command line."""
    found = {n: given[n] for n in ("field", "bos", "packing", "roles", "tokens") if given.get(n) is not None}
    if found.get("bos") in ("true", "false"):
        found["bos"] = found["bos"] == "true"
    return found


def judged_text(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say how much of the texts is judged: `tokens`, `contexts`."""
    for option in (
        click.option(
            "--contexts", type=WholeNumber(1), help="Maximum number of contexts (default: all of the texts)."
        ),
        click.option(
            "--tokens",
            type=WholeNumber(1, 2**62),
            help="Maximum number of tokens, in whole contexts (default: all of the texts).",
        ),
    ):
        command = option(command)
    return command


PUSH = click.option(
    "--push",
    "push_to",
    metavar="ORG/NAME",
    help="Repository on the Hugging Face hub to upload the finished output to.",
)


class _Multiple(Number):
    """A number above 1; infinity is no limit."""

    name = "number"
    bounded = False

    def __init__(self) -> None:
        super().__init__(1, min_open=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert("inf" if value == "none" else value, param, ctx)


def token_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say which tokens count: `skip_positions`, `skip_special`, `max_norm_multiple`."""
    for option in (
        click.option(
            "--max-norm-multiple",
            type=_Multiple(),
            metavar="NUMBER|none",
            help="Largest norm of a token that counts, in medians (default: 10); none for no limit.",
        ),
        click.option(
            "--skip-special/--keep-special",
            default=None,
            help="Whether special tokens count for nothing (default: they do not count).",
        ),
        click.option(
            "--skip-positions",
            type=WholeNumber(0),
            help="Number of first positions of a context that do not count (default: 1).",
        ),
    ):
        command = option(command)
    return command


def token_rule(options: Mapping[str, Any], default: TokenRule) -> TokenRule:
    """What the options of `token_options` say; what they do not say is the default's."""
    import math
    from dataclasses import replace

    given = {name: options[name] for name in default.facts() if options[name] is not None}
    if given.get("max_norm_multiple") == math.inf:
        given["max_norm_multiple"] = None
    return replace(default, **given)


def check_push_option(push_to: str | None, out: Path | None) -> None:
    """Refuses, before any work, a push that cannot succeed."""
    if push_to is not None:
        from mergelab.checkpoints.hub_push import check_push
        from mergelab.checkpoints.locations import is_url

        if out is not None and is_url(out):
            raise click.UsageError("--push uploads from this machine: give a local folder with --out")
        check_push(push_to)


def push_output(out: Path, push_to: str | None, card: bytes | None = None) -> None:
    """Uploads a finished output where that was asked for, and says on stderr where it is.

    Args:
        out: the output.
        push_to: `org/name`; None where nothing was asked for.
        card: `README.md` for a repository and an output that have none.
    """
    if push_to is not None:
        from mergelab.checkpoints.hub_push import push

        click.echo(f"pushed to {push(out, push_to, card=card)}", err=True)


def stream_layers(command: Any) -> Any:
    """Options by which the weights of a model stay in its files; `streaming` reads them."""
    options = (
        click.option(
            "--stream-layers", is_flag=True,
            help="Weights left in their files: each block is read once for all tokens, for models that "
            "memory cannot hold.",
        ),
        click.option(
            "--spill", type=click.Path(path_type=Path, exists=True, file_okay=False),
            help="Folder on a disk in which activations wait with --stream-layers (default: in memory).",
        ),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def streaming(given: dict[str, Any]) -> Streaming | None:
    """How a model is streamed, by the options of `stream_layers`, which are taken out; None to load it."""
    wanted, spill = given.pop("stream_layers"), given.pop("spill")
    if spill is not None and not wanted:
        raise click.UsageError("--spill is for models whose weights stay in their files: add --stream-layers")
    if not wanted:
        return None
    from mergelab.models.streamed import Streaming

    return Streaming(spill)


def read_model(path: Path) -> Any:
    """The model that a folder's `config.json` describes, in either form, without its parameters.

    Raises:
        CheckpointError: there is none, or it is of no supported family.
    """
    from mergelab.checkpoints.companions import companion_json, has_companion
    from mergelab.errors import CheckpointError
    from mergelab.models.families import model_from_config

    if not has_companion(path, "config.json"):
        raise CheckpointError(f"{path} has no config.json; name the folder of a model")
    return model_from_config(companion_json(path, "config.json"), str(path / "config.json"))


def load_either(
    path: Path, sizes: Mapping[str, int] | None = None, dtype: str | None = None
) -> tuple[Any, Any]:
    """The model and its parameters.

    Args:
        path: the folder.
        sizes: the axes of the mesh it is spread over; the default device if None.
        dtype: the parameters' dtype; the stored one if None.

    Raises:
        MergelabError: as `load_model`, `load_orbax` and `make_mesh`.
    """
    from mergelab.models.load import load_model
    from mergelab.models.orbax import is_orbax_model, load_orbax

    mesh = None if sizes is None else model_mesh(sizes)
    load = load_orbax if is_orbax_model(path) else load_model
    return load(path, mesh=mesh, dtype=dtype)


def model_mesh(sizes: Mapping[str, int]) -> Mesh:
    """The mesh that a model is spread over; what it leaves idle is said on stderr.

    Raises:
        MeshError: an axis is unknown, or so many devices cannot be laid out like that.
    """
    from mergelab.sharding import MODEL_AXES, idle_devices, make_mesh

    mesh = make_mesh(sizes, axes=MODEL_AXES)
    if sentence := idle_devices(mesh):
        note(sentence)
    return mesh


def open_sae(path: Path, step: int | None = None) -> SAE:
    """Loads it; of a run that has not finished the newest whole checkpoint, which is said on stderr.

    Args:
        path: an SAE, or a run.
        step: step of a checkpoint of the run.

    Raises:
        CheckpointError: there is none.
    """
    from mergelab.errors import CheckpointError
    from mergelab.sae.formats import load_sae, sae_path

    path = sae_path(path)
    is_run = (path / "config.yaml").is_file() and (path / "checkpoints").is_dir()
    if step is not None and not is_run:
        raise CheckpointError(f"{path}: a step was named, but this is not a run with checkpoints")
    if step is None and (path / "final").is_dir():
        return _as_trained(load_sae(path / "final"), path / "config.yaml")
    if is_run:
        from mergelab.sae.training.snapshot import snapshot_sae

        found = snapshot_sae(path, step)
        if step is None:
            click.echo(
                f"{path}: the run has not finished; taken is its checkpoint of step {found.step:,} of "
                f"{found.steps:,}",
                err=True,
            )
        return _as_trained(found.sae, path / "config.yaml")
    return load_sae(path)


def _as_trained(sae: SAE, config: Path) -> SAE:
    """The SAE of a run; where it does not say what it writes, the run's configuration does."""
    from dataclasses import replace

    from mergelab.errors import SAEError
    from mergelab.sae.sae import at_sites
    from mergelab.sae.training.config import load_config

    if sae.target_known or not config.is_file():
        return sae
    try:
        data = load_config(config).data
    except SAEError:
        return sae
    if data.target_site is not None:
        return at_sites(sae, data.site, data.target_site)
    settings = replace(sae.config, transcoder=data.target_path is not None)
    return replace(sae, config=settings)


def configure_jax(*, merging: bool = False) -> None:
    """Sets JAX up for this process; call it before the first computation.

    Compiled programs go to `$XDG_CACHE_HOME/mergelab/xla` (`program_cache`), so that a second run does not
    compile them again; `JAX_COMPILATION_CACHE_DIR` overrides the place, and is then left to its owner.

    Args:
        merging: Whether the process does nothing but stream merges. Their blocks run side by side already,
            so XLA gets one thread for each. A model's forward pass would be slowed by that.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if merging and "xla_cpu_multi_thread_eigen" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()

    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(program_cache(jax.__version__)))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if merging:
        # The streaming pool calls from its own threads: handing each block to another thread only costs.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
