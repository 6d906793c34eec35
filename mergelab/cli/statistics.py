"""`mergelab statistics`: what a text says of each parameter, for merges that weigh by it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from mergelab.cli.joined import joins_run
from mergelab.cli.numbers import WholeNumber
from mergelab.cli.options import TEXT, text_options, token_options, token_rule

__all__ = ["command"]


@click.command("statistics")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--text", "texts", multiple=True, required=True, metavar="PLACE",
    help="Text: file, glob, folder or data set; repeatable.",
)  # fmt: skip
@TEXT
@click.option(
    "--kind", required=True, type=click.Choice(["gram", "fisher"]),
    help="gram: mean of x x^T over tokens, for regmean; fisher: mean squared gradient, for fisher.",
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
@click.option("--overwrite", is_flag=True, help="Replace OUT if mergelab wrote it.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@joins_run
def command(
    model: Path,
    texts: tuple[str, ...],
    kind: str,
    out: Path,
    context: int | None,
    batch: int,
    tokens: int | None,
    overwrite: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Write statistics of MODEL's parameters on text files.

    OUT gets safetensors files with a float32 tensor for each tensor of MODEL, under its name: for `gram`
    [in, in] for each matrix whose input has one site, for `fisher` the tensor's own shape. A recipe names the
    folder beside the model: `models: [{model: MODEL, statistics: OUT}]`.

    Of gram, the tokens that count are those of `mergelab sae eval`: not the first of each context, special
    ones, or those far longer than the others, at the input of each matrix. Of fisher, every token counts that
    no option leaves out.

    \b
    Examples:
      mergelab statistics model --text corpus.txt --kind gram --out stats/model
      mergelab statistics model --text a.txt --kind fisher --tokens 100000 --context 256 --out fisher
    """
    import hashlib

    from tqdm import tqdm

    from mergelab.activations.kept import DEFAULT_RULE, EVERY_TOKEN
    from mergelab.activations.model_activations import open_model_activations
    from mergelab.activations.statistics import counted_tokens, write_statistics
    from mergelab.checkpoints.folder import stat_sha256
    from mergelab.checkpoints.locations import local_path
    from mergelab.checkpoints.publish import WorkFolder
    from mergelab.checkpoints.remote_output import local_output, shown
    from mergelab.text.corpus import TextOptions
    from mergelab.text.corpus_files import corpus_files

    if given["roles"] == "assistant":
        raise click.UsageError("--roles assistant: statistics are of all tokens that a model reads")
    model, files, asked = local_path(model), corpus_files(texts), text_options(given)
    inputs = [model, *(file.path for file in files if file.path is not None)]
    with (
        local_output(out, overwrite=overwrite) as folder,
        WorkFolder(folder, inputs=inputs, overwrite=overwrite) as work,
        tqdm(unit="context", disable=as_json or None, dynamic_ncols=True) as bar,
    ):
        names = [file.name for file in files]
        rule = token_rule(given, DEFAULT_RULE if kind == "gram" else EVERY_TOKEN)
        options = (stat_sha256(*inputs), names, sorted(asked.items()), kind, context, tokens, rule)
        identity = hashlib.sha256(repr(options).encode()).hexdigest()
        if not work.finished(identity):
            work.prepare()
        options = TextOptions(**asked, tokens=tokens)
        source = open_model_activations(model, [], files, length=context, text=options)
        length = source.tokens.shape[1]
        kept = slice(None if tokens is None else max(tokens // length, 1))
        contexts = source.tokens[kept]
        mask = None if source.counted is None else source.counted[kept]

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        count = write_statistics(
            source.model,
            source.params,
            contexts,
            work,
            mask=mask,
            kind="gram" if kind == "gram" else "fisher",
            batch=batch,
            identity=identity,
            progress=progress,
            rule=rule,
            special_ids=source.special_ids,
        )
        used = counted_tokens(contexts, mask, rule, source.special_ids)
    if as_json:
        facts = {"path": shown(out), "kind": kind, "tensors": count, "tokens": used}
        click.echo(json.dumps(facts))
    else:
        click.echo(f"{kind} of {count:,} tensors on {used:,} tokens\n{shown(out)}")
