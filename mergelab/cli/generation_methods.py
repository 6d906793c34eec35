"""What `mergelab generate` does with one prompt: samples, search, a draft, thinking, steering, watching."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mergelab.cli.decoding_options import ClampedLatent, Trigger
    from mergelab.decoding import Completion, Monitor, Sampler
    from mergelab.models.model import Model
    from mergelab.models.sites import Edit
    from mergelab.sae.sae import SAE
    from mergelab.text.tokenizer import Tokenizer

__all__ = ["check_draft", "continue_by_method", "with_token_sets"]


def with_token_sets(
    sampler: Sampler, tokenizer: Tokenizer | None, vocab_size: int, options: Mapping[str, Any]
) -> Sampler:
    """The sampler with `--promote` and `--ban` before its other transforms.

    Raises:
        UsageError: there is no tokenizer.
        DecodingError: a text has no tokens.
    """
    import click

    from mergelab.decoding import Sampler, ban_texts_of, chain, promote_texts

    if not options["promote"] and not options["ban"]:
        return sampler
    if tokenizer is None:
        raise click.UsageError("--promote and --ban need a tokenizer; the model has none")
    first: list[Any] = []
    if options["promote"]:
        strengths: dict[str, float] = {}
        for text, strength in options["promote"]:
            strengths[text] = strengths.get(text, 0.0) + strength
        first.append(promote_texts(tokenizer, strengths))
    if options["ban"]:
        first.append(ban_texts_of(tokenizer, options["ban"], vocab_size))
    return Sampler(chain(*first, *sampler.transforms.transforms), sampler.random)


def check_draft(path: Path, model: Model, tokenizer: Tokenizer | None, draft: Path) -> int | None:
    """How many tokens a draft shares with the model, for `speculate`; before any weight is read.

    Returns:
        None where the vocabularies are of one size.

    Raises:
        DecodingError: its tokens are others.
    """
    from mergelab.checkpoints.companions import has_companion
    from mergelab.cli.options import read_model
    from mergelab.errors import DecodingError
    from mergelab.text.tokenizer import load_tokenizer

    ours, theirs = model.config.vocab_size, read_model(draft).config.vocab_size
    sizes = f"{draft}: the draft has a vocabulary of {theirs} tokens and {path} one of {ours}"
    if tokenizer is None or not has_companion(draft, "tokenizer.json"):
        if ours != theirs:
            raise DecodingError(
                f"{sizes}, and there are no two tokenizers that say which tokens they share; give a draft "
                "that has the model's own."
            )
        return None
    words, others = (
        one.backend.get_vocab(with_added_tokens=True) for one in (tokenizer, load_tokenizer(draft))
    )
    apart = sorted(word for word in words.keys() | others.keys() if words.get(word) != others.get(word))
    if apart:
        raise DecodingError(
            f"{draft}: {len(apart)} tokens have other ids than in {path}, such as {apart[0]!r}; give a draft "
            "that has the model's own vocabulary."
        )
    if ours == theirs:
        return None
    shared = max(words.values(), default=-1) + 1
    if not 0 < shared <= min(ours, theirs):
        raise DecodingError(
            f"{sizes}, fewer than the {shared} of their tokenizer; give a draft that has the model's own."
        )
    return shared


def continue_by_method(
    path: Path,
    model: Model,
    params: Any,
    tokenizer: Tokenizer | None,
    ids: list[int],
    *,
    ends: Sequence[int],
    options: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """What is printed as JSON: the text, or all of them.

    Args:
        path: where the model lies.
        model: a decoder.
        params: its parameters.
        tokenizer: its tokenizer, or None.
        ids: the prompt.
        ends: tokens that end a text.
        options: those of the command.
        settings: `max_new_tokens`, `sampler` and `key`.

    Raises:
        MergelabError: a file, an SAE or a latent that is not there, or does not fit the model.
    """
    edits = _edits(path, model, options["steer"], options["clamps"])
    monitor, sites, names = _monitor(path, model, options["triggers"])
    shared = {**settings, "edit": edits or None}
    if options["beams"] is not None:
        return _beams(model, params, tokenizer, ids, ends, options, shared)
    if options["draft"] is not None:
        found, told = _drafted(model, params, tokenizer, ids, ends, options, shared)
    else:
        told: dict[str, Any] = {}
        found = _completions(
            model, params, tokenizer, ids, ends, options, {**shared, "monitor": monitor, "capture": sites}
        )
    entries = [_entry(one, names, log_probability=options["samples"] is not None) for one in found]
    if tokenizer is None:
        entries = [{**entry, "text": None} for entry in entries]
    return {"samples": entries, **told} if options["samples"] is not None else {**entries[0], **told}


def _entry(one: Completion, names: Sequence[str], *, log_probability: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {"token_ids": list(one.token_ids), "text": one.text}
    if log_probability:
        entry["log_probability"] = one.log_probability
    entry["stop"] = "latent" if one.stop == "monitor" else one.stop
    if names:
        columns = zip(*one.readings, strict=True) if one.readings else [()] * len(names)
        entry["latents"] = {name: list(column) for name, column in zip(names, columns, strict=True)}
    return entry


def _completions(
    model: Model,
    params: Any,
    tokenizer: Tokenizer | None,
    ids: list[int],
    ends: Sequence[int],
    options: Mapping[str, Any],
    shared: dict[str, Any],
) -> list[Completion]:
    """Continuations token by token, with budget forcing where it is asked for."""
    import click

    from mergelab.decoding import Thinking, complete, complete_thinking

    samples = options["samples"] or 1
    shared = {**shared, "samples": samples, "log_probs": options["samples"] is not None}
    if tokenizer is None:
        if options["think_end"] is not None:
            raise click.UsageError("--think-end needs a tokenizer to read what was generated; there is none")
        return _without_text(model, params, ids, ends, shared)
    shared |= {"stop_strings": options["stops"], "end_ids": ends}
    if options["think_end"] is None:
        return complete(model, params, tokenizer, [ids], **shared)
    thinking = Thinking(
        options["think_end"], options["think_min"] or 0, options["think_max"], options["think_more"] or ""
    )
    return complete_thinking(model, params, tokenizer, [ids], thinking, **shared)


def _without_text(
    model: Model, params: Any, ids: list[int], ends: Sequence[int], shared: dict[str, Any]
) -> list[Completion]:
    import numpy as np

    from mergelab.decoding import Completion, generate, stop_at

    monitor = shared.pop("monitor")
    found = generate(
        model, params, np.asarray([ids], np.int32), stop=stop_at(ends, monitor=monitor), **shared
    )
    rows = []
    for number, row in enumerate(found.rows()):
        total = None if found.log_probs is None else float(np.asarray(found.log_probs[number]).sum())
        read: tuple[tuple[float, ...], ...] = ()
        stop = "token" if found.finished[number] else "length"
        if monitor is not None and found.readings is not None:
            read = tuple(map(tuple, np.asarray(found.readings)[number, : len(row)].tolist()))
            over = (np.asarray(read[-1], np.float32) > np.asarray(monitor.above)).any()
            stop = "monitor" if over else stop
        rows.append(Completion(tuple(row), "", stop, total, read))
    return rows


def _drafted(
    model: Model,
    params: Any,
    tokenizer: Tokenizer | None,
    ids: list[int],
    ends: Sequence[int],
    options: Mapping[str, Any],
    shared: Mapping[str, Any],
) -> tuple[list[Completion], dict[str, Any]]:
    """Continuations with a draft, and how many of its tokens were kept."""
    from dataclasses import replace

    import numpy as np

    from mergelab.cli.options import load_either
    from mergelab.decoding import Completion, speculate, stop_at
    from mergelab.decoding.completion import at_stop_string, new_text

    draft, draft_params = load_either(options["draft"], options["mesh"], options["dtype"])
    done = speculate(
        model,
        params,
        draft,
        draft_params,
        np.asarray([ids], np.int32),
        stop=stop_at(ends),
        samples=options["samples"] or 1,
        log_probs=True,
        shared=options["shared"],
        **shared,
    )
    rows = []
    for number, row in enumerate(done.generated.rows()):
        stop = "token" if done.generated.finished[number] else "length"
        one = Completion(tuple(row), "" if tokenizer is None else new_text(tokenizer, ids, row), stop)
        if tokenizer is not None:
            one = at_stop_string(tokenizer, ids, row, options["stops"]) or one
        kept = np.asarray(done.generated.log_probs)[number, : len(one.token_ids)]
        rows.append(replace(one, log_probability=float(kept.astype(np.float64).sum())))
    counts = {"passes": int(done.rounds.sum()), "accepted": int(done.accepted.sum())}
    return rows, {"draft": counts}


def _beams(
    model: Model,
    params: Any,
    tokenizer: Tokenizer | None,
    ids: list[int],
    ends: Sequence[int],
    options: Mapping[str, Any],
    shared: Mapping[str, Any],
) -> dict[str, Any]:
    """The best continuation of a beam search, and all of them as `beams`."""
    import numpy as np

    from mergelab.decoding import beam_search, stop_at
    from mergelab.decoding.completion import at_stop_string, new_text

    found = beam_search(
        model,
        params,
        np.asarray([ids], np.int32),
        beams=options["beams"],
        max_new_tokens=shared["max_new_tokens"],
        transforms=shared["sampler"].transforms,
        stop=stop_at(ends),
        edit=shared["edit"],
    )
    entries = []
    for number, row in enumerate(found.rows()):
        stop = "token" if found.finished[0, number] else "length"
        text = None if tokenizer is None else new_text(tokenizer, ids, row)
        cut = None if tokenizer is None else at_stop_string(tokenizer, ids, row, options["stops"])
        entries.append(
            {
                "token_ids": row if cut is None else list(cut.token_ids),
                "text": text if cut is None else cut.text,
                "stop": stop if cut is None else cut.stop,
                "log_probability": float(found.log_probs[0, number]),
                "score": float(found.scores[0, number]),
            }
        )
    best = {name: entries[0][name] for name in ("token_ids", "text", "stop")}
    return {**best, "beams": entries}


def _edits(
    path: Path, model: Model, steers: Sequence[tuple[Path, float]], clamps: Sequence[ClampedLatent]
) -> dict[str, Edit]:
    """The edits of `--steer` and `--clamp-latent` by site, in that order.

    Raises:
        MergelabError: a file or an SAE is not there, or does not fit the model.
    """
    from jax.tree_util import Partial

    from mergelab.errors import SiteError
    from mergelab.interp import clamp, load_steering

    edits: dict[str, Edit] = {}

    def put(site: str, edit: Edit) -> None:
        edits[site] = Partial(_one_after_the_other, edits[site], edit) if site in edits else edit

    for file, strength in steers:
        for site, vector in load_steering(file).items():
            _check_site(model, site, vector.vector.shape[0], f"{file}: the control vector")
            put(site, vector.edit(strength))
    grouped: dict[Path, dict[int, float]] = {}
    for one in clamps:
        held = grouped.setdefault(one.sae, {})
        if one.latent in held:
            raise SiteError(f"{one.sae}: latent {one.latent} is held at two values; give it one.")
        held[one.latent] = one.value
    for place, values in grouped.items():
        sae, site = _sae_at(path, model, place)
        put(site, clamp(sae, list(values), list(values.values())))
    return edits


def _one_after_the_other(first: Any, second: Any, x: Any) -> Any:
    return second(first(x))


def _sae_at(path: Path, model: Model, place: Path) -> tuple[SAE, str]:
    """An SAE, and the site that it reads.

    Raises:
        SAEError: it belongs to another model, reads several sites, or does not say which.
        SiteError: the model has no such site.
    """
    from mergelab.cli.options import open_sae
    from mergelab.errors import SAEError
    from mergelab.sae.subject_model import check_subject_model

    sae = open_sae(place)
    reads = sae.config.reads
    if reads is None or len(reads) != 1:
        said = "does not say which site it reads" if reads is None else f"reads {len(reads)} sites"
        raise SAEError(f"{place}: the SAE {said}; give one that names one site of the model.")
    check_subject_model(sae, path)
    _check_site(model, reads[0], sae.d_in, f"{place}: the SAE")
    return sae, reads[0]


def _check_site(model: Model, site: str, width: int, what: str) -> None:
    from mergelab.errors import SiteError
    from mergelab.models.sites import match_sites

    (name,) = match_sites(model.sites(), site)
    wide = model.sites()[name][2:]
    if wide != (width,):
        raise SiteError(f"{what} is {width} wide, but {site} of this model is {list(wide)}; it is another's.")


def _monitor(
    path: Path, model: Model, triggers: Sequence[Trigger]
) -> tuple[Monitor | None, tuple[str, ...], list[str]]:
    """What `--stop-when` watches: the monitor, the sites it reads, and a name for each reading.

    Raises:
        MergelabError: an SAE is not there, does not fit the model, or has no such latent.
    """
    import jax.numpy as jnp
    import numpy as np
    from jax.tree_util import Partial

    from mergelab.decoding import Monitor
    from mergelab.errors import SAEError

    if not triggers:
        return None, (), []
    reads, names, above = [], [], []
    for one in triggers:
        sae, site = _sae_at(path, model, one.sae)
        if beyond := [latent for latent in one.latents if latent >= sae.n_latents]:
            raise SAEError(f"{one.sae}: latent {beyond[0]} does not exist: the SAE has {sae.n_latents}.")
        reads.append((site, Partial(_latents, sae, jnp.asarray(one.latents, jnp.int32))))
        names += [f"{one.sae}:{latent}" for latent in one.latents]
        above += [one.above] * len(one.latents)
    sites = tuple(dict.fromkeys(site for site, _ in reads))
    read = Partial(_side_by_side, {f"{n} {site}": one for n, (site, one) in enumerate(reads)})
    return Monitor(read, np.array(above, np.float32)), sites, names


def _latents(sae: SAE, latents: Any, x: Any) -> Any:
    import jax.numpy as jnp

    return sae.encode(x.astype(jnp.float32))[:, latents]


def _side_by_side(reads: Mapping[str, Any], captured: Mapping[str, Any]) -> Any:
    import jax.numpy as jnp

    ordered = sorted(reads.items(), key=lambda item: int(item[0].split(" ")[0]))
    return jnp.concatenate([read(captured[name.split(" ", 1)[1]]) for name, read in ordered], axis=1)
