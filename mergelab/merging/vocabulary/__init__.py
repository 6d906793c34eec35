"""The merged model's tokenizer: one vocabulary for all models, and its rows in every embedding."""

from typing import TYPE_CHECKING

from mergelab.lazy import lazy_names

if TYPE_CHECKING:
    from mergelab.merging.vocabulary.chat_templates import chat_template_files
    from mergelab.merging.vocabulary.tokenizer_data import vocabulary_differences
    from mergelab.merging.vocabulary.vocabulary_plan import VocabularyPlan, plan_vocabulary

__all__ = [
    "VocabularyPlan",
    "chat_template_files",
    "plan_vocabulary",
    "vocabulary_differences",
]

__getattr__, __dir__ = lazy_names(__name__)
