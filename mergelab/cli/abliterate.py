"""`mergelab abliterate`: take the direction of refusals out of a model's weights, and measure both."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from mergelab.cli.numbers import ANY_NUMBER, Number, Seed, WholeNumber
from mergelab.cli.options import (
    MESH,
    PUSH,
    check_push_option,
    model_mesh,
    push_output,
    stream_layers,
    streaming,
)
from mergelab.cli.output import StageBar, print_result
from mergelab.cli.verbosity import warn
from mergelab.errors import quoted

__all__ = ["command"]


class _Layers(click.ParamType):
    name = "layers"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"\s*([0-9]{1,6})\s*(?:-\s*([0-9]{1,6})\s*)?", value)
        if match is None or int(match[1]) > int(match[2] or match[1]):
            self.fail(
                f"{quoted(value)} is not a range of layers; write the first and the last one, such as 12-18",
                param,
                ctx,
            )
        return int(match[1]), int(match[2] or match[1])


LAYERS = _Layers()


@click.command("abliterate")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--harmful",
    type=click.Path(path_type=Path),
    help="File of prompts that the model refuses.  [default: a built-in set]",
)
@click.option(
    "--harmless",
    type=click.Path(path_type=Path),
    help="File of prompts that the model answers.  [default: a built-in set]",
)
@click.option(
    "--borderline",
    type=click.Path(path_type=Path),
    help="File of harmless prompts that tend to be refused: counted, and used to judge directions, not to "
    "find them.  [default: a built-in set beside the built-in ones]",
)
@click.option(
    "--direction",
    type=click.Path(path_type=Path),
    help="File or edited folder whose direction is removed, in place of one that is found.",
)
@click.option("--out", "-o", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--text", type=click.Path(path_type=Path), help="Text file to measure the loss on.")
@click.option(
    "--refusal", "phrases", multiple=True, metavar="PHRASE", help="Beginning of a refusal; repeatable."
)
@click.option("--system", help="System prompt before every prompt.")
@click.option(
    "--positions", type=WholeNumber(1), help="Number of last tokens to look at.  [default: the template's]"
)
@click.option(
    "--winsorize",
    type=Number(0, 1, min_open=True),
    help="Quantile of magnitudes to clip activations to, before means are taken.",
)
@click.option(
    "--orthogonal",
    is_flag=True,
    help="Make the direction orthogonal to the mean of harmless prompts first, so that the model keeps this "
    "component.",
)
@click.option(
    "--max-kl",
    type=ANY_NUMBER,
    default=0.1,
    show_default=True,
    help="Largest KL divergence of harmless answers, in nats.",
)
@click.option(
    "--min-induced",
    type=ANY_NUMBER,
    default=0.0,
    show_default=True,
    help="Least refusal score when the direction is added.",
)
@click.option(
    "--max-depth",
    type=ANY_NUMBER,
    default=0.8,
    show_default=True,
    help="Fraction of the layers to look at, from the first.",
)
@click.option(
    "--layers",
    type=LAYERS,
    metavar="FIRST-LAST",
    help="Layers to look at in place of --max-depth, the first being 0: 12-18.",
)
@click.option(
    "--answer-tokens",
    "max_new_tokens",
    type=WholeNumber(1),
    default=48,
    show_default=True,
    help="Tokens of each answer that are looked through for refusals.",
)
@click.option(
    "--response-prefix",
    metavar="TEXT",
    help=r"Text that every answer begins with, such as '<think>\n', to be looked past; \n ends a line.  "
    r"[default: what all answers share]",
)
@click.option(
    "--keep-norms", type=click.Choice(["written", "coordinate"]), help="Norms that edited matrices keep."
)
@click.option(
    "--trials",
    type=WholeNumber(0),
    default=0,
    show_default=True,
    help="Trials of a search over layers and weights; 0 removes the direction everywhere.",
)
@click.option(
    "--choose",
    default="lowest-refusals",
    show_default=True,
    metavar="RULE|NUMBER",
    help="Trial to write: lowest-refusals, lowest-kl (that halves refusals) or balanced, each within "
    "--max-kl; or the number of a trial.",
)
@click.option(
    "--journal",
    type=click.Path(path_type=Path),
    help="File of the search's trials: kept, and read in place of searching again.  [default: "
    "OUT.trials.jsonl]",
)
@click.option(
    "--batch", type=WholeNumber(1), default=16, show_default=True, help="Prompts in one forward pass."
)
@click.option(
    "--seed", type=Seed(0, fold=False), default=0, show_default=True, help="Seed of shuffles and draws."
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Dtype to measure in; weights are written as stored.",
)
@click.option("--mesh", type=MESH, metavar="AXES", help="Mesh to spread the model over, as in tensor=4.")
@click.option(
    "--anyway",
    is_flag=True,
    help="Search although harmful prompts score no higher than harmless ones, so that the model does not "
    "seem to refuse.",
)
@stream_layers
@click.option("--overwrite", is_flag=True, help="Replace the output folder if it is not empty.")
@click.option("--resume", is_flag=True, help="Go on with an output that was interrupted.")
@PUSH
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(
    model: Path,
    harmful: Path | None,
    harmless: Path | None,
    borderline: Path | None,
    direction: Path | None,
    out: Path,
    text: Path | None,
    journal: Path | None,
    phrases: tuple[str, ...],
    mesh: dict[str, int] | None,
    dtype: str | None,
    overwrite: bool,
    resume: bool,
    push_to: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Take out of MODEL the direction along which it refuses.

    The direction is the difference of the means of two sets of prompts, chosen by what its removal and its
    addition do. OUT gets the edited model, with abliteration.json and a README.md that state refusals, KL
    and loss before and after on prompts kept aside, and the direction in abliteration/direction.safetensors.
    Prompts stand one a line, or as JSON strings in .jsonl files; without any, small built-in sets are used,
    and your own are better. With --trials the trials that no other beats are listed, and the same command
    with another --choose (and --out, or --overwrite) writes another of them without searching again.
    docs/abliteration.md says what this removes and what it does not.

    \b
    Examples:
      mergelab abliterate model --harmful harmful.txt --harmless harmless.txt --out edited
      mergelab abliterate model --harmful a.txt --harmless b.txt --out edited --text prose.txt --trials 64
      mergelab abliterate model --out edited --trials 64 --choose balanced
      mergelab abliterate model --out other --trials 64 --choose 17 --journal edited.trials.jsonl
      mergelab abliterate sibling --direction edited --out edited-sibling
      mergelab abliterate model --harmful a.txt --harmless b.txt --out edited --refusal "Das kann ich nicht"
    """
    check_push_option(push_to, out)
    streamed = streaming(options)
    from mergelab.abliteration import (
        AbliterationSettings,
        Filters,
        abliterate,
        load_direction,
        read_prompts,
    )
    from mergelab.checkpoints.companion_files import companion_warnings, donor_files

    filters = Filters(*(options.pop(name) for name in ("max_kl", "min_induced", "max_depth", "layers")))
    if options["response_prefix"] is not None:
        options["response_prefix"] = options["response_prefix"].replace("\\n", "\n")
    if phrases:
        options["phrases"] = phrases
    from mergelab.checkpoints.text_file import MAX_PROSE, read_text

    prose = None if text is None else read_text(text, MAX_PROSE)
    with StageBar(quiet=as_json) as bar:
        report = abliterate(
            model,
            out,
            *(None if path is None else read_prompts(path) for path in (harmful, harmless)),
            borderline=None if borderline is None else read_prompts(borderline),
            direction=None if direction is None else load_direction(direction),
            settings=AbliterationSettings(filters=filters, **options),
            text=prose,
            journal=journal,
            mesh=None if mesh is None else model_mesh(mesh),
            dtype=dtype,
            streamed=streamed,
            overwrite=overwrite,
            resume=resume,
            inputs=[path for path in (harmful, harmless, borderline, direction, text) if path is not None],
            progress=bar.show,
        )

    def lines() -> str:
        found = "direction as given"
        if report.selection is not None:
            chosen = report.selection.chosen
            found = f"direction before block {chosen.layer}, token {chosen.position}"
        return "\n".join([found, *report.frontier_table(), *report.table(), *report.findings(), str(out)])

    for warning in companion_warnings(model, donor_files(model, None)):
        warn(warning)
    print_result(report.to_json, lines, as_json=as_json, indent=None)
    push_output(out, push_to)
