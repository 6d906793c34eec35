"""The special-token ids of a merged model's config, in the merged vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergelab.merging.vocabulary.tokenizer_files import Tokenizer

__all__ = ["token_ids"]


def token_ids(
    config: Mapping[str, Any],
    tokenizer: Tokenizer,
    donor_config: Mapping[str, Any],
    output: Mapping[str, int],
) -> dict[str, int | list[int] | None]:
    """Returns the `*_token_id` keys of the merged config that differ from `config`.

    The donor's ids are ids of the merged vocabulary; a key only `config` has is carried over by its token's
    spelling, and becomes None if the merged vocabulary has no such token.

    Args:
        config: the config the merge starts from.
        tokenizer: the tokenizer that `config` speaks of.
        donor_config: the config of the model that gives the ids.
        output: the merged vocabulary.
    """
    spelling = {number: token for token, number in tokenizer.vocabulary.items()}

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [new for new in map(moved, value) if new is not None]
        return output.get(spelling.get(value, "")) if isinstance(value, int) else value

    updates = {key: value for key, value in donor_config.items() if key.endswith("_token_id")}
    for key, value in config.items():
        if key.endswith("_token_id") and key not in donor_config:
            updates[key] = moved(value)
    return {key: value for key, value in updates.items() if key not in config or config[key] != value}
