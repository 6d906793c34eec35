"""The merged model's tokenizer: one vocabulary for all models, and its rows in every embedding."""

from mergelab.merging.vocabulary.chat_templates import chat_template_files
from mergelab.merging.vocabulary.tokenizer_data import vocabulary_differences
from mergelab.merging.vocabulary.vocabulary_plan import VocabularyPlan, plan_vocabulary

__all__ = ["VocabularyPlan", "chat_template_files", "plan_vocabulary", "vocabulary_differences"]
