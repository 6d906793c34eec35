"""`mergelab finetune`: a model trained further on text, whole or by LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from mergelab.checkpoints.locations import location_text
from mergelab.cli.joined import DURATION
from mergelab.cli.numbers import Number, Seed, WholeNumber
from mergelab.cli.options import MESH, PUSH, check_push_option, model_mesh, push_output
from mergelab.cli.output import count_bar, print_result

__all__ = ["command"]


@click.command("finetune")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--text", "texts", multiple=True, required=True, metavar="PLACE",
    help="Text or conversations to learn: file, glob, folder or data set; repeatable.",
)  # fmt: skip
@click.option("--out", "-o", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option(
    "--lora", "rank", type=WholeNumber(1), metavar="RANK",
    help="Rank of LoRA factors that are trained and written in place of the weights.",
)  # fmt: skip
@click.option(
    "--alpha",
    type=Number(0, min_open=True),
    help="Numerator of LoRA's scale alpha / RANK.  [default: 2 RANK]",
)
@click.option(
    "--target", "targets", multiple=True, metavar="NAME",
    help="Module that gets factors, by its end or a glob (q_proj, attn.q, *.mlp.*); repeatable.  [default: "
    "all linear layers of the blocks]",
)  # fmt: skip
@click.option("--tokens", type=WholeNumber(1, 2**62), help="Tokens to train on in all.  [default: --epochs]")
@click.option(
    "--epochs", type=Number(0, min_open=True), default=1.0, show_default=True, help="Passes over the text."
)
@click.option(
    "--lr", "learning_rate", type=Number(0, min_open=True),
    help="Peak of the learning rate.  [default: 2e-5; with --lora 2e-4]",
)  # fmt: skip
@click.option(
    "--batch", type=WholeNumber(1), default=8, show_default=True, help="Contexts in one forward pass."
)
@click.option(
    "--accumulate", type=WholeNumber(1), default=1, show_default=True,
    help="Forward passes whose gradients make one step.",
)  # fmt: skip
@click.option(
    "--context", type=WholeNumber(2),
    help="Tokens in a context.  [default: 512, or the model's positions if they are fewer]",
)  # fmt: skip
@click.option(
    "--optimizer", type=click.Choice(["adamw", "muon"]), default="adamw", show_default=True,
    help="Optimizer; muon is for matrices of the blocks, with AdamW for all else.",
)  # fmt: skip
@click.option(
    "--warmup", type=Number(0, 1), default=0.05, show_default=True,
    help="Fraction of the steps in which the learning rate rises.",
)  # fmt: skip
@click.option("--weight-decay", type=Number(0), default=0.0, show_default=True, help="Decay of matrices.")
@click.option(
    "--teacher", type=click.Path(path_type=Path),
    help="Model of the same vocabulary that the trained one is kept near to, with weight --kl.",
)  # fmt: skip
@click.option(
    "--kl", type=Number(0), default=0.0, show_default=True,
    help="Weight of the KL divergence from --teacher beside the cross-entropy.",
)  # fmt: skip
@click.option(
    "--roles", type=click.Choice(["auto", "all", "assistant"]), default="auto", show_default=True,
    help="Tokens that are learned; auto takes assistants' turns of conversations and all of texts.",
)  # fmt: skip
@click.option(
    "--held-out", multiple=True, metavar="PLACE",
    help="Text to judge on before, while and after; repeatable.  [default: --held-out-share of --text]",
)  # fmt: skip
@click.option(
    "--held-out-share", type=Number(0, 1), default=0.05, show_default=True,
    help="Fraction of the contexts of --text, the last ones, to judge on.",
)  # fmt: skip
@click.option(
    "--evaluate-every", type=WholeNumber(1), help="Steps between judgments.  [default: a fifth of all]"
)
@click.option("--mesh", type=MESH, metavar="AXES", help="Mesh to spread the model over, as in data=2,fsdp=4.")
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Dtype of the forward pass; weights are trained in float32 and written as stored.  [default: the "
    "stored one]",
)  # fmt: skip
@click.option(
    "--seed", type=Seed(0, fold=False), default=0, show_default=True,
    help="Seed of the order of contexts and of LoRA's factors.",
)  # fmt: skip
@click.option(
    "--save-every", type=WholeNumber(1),
    help="Steps between checkpoints, which --resume continues from.  [default: two minutes]",
)  # fmt: skip
@click.option(
    "--grace", type=DURATION, default="60s", show_default=True,
    help="Time after SIGTERM within which a checkpoint is written; then the run is ended.",
)  # fmt: skip
@click.option("--resume", is_flag=True, help="Go on with a run that was interrupted.")
@click.option("--overwrite", is_flag=True, help="Replace the output folder if it is not empty.")
@PUSH
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    model: Path,
    texts: tuple[str, ...],
    out: Path,
    rank: int | None,
    alpha: float | None,
    targets: tuple[str, ...],
    teacher: Path | None,
    held_out: tuple[str, ...],
    mesh: dict[str, int] | None,
    save_every: int | None,
    grace: float,
    resume: bool,
    overwrite: bool,
    push_to: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Train MODEL further on text: all of its weights, or LoRA factors.

    OUT gets a model like MODEL, or with --lora a PEFT adapter, with finetune.json (settings, losses) and a
    README.md. Equal commands give equal bytes on one device, also where a run was killed and resumed.
    Of conversations (records with messages) the assistants' turns are learned.

    \b
    Examples:
      mergelab finetune model --text prose.txt --out prose
      mergelab finetune model --text code.jsonl --out code-lora --lora 16 --tokens 2000000
      mergelab finetune model --text chats.jsonl --out chat --teacher model --kl 0.1 --optimizer muon
      mergelab finetune model --text prose.txt --held-out other.txt --out prose --resume
    """
    check_push_option(push_to, out)
    if rank is None and (alpha is not None or targets):
        raise click.UsageError("--alpha and --target are of LoRA factors: give their rank with --lora")
    from mergelab.cli.options import configure_jax

    configure_jax()
    from mergelab.tuning import LoraSettings, TuningSettings, finetune_folder

    lora = None if rank is None else LoraSettings(rank, alpha, targets)
    with count_bar("step", quiet=as_json) as bar:

        def tell(line: str) -> None:
            if not as_json:
                bar.clear()
                click.echo(line, err=True)

        def progress(done: int, total: int, figures: Mapping[str, float]) -> None:
            bar.total = total
            bar.set_postfix(loss=f"{figures['cross_entropy']:.4f}", refresh=False)
            bar.update(done - bar.n)

        def reading(tokens: int) -> None:
            bar.set_description(f"{tokens:,} tokens read", refresh=False)
            bar.update(0)

        found = finetune_folder(
            model,
            texts,
            out,
            TuningSettings(lora=lora, **options),
            held_out=held_out,
            teacher=teacher,
            mesh=None if mesh is None else model_mesh(mesh),
            overwrite=overwrite,
            resume=resume,
            save_every=save_every,
            grace=grace,
            progress=progress,
            tell=tell,
            reading=reading,
        )
    push_output(found.path, push_to)
    path = location_text(found.path)

    def lines() -> str:
        said, losses = found.facts, found.facts["held_out_loss"]
        first = "the run had finished before; nothing was left to train\n" if found.finished_before else ""
        judged = ""
        if losses["before"] is not None:
            judged = (
                f"held-out loss {losses['before']:.4f} -> {losses['after']:.4f} nats a token, on "
                f"{said['held_out_targets']:,} tokens\n"
            )
        return f"{first}{said['steps']:,} steps, {said['tokens']:,} tokens\n{judged}{path}"

    print_result(lambda: {"path": path, **found.facts}, lines, as_json=as_json, indent=None)
