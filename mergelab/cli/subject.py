"""The model of SAEs, opened on texts as the options of a command say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelab.cli.options import text_options, token_rule

if TYPE_CHECKING:
    from mergelab.activations.model_activations import ModelActivations
    from mergelab.sae.evaluation.own_labels import LabeledContexts
    from mergelab.sae.sae import SAE

__all__ = ["open_labels", "open_subject"]


def open_subject(
    saes: Sequence[SAE], model: Path, texts: Sequence[str | Path], given: Mapping[str, Any]
) -> ModelActivations:
    """The model at the site of the first SAE, by a rule for tokens that is the same for all.

    Args:
        saes: SAEs of one site; the first one's training decides about contexts where no option does.
        model: folder of the model.
        texts: places of texts.
        given: `context`, `contexts`, `mesh` (made, or None), `any_model`, and the options of `TEXT`,
            `judged_text` and `token_options`.

    Raises:
        MergelabError: as `open_subject_model`.
    """
    from mergelab.sae.subject_model import judging_rule, open_subject_model

    return open_subject_model(
        saes[0],
        model,
        texts,
        length=given["context"],
        contexts=given["contexts"],
        any_model=given["any_model"],
        mesh=given["mesh"],
        rule=token_rule(given, judging_rule(*saes)),
        text=text_options(given),
    )


def open_labels(
    saes: Sequence[SAE], model: Path, texts: Sequence[str | Path], given: Mapping[str, Any]
) -> tuple[ModelActivations, LabeledContexts | None]:
    """What `open_subject` gives, and the labeled texts of `--labels`; without other texts on those.

    Raises:
        MergelabError: as `open_subject`, `read_labeled_texts` and `label_contexts`.
    """
    from mergelab.sae.evaluation.label_files import read_labeled_texts
    from mergelab.sae.evaluation.own_labels import label_contexts, text_file
    from mergelab.sae.subject_model import trained_context, trained_text
    from mergelab.text.tokenizer import load_tokenizer

    if given["labels"] is None:
        return open_subject(saes, model, texts, given), None
    records = read_labeled_texts(given["labels"], field=given["field"], label_field=given["label_field"])
    tokenizer, asked = load_tokenizer(model), text_options(given)
    if texts:
        subject = open_subject(saes, model, texts, given)
        length = subject.tokens.shape[1]
    else:
        with text_file(records, tokenizer) as (file, options):
            subject = open_subject(saes, model, [file], {**given, **options})
        length = given["context"] or trained_context(saes[0])
    labeled = label_contexts(tokenizer, records, length, trained_text(saes[0], asked))
    most = given["contexts"] or len(labeled.tokens)
    if given["tokens"] is not None:
        most = min(most, max(given["tokens"] // labeled.tokens.shape[1], 1))
    labeled = labeled.some(most, given["seed"])
    return (subject if texts else labeled.source(subject)), labeled
