"""`mergelab trace-decision`: why one model ends a text where another goes on, in one report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mergelab.checkpoints.locations import location_text
from mergelab.cli.numbers import Seed, WholeNumber
from mergelab.cli.options import LOCAL_PATH
from mergelab.cli.output import StageBar, print_result

__all__ = ["command"]

_SWAPS = {
    "both": ("weights", "activations"),
    "weights": ("weights",),
    "activations": ("activations",),
    "none": (),
}


@click.command("trace-decision")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option(
    "--prompts", type=click.Path(path_type=Path), metavar="FILE",
    help="Prompts to try, one a line, or JSON lines in a .jsonl file.  [default: a dozen with short answers]",
)  # fmt: skip
@click.option(
    "--token", "tokens", multiple=True, metavar="TEXT", default=(" Wait", "\\n"), show_default=True,
    help="Token that is followed beside the end of a text; repeatable.",
)  # fmt: skip
@click.option(
    "--ending", "endings", multiple=True, metavar="TEXT", default=("", "</think>", "\\n", "."),
    help="Text that is put behind A's answers, the empty one for none; repeatable.  "
    "[default: none, </think>, \\n and .]",
)  # fmt: skip
@click.option("--out", "-o", required=True, type=LOCAL_PATH, metavar="DIR", help="Folder to write.")
@click.option(
    "--most", type=WholeNumber(1), default=4, show_default=True, help="Number of prompts that are kept."
)
@click.option(
    "--max-new-tokens", type=WholeNumber(1), default=64, show_default=True, help="Most tokens of an answer."
)
@click.option(
    "--positions", type=WholeNumber(1), default=8, show_default=True,
    help="Number of last positions at which layers are read.",
)  # fmt: skip
@click.option(
    "--swaps", type=click.Choice(list(_SWAPS)), default="both", show_default=True,
    help="Ways in which blocks of B are put into A; weights take most of the time.",
)  # fmt: skip
@click.option(
    "--batch", type=WholeNumber(1), default=8, show_default=True, help="Contexts in one forward pass."
)
@click.option(
    "--chat/--no-chat", default=None,
    help="Whether prompts are put into the chat format of A (default: where it has one).",
)  # fmt: skip
@click.option("--tokenizer", type=click.Path(path_type=Path), help="Tokenizer of both.  [default: that of A]")
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Dtype that the models are run in.  [default: the stored one]",
)  # fmt: skip
@click.option("--seed", type=Seed(0, fold=False), default=0, show_default=True, help="Seed of all controls.")
@click.option("--overwrite", is_flag=True, help="Replace a folder that mergelab wrote.")
@click.option("--json", "as_json", is_flag=True, help="Print all that was read as JSON.")
def command(
    a: str,
    b: str,
    prompts: Path | None,
    tokens: tuple[str, ...],
    endings: tuple[str, ...],
    out: Path,
    swaps: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Say why model A ends a text where model B goes on.

    The two share a vocabulary: a base and its reasoning model, a model and its fine-tune or merge. DIR gets
    decision.html and decision.json: what follows A's answers in both, the logits of the end and of tokens
    over layers, what adds to them, which neurons, and which blocks of B in A bring B's decision. A and B are
    folders, GGUF files, models on the hub, adapters, or merge recipes (.yaml). docs/trace_decision.md says
    how each is read.

    \b
    Examples:
      mergelab trace-decision base reasoner --out why
      mergelab trace-decision base tuned --prompts asked.txt --token " Wait" --token " Hmm" --out why
      mergelab trace-decision base merge.yaml --swaps activations --max-new-tokens 32 --out why --json
    """
    from mergelab.cli.options import configure_jax
    from mergelab.reasoning import trace_decision
    from mergelab.text.prompt_file import read_prompts

    asked = None if prompts is None else read_prompts(prompts)
    configure_jax()
    with StageBar(quiet=as_json) as bar:
        found = trace_decision(
            a,
            b,
            asked,
            [_unescaped(token) for token in tokens],
            out,
            endings=[_unescaped(ending) for ending in endings],
            swaps=_SWAPS[swaps],
            progress=bar.show,
            **options,
        )
    print_result(
        found.to_json,
        lambda: "\n".join([*found.summary(), location_text(out)]),
        as_json=as_json,
        indent=None,
    )


def _unescaped(text: str) -> str:
    return text.replace("\\n", "\n").replace("\\t", "\t")
