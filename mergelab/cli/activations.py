"""`mergelab activations`: what a model computes at its sites, written as training data."""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from mergelab.cli.joined import joins_run
from mergelab.cli.numbers import WholeNumber
from mergelab.cli.options import (
    TEXT,
    readable,
    stream_layers,
    streaming,
    text_options,
    token_options,
    token_rule,
)
from mergelab.cli.output import count_bar, print_result
from mergelab.cli.verbosity import warn
from mergelab.errors import quoted

__all__ = ["command"]


class _PartType(click.ParamType):
    name = "part"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", str(value))
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            self.fail(f"{quoted(value)} is not a part; write 1/4, 2/4, ...", param, ctx)
        return int(match[1]) - 1, int(match[2])


PART = _PartType()


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
    metavar="PLACE",
    help="Text to read: file (txt, jsonl, parquet, arrow; gz, zst), glob, folder, data set on the hub "
    "(org/name), URL; repeatable.",
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
@click.option(
    "--compute-dtype", type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Dtype of the running model's weights (default: as stored); float32 is fastest on most CPUs.",
)  # fmt: skip
@stream_layers
@TEXT
@token_options
@click.option(
    "--part", type=PART, default="1/1", show_default=True, metavar="N/COUNT",
    help="Share of the documents: every COUNT-th, from the N-th on; each machine has an OUT of its own.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@joins_run
def command(
    model: Path,
    sites: tuple[str, ...],
    texts: tuple[str, ...],
    out: Path,
    context: int | None,
    tokens: int | None,
    dtype: str,
    compute_dtype: str | None,
    part: tuple[int, int],
    as_json: bool,
    **given: Any,
) -> None:
    """Record the activations of MODEL on text.

    OUT gets files SITE-00000.safetensors with rows [tokens, d_model], tokens.safetensors with the token of
    each row, and store.json. All rows are written; store.json says which count, for trainings and evaluations
    that read them. `mergelab inspect MODEL` lists the sites.

    \b
    Examples:
      mergelab activations model --site blocks.8.resid_post --text corpus.txt --out acts
      mergelab activations model --site blocks.8.resid_post --text 'chats/*.jsonl.gz' --out acts \\
          --roles assistant
      mergelab activations model --site blocks.2.mlp.pre --site blocks.2.mlp.out --text a.txt --out acts \\
          --dtype int8
      mergelab activations a-model-of-70-billion --site blocks.40.resid_post --text a.txt --out acts \\
          --stream-layers --spill /fast-disk
    """
    from mergelab.activations.kept import DEFAULT_RULE
    from mergelab.activations.left_out import LeftOut
    from mergelab.activations.model_activations import open_model_activations
    from mergelab.activations.store import write_store
    from mergelab.activations.store_shares import own_tokens
    from mergelab.checkpoints.locations import local_path
    from mergelab.checkpoints.new_files import check_new_folder
    from mergelab.checkpoints.remote_output import local_output, shown
    from mergelab.checkpoints.shared_work import SharedWorkFolder
    from mergelab.text.corpus import TextOptions
    from mergelab.text.corpus_files import corpus_files

    streamed = streaming(given)
    model, files = local_path(model), corpus_files(texts)
    options = TextOptions(**text_options(given), tokens=tokens, part=part)
    places = [file.path for file in files if file.path is not None]
    with (
        local_output(out) as folder,
        SharedWorkFolder(folder, inputs=[model, *places]) as work,
        ExitStack() as bars,
    ):
        if not work.published:
            check_new_folder(work.out)  # before hours of work
        with count_bar("token", quiet=as_json) as read:
            source = open_model_activations(
                model,
                sites,
                files,
                length=context,
                dtype=compute_dtype,
                rule=token_rule(given, DEFAULT_RULE),
                text=options,
                kept=own_tokens(work),
                reading=lambda tokens: read.update(tokens - read.n),
                streamed=streamed,
            )
        if streamed is not None:
            plan = source.params.memory_plan(min(tokens or source.rows, source.rows), sites)
            click.echo(
                f"streamed: {readable(plan.blocks)} of weights, {readable(plan.stream + plan.kept)} of "
                "activations are held at most",
                err=True,
            )
        bar = bars.enter_context(count_bar("row", quiet=as_json))
        left_out = LeftOut()

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        def notice(message: str) -> None:
            warn(message)

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
