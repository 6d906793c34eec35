"""One call for the scores of an SAE: on an array of activations, or in its model on a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from mergelab.activations.kept import TokenRule, median_norm, row_norms
from mergelab.activations.left_out import LeftOut
from mergelab.activations.model_activations import ModelActivations
from mergelab.checkpoints.locations import local_path
from mergelab.errors import NonFiniteError, SAEError, did_you_mean
from mergelab.models.model import Model, Params
from mergelab.models.token_checks import check_tokens, window_length
from mergelab.sae.evaluation.label_files import LabeledText, labeled_texts, read_labeled_texts
from mergelab.sae.evaluation.metric import Evidence, Options, Score
from mergelab.sae.evaluation.own_labels import label_contexts, text_file
from mergelab.sae.evaluation.reconstruction import Reconstruction, evaluate_reconstruction
from mergelab.sae.evaluation.scorecard import METRICS, Scorecard, scorecard
from mergelab.sae.evaluation.settings import settings_of
from mergelab.sae.formats.detect import load_sae
from mergelab.sae.sae import SAE, at_sites
from mergelab.sae.subject_model import (
    check_modules,
    check_reads,
    check_target,
    judging_rule,
    open_subject_model,
    trained_context,
    trained_text,
)
from mergelab.text.contexts import text_contexts
from mergelab.text.corpus import documents, documents_of_texts
from mergelab.text.tokenizer import Tokenizer, load_tokenizer

__all__ = ["evaluate_sae"]

_ROWS = 4096

Rows = Float[np.ndarray, "rows width"] | Float[Array, "rows width"]

Labels = str | Path | Sequence[Any] | Mapping[str, np.ndarray] | None


def evaluate_sae(
    sae: SAE | str | Path,
    on: Rows | Model | ModelActivations | str | Path,
    params: Params | None = None,
    tokenizer: Tokenizer | None = None,
    text: str | Path | Sequence[str | Path] | None = None,
    *,
    targets: Rows | None = None,
    site: str | None = None,
    target_site: str | None = None,
    length: int | None = None,
    rule: TokenRule | None = None,
    labels: Labels = None,
    **options: Any,
) -> Scorecard:
    """Scores an SAE, each score with its unit and what to compare it with.

        evaluate_sae(sae, activations).values()["reconstruction.nmse"]
        evaluate_sae(sae, model, params, tokenizer, text, metrics=["downstream"])
        evaluate_sae("run/final", "path/to/model", text=Path("held-out.txt"))
        evaluate_sae("run/final", "path/to/model", labels=Path("reviews.csv"), metrics=["labels"])

    Args:
        sae: the SAE, or its folder.
        on: activations `[rows, d_in]`, for reconstruction and sparsity alone; or the subject model, for all
            evaluations: a model with `params`, `tokenizer` and `text`, its folder with `text`, or opened
            `ModelActivations`.
        params: parameters of the model.
        tokenizer: tokenizer of the model.
        text: texts the SAE was not trained on: strings, or `Path`s of files and folders (with a model's
            folder only those). The labeled texts if None.
        targets: rows beside the activations, `[rows, d_out]` that a transcoder reconstructs.
        site: site that the SAE reads, such as `blocks.8.resid_post`; by default the one it says.
        target_site: site that a transcoder writes; by default the one it says.
        length: tokens in a context; by default that of the SAE's training, or 64.
        rule: which tokens count, or of rows which are short enough; `judging_rule` of the SAE if None.
            Opened `ModelActivations` have their own.
        labels: labels of your own that are probed: a file, as `read_labeled_texts` reads it, what that or
            `labeled_texts` gives, or, where `text` is a list of strings, one label or one list of labels for
            each. Or answers for every token of opened `ModelActivations`, bool `[contexts, length]` by task.
        options: further settings where there is a model, fields of `mergelab.sae.evaluation.Options`
            (`metrics`, `seed`, ...) and resources of `Evidence` (`curve`, ...).

    Raises:
        SAEError: the SAE does not fit the activations or the model, its site is not known, the text is
            short, or labels do not fit the texts or are of one class.
        SiteError: the model has no such site.
    """
    sae = sae if isinstance(sae, SAE) else load_sae(sae)
    texts = [] if text is None else [text] if isinstance(text, str | Path) else list(text)
    if not isinstance(on, Model | ModelActivations | str | Path):
        if labels is not None or options:
            name = "labels" if labels is not None else next(iter(options))
            raise SAEError(f"{name!r} was given with activations; it needs the model they come from.")
        return _on_rows(sae, on, targets, judging_rule(sae) if rule is None else rule)
    records = _records(labels, texts)
    sae = at_sites(sae, site, target_site)
    if isinstance(on, ModelActivations):
        source = on
    elif not texts and records is None:
        raise SAEError("no text was given to evaluate on; give text= that the SAE was not trained on.")
    elif not isinstance(on, Model):
        files = [item for item in texts if isinstance(item, Path)]
        if len(files) < len(texts):
            raise SAEError(
                "with a model's folder, text is read from files; give Path objects, or a loaded model."
            )
        tokenizer = load_tokenizer(local_path(on)) if tokenizer is None and records else tokenizer
        source = _on_folder(sae, on, files, length, rule, records, tokenizer)
    elif params is None or tokenizer is None:
        raise SAEError(
            "a model was given without its params or tokenizer; give evaluate_sae(sae, model, params, "
            "tokenizer, text)."
        )
    else:
        rule = judging_rule(sae) if rule is None else rule
        told = [one.text for one in records or ()]
        source = _on_model(sae, on, params, tokenizer, texts or told, length, rule)
    if records is None:
        resources = {"labels": labels, **options}
    elif tokenizer is None:
        raise SAEError("labels of texts need the model's tokenizer; give it (tokenizer=).")
    else:
        size = length or (source.tokens.shape[1] if texts else trained_context(sae))
        labeled = label_contexts(tokenizer, records, size, trained_text(sae))
        source = source if texts or source is on else labeled.source(source)
        resources = {"own_labels": labeled, **options}
    return _scores_of(sae, source, resources)


def _records(labels: Any, texts: Sequence[str | Path]) -> list[LabeledText] | None:
    """Labeled texts that were given; None for none, and for answers by task."""
    if labels is None or isinstance(labels, Mapping):
        return None
    if isinstance(labels, str | Path):
        return read_labeled_texts(labels)
    given = list(labels)
    if given and all(isinstance(one, LabeledText) for one in given):
        return given
    strings = [one for one in texts if isinstance(one, str)]
    if len(strings) < len(texts):
        raise SAEError("a list of labels is of texts that are strings; of files, give a file with both.")
    return labeled_texts(strings, given)


def _on_folder(
    sae: SAE,
    model: str | Path,
    files: Sequence[Path],
    length: int | None,
    rule: TokenRule | None,
    records: list[LabeledText] | None,
    tokenizer: Tokenizer | None,
) -> ModelActivations:
    if files or records is None or tokenizer is None:
        return open_subject_model(sae, model, files, length=length, rule=rule)
    with text_file(records, tokenizer) as (file, options):
        packing = {"packing": options["packing"]}
        contexts = options["contexts"]
        return open_subject_model(sae, model, file, length=length, rule=rule, text=packing, contexts=contexts)


def _scores_of(sae: SAE, source: ModelActivations, given: Mapping[str, Any]) -> Scorecard:
    """The scorecard; what is given says how to run it, or is evidence of that name."""
    how = {field.name for field in fields(Options)}
    resources = {name: value for name, value in given.items() if name not in how}
    known = {name for metric in METRICS.values() for name in metric.needs} | {"curve", "mask_token"}
    for name in sorted(resources.keys() - known):
        # Evidence may have any name, but what is nearly the name of an option is meant for one.
        if meant := did_you_mean(name, sorted(how | known)):
            raise SAEError(f"{name!r} is no option of an evaluation{meant}.")
    return scorecard(
        sae, Evidence(source, resources), Options(**{k: v for k, v in given.items() if k in how})
    )


def _on_rows(sae: SAE, rows: Rows, targets: Rows | None, rule: TokenRule) -> Scorecard:
    """The figures that need no model."""
    arrays = [np.asarray(array, np.float32) for array in (rows, targets) if array is not None]
    for array in arrays:
        if array.ndim != 2:
            raise SAEError(f"activations have shape {list(array.shape)}; expected [rows, width].")
        if not len(array):
            raise SAEError("there are no activations to evaluate on; give at least one row.")
        finite = np.isfinite(array).all(axis=1)
        if not finite.all():
            raise NonFiniteError(
                f"row {int(np.argmin(finite))} of the activations is NaN or infinite; remove it"
            )
    if arrays[0].shape[1] != sae.d_in:
        raise SAEError(f"activations are {arrays[0].shape[1]} wide, but the SAE reads {sae.d_in}.")
    x, y = arrays[0], arrays[-1]
    kept = np.ones(len(x), bool)
    for array in arrays:
        norms = row_norms(array)
        kept &= ~(norms > rule.norm_limit(median_norm(norms)))
    every = _figures(sae, x, None if targets is None else y)
    found = every if kept.all() else _figures(sae, x[kept], None if targets is None else y[kept])
    scores = _scores(sae, found)
    if not kept.all():
        left_out = LeftOut()
        left_out.add(kept)
        said = f"rows that do not count: {left_out.sentence('row')}"
        scores["left_out"] = Score(1 - left_out.kept / left_out.rows, "", said)
        scores["nmse_all"] = Score(every.nmse, "", "nmse with those included")
        scores["explained_variance_all"] = Score(every.explained_variance, "", "with those included")
    return Scorecard(
        {f"reconstruction.{name}": score for name, score in scores.items()},
        settings=settings_of(sae),
    )


def _figures(sae: SAE, x: np.ndarray, y: np.ndarray | None) -> Reconstruction:
    """Figures of rows and, of a transcoder, their targets."""
    cuts = range(0, len(x), _ROWS)
    batches = [x[start : start + _ROWS] for start in cuts]
    return evaluate_reconstruction(sae, batches, None if y is None else [y[at : at + _ROWS] for at in cuts])


def _scores(sae: SAE, found: Reconstruction) -> dict[str, Score]:
    return {
        "nmse": Score(found.nmse, "", "squared error over that of the mean; 0 exact, 1 useless"),
        "explained_variance": Score(found.explained_variance, "", "1 exact, 0 useless"),
        "cosine": Score(found.cosine, "", "of a row and its reconstruction; 1 exact"),
        "l0": Score(found.l0, "latents / token", f"of {sae.n_latents}"),
        "alive": Score(found.alive, "", f"fraction of the latents active in {found.rows} tokens"),
    }


def _on_model(
    sae: SAE,
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    texts: Sequence[str | Path],
    length: int | None,
    rule: TokenRule,
) -> ModelActivations:
    if sae.config.reads is None:
        raise SAEError("the SAE does not say which site it reads; name it (site=).")
    sites = [sae.config.reads[0]]
    if not sae.is_autoencoder and sae.config.writes is not None:
        sites.append(sae.config.writes[0])
    read = chain.from_iterable(
        documents_of_texts(text) if isinstance(text, str) else documents(text) for text in texts
    )
    width, options = window_length(model, length, trained_context(sae)), trained_text(sae)
    contexts = text_contexts(tokenizer, read, width, options)
    check_tokens(model, contexts.tokens, place="the text")
    source = ModelActivations(
        model,
        params,
        contexts.tokens,
        tuple(sites),
        framed=contexts.framed,
        counted=contexts.counted,
        text=options,
        rule=rule,
        special_ids=tokenizer.special_ids,
    )
    check_modules(sae, source)
    check_reads(sae, source)
    if len(sites) > 1:
        check_target(sae, source)
    return source
