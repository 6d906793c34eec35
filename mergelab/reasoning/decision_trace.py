"""Why one model stops where another goes on: every reading of such a decision, in one report."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mergelab.checkpoints.output_target import MARKER
from mergelab.checkpoints.publish import WorkFolder
from mergelab.errors import SiteError
from mergelab.reasoning.decision_endings import ENDINGS, EndingTable, compare_endings
from mergelab.reasoning.decision_layers import (
    DifferenceParts,
    LayerLogits,
    attribute_difference,
    read_layers,
)
from mergelab.reasoning.decision_pair import LoadedModel, open_pair
from mergelab.reasoning.decision_paths import (
    Analogy,
    PathTable,
    TokenSum,
    read_analogies,
    read_paths,
    sparse_token_sum,
)
from mergelab.reasoning.decision_prompts import StoppedPrompt, find_stopping_prompts
from mergelab.reasoning.decision_report import render_decision
from mergelab.reasoning.decision_swaps import SwapTable, swap_activations, swap_weights
from mergelab.reasoning.decision_values import ValueTable, find_promoters
from mergelab.text.tokenizer import Tokenizer
from mergelab.version import __version__

__all__ = ["DecisionTrace", "trace_decision"]

Progress = Callable[[str, int, int], object]
Swap = Literal["weights", "activations"]


@dataclass(frozen=True)
class DecisionTrace:
    """All that was read.

    Attributes:
        names: what the two models are called.
        tokens: texts of the chosen tokens, that which ends a text first.
        prompts: prompts that the two models part at, with their answers.
        tried: number of prompts that were tried.
        parted: number of those at which the first model stops and the second goes on.
        endings: what both make of each ending.
        layers: the logit lens in both models.
        attribution: parts of the difference of their logits.
        values: neurons that promote the tokens; None where the MLPs are experts.
        weight_swaps: blocks swapped by weight; None where the models have different shapes,
            or it was not asked for.
        activation_swaps: blocks swapped by what they add to the last token; None there, too.
        paths: bigrams and direct paths from what answers end in.
        analogies: sums of tokens.
        sums: the end as a sparse sum of other tokens, in both models.
        texts: texts of all tokens that are named by id.
    """

    names: tuple[str, str]
    tokens: tuple[str, ...]
    prompts: tuple[StoppedPrompt, ...]
    tried: int
    parted: int
    endings: EndingTable
    layers: tuple[LayerLogits, LayerLogits]
    attribution: DifferenceParts
    values: ValueTable | None
    weight_swaps: SwapTable | None
    activation_swaps: SwapTable | None
    paths: PathTable
    analogies: tuple[Analogy, ...]
    sums: tuple[TokenSum, TokenSum]
    texts: dict[int, str]

    def to_json(self) -> dict[str, Any]:
        """All of it as plain JSON, floats to six digits."""
        return {name: _plain(value) for name, value in vars(self).items()}

    def summary(self) -> list[str]:
        """The findings as sentences: who stops, how likely the end is, and what brings it back."""
        first, second = self.names
        end = self.endings.end[:, :, 0].mean(axis=1)
        said = [
            f"{first} ends its answer before {second} on {self.parted} of {self.tried} prompts tried",
            f"P({self.tokens[0]}) behind the answer: {end[0]:.3f} in {first}, {end[1]:.3f} in {second}",
        ]
        if not self.parted:
            said[0] += ", so that what follows is of prompts that do not part them"
        for table in (self.weight_swaps, self.activation_swaps):
            if table is None:
                continue
            strongest = table.parts[table.order(0)[0]]
            enough = table.enough(0) or f"more than {table.fewest.shape[1]}"
            said.append(
                f"parts of {second} put into {first} by {table.by}: {strongest} does most of "
                f"{len(table.parts)}, and half of the change of the end's log-probability takes {enough}"
            )
        return said


def trace_decision(
    a: str | Path | LoadedModel,
    b: str | Path | LoadedModel,
    prompts: str | Sequence[str] | None = None,
    tokens: Sequence[str | int] = (" Wait", "\n"),
    out: str | Path | None = None,
    *,
    tokenizer: Tokenizer | str | Path | None = None,
    chat: bool | None = None,
    endings: Sequence[str] = ENDINGS,
    analogies: Sequence[tuple[str | int, str | int, str | int]] = (),
    most: int = 4,
    max_new_tokens: int = 64,
    positions: int = 8,
    batch: int = 8,
    swaps: Sequence[Swap] = ("weights", "activations"),
    dtype: Any = None,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> DecisionTrace:
    """Asks, of two models of one vocabulary, what decides between ending a text and going on.

    It lets both answer, keeps prompts where the first stops and the second goes on, puts the first's answer
    behind each, and reads what both then make of the tokens: after other endings, over layers and positions,
    by what added to the logits, by neurons, by blocks of one put into the other, and by weights alone. Beside
    each reading stands what random directions give.

    Args:
        a: the model that stops: a folder or anything that `mergelab.load_model` takes; or a model with its
            parameters.
        b: the model that goes on, of the same vocabulary; of the same shape for swaps.
        prompts: texts to try, or one; some with short answers if None.
        tokens: texts (" Wait") or ids of tokens to follow beside the end, which is always followed.
        out: folder to write: `decision.json` and `decision.html`; nothing is written if None.
        tokenizer: tokenizer of both; that of `a` if None.
        chat: whether prompts are turns of a conversation; where the tokenizer has a template if None.
        endings: texts that are put behind the first's answers.
        analogies: triples of tokens, for `first - second + third`; of the end, the first ending of one token,
            and each other token if empty.
        most: number of prompts that are kept.
        max_new_tokens: largest number of tokens of an answer.
        positions: number of last positions at which layers are read.
        batch: contexts in one pass.
        swaps: what blocks are swapped by; weights take most of the time, and an empty tuple swaps none.
        dtype: dtype of loaded parameters; the stored one if None.
        seed: seed of all controls.
        overwrite: replace a folder that mergelab wrote.
        progress: function that is told what is being done.

    Raises:
        TokenError: the vocabularies differ, or a token is none.
        DecodingError: there are no prompts.
        CheckpointError: a model or the tokenizer cannot be read.
        OutputError: the folder cannot be written.
    """
    settings: dict[str, Any] = {
        "tokenizer": tokenizer, "chat": chat, "endings": endings, "analogies": analogies, "most": most,
        "max_new_tokens": max_new_tokens, "positions": positions, "batch": batch, "swaps": swaps,
        "dtype": dtype, "seed": seed, "progress": progress,
    }  # fmt: skip
    if out is None:
        return _trace(a, b, prompts, tokens, **settings)
    given = [one for one in (a, b, tokenizer) if isinstance(one, str | Path) and os.path.exists(one)]
    with WorkFolder(out, inputs=given, overwrite=overwrite) as work:
        work.prepare()
        found = _trace(a, b, prompts, tokens, **settings)
        said = found.to_json()
        work.clear()
        files = {
            "decision.json": (json.dumps(said, indent=1) + "\n").encode(),
            "decision.html": render_decision(said).encode(),
            MARKER: (json.dumps({"mergelab": __version__}) + "\n").encode(),
        }
        for name, content in files.items():
            (work.path / name).write_bytes(content)
        work.publish(hashlib.sha256(files["decision.json"]).hexdigest())
    return found


def _trace(
    a: Any,
    b: Any,
    prompts: str | Sequence[str] | None,
    tokens: Sequence[str | int],
    *,
    tokenizer: Any,
    chat: bool | None,
    endings: Sequence[str],
    analogies: Sequence[tuple[str | int, str | int, str | int]],
    most: int,
    max_new_tokens: int,
    positions: int,
    batch: int,
    swaps: Sequence[Swap],
    dtype: Any,
    seed: int,
    progress: Progress,
) -> DecisionTrace:
    steps = iter(range(9))

    def tell(what: str) -> None:
        progress(what, next(steps), 9)

    tell("loading models")
    pair = open_pair(a, b, tokens, tokenizer=tokenizer, chat=chat, dtype=dtype)
    tell("looking for prompts")
    prompts = [prompts] if isinstance(prompts, str) else prompts
    kept, tried = find_stopping_prompts(pair, prompts, most=most, max_new_tokens=max_new_tokens, batch=batch)
    contexts = [prompt.context for prompt in kept]
    tell("trying endings")
    table = compare_endings(pair, kept, endings, max_new_tokens=max_new_tokens, batch=batch)
    tell("reading layers")
    layers = [read_layers(one, contexts, pair.ids, positions=positions, batch=batch) for one in pair.models]
    tell("attributing the difference")
    parts = attribute_difference(pair, contexts, batch=batch)
    tell("reading value vectors")
    try:
        values = find_promoters(pair, contexts, seed=seed, batch=batch)
    except SiteError:  # experts have no neurons of one width
        values = None
    tell("swapping weights")
    kinds = swaps if pair.swappable else ()
    weights = swap_weights(pair, contexts, batch=batch, seed=seed) if "weights" in kinds else None
    tell("swapping activations")
    activations = swap_activations(pair, contexts, batch=batch, seed=seed) if "activations" in kinds else None
    tell("reading weights alone")
    asked = [pair.tokenizer.encode(text, add_special_tokens=False) for text in endings if text]
    lasts = [ids[-1] for ids in asked if ids]
    sources = [*dict.fromkeys([*(context[-1] for context in contexts), *lasts, *pair.ids.tolist()])]
    terms = [tuple(pair.id_of(one) for one in triple) for triple in analogies]
    if not terms and lasts:
        end, *others = pair.ids.tolist()
        terms = [(end, lasts[-1], other) for other in others if other != lasts[-1]]
    paths = read_paths(pair, sources)
    found = read_analogies(pair, [(one[0], one[1], one[2]) for one in terms], seed=seed)
    sums = [sparse_token_sum(one, int(pair.ids[0]), seed=seed) for one in pair.models]
    named = [
        sources,
        table.likeliest,
        paths.likeliest,
        *(one.nearest for one in found),
        *(s.terms for s in sums),
    ]
    texts = {int(n): pair.shown(n) for n in np.unique(np.concatenate([np.ravel(ids) for ids in named]))}
    return DecisionTrace(
        pair.names,
        tuple(pair.chosen),
        tuple(kept),
        len(tried),
        sum(prompt.parted for prompt in tried),
        table,
        (layers[0], layers[1]),
        parts,
        values,
        weights,
        activations,
        paths,
        tuple(found),
        (sums[0], sums[1]),
        texts,
    )


def _plain(value: Any) -> Any:
    """Dataclasses and arrays as dictionaries and lists."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    return round(value, 6) if isinstance(value, float) else value
