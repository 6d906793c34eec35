"""`mergelab evaluate`: models measured on held-out text, tasks and prompts, and compared pair by pair."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mergelab.cli.numbers import WholeNumber
from mergelab.cli.options import SIZE, stream_layers, streaming
from mergelab.cli.output import print_result
from mergelab.cli.verbosity import warn

__all__ = ["command"]


@click.command("evaluate")
@click.argument("models", nargs=-1, required=True, metavar="MODEL [MODEL...]")
@click.option(
    "--text", "texts", multiple=True, metavar="FILE",
    help="Held-out text: file, glob, folder or data set; repeatable.",
)  # fmt: skip
@click.option("--field", metavar="NAME", help="Field of JSON, parquet and arrow records (default: text).")
@click.option("--bytes", "most", type=SIZE, help="Bytes of text that are read at most (default: all).")
@click.option(
    "--tasks", type=click.Path(path_type=Path), metavar="FILE.jsonl",
    help="Multiple choice: a JSON object a line, with question, choices and answer.",
)  # fmt: skip
@click.option(
    "--prompts", type=click.Path(path_type=Path), metavar="FILE",
    help="Questions to answer, one a line or .jsonl: length of answers, and whether thinking closes.",
)  # fmt: skip
@click.option(
    "--adapter", "adapters", multiple=True, metavar="FOLDER",
    help="LoRA adapter, measured on the first MODEL as one model more; repeatable.",
)  # fmt: skip
@click.option(
    "--context", type=WholeNumber(2),
    help="Tokens in a window of text (default: 512, or the model's positions if they are fewer).",
)  # fmt: skip
@click.option(
    "--batch", type=WholeNumber(1), default=8, show_default=True,
    help="Number of windows, choices or prompts in one pass.",
)  # fmt: skip
@click.option(
    "--max-new-tokens",
    type=WholeNumber(1),
    default=256,
    show_default=True,
    help="Largest length of an answer.",
)
@click.option(
    "--chat/--no-chat", default=None,
    help="Whether prompts are put into the model's chat format (default: where it has one).",
)  # fmt: skip
@click.option(
    "--think-end", metavar="TEXT", default="</think>", show_default=True, help="Text that ends thinking."
)
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Dtype of the computation."
)
@stream_layers
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def command(
    models: tuple[str, ...],
    texts: tuple[str, ...],
    tasks: Path | None,
    prompts: Path | None,
    adapters: tuple[str, ...],
    dtype: str | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Measure models on held-out text and tasks, each figure with its interval, and compare every two.

    MODEL is a folder, a GGUF file, a model on the hub, the folder of a LoRA adapter that names its base,
    BASE+ADAPTER, or a merge recipe (.yaml): that is merged while it is loaded, and never written. Bits per
    byte compare models of different tokenizers. Intervals and differences are bootstraps over documents,
    passages of a single text, tasks or prompts; a difference is paired: both models on the same units.

    \b
    Examples:
      mergelab evaluate model --text held-out.txt
      mergelab evaluate base tuned ties.yaml --text held-out.jsonl --tasks tasks.jsonl --json
      mergelab evaluate base --adapter lora-a --adapter lora-b --text held-out.txt
      mergelab evaluate slow.gguf short.yaml --prompts questions.txt --max-new-tokens 1024
    """
    if not texts and tasks is None and prompts is None:
        raise click.UsageError("say what to evaluate on: --text FILE, --tasks FILE.jsonl or --prompts FILE")
    streamed = streaming(settings)
    from mergelab.cli.options import configure_jax
    from mergelab.verdict.comparison import compare_models

    configure_jax()
    found = compare_models(
        models,
        text=[Path(text) for text in texts] or None,
        tasks=tasks,
        prompts=prompts,
        adapters=adapters,
        dtype=dtype,
        streamed=streamed,
        note=warn,
        progress=lambda name: click.echo(f"evaluating {name}", err=True),
        **settings,
    )
    print_result(found.to_dict, found.table, as_json=as_json)
