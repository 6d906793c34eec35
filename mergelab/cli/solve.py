"""`mergelab solve`: tasks solved by sampling, voting, searching and thinking longer, and what that costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mergelab.cli.numbers import SEED, Number, WholeNumber
from mergelab.cli.options import LOCAL_PATH, MESH
from mergelab.cli.output import StageBar, print_result
from mergelab.cli.verbosity import warn

__all__ = ["command"]

_METHODS = ("best-of-n", "vote", "weighted-vote", "beam", "dvts", "particles", "deepconf", "force")


class _Prices(click.ParamType):
    name = "PROMPT,COMPLETION"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, float]:
        if isinstance(value, tuple):
            return value
        parts = str(value).split(",")
        try:
            if len(parts) != 2 or max(map(len, parts)) > 40:
                raise ValueError
            prompt, completion = map(float, parts)
            if not (0 <= prompt < 1e12 and 0 <= completion < 1e12):
                raise ValueError
        except ValueError:
            self.fail(
                f"{str(value)[:60]!r} is not two prices; write dollars per million tokens that are read "
                "and generated, such as 15,60",
                param,
                ctx,
            )
        return prompt, completion


@click.command("solve")
@click.argument("model", metavar="MODEL")
@click.argument("tasks", type=click.Path(path_type=Path), metavar="TASKS.jsonl")
@click.option(
    "--method", type=click.Choice(_METHODS), default="vote", show_default=True,
    help="Way to more compute; docs/solve.md has a paragraph for each.",
)  # fmt: skip
@click.option(
    "--samples", type=WholeNumber(1), default=8, show_default=True,
    help="Number of traces of each task; of a search, those that are looked at side by side.",
)  # fmt: skip
@click.option(
    "--budget", type=WholeNumber(1), default=256, show_default=True, help="Most new tokens of one trace."
)
@click.option("--out", type=LOCAL_PATH, required=True, metavar="DIR", help="Folder for log and results.")
@click.option(
    "--answer", default="auto", show_default=True, metavar="HOW",
    help="Way to find an answer: number, boxed, choice, exact, regex:PATTERN, or auto.",
)  # fmt: skip
@click.option(
    "--verifier", "verifiers", multiple=True, metavar="NAME",
    help="Judge of traces: logprob, entropy, confidence, lens:SITE, latents:SAE:ID,..., probe:FILE, "
    "probe:SITE, shuffled:SITE, random:SITE. The first one judges, others are compared with it. Repeatable.",
)  # fmt: skip
@click.option(
    "--fit-on", type=click.Path(path_type=Path), metavar="FILE.jsonl",
    help="Other tasks, to whose traces probes are fitted.",
)  # fmt: skip
@click.option(
    "--fit-samples", type=WholeNumber(1), default=4, show_default=True,
    help="Number of traces of each task of --fit-on.",
)  # fmt: skip
@click.option(
    "--worth", type=click.Choice(["last", "min", "product"]), default="last", show_default=True,
    help="Worth of a trace by a probe: at its end, or the least or the product over its steps.",
)  # fmt: skip
@click.option("--temperature", type=Number(0), default=1.0, show_default=True, help="Divisor of the logits.")
@click.option("--top-k", type=WholeNumber(1), help="Sample from the k most likely tokens.")
@click.option(
    "--top-p", type=Number(0, 1, min_open=True),
    help="Sample from the smallest set of tokens with this probability.",
)  # fmt: skip
@click.option("--min-p", type=Number(0, 1), help="Drop tokens below this fraction of the top probability.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Random seed.")
@click.option("--stop", "stops", multiple=True, metavar="TEXT", help="Text that ends a trace; repeatable.")
@click.option(
    "--step", default="\\n", show_default=True, metavar="TEXT", help="Text that ends a step of a search."
)
@click.option(
    "--branch", type=WholeNumber(1), default=4, show_default=True,
    help="Number of ways in which a search extends each state.",
)  # fmt: skip
@click.option(
    "--keep", type=Number(0, 1, min_open=True), default=0.9, show_default=True,
    help="Fraction of the first traces that the bound of deepconf lets pass.",
)  # fmt: skip
@click.option("--batch", type=WholeNumber(1), default=64, show_default=True, help="Most traces in one pass.")
@click.option(
    "--think-end", metavar="TEXT", default="</think>", show_default=True, help="Text that ends thinking."
)
@click.option(
    "--think-min", type=WholeNumber(0),
    help="Number of tokens that force thinks at least (default: half of the budget).",
)  # fmt: skip
@click.option("--think-max", type=WholeNumber(1), help="Number of tokens at which force ends thinking.")
@click.option(
    "--think-more", metavar="TEXT", default=" Wait", show_default=True,
    help="Text in the place of an end before --think-min.",
)  # fmt: skip
@click.option(
    "--chat/--no-chat", default=None,
    help="Whether prompts are put into the model's chat format (default: where it has one).",
)  # fmt: skip
@click.option("--system", metavar="TEXT", help="Instruction before each prompt of a chat.")
@click.option("--adapter", metavar="FOLDER", help="LoRA adapter that is added to MODEL.")
@click.option(
    "--prices", type=_Prices(), metavar="PROMPT,COMPLETION",
    help="Dollars per million tokens that are read and generated.",
)  # fmt: skip
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Dtype of the computation."
)
@click.option(
    "--mesh", type=MESH, metavar="AXES", help="Mesh to spread model and traces over: data=2,tensor=4."
)
@click.option("--overwrite", is_flag=True, help="Replace the results of other settings in DIR.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def command(
    model: str,
    tasks: Path,
    method: str,
    out: Path,
    verifiers: tuple[str, ...],
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    step: str,
    think_end: str,
    think_min: int | None,
    think_max: int | None,
    think_more: str,
    prices: tuple[float, float] | None,
    mesh: dict[str, int] | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Solve the tasks of a file with MODEL, and say how accuracy grows with compute.

    Each line of TASKS.jsonl has a prompt, its answer, and for multiple choice the choices. DIR gets every
    trace (traces.jsonl, traces.html) and the figures (results.json, table.txt, accuracy.svg). The same
    command given again goes on where it was interrupted. MODEL is a folder, a GGUF file, a model on the hub,
    an adapter, BASE+ADAPTER, or a merge recipe (.yaml).

    \b
    Examples:
      mergelab solve model tasks.jsonl --method vote --samples 16 --out voted
      mergelab solve model tasks.jsonl --method best-of-n --verifier logprob --verifier entropy --out best
      mergelab solve model tasks.jsonl --method weighted-vote --verifier probe:blocks.3.resid_post \\
          --verifier random:blocks.3.resid_post --fit-on other.jsonl --out judged
      mergelab solve model tasks.jsonl --method force --think-min 64 --samples 4 --prices 15,60 --out forced
    """
    from mergelab.cli.options import configure_jax, model_mesh
    from mergelab.decoding import Prices, Thinking, sampler_from_options
    from mergelab.errors import quoted
    from mergelab.reasoning import solve

    if not think_end:
        raise click.UsageError("--think-end is empty; give the text that ends thinking, such as '</think>'")
    step = step.replace("\\n", "\n").replace("\\t", "\t")
    if not step:
        raise click.UsageError("--step is empty; give the text that ends a step, such as '\\n'")
    if any(not text for text in options["stops"]):
        raise click.UsageError(f"--stop {quoted('')} is empty; give the text that ends a trace")
    budget = options["budget"]
    thinking = None
    if method == "force":
        least = budget // 2 if think_min is None else think_min
        if think_max is not None and think_max < least:
            raise click.UsageError(f"--think-max {think_max} is less than --think-min {least}; exchange them")
        thinking = Thinking(think_end, least, think_max, think_more)
    elif think_min is not None or think_max is not None:
        raise click.UsageError("--think-min and --think-max are of --method force: add it, or omit them")
    configure_jax()
    with StageBar(quiet=as_json) as bar:
        found = solve(
            model,
            tasks=tasks,
            out=out,
            method=method,
            verifiers=verifiers,
            thinking=thinking,
            sampler=sampler_from_options(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p),
            step=step,
            prices=None if prices is None else Prices(*prices),
            mesh=None if mesh is None else model_mesh(mesh),
            note=warn,
            progress=bar.show,
            **options,
        )
    print_result(lambda: dict(found.results), found.table, as_json=as_json)
