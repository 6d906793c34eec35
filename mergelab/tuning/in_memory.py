"""`finetune`: a model and a text in memory, parameters and their record out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from mergelab.models.model import Model, Params
from mergelab.text.tokenizer import Tokenizer
from mergelab.tuning.contexts import Text, read_rows
from mergelab.tuning.lora import Factors
from mergelab.tuning.preparation import prepare, tuned_params
from mergelab.tuning.settings import TuningSettings, settings_from
from mergelab.tuning.training import Hooks, Progress, Record

__all__ = ["LoraRecord", "Tuned", "finetune"]


@dataclass(kw_only=True)
class LoraRecord(Record):
    """What happened, and the factors that were learned.

    Attributes:
        factors: modules that have factors, and their scale.
        trained: `A` and `B` of each module; `save_adapter(record, folder)` writes them.
    """

    factors: Factors
    trained: Any


class Tuned(NamedTuple):
    """A fine-tuned model.

    Attributes:
        params: its parameters, in the dtypes of before; of LoRA with the factors added.
        record: losses of every step and on held-out text; of LoRA a `LoraRecord`.
    """

    params: Params
    record: Record


def finetune(
    model: Model,
    params: Params,
    tokenizer: Tokenizer | None,
    text: Text,
    *,
    held_out: Text | None = None,
    teacher: tuple[Model, Params] | None = None,
    settings: TuningSettings | None = None,
    progress: Progress | None = None,
    tell: Callable[[str], object] | None = None,
    **options: Any,
) -> Tuned:
    """Trains a loaded model further on text, by AdamW or Muon, whole or by LoRA.

    What is trained is float32; the forward pass has the dtype of the parameters, or `dtype`. Contexts come in
    an order that the seed and the number of the step decide, so that equal calls give equal bits. On a mesh
    (`load_model(mesh=...)`) contexts are shared over `data` and `fsdp`, and what is trained lies as the
    parameters do.

    Args:
        model: a decoder.
        params: its parameters, left as they are.
        tokenizer: its tokenizer; None where the text is rows of token ids.
        text: a text; a `Path` of texts, or several; a list of texts, or of conversations
            `[{"role": ..., "content": ...}]`; or rows of token ids `[contexts, length]`. Of conversations the
            assistants' turns are learned.
        held_out: text that is judged before, while and after; a twentieth of the contexts, the last, if None.
        teacher: model and parameters that the model is kept near to, by `kl`.
        settings: all else.
        progress: function that is called with steps done, steps in all, and the figures of a step.
        tell: function that is told, line by line, what memory the training takes, and held-out losses.
        **options: fields of `TuningSettings` that replace those of `settings`; `lora` may be a rank.

    Returns:
        The parameters, and the record of what happened: `params, record = finetune(...)`.

    Raises:
        TuningError: settings have no meaning, the text is too short, or the training diverged.
        CorpusError: a text cannot be read, or does not fill one context.
        TokenError: a context is longer than the positions, or a token is beyond the vocabulary.
        MeshError: the devices cannot share a batch.
        SiteError: a model is an encoder.
    """
    settings = settings_from(settings, options)
    settings.check(teacher=teacher is not None)
    learned, judged = read_rows(model, tokenizer, text, held_out, settings)
    tuning, state = prepare(model, params, learned, judged, settings, teacher)
    record = Record()
    hooks = Hooks(progress or Hooks.progress, tell or Hooks.tell)
    state = tuning.run(state, 0, record, hooks)
    if tuning.factors is not None:
        learned_factors = {"factors": tuning.factors, "trained": state.trained}
        record = LoraRecord(steps=record.steps, held_out=record.held_out, **learned_factors)
    return Tuned(tuned_params(tuning, params, state.trained), record)
