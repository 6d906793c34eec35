"""`mergelab statistics`: what a text says of each parameter, for merges that weigh by it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from mergelab.cli.joined import joins_run
from mergelab.cli.numbers import Number, WholeNumber
from mergelab.cli.options import TEXT, stream_layers, streaming, text_options, token_options, token_rule
from mergelab.cli.verbosity import is_quiet

if TYPE_CHECKING:
    import numpy as np

    from mergelab.activations.kept import TokenRule
    from mergelab.activations.statistics import Statistics
    from mergelab.models.model import Model, Params
    from mergelab.models.streamed import Streaming

__all__ = ["command"]


@click.command("statistics")
@click.argument("models", metavar="MODEL...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--text", "texts", multiple=True, required=True, metavar="PLACE",
    help="Text: file, glob, folder or data set; repeatable. Of merged_gram one per MODEL, in their order.",
)  # fmt: skip
@TEXT
@click.option(
    "--kind", required=True, type=click.Choice(["gram", "fisher", "merged_gram"]),
    help="gram: mean of x x^T over tokens, for regmean; fisher: mean squared gradient, for fisher; "
    "merged_gram: gram behind merged layers, of all models together, for regmean_pp.",
)  # fmt: skip
@click.option(
    "--off-diagonal", type=Number(0, 1), default=1.0, show_default=True,
    help="The off_diagonal of regmean_pp, for merged_gram.",
)  # fmt: skip
@click.option("--out", required=True, type=click.Path(path_type=Path), help="A new folder.")
@click.option(
    "--context",
    type=WholeNumber(2),
    help="Tokens in a context; 64, or the model's positions if they are fewer, if not given.",
)
@click.option(
    "--batch", type=WholeNumber(1), default=8, show_default=True, help="Contexts in one compiled call."
)
@click.option(
    "--tokens", type=WholeNumber(1, 2**62), help="Upper limit on tokens; all of the text if not given."
)
@token_options
@stream_layers
@click.option("--overwrite", is_flag=True, help="Replace OUT if mergelab wrote it.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@joins_run
def command(
    models: tuple[Path, ...],
    texts: tuple[str, ...],
    kind: str,
    off_diagonal: float,
    out: Path,
    context: int | None,
    batch: int,
    tokens: int | None,
    overwrite: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Write statistics of a MODEL's parameters on text files.

    OUT gets safetensors files with a float32 tensor for each tensor of MODEL, under its name: for `gram`
    [in, in] for each matrix whose input has one site, for `fisher` the tensor's own shape. A recipe names the
    folder beside the model: `models: [{model: MODEL, statistics: OUT}]`. Of merged_gram there is a folder in
    OUT for each MODEL, of the model folder's name.

    Of gram, the tokens that count are those of `mergelab sae eval`: not the first of each context, special
    ones, or those far longer than the others, at the input of each matrix. Of fisher, every token counts that
    no option leaves out.

    \b
    Examples:
      mergelab statistics model --text corpus.txt --kind gram --out stats/model
      mergelab statistics model --text a.txt --kind fisher --tokens 100000 --context 256 --out fisher
      mergelab statistics a b --text a.txt --text b.txt --kind merged_gram --out stats
    """
    import hashlib
    from functools import partial

    from tqdm import tqdm

    from mergelab.activations.kept import DEFAULT_RULE, EVERY_TOKEN
    from mergelab.activations.merged_statistics import write_merged_grams
    from mergelab.activations.statistics import counted_tokens, write_statistics
    from mergelab.checkpoints.folder import stat_sha256
    from mergelab.checkpoints.locations import local_path
    from mergelab.checkpoints.publish import WorkFolder
    from mergelab.checkpoints.remote_output import local_output, shown
    from mergelab.text.corpus_files import corpus_files

    streamed = streaming(given)
    if streamed is not None and kind == "merged_gram":
        raise click.UsageError("merged_gram holds all models at once: omit --stream-layers")
    if given["roles"] == "assistant":
        raise click.UsageError("--roles assistant: statistics are of all tokens that a model reads")
    _check_numbers(kind, models, texts)
    joint = kind == "merged_gram"
    folders = [local_path(model) for model in models]
    files = [corpus_files([text]) for text in texts] if joint else [corpus_files(texts)]
    asked = text_options(given)
    inputs = [*folders, *(file.path for each in files for file in each if file.path is not None)]
    with (
        local_output(out, overwrite=overwrite) as folder,
        WorkFolder(folder, inputs=inputs, overwrite=overwrite) as work,
        tqdm(
            unit="block" if joint else "context", disable=as_json or is_quiet() or None, dynamic_ncols=True
        ) as bar,
    ):
        names = [[file.name for file in each] for each in files]
        rule = token_rule(given, EVERY_TOKEN if kind == "fisher" else DEFAULT_RULE)
        options = (
            stat_sha256(*inputs),
            names,
            sorted(asked.items()),
            kind,
            context,
            tokens,
            rule,
            off_diagonal,
        )
        identity = hashlib.sha256(repr(options).encode()).hexdigest()
        if not work.finished(identity):
            work.prepare()
        opened = [
            _opened(model, each, context, tokens, asked, streamed)
            for model, each in zip(folders, files, strict=True)
        ]

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        used = [counted_tokens(one.contexts, one.mask, rule, one.special_ids) for one in opened]
        if joint:
            found = partial(_joint, opened, _names(folders), off_diagonal, batch, rule, progress)
            count = write_merged_grams(opened[0].model, found, work, identity)
        else:
            (one,) = opened
            count = write_statistics(
                one.model,
                one.params,
                one.contexts,
                work,
                mask=one.mask,
                kind="gram" if kind == "gram" else "fisher",
                batch=batch,
                identity=identity,
                progress=progress,
                rule=rule,
                special_ids=one.special_ids,
            )
    if as_json:
        facts = {"path": shown(out), "kind": kind, "tensors": count, "tokens": sum(used)}
        click.echo(json.dumps(facts))
    else:
        click.echo(f"{kind} of {count:,} tensors on {sum(used):,} tokens\n{shown(out)}")


class _Opened(NamedTuple):
    """A model and its text."""

    model: Model
    params: Params
    contexts: np.ndarray
    mask: np.ndarray | None
    special_ids: Sequence[int]


def _check_numbers(kind: str, models: tuple[Path, ...], texts: tuple[str, ...]) -> None:
    if kind == "merged_gram":
        if len(models) < 2 or len(texts) != len(models):
            raise click.UsageError(
                f"merged_gram is of two models or more and a --text of each, in their order: found "
                f"{len(models)} and {len(texts)}"
            )
    elif len(models) > 1:
        raise click.UsageError(f"{kind} is of one MODEL at a time: found {len(models)}")


def _opened(
    folder: Path,
    files: Sequence[Any],
    context: int | None,
    tokens: int | None,
    asked: Mapping[str, Any],
    streamed: Streaming | None,
) -> _Opened:
    from mergelab.activations.model_activations import open_model_activations
    from mergelab.text.corpus import TextOptions

    source = open_model_activations(
        folder, [], files, length=context, text=TextOptions(**asked, tokens=tokens), streamed=streamed
    )
    length = source.tokens.shape[1]
    kept = slice(None if tokens is None else max(tokens // length, 1))
    mask = None if source.counted is None else source.counted[kept]
    return _Opened(source.model, source.params, source.tokens[kept], mask, source.special_ids)


def _names(folders: Sequence[Path]) -> list[str]:
    """A folder for each model: its name, with a number where several have it."""
    names = [folder.resolve().name or "model" for folder in folders]
    return [name if names.count(name) == 1 else f"{name}-{i}" for i, name in enumerate(names)]


def _joint(
    opened: Sequence[_Opened],
    names: Sequence[str],
    off_diagonal: float,
    batch: int,
    rule: TokenRule,
    progress: Callable[[int, int], None],
) -> dict[str, Statistics]:
    """Statistics by the name of each model's folder."""
    import numpy as np

    from mergelab.activations.merged_statistics import merged_grams
    from mergelab.errors import SiteError

    first = opened[0]
    for name, one in zip(names, opened, strict=True):
        if one.model != first.model:
            raise SiteError(
                f"{name} is not of the configuration of {names[0]}: models that are merged layer by layer "
                "have one configuration; compare them with 'mergelab inspect'"
            )
    found = merged_grams(
        first.model,
        [one.params for one in opened],
        [one.contexts for one in opened],
        masks=[np.ones(one.contexts.shape, bool) if one.mask is None else one.mask for one in opened],
        off_diagonal=off_diagonal,
        batch=batch,
        rule=rule,
        special_ids=first.special_ids,
        advance=progress,
    )
    return dict(zip(names, found, strict=True))
