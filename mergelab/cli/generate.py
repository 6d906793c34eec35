"""`mergelab generate`: continue a prompt with a model folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergelab.cli.decoding_options import check_methods, decoding_options, uses_methods
from mergelab.cli.joined import joins_run
from mergelab.cli.numbers import SEED, Number, WholeNumber
from mergelab.cli.options import MESH, load_either, read_model
from mergelab.errors import quoted
from mergelab.processes.joining import current_run

if TYPE_CHECKING:
    from mergelab.decoding import Sampler
    from mergelab.models.model import Model
    from mergelab.text.tokenizer import Tokenizer

__all__ = ["command"]


class _TokenIds(click.ParamType):
    name = "ids"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        parts = value.split(",") if isinstance(value, str) else value
        try:
            # Ids are 32-bit integers; how many the model has is known only when it is open.
            if all(len(str(part)) < 12 and -(2**31) <= int(part) < 2**31 for part in parts):
                return [int(part) for part in parts]
            raise ValueError
        except ValueError:
            self.fail(f"{quoted(value)} is not a list of token ids; write 1,2,3", param, ctx)


@click.command("generate")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--prompt", help="Text to continue, or with --chat a question to answer.")
@click.option(
    "--prompts",
    "prompt_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="File of prompts, one a line or .jsonl, each continued and printed as a line of JSON.",
)
@click.option("--batch", type=WholeNumber(1), help="Number of prompts of --prompts at a time (default: 16).")
@click.option("--chat", is_flag=True, help="Talk in the model's chat format; without --prompt, in turns.")
@click.option("--system", metavar="TEXT", help="Instruction at the beginning of a chat.")
@click.option(
    "--token-ids", type=_TokenIds(), metavar="1,2,3", help="Tokens to continue, in place of a text."
)
@click.option(
    "--max-new-tokens",
    type=WholeNumber(1),
    help="Maximum number of new tokens (default: 64; of an answer in a chat: 1024).",
)
@click.option("--greedy", is_flag=True, help="Pick the most likely token each time; nothing is sampled.")
@click.option("--temperature", type=Number(0), help="Divisor of the logits (default: 1).")
@click.option("--top-k", type=WholeNumber(1), help="Sample from the k most likely tokens.")
@click.option(
    "--top-p",
    type=Number(0, 1, min_open=True),
    help="Sample from the smallest set of tokens with this probability.",
)
@click.option("--min-p", type=Number(0, 1), help="Drop tokens below this fraction of the top probability.")
@click.option(
    "--repetition-penalty",
    type=Number(0, min_open=True),
    help="Values above 1 penalize tokens that have occurred.",
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Random seed.")
@click.option("--stop", "stops", multiple=True, metavar="TEXT", help="Text to stop before; repeatable.")
@click.option("--ignore-end", is_flag=True, help="Continue after the token that ends a text.")
@decoding_options
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Dtype of the computation."
)
@click.option(
    "--mesh", type=MESH, metavar="AXES", help="Mesh to spread the model and batches over: data=2,tensor=4."
)
@click.option("--json", "as_json", is_flag=True, help="Print token ids and text as JSON.")
@joins_run
def command(
    path: Path,
    prompt: str | None,
    prompt_file: Path | None,
    batch: int | None,
    token_ids: list[int] | None,
    chat: bool,
    system: str | None,
    max_new_tokens: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Continue a prompt with the model in PATH, or chat with it; the prompt itself is not printed.

    Without --greedy, every token is sampled from the model's distribution; the same seed gives the same
    text. With --chat, the prompt is a question in the model's own chat format, and the answer alone is
    printed while it is made; without a prompt, each line of the input is a turn of one conversation.
    --samples prints several continuations, --beams the best of a search; docs/decoding.md has a paragraph
    for each.

    \b
    Examples:
      mergelab generate model --chat --prompt "What is the capital of Japan?" --greedy
      mergelab generate model --chat --system "Answer in one sentence."
      mergelab generate model --prompt "Once upon a time" --max-new-tokens 50
      mergelab generate model --prompt "def add(a, b):" --max-new-tokens 30 --greedy --stop $'\\n\\n'
      mergelab generate model --prompts prompts.txt --batch 64 --mesh data=8 --greedy
      mergelab generate model --token-ids 1,415,2936 --max-new-tokens 8 --greedy --json
      mergelab generate model --prompt "Dear" --max-new-tokens 99 --temperature 0.8 --min-p 0.05 --seed 7
      mergelab generate model --chat --prompt "17 * 23?" --samples 16 --json
      mergelab generate model --chat --prompt "Why?" --think-end "</think>" --think-min 64 --think-more Wait
    """
    if chat and token_ids is not None:
        raise click.UsageError("--chat takes a text: give --prompt TEXT, and omit --token-ids")
    if system is not None and not chat:
        raise click.UsageError("--system is the instruction of a chat: add --chat")
    if prompt_file is not None and (prompt is not None or token_ids is not None):
        raise click.UsageError("--prompts is what to continue: omit --prompt and --token-ids")
    if batch is not None and prompt_file is None:
        raise click.UsageError("--batch is of a file of prompts: add --prompts FILE")
    if not chat and prompt_file is None and (prompt is None) == (token_ids is None):
        raise click.UsageError("give what to continue: either --prompt TEXT or --token-ids 1,2,3")
    drawing = ("temperature", "top_k", "top_p", "min_p")
    if options["greedy"] and (given := [name for name in drawing if options[name] is not None]):
        raise click.UsageError(f"--greedy does not sample: omit --{given[0].replace('_', '-')}")
    turns = chat and prompt is None and prompt_file is None
    if turns and (joined := current_run()) is not None and joined.processes > 1:
        raise click.UsageError(
            f"a conversation is held with one process, and this run has {joined.processes}: give "
            "--prompt TEXT or --prompts FILE, or start one process"
        )
    check_methods(options, turns=turns, file=prompt_file is not None)

    from mergelab.checkpoints.companions import has_companion
    from mergelab.checkpoints.locations import local_path
    from mergelab.cli.conversation import hint
    from mergelab.cli.options import configure_jax
    from mergelab.text.tokenizer import load_tokenizer

    configure_jax()
    path = local_path(path)
    texts = prompt is not None or prompt_file is not None or chat
    tokenizer = load_tokenizer(path) if texts or has_companion(path, "tokenizer.json") else None
    if options["stops"] and tokenizer is None:
        raise click.UsageError(f"--stop needs a tokenizer to read what was generated; {path} has none")
    if prompt_file is not None:
        assert tokenizer is not None
        _file(path, tokenizer, prompt_file, batch or 16, chat, system, max_new_tokens, options)
        return
    if chat:
        assert tokenizer is not None
        _chat(path, tokenizer, prompt, system, max_new_tokens, as_json, options)
        return
    if tokenizer is not None and prompt is not None and (words := hint(tokenizer, prompt)):
        click.echo(words, err=True)
    new = max_new_tokens or _NEW_TOKENS
    ids = token_ids if tokenizer is None or prompt is None else tokenizer.encode(prompt)
    if not ids:
        raise click.UsageError("the prompt is empty: it has no tokens to continue; give a text")
    if has_companion(path, "config.json"):  # before any weight is read
        _check_prompt(path, ids, new, from_text=prompt is not None)
    settings = _settings(path, tokenizer, options, new)
    ends = () if options["ignore_end"] or tokenizer is None else tokenizer.end_ids
    if uses_methods(options):
        found = _by_method(path, tokenizer, ids, ends, options, settings)
    else:
        model, params = _load(path, options, len(ids), ends, settings)
        if tokenizer is None and not options["ignore_end"]:
            ends = _end_ids(model, path)
        found = _continue(model, params, tokenizer, ids, ends, options["stops"], settings)
    _print(found, ids, tokenizer, as_json=as_json)


def _settings(
    path: Path, tokenizer: Tokenizer | None, options: Mapping[str, Any], max_new_tokens: int
) -> dict[str, Any]:
    """`max_new_tokens`, `sampler` and `key`, as `complete` takes them."""
    from mergelab.cli.generation_methods import with_token_sets

    sampler = _sampler(options)
    if options["promote"] or options["ban"]:
        sampler = with_token_sets(sampler, tokenizer, read_model(path).config.vocab_size, options)
    return {"max_new_tokens": max_new_tokens, "sampler": sampler, "key": options["seed"]}


def _by_method(
    path: Path,
    tokenizer: Tokenizer | None,
    ids: list[int],
    ends: Sequence[int],
    options: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Loads the model, and continues one prompt by the method that the options name."""
    from mergelab.checkpoints.locations import local_path
    from mergelab.cli.generation_methods import check_draft, continue_by_method

    if options["draft"] is not None:
        draft = local_path(options["draft"])
        shared = check_draft(path, read_model(path), tokenizer, draft)
        options = {**options, "draft": draft, "shared": shared}
    model, params = load_either(path, options["mesh"], options["dtype"])
    if tokenizer is None and not options["ignore_end"]:
        ends = _end_ids(model, path)
    return continue_by_method(
        path, model, params, tokenizer, ids, ends=ends, options=options, settings=settings
    )


def _print(
    found: Mapping[str, Any], ids: Sequence[int], tokenizer: Tokenizer | None, *, as_json: bool
) -> None:
    """Prints what was made of a prompt: as JSON, or its text; several are parted by a line `---`."""
    if as_json:
        click.echo(json.dumps({**found, "prompt_token_ids": list(ids)}))
        return
    for number, one in enumerate(found.get("samples", [found])):
        if number:
            click.echo("---")
        click.echo(",".join(map(str, one["token_ids"])) if tokenizer is None else one["text"])


_NEW_TOKENS = 64


def _chat(
    path: Path,
    tokenizer: Tokenizer,
    prompt: str | None,
    system: str | None,
    max_new_tokens: int | None,
    as_json: bool,
    options: Mapping[str, Any],
) -> None:
    """Answers the prompt, or turn after turn.

    Raises:
        ChatTemplateError: the model's template refuses the messages.
        DecodingError: question and answer are more tokens than the model has positions.
    """
    from mergelab.checkpoints.companions import has_companion
    from mergelab.cli.conversation import ANSWER_TOKENS, Chat
    from mergelab.text.chat import chat_ids, turn_end_ids

    if "default" not in tokenizer.chat_templates:
        raise click.UsageError(f"{path} has no chat template; omit --chat to continue the prompt as text")
    if prompt is not None and not prompt.strip():
        raise click.UsageError("the prompt is empty; ask something")
    messages = [{"role": "user", "content": prompt or "Hello"}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    ids = chat_ids(tokenizer, messages)  # before any weight is read
    if has_companion(path, "config.json"):
        _check_prompt(path, ids, max_new_tokens or 1, from_text=True)
    settings = _settings(path, tokenizer, options, max_new_tokens or ANSWER_TOKENS)
    ends = () if options["ignore_end"] else turn_end_ids(tokenizer)
    if uses_methods(options):
        room = read_model(path).config.max_length - len(ids)
        settings["max_new_tokens"] = min(settings["max_new_tokens"], room)
        found = _by_method(path, tokenizer, list(ids), ends, options, settings)
        _print(found, ids, tokenizer, as_json=as_json)
        return
    del settings["max_new_tokens"]
    model, params = _load(
        path,
        options,
        len(ids),
        ends,
        {"max_new_tokens": max_new_tokens or ANSWER_TOKENS, "turns": prompt is None, **settings},
    )
    chat = Chat(
        model,
        params,
        tokenizer,
        system=system,
        max_new_tokens=max_new_tokens,
        end_ids=ends,
        stops=options["stops"],
        settings=settings,
    )
    if prompt is None:
        chat.converse(as_json=as_json)
    else:
        chat.answer(prompt, as_json=as_json)


def _file(
    path: Path,
    tokenizer: Tokenizer,
    file: Path,
    batch: int,
    chat: bool,
    system: str | None,
    max_new_tokens: int | None,
    options: Mapping[str, Any],
) -> None:
    """Continues the prompts of a file, or answers them.

    Raises:
        MergelabError: the file holds no prompts.
        DecodingError: the longest prompt and its new tokens are more than the model has positions.
    """
    from mergelab.checkpoints.companions import has_companion
    from mergelab.cli.prompt_file import continuations, encoded_prompts
    from mergelab.text.chat import turn_end_ids

    if chat and "default" not in tokenizer.chat_templates:
        raise click.UsageError(f"{path} has no chat template; omit --chat to continue the prompts as text")
    prompts = encoded_prompts(file, tokenizer, chat=chat, system=system)
    new = max_new_tokens or _NEW_TOKENS
    if has_companion(path, "config.json"):  # before any weight is read
        _check_prompt(path, max((ids for _, ids in prompts), key=len), new, from_text=True)
    ends = () if options["ignore_end"] else turn_end_ids(tokenizer) if chat else tokenizer.end_ids
    settings = _settings(path, tokenizer, options, new)
    model, params = load_either(path, options["mesh"], options["dtype"])
    for line in continuations(
        model,
        params,
        tokenizer,
        prompts,
        batch=batch,
        stops=options["stops"],
        ends=ends,
        settings=settings,
    ):
        click.echo(line)


def _load(
    path: Path, options: Mapping[str, Any], length: int, ends: Sequence[int], settings: Mapping[str, Any]
) -> tuple[Model, Any]:
    """The model and its parameters; what a prompt of this length will run is compiled meanwhile."""
    from mergelab.checkpoints.folder import open_checkpoint
    from mergelab.decoding.rehearsal import rehearsing
    from mergelab.decoding.stop import stop_at
    from mergelab.models.load import load_model, parameter_shapes
    from mergelab.models.orbax import is_orbax_model

    if options["mesh"] is not None or is_orbax_model(path):
        return load_either(path, options["mesh"], options["dtype"])
    checkpoint = open_checkpoint(path)
    model, shapes = parameter_shapes(checkpoint, dtype=options["dtype"])
    room = max(1, model.config.max_length - length)
    settings = {**settings, "max_new_tokens": min(settings["max_new_tokens"], room)}
    with rehearsing(model, shapes, length, stop=stop_at(ends), **settings):
        return load_model(checkpoint, dtype=options["dtype"])


def _check_prompt(path: Path, ids: Sequence[int], max_new_tokens: int, *, from_text: bool) -> None:
    """Refuses tokens the model has no embedding for, and more than it is made for.

    Raises:
        DecodingError: prompt and new tokens are more than the positions.
        TokenError: an id is beyond the vocabulary.
    """
    import numpy as np

    from mergelab.errors import DecodingError
    from mergelab.models.token_checks import check_ids

    model = read_model(path)
    place = str(path / "tokenizer.json") if from_text else "--token-ids"
    size = model.config.vocab_size
    # Whatever is beyond int64 is beyond any vocabulary.
    bounded = [max(min(token, 2**62), -(2**62)) for token in ids]
    check_ids(np.asarray(bounded, np.int64), size, "the model's vocabulary", place)
    room = model.config.max_length
    total = len(ids) + max_new_tokens
    if total > room:
        raise DecodingError(
            f"{path}: a prompt of {len(ids)} tokens and {max_new_tokens} new ones are {total} tokens, more "
            f"than the model's {room} positions; shorten the prompt or ask for fewer (--max-new-tokens)."
        )


def _sampler(options: Mapping[str, Any]) -> Sampler:
    from mergelab.decoding import sampler_from_options

    temperature = 1.0 if options["temperature"] is None else options["temperature"]
    return sampler_from_options(
        temperature=None if options["greedy"] else temperature,
        top_k=options["top_k"],
        top_p=options["top_p"],
        min_p=options["min_p"],
        repetition_penalty=options["repetition_penalty"],
    )


def _continue(
    model: Model,
    params: Any,
    tokenizer: Tokenizer | None,
    ids: Sequence[int],
    ends: Sequence[int],
    stops: Sequence[str],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """New tokens, their text (None without a tokenizer), and why they end: `token`, `string` or `length`."""
    from mergelab.decoding import complete, generate, pad_prompts, stop_at

    if tokenizer is not None:
        (found,) = complete(model, params, tokenizer, [ids], stop_strings=stops, end_ids=ends, **settings)
        return {"token_ids": list(found.token_ids), "text": found.text, "stop": found.stop}
    tokens, mask = pad_prompts([ids])
    generated = generate(model, params, tokens, mask, stop=stop_at(ends), **settings)
    stop = "token" if generated.finished[0] else "length"
    return {"token_ids": generated.rows()[0], "text": None, "stop": stop}


def _end_ids(model: Model, path: Path) -> tuple[int, ...]:
    """The tokens that end a text by the configs, of a model without a tokenizer."""
    from mergelab.checkpoints.companions import companion_json
    from mergelab.text.tokenizer import token_ids

    declared = companion_json(path, "generation_config.json").get("eos_token_id")
    declared = model.hf_config.get("eos_token_id") if declared is None else declared
    if declared is None:
        return ()
    return token_ids(declared, f"{path}: eos_token_id")
