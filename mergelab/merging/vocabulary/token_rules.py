"""A recipe's per-token rules, checked against the models' vocabularies and turned into rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from mergelab.errors import MAX_FAULTS, did_you_mean, quoted, shortened
from mergelab.merging.recipe.schema import EmbeddingRule, TokenSource
from mergelab.merging.vocabulary.embedding_rows import ZERO, EmbeddingRow
from mergelab.merging.vocabulary.merged_tokenizer import Additions
from mergelab.merging.vocabulary.tokenizer_data import TokenizerData

__all__ = ["RuleBook"]


@dataclass
class RuleBook:
    """What rules are checked against, and the faults found so far.

    Attributes:
        tokenizers: tokenizer of each model.
        vocabularies: row of each token that has one, per model.
        rows: number of rows of each model's embedding.
        faults: one sentence each.
        warnings: one sentence each.
    """

    tokenizers: Mapping[str, TokenizerData]
    vocabularies: Mapping[str, Mapping[str, int]]
    rows: Mapping[str, int]
    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add_tokens(self, rules: Mapping[str, EmbeddingRule], additions: Additions) -> None:
        """Adds to the output the tokens that rules speak of and no vocabulary taken into it has."""
        known = additions.vocabulary
        for token, rule in rules.items():
            if token in known:
                continue
            definition = next((t.added[token] for t in self.tokenizers.values() if token in t.added), None)
            elsewhere = any(token in vocabulary for vocabulary in self.vocabularies.values())
            # Looking through a vocabulary takes long, and more than these are not shown.
            many = len(self.faults) + len(self.warnings) >= MAX_FAULTS
            near = "" if many else did_you_mean(token, known)
            if rule.source is None and not elsewhere:
                self.faults.append(
                    f"tokenizer.tokens[{quoted(token)}]: no model has this token{near}, so its row needs "
                    "a source: give it {kind: zero} or {kind: model_token, model: ..., token: ...}"
                )
                continue
            number = additions.add_token(token, definition)
            if not elsewhere:
                self.warnings.append(
                    f"token {quoted(token)} is in no model's vocabulary{near}; it is added with id {number}"
                )

    def row(self, token: str, source: str | TokenSource) -> EmbeddingRow:
        """The row a rule names; ZERO, with a fault noted, where there is none."""
        field_name = f"tokenizer.tokens[{quoted(token)}].source"
        if isinstance(source, str):
            return self._named(field_name, source, token)
        if source.kind == "zero" or source.model is None:
            return ZERO
        if source.token is not None:
            return self._named(field_name, source.model, source.token)
        if not self._knows(field_name, source.model):
            return ZERO
        number, rows = source.token_id, self.rows[source.model]
        if number is None or not 0 <= number < rows:
            self.faults.append(
                f"{field_name}.token_id: {number} is not a row of {source.model!r}, whose embedding has rows "
                f"0 to {rows - 1}"
            )
            return ZERO
        return ((source.model, number),)

    def _named(self, field_name: str, model: str, token: str) -> EmbeddingRow:
        if not self._knows(field_name, model):
            return ZERO
        vocabulary = self.vocabularies[model]
        if token not in vocabulary:
            near = "" if len(self.faults) >= MAX_FAULTS else did_you_mean(token, vocabulary)
            self.faults.append(
                f"{field_name}: model {quoted(model)} has no token {quoted(token)}{near}; "
                "name one it has with {kind: model_token, model: ..., token: ...}"
            )
            return ZERO
        return ((model, vocabulary[token]),)

    def _knows(self, field_name: str, model: str) -> bool:
        known = model in self.vocabularies
        if not known:
            self.faults.append(unknown_model(field_name, model, self.vocabularies))
        return known


def unknown_model(field_name: str, model: str, models: Iterable[str]) -> str:
    """The sentence for a model name that the recipe's tokenizer section uses and the merge does not have."""
    names = list(models)
    return (
        f"{field_name}: no model {quoted(model)} in this merge{did_you_mean(model, names)}; its models are "
        f"{shortened(', '.join(map(repr, names)), 400)}"
    )
