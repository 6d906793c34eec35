"""`mergelab activations`: what a model computes at its sites, written as training data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mergelab.cli.numbers import WholeNumber
from mergelab.cli.options import token_options, token_rule
from mergelab.cli.output import count_bar, print_result

__all__ = ["command"]


@click.command("activations")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--site",
    "sites",
    multiple=True,
    required=True,
    help="Site to record, such as blocks.8.resid_post; repeatable.",
)
@click.option(
    "--text",
    "texts",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path),
    help="Text file to read; repeatable.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="New folder to write.")
@click.option(
    "--context",
    type=WholeNumber(1),
    help="Tokens in a context (default: 64, or the model's positions if they are fewer).",
)
@click.option(
    "--tokens", type=WholeNumber(1, 2**62), help="Maximum number of tokens (default: all of the text)."
)
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "int8"]), default="float32", show_default=True,
    help="Stored dtype; int8 keeps a scale for each row.",
)  # fmt: skip
@token_options
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    model: Path,
    sites: tuple[str, ...],
    texts: tuple[Path, ...],
    out: Path,
    context: int | None,
    tokens: int | None,
    dtype: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Record the activations of MODEL on text files.

    OUT gets files SITE-00000.safetensors with rows [tokens, d_model], tokens.safetensors with the token of
    each row, and store.json. All rows are written; store.json says which count, for trainings and evaluations
    that read them. `mergelab inspect MODEL` lists the sites.

    \b
    Examples:
      mergelab activations model --site blocks.8.resid_post --text corpus.txt --out acts
      mergelab activations model --site blocks.2.mlp.pre --site blocks.2.mlp.out --text a.txt --out acts \\
          --dtype int8
    """
    from mergelab.activations.capture import open_model_activations
    from mergelab.activations.kept import DEFAULT_RULE
    from mergelab.activations.left_out import LeftOut
    from mergelab.activations.store import write_store
    from mergelab.checkpoints.locations import local_path
    from mergelab.checkpoints.publish import WorkFolder
    from mergelab.checkpoints.remote_output import local_output, shown

    model = local_path(model)
    with (
        local_output(out) as folder,
        WorkFolder(folder, inputs=[model, *texts]) as work,
        count_bar("row", quiet=as_json) as bar,
    ):
        rule = token_rule(options, DEFAULT_RULE)
        source = open_model_activations(model, sites, texts, length=context, rule=rule)
        left_out = LeftOut()

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        def notice(message: str) -> None:
            click.echo(f"warning: {message}", err=True)

        rows = write_store(
            source,
            work,
            model=model,
            rows=tokens,
            dtype=dtype,
            progress=progress,
            notice=notice,
            left_out=left_out,
        )
    uncounted = f"\n{left_out.sentence()} do not count" if left_out.kept < left_out.rows else ""
    print_result(
        lambda: {"path": shown(out), "rows": rows, "sites": list(sites), "left_out": left_out.facts()},
        lambda: f"{rows:,} rows of {', '.join(sites)}{uncounted}\n{shown(out)}",
        as_json=as_json,
        indent=None,
    )
