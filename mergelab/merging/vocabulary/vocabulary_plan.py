"""The merged vocabulary of a recipe's `tokenizer:` section, and every model's rows in its order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergelab.checkpoints.source import Checkpoint, TensorSource
from mergelab.errors import CheckpointError, RecipeError
from mergelab.merging.recipe.schema import TokenizerSpec
from mergelab.merging.vocabulary.embedding_rows import (
    EmbeddingRow,
    RowMap,
    RowSource,
    default_row,
    input_embedding,
    is_output_embedding,
    is_token_tensor,
    row_map,
)
from mergelab.merging.vocabulary.merged_tokenizer import Additions, token_ids, tokenizer_files, union
from mergelab.merging.vocabulary.token_rules import RuleBook, unknown_model
from mergelab.merging.vocabulary.tokenizer_data import TokenizerData, read_tokenizer

__all__ = ["VocabularyPlan", "plan_vocabulary"]


@dataclass(frozen=True)
class VocabularyPlan:
    """The vocabulary of a merge, and how each model's rows are brought into its order.

    Attributes:
        size: rows of the merged embedding.
        vocabulary: token -> row.
        donor: the model whose ids are kept: its generation config fits the merged vocabulary.
        files: the tokenizer files to write, by name.
        config_updates: keys of `config.json` to set: `vocab_size`, and `*_token_id` where they move.
        warnings: one sentence each.
        rows: places, for each model, where the rows of its re-ordered embedding come from.
        models: the checkpoints rows are read from.
    """

    size: int
    vocabulary: Mapping[str, int]
    donor: str
    files: Mapping[str, bytes]
    config_updates: Mapping[str, Any]
    warnings: tuple[str, ...]
    rows: Mapping[str, RowMap]
    models: Mapping[str, Checkpoint]

    def source(self, model: str, source: TensorSource, *, role: str | None = None) -> TensorSource:
        """Returns a model's tensor with its rows in the merged order; `source` itself if nothing moves.

        Args:
            model: its name in `models`.
            source: any of its tensors; only those with one row per token change.
            role: the output tensor it is read for, where that has another name: a tied input embedding that
                stands in for `lm_head.weight` borrows rows of the other models' `lm_head.weight`.

        Raises:
            CheckpointError: it has too few rows, or a model that lends it rows lacks the tensor or has it
                with another row shape.
        """
        name = role or source.name
        rows = self.rows[model]
        if not is_token_tensor(name) or rows.is_identity(source.shape[0]):
            return source
        needed = int(rows.index.max(initial=-1)) + 1
        if source.shape[0] < needed:
            raise CheckpointError(
                f"tensor {source.name!r} of {model!r} has {source.shape[0]} rows but its vocabulary needs "
                f"{needed}; use the tokenizer files that belong to this model"
            )
        lenders = dict.fromkeys(
            lender for row in rows.elsewhere.values() for lender, _ in row if lender != model
        )
        return RowSource(source, rows, {m: self._counterpart(m, name, source) for m in lenders})

    def _counterpart(self, lender: str, name: str, source: TensorSource) -> TensorSource | None:
        checkpoint = self.models[lender]
        tensor = checkpoint.tensors.get(name)
        if tensor is None and is_output_embedding(name):
            if name.endswith(".bias"):
                return None
            tensor = input_embedding(checkpoint)
        if tensor is None:
            raise CheckpointError(
                f"model {lender!r} has no tensor {name!r}, from which other models take the rows of "
                "tokens they lack; merge models of one architecture, or set tokenizer_source to 'base'"
            )
        if tensor.shape[1:] != source.shape[1:]:
            raise CheckpointError(
                f"rows of {name!r} are {list(tensor.shape[1:])} in {lender!r} and {list(source.shape[1:])} "
                f"in {source.name!r} of the model that borrows them; merge models of one width"
            )
        return tensor


def plan_vocabulary(
    spec: TokenizerSpec,
    models: Mapping[str, Checkpoint],
    base: str | None,
    *,
    inputs: Sequence[str] | None = None,
) -> VocabularyPlan:
    """Plans the merged vocabulary; reads tokenizer files and tensor headers, no weights.

    Args:
        spec: the recipe's `tokenizer:` section.
        models: every model the section or the merge names, in recipe order.
        base: the base model's name, if there is one; otherwise the first of `inputs` gives the ids.
        inputs: the models that are merged (the base among them); None means all. The others only lend their
            tokenizer, or the rows that rules ask of them.

    Raises:
        RecipeError: a rule or source names a model, token or id that does not exist.
        CheckpointError: a model without a usable tokenizer, or with one that its embedding is too small for.
    """
    merged = list(models) if inputs is None else list(inputs)
    first = base or merged[0]
    tokenizers = {name: read_tokenizer(name, checkpoint.path) for name, checkpoint in models.items()}
    rows = {name: _embedding_rows(name, checkpoint) for name, checkpoint in models.items()}
    warnings: list[str] = []
    vocabularies = {name: _with_rows(t, rows[name], warnings) for name, t in tokenizers.items()}
    additions = _output_tokens(spec.source, tokenizers, first, merged)
    book = RuleBook(tokenizers, vocabularies, rows)
    book.add_tokens(spec.tokens, additions)
    output = additions.vocabulary
    named = {t: book.row(t, r.source) for t, r in spec.tokens.items() if r.source is not None}
    if book.faults:
        raise RecipeError(book.faults)

    forced = frozenset(token for token, rule in spec.tokens.items() if rule.force)
    defaults = _defaults(output, {name: vocabularies[name] for name in merged}, base, forced, named, warnings)
    kept_rows = _kept_rows(output, merged, vocabularies, rows, warnings)
    size = max(max(output.values()) + 1, kept_rows)
    size += -size % (spec.pad_to_multiple_of or 1)
    donor = additions.donor.name
    return VocabularyPlan(
        size=size,
        vocabulary=output,
        donor=donor,
        files=tokenizer_files(additions),
        config_updates={
            "vocab_size": size,
            **token_ids(models[first].config, tokenizers[first], models[donor].config, output),
        },
        warnings=tuple(dict.fromkeys([*warnings, *additions.warnings, *book.warnings])),
        rows={
            name: row_map(name, vocabularies[name], output, defaults, forced, kept_rows=kept_rows, size=size)
            for name in merged
        },
        models=models,
    )


def _embedding_rows(name: str, checkpoint: Checkpoint) -> int:
    tensor = input_embedding(checkpoint)
    rows = checkpoint.config.get("vocab_size") if tensor is None else tensor.shape[0]
    if not isinstance(rows, int):
        raise CheckpointError(
            f"model {name!r} has no input embedding under a known name and no vocab_size in its "
            "config.json, so its vocabulary cannot be merged; leave `tokenizer` and "
            "`tokenizer_source` out of the recipe"
        )
    return rows


def _with_rows(tokenizer: TokenizerData, rows: int, warnings: list[str]) -> dict[str, int]:
    """The tokens that have a row; an added token may lack one, a token of the subword model may not."""
    vocabulary = tokenizer.vocabulary
    beyond = [token for token, number in vocabulary.items() if number >= rows]
    plain = next((token for token in beyond if token not in tokenizer.added), None)
    if plain is not None:
        raise CheckpointError(
            f"model {tokenizer.name!r} has {rows} embedding rows but its tokenizer gives {plain!r} the id "
            f"{vocabulary[plain]}; use the tokenizer files that belong to this model"
        )
    if beyond:
        warnings.append(
            f"added tokens of {tokenizer.name!r} without a row in its embedding count as tokens it lacks: "
            f"{len(beyond)} in all, such as {beyond[0]!r}"
        )
    return {token: number for token, number in vocabulary.items() if number < rows}


def _output_tokens(
    source: str, tokenizers: Mapping[str, TokenizerData], first: str, merged: Sequence[str]
) -> Additions:
    if source == "union":
        return union(tokenizers[first], [tokenizers[name] for name in merged if name != first])
    if source == "base":
        return Additions(tokenizers[first])
    if source not in tokenizers:
        raise RecipeError(unknown_model("tokenizer.source", source, tokenizers))
    return Additions(tokenizers[source])


def _defaults(
    output: Mapping[str, int],
    vocabularies: Mapping[str, Mapping[str, int]],
    base: str | None,
    forced: frozenset[str],
    named: Mapping[str, EmbeddingRow],
    warnings: list[str],
) -> dict[str, EmbeddingRow]:
    """The row of each token for models that lack it (or all, where forced)."""
    everywhere = set(output).intersection(*vocabularies.values()) - forced
    rows = dict(named)
    nowhere = []
    for token in output:
        if token in everywhere or token in rows:
            continue
        owners = {m: vocabulary[token] for m, vocabulary in vocabularies.items() if token in vocabulary}
        rows[token] = default_row(owners, base)
        if not owners:
            nowhere.append(token)
    if nowhere:
        warnings.append(
            f"tokens that no merged model has get rows of zeros: {len(nowhere)} in all, such as "
            f"{nowhere[0]!r}; name a source for them under tokenizer.tokens"
        )
    return rows


def _kept_rows(
    output: Mapping[str, int],
    merged: Sequence[str],
    vocabularies: Mapping[str, Mapping[str, int]],
    rows: Mapping[str, int],
    warnings: list[str],
) -> int:
    """Rows to keep past the vocabulary: those of models that agree on all of it; 0 where they do not."""
    agree = all(vocabularies[m] == output for m in merged)
    counts = {rows[m] for m in merged}
    if agree and len(counts) == 1:
        return counts.pop()
    named = max(output.values()) + 1
    if max(counts) > named:
        reason = "have different numbers of rows" if agree else "do not all have the merged vocabulary"
        warnings.append(
            f"embedding rows past the {named} of the merged vocabulary are dropped, as the models {reason}; "
            "set tokenizer.pad_to_multiple_of to pad it again"
        )
    return 0
