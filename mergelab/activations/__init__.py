"""A model run on text or tokens: sites captured, streamed as shuffled rows, stored; losses and sentences."""

from typing import TYPE_CHECKING

from mergelab.activations.capture import capture
from mergelab.lazy import lazy_names

if TYPE_CHECKING:
    from mergelab.activations.batches import bucket_size, pad_prompts
    from mergelab.activations.capture import stream_sites
    from mergelab.activations.kept import EVERY_TOKEN, KeptRows, TokenRule
    from mergelab.activations.left_out import LeftOut, count_left_out
    from mergelab.activations.losses import summed_loss, target_scores
    from mergelab.activations.merged_statistics import merged_grams
    from mergelab.activations.model_activations import (
        ModelActivations,
        SiteActivations,
        contexts_of_texts,
        halves,
        open_model_activations,
    )
    from mergelab.activations.prefetch import Prefetch, PrefetchTrace
    from mergelab.activations.sentences import SentenceEncoder, load_sentence_encoder, pool
    from mergelab.activations.statistics import Statistics, fisher, gram, write_statistics
    from mergelab.activations.store import (
        ActivationFiles,
        find_activation_files,
        open_activation_files,
        write_store,
    )
    from mergelab.activations.stream import ActivationSource, ActivationStream, Batch

__all__ = [
    "EVERY_TOKEN",
    "ActivationFiles",
    "ActivationSource",
    "ActivationStream",
    "Batch",
    "KeptRows",
    "LeftOut",
    "ModelActivations",
    "Prefetch",
    "PrefetchTrace",
    "SentenceEncoder",
    "SiteActivations",
    "Statistics",
    "TokenRule",
    "bucket_size",
    "capture",
    "contexts_of_texts",
    "count_left_out",
    "find_activation_files",
    "fisher",
    "gram",
    "halves",
    "load_sentence_encoder",
    "merged_grams",
    "open_activation_files",
    "open_model_activations",
    "pad_prompts",
    "pool",
    "stream_sites",
    "summed_loss",
    "target_scores",
    "write_statistics",
    "write_store",
]

__getattr__, __dir__ = lazy_names(__name__)
