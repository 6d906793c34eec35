"""`mergelab generate`: continue a prompt with a model folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergelab.cli.meshes import MESH

if TYPE_CHECKING:
    from mergelab.data.tokenizer import Tokenizer
    from mergelab.models.model import Model

__all__ = ["command"]


class _TokenIds(click.ParamType):
    name = "ids"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        parts = value.split(",") if isinstance(value, str) else value
        try:
            return [int(part) for part in parts]
        except ValueError:
            self.fail(f"{value!r} is not a list of token ids; write 1,2,3", param, ctx)


@click.command("generate")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--prompt", help="The text to continue.")
@click.option(
    "--token-ids", type=_TokenIds(), metavar="1,2,3", help="Tokens to continue, in place of a text."
)
@click.option("--max-new-tokens", type=click.IntRange(1), required=True, help="At most so many tokens.")
@click.option("--greedy", is_flag=True, help="Take the likeliest token each time; draw nothing.")
@click.option("--temperature", type=click.FloatRange(0), help="Divides the logits; 1 if not given.")
@click.option("--top-k", type=click.IntRange(1), help="Draw from the k likeliest tokens.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="Draw from this much probability.")
@click.option("--min-p", type=click.FloatRange(0, 1), help="Drop tokens below this part of the likeliest.")
@click.option("--repetition-penalty", type=click.FloatRange(0, min_open=True), help="Above 1: repeat less.")
@click.option("--seed", default=0, show_default=True, help="Seeds the draws.")
@click.option("--stop", "stops", multiple=True, metavar="TEXT", help="End before this text; repeatable.")
@click.option("--ignore-end", is_flag=True, help="Go on after the token that ends a text.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Dtype to compute in.")
@click.option("--mesh", type=MESH, metavar="AXES", help="Spread the model over devices: tensor=8.")
@click.option("--json", "as_json", is_flag=True, help="Print token ids and text as JSON.")
def command(
    path: Path,
    prompt: str | None,
    token_ids: list[int] | None,
    max_new_tokens: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Continue a prompt with the model in PATH; the prompt itself is not printed.

    Without --greedy every token is drawn from the model's distribution; the same seed gives the same text.

    \b
    Examples:
      mergelab generate model --prompt "Once upon a time" --max-new-tokens 50
      mergelab generate model --prompt "def add(a, b):" --max-new-tokens 30 --greedy --stop "\n\n"
      mergelab generate model --token-ids 1,415,2936 --max-new-tokens 8 --greedy --json
      mergelab generate model --prompt "Dear" --max-new-tokens 99 --temperature 0.8 --min-p 0.05 --seed 7
    """
    if (prompt is None) == (token_ids is None):
        raise click.UsageError("say what to continue: either --prompt TEXT or --token-ids 1,2,3")
    drawing = ("temperature", "top_k", "top_p", "min_p")
    if options["greedy"] and (given := [name for name in drawing if options[name] is not None]):
        raise click.UsageError(f"--greedy draws nothing: leave --{given[0].replace('_', '-')} away")

    from mergelab.cli.runtime import configure_jax
    from mergelab.data.tokenizer import load_tokenizer
    from mergelab.models.load import load_model

    configure_jax()
    tokenizer = load_tokenizer(path) if prompt is not None or (path / "tokenizer.json").is_file() else None
    ids = token_ids if tokenizer is None or prompt is None else tokenizer.encode(prompt)
    if options["stops"] and tokenizer is None:
        raise click.UsageError(f"--stop needs a tokenizer to read what was generated; {path} has none")
    model, params = load_model(path, mesh=_mesh(options["mesh"]), dtype=options["dtype"])
    generated, finished = _generate(model, params, tokenizer, ids or [], max_new_tokens, path, options)
    text = None if tokenizer is None else tokenizer.decode(generated)
    stopped = None
    if text is not None:
        from mergelab.decoding import cut_at_strings

        text, stopped = cut_at_strings(text, options["stops"])
    if as_json:
        result = {
            "token_ids": generated,
            "text": text,
            "finished": finished or stopped is not None,
            "prompt_token_ids": ids,
        }
        click.echo(json.dumps(result))
    else:
        click.echo(",".join(map(str, generated)) if text is None else text)


def _mesh(sizes: dict[str, int] | None) -> Any:
    if sizes is None:
        return None
    from mergelab.sharding import make_mesh

    return make_mesh(sizes)


def _generate(
    model: Model,
    params: Any,
    tokenizer: Tokenizer | None,
    ids: Sequence[int],
    max_new_tokens: int,
    path: Path,
    options: dict[str, Any],
) -> tuple[list[int], bool]:
    """The new tokens of one prompt, and whether a token that ends a text ended them."""
    from mergelab.decoding import generate, pad_prompts, sampler_from_options, stop_at

    ends = () if options["ignore_end"] else _end_ids(tokenizer, model, path)
    temperature = 1.0 if options["temperature"] is None else options["temperature"]
    sampler = sampler_from_options(
        temperature=None if options["greedy"] else temperature,
        top_k=options["top_k"],
        top_p=options["top_p"],
        min_p=options["min_p"],
        repetition_penalty=options["repetition_penalty"],
    )
    tokens, mask = pad_prompts([ids])
    found = generate(
        model,
        params,
        tokens,
        mask,
        max_new_tokens=max_new_tokens,
        sampler=sampler,
        key=options["seed"],
        stop=stop_at(ends),
    )
    return found.rows()[0], bool(found.finished[0])


def _end_ids(tokenizer: Tokenizer | None, model: Model, path: Path) -> tuple[int, ...]:
    """The tokens that end a text, from the tokenizer's folder or, without one, from the configs."""
    if tokenizer is not None:
        return tokenizer.end_ids
    from mergelab.checkpoints.json_data import read_json_object

    file = path / "generation_config.json"
    declared = read_json_object(file).get("eos_token_id") if file.is_file() else None
    declared = model.hf_config.get("eos_token_id") if declared is None else declared
    if declared is None:
        return ()
    return tuple(declared) if isinstance(declared, list) else (int(declared),)
