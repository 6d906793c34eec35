"""The model that an SAE belongs to: opened for an evaluation, refused where it is another one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergelab.activations.kept import DEFAULT_RULE, TokenRule
from mergelab.activations.model_activations import DEFAULT_CONTEXT, ModelActivations, open_model_activations
from mergelab.checkpoints.folder import weights_sha256
from mergelab.checkpoints.locations import local_path
from mergelab.errors import SAEError
from mergelab.models.residual_stream import norms_outputs
from mergelab.models.streamed import Streaming
from mergelab.sae.belonging import warn_where_foreign
from mergelab.sae.formats.hook_names import site_of
from mergelab.sae.sae import SAE, at_sites
from mergelab.text.corpus import TextOptions
from mergelab.text.tokenizer import load_tokenizer

__all__ = [
    "check_modules",
    "check_reads",
    "check_subject_model",
    "check_target",
    "judging_rule",
    "open_subject_model",
    "trained_context",
    "trained_text",
]


def check_subject_model(sae: SAE, model: str | Path, *, any_model: bool = False) -> bool:
    """Whether the folder holds the very weights whose activations the SAE was trained on.

    Args:
        sae: SAE whose metadata has `model_hash`, the digest of its model's weights, where that is known.
        model: a model folder.
        any_model: accept other weights.

    Returns:
        False where the metadata has no digest, or other weights were accepted.

    Raises:
        SAEError: the weights are others.
        CheckpointError: the folder holds no weights.
    """
    recorded = sae.config.metadata.get("model_hash")
    if recorded is None:
        return False
    found = weights_sha256(model)
    if found != recorded and not any_model:
        raise SAEError(
            f"{model}: its weights have SHA-256 {found[:12]}..., but the SAE belongs to a model with "
            f"{recorded[:12]}...; give that model, or say that any model will do (any_model, --any-model)."
        )
    return found == recorded


def open_subject_model(
    sae: SAE,
    model: str | Path,
    texts: str | Path | Sequence[str | Path],
    *,
    site: str | None = None,
    target_site: str | None = None,
    length: int | None = None,
    contexts: int | None = None,
    any_model: bool = False,
    mesh: Any = None,
    rule: TokenRule | None = None,
    text: Mapping[str, Any] | None = None,
    streamed: Streaming | None = None,
) -> ModelActivations:
    """Activations of the SAE's model on text files, at the site it reads and, of a transcoder, the one
    it writes as far as that is known.

    Of an SAE that does not say whose weights it belongs to, one batch is read, and a warning given where the
    SAE does not fit (`mergelab.sae.belonging`), unless any model will do.

    Args:
        sae: SAE that will read them. Where it does not say its sites itself, give it to evaluations as
            `mergelab.sae.sae.at_sites(sae, site, target_site)`.
        model: a Hugging Face folder with its tokenizer.
        texts: what `mergelab.text.corpus.documents` takes: files, globs, folders, data sets, URLs; or one.
        site: site that the SAE reads, such as `blocks.8.resid_post`; the one it says if None.
        target_site: site that a transcoder writes; the one it says if None.
        length: tokens in a context; if None, what the SAE was trained with, or else 64, and never
            more than the model has positions.
        contexts: largest number of contexts; all of the texts if None.
        any_model: accept other weights than the recorded ones.
        mesh: devices to spread the model over.
        rule: which tokens count; `judging_rule` of the SAE if None.
        text: options of `mergelab.text.corpus.TextOptions` that are other than those of the SAE's training.
        streamed: how activations wait, where the weights stay in their files; None to load them.

    Raises:
        SAEError: the weights or the widths are not the SAE's, no site is known, or the text is short.
        TokenError: `length` is more than the model's positions, or a token is beyond its vocabulary.
        SiteError: the model has no such site.
        CheckpointError: the model cannot be read.
    """
    known = check_subject_model(sae, model, any_model=any_model)
    _check_one_site(sae)
    sae = at_sites(sae, site, target_site)
    reads, writes = sae.config.reads, sae.config.writes
    if reads is None:
        metadata = sae.config.metadata
        hook = metadata.get("hook_name", metadata.get("hf_hook_point_in", metadata.get("hookpoint")))
        named = f" ({hook!r} is the name of none here)" if isinstance(hook, str) else ""
        raise SAEError(f"the SAE does not say which site it reads{named}; name it (site, --site).")
    sites = [reads[0]]
    if not sae.is_autoencoder and writes is not None:
        sites.append(writes[0])
    source = open_model_activations(
        model,
        sites,
        texts,
        length=length,
        default=trained_context(sae),
        mesh=mesh,
        rule=judging_rule(sae) if rule is None else rule,
        text=_up_to(contexts, length or trained_context(sae), trained_text(sae, text)),
        streamed=streamed,
    )
    source = source if contexts is None else source.contexts(slice(contexts))
    check_modules(sae, source)
    check_reads(sae, source)
    if len(sites) > 1:
        check_target(sae, source)
    if not (known or any_model or (len(sites) == 1 and not sae.is_autoencoder)):
        warn_where_foreign(sae, source, bos=lambda: load_tokenizer(local_path(model)).id_of("bos"))
    return source


def _up_to(contexts: int | None, length: int, text: TextOptions) -> TextOptions:
    """The options with which no more text is read than so many contexts hold."""
    if contexts is None:
        return text
    tokens = contexts * length
    return replace(text, tokens=tokens if text.tokens is None else min(tokens, text.tokens))


def judging_rule(*saes: SAE) -> TokenRule:
    """The rule for tokens by which SAEs are judged where nobody names one: the same for all of them.

    A token counts if it does by the rule of every one's training, where that is recorded, and by the default:
    what one of them was trained on and another was not would decide between them.
    """
    return DEFAULT_RULE.strictest(
        *(TokenRule.of_facts(one.config.metadata.get("token_rule")) for one in saes)
    )


def trained_context(sae: SAE) -> int:
    """The tokens in a context of the SAE's training, where its metadata says so; else 64."""
    metadata = sae.config.metadata
    for name in ("context", "context_size"):
        found = metadata.get(name)
        if isinstance(found, int) and not isinstance(found, bool) and found >= 2:
            return found
    return DEFAULT_CONTEXT


def trained_text(sae: SAE, given: Mapping[str, Any] | None = None) -> TextOptions:
    """How texts became contexts in the SAE's training, as far as its metadata says; what is given wins."""
    metadata = sae.config.metadata
    found: dict[str, Any] = {}
    if isinstance(metadata.get("prepend_bos"), bool):
        found["bos"] = metadata["prepend_bos"]
    for name, known in (("packing", ("packed", "documents")), ("roles", ("all", "assistant"))):
        if metadata.get(name) in known:
            found[name] = metadata[name]
    return TextOptions(**{**found, **(given or {})})


def check_modules(sae: SAE, source: ModelActivations) -> None:
    """Checks that a module by which another library named a site has that site as its output here.

    Where blocks normalize what they add to the stream, a site holds what is added, not the module's output.

    Raises:
        SAEError: it has not.
    """
    if not norms_outputs(source.model):
        return
    for key in ("hookpoint", "hf_hook_point_in", "hf_hook_point_out"):
        said = sae.config.metadata.get(key)
        site = site_of(said)
        if not isinstance(said, str) or site is None or "layernorm" in said:
            continue
        if site in source.sites and site.endswith((".attn.out", ".mlp.out")):
            raise SAEError(
                f"the SAE is of the output of the module {said!r}, which this model normalizes "
                f"before it adds it to the stream, so it is not the site {site!r}; no site holds it."
            )


def _check_one_site(sae: SAE) -> None:
    if sae.config.sites != 1:
        raise SAEError(
            f"the SAE reads {sae.config.sites} activations side by side, but a model is read "
            "at one site; judge it on stored activations (--data)."
        )


def check_reads(sae: SAE, source: ModelActivations) -> None:
    """Checks that the SAE reads the source's first site.

    The site it says it reads decides; the width is compared too, as an SAE need not say its site.

    Raises:
        SAEError: it reads another site or width, or several sites.
    """
    _check_one_site(sae)
    reads = sae.config.reads
    if reads is not None and reads[0] != source.sites[0]:
        raise SAEError(
            f"the SAE reads {reads[0]!r}, but the activations are of {source.sites[0]!r}; take the "
            "site it was trained on, or say that it is to read this one (mergelab.sae.sae.at_sites)."
        )
    width = source.widths[0]
    if sae.d_in != width:
        raise SAEError(
            f"the SAE reads activations {sae.d_in} wide, but site {source.sites[0]!r} is "
            f"{width} wide; take the site it was trained on."
        )


def check_target(sae: SAE, source: ModelActivations) -> str:
    """The site of the source whose activations the SAE reconstructs.

    The first for an autoencoder. For a transcoder the one it says it writes, and where it does not say, the
    source's second.

    Raises:
        SAEError: the source lacks that site, its width is another, or it is not known.
    """
    check_reads(sae, source)
    sites = source.sites
    if sae.is_autoencoder:
        if not sae.target_known and len(sites) > 1:
            raise SAEError(
                f"the SAE does not say whether it writes {sites[0]!r}, which it reads, or "
                f"{sites[1]!r}; say it (mergelab.sae.sae.at_sites)."
            )
        return source.sites[0]
    writes = sae.config.writes
    if writes is None:
        if len(sites) != 2:
            raise SAEError(
                f"the SAE is a transcoder and does not say which site it writes, so {sites[0]!r}, "
                "which it reads, is not what it is to be compared with; name it (target_site, --target-site)."
            )
        target = sites[1]
    else:
        target = writes[0]
    if target not in sites:
        raise SAEError(
            f"the SAE is a transcoder and writes {target!r}, but the activations are of "
            f"{', '.join(sites)}; open them with that site too (target_site, --target-site)."
        )
    width = source.widths[sites.index(target)]
    if sae.d_out != width:
        raise SAEError(
            f"the SAE writes activations {sae.d_out} wide, but site {target!r} is {width} "
            "wide; take the site it was trained to write."
        )
    return target
