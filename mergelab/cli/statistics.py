"""`mergelab statistics`: what a text says of each parameter, for merges that weigh by it."""

from __future__ import annotations

import json
from pathlib import Path

import click

from mergelab.cli.numbers import WholeNumber

__all__ = ["command"]


@click.command("statistics")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--text", "texts", multiple=True, required=True, type=click.Path(path_type=Path),
    help="UTF-8 text file; repeatable.",
)  # fmt: skip
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
@click.option("--overwrite", is_flag=True, help="Replace OUT if mergelab wrote it.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    model: Path,
    texts: tuple[Path, ...],
    kind: str,
    out: Path,
    context: int | None,
    batch: int,
    tokens: int | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write statistics of MODEL's parameters on text files.

    OUT gets safetensors files with a float32 tensor for each tensor of MODEL, under its name: for `gram`
    [in, in] for each matrix whose input has one site, for `fisher` the tensor's own shape. A recipe names the
    folder beside the model: `models: [{model: MODEL, statistics: OUT}]`.

    \b
    Examples:
      mergelab statistics model --text corpus.txt --kind gram --out stats/model
      mergelab statistics model --text a.txt --kind fisher --tokens 100000 --context 256 --out fisher
    """
    import hashlib

    from tqdm import tqdm

    from mergelab.activations.capture import open_model_activations
    from mergelab.activations.statistics import write_statistics
    from mergelab.checkpoints.folder import stat_sha256
    from mergelab.checkpoints.locations import local_path
    from mergelab.checkpoints.publish import WorkFolder
    from mergelab.checkpoints.remote_output import local_output, shown

    model = local_path(model)
    inputs = [model, *texts]
    with (
        local_output(out, overwrite=overwrite) as folder,
        WorkFolder(folder, inputs=inputs, overwrite=overwrite) as work,
        tqdm(unit="context", disable=as_json or None, dynamic_ncols=True) as bar,
    ):
        options = (stat_sha256(*inputs), kind, context, tokens)
        identity = hashlib.sha256(repr(options).encode()).hexdigest()
        if not work.finished(identity):
            work.prepare()
        source = open_model_activations(model, [], texts, length=context)
        length = source.tokens.shape[1]
        contexts = source.tokens if tokens is None else source.tokens[: max(tokens // length, 1)]

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        count = write_statistics(
            source.model,
            source.params,
            contexts,
            work,
            kind="gram" if kind == "gram" else "fisher",
            batch=batch,
            identity=identity,
            progress=progress,
        )
    if as_json:
        facts = {"path": shown(out), "kind": kind, "tensors": count, "tokens": contexts.size}
        click.echo(json.dumps(facts))
    else:
        click.echo(f"{kind} of {count:,} tensors on {contexts.size:,} tokens\n{shown(out)}")
