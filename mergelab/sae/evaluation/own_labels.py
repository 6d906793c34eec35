"""Labels of one's own: contexts of labeled texts, and probes on latents that tell one class from the rest."""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mergelab.activations.model_activations import ModelActivations
from mergelab.errors import SAEError, quoted
from mergelab.models.token_checks import check_tokens
from mergelab.sae.evaluation.label_files import LabeledText
from mergelab.sae.evaluation.metric import HELD, Evidence, Metric, Options, Scores
from mergelab.sae.evaluation.probing import SparseProbe, best_probes, sparse_probe
from mergelab.sae.sae import SAE
from mergelab.sae.splice import read_passes
from mergelab.text.contexts import cut_pieces
from mergelab.text.corpus import TextOptions
from mergelab.text.corpus_tokens import TokenPiece
from mergelab.text.tokenizer import Tokenizer

__all__ = ["LabelProbes", "LabeledContexts", "label_contexts", "probe_labels", "text_file"]

LEAST = 10
"""Examples of a class, and of the rest, below which no probe is fitted."""

_MOST_CLASSES = 200
_KS = (1, 2, 5)
_NONE = -1


@dataclass(frozen=True, eq=False)
class LabeledContexts:
    """Labeled texts in the tokens of a model.

    Attributes:
        tokens: int32 `[contexts, length]`.
        counted: bool `[contexts, length]`, False for padding; None where all tokens count.
        framed: whether each context stands between a first and a last token of its own.
        options: how the texts became contexts.
        texts: int32 `[contexts, length]`, number of the text of each token; -1 for tokens of none.
        codes: int32, class of each text `[texts]`, or of each token `[contexts, length]`; -1 for none that is
            judged, `len(classes)` for parts of a text that are of no class.
        classes: names of the classes, sorted.
    """

    tokens: np.ndarray
    counted: np.ndarray | None
    framed: bool
    options: TextOptions
    texts: np.ndarray
    codes: np.ndarray
    classes: tuple[str, ...]

    @property
    def by_token(self) -> bool:
        """Whether tokens have labels, instead of whole texts."""
        return self.codes.ndim == 2

    def source(self, like: ModelActivations) -> ModelActivations:
        """These contexts in the model, and at the sites, of another source."""
        check_tokens(like.model, self.tokens, place="the labeled texts")
        return replace(like, tokens=self.tokens, counted=self.counted, framed=self.framed, text=self.options)

    def some(self, contexts: int, seed: int = 0) -> LabeledContexts:
        """Some of the contexts, that many at most, drawn at random: files are often sorted by class."""
        if contexts >= len(self.tokens):
            return self
        chosen = np.sort(np.random.default_rng(seed).permutation(len(self.tokens))[:contexts])
        counted = None if self.counted is None else self.counted[chosen]
        codes = self.codes[chosen] if self.by_token else self.codes
        return replace(
            self, tokens=self.tokens[chosen], counted=counted, texts=self.texts[chosen], codes=codes
        )

    def identity(self) -> str:
        """SHA-256 of all of it."""
        found = hashlib.sha256(repr((self.tokens.shape, self.codes.shape, self.classes)).encode())
        for array in (self.tokens, self.texts, self.codes, self.counted):
            if array is not None:
                found.update(np.ascontiguousarray(array).view(np.uint8).data)
        return found.hexdigest()


def label_contexts(
    tokenizer: Tokenizer, given: Sequence[LabeledText], length: int, options: TextOptions | None = None
) -> LabeledContexts:
    """Labeled texts as contexts, each text in contexts of its own.

    A context is as long as the longest text needs, at most `length`; a longer text goes on in the next. For
    an encoder texts are joined and cut, as its model would look at padding.

    Args:
        tokenizer: the model's.
        given: the texts (`mergelab.sae.evaluation.label_files`).
        length: tokens of a context, at most.
        options: whether a token begins texts; all else is as said above.

    Raises:
        SAEError: a text has more or fewer labels than tokens, there is one class only, or too many.
    """
    whole = given[0].label is not None
    classes = sorted({name for one in given for name in _classes(one)}, key=_order)
    _check_classes(classes, given)
    number = {name: place for place, name in enumerate(classes)}
    ids, codes, faults = [], [], []
    for one in given:
        encoding = tokenizer.backend.encode(one.text, add_special_tokens=False)
        ids.append(np.array(encoding.ids, np.int32))
        if whole:
            codes.append(np.full(len(encoding.ids), number[one.label or ""], np.int32))
        elif one.tokens is not None and len(one.tokens) != len(encoding.ids):
            faults.append(
                f"{one.place} has {len(one.tokens)} labels, but its text is {len(encoding.ids)} tokens of "
                f"{tokenizer.folder}; give one for each token, one for each word of a list tokens, or spans "
                "[start, end, class]."
            )
        else:
            codes.append(_codes_of(one, encoding.offsets, number))
    if faults:
        raise SAEError(faults)
    options = options or TextOptions()
    options = TextOptions(bos=options.bos, packing="packed" if tokenizer.frame else "documents")
    longest = max(len(one) for one in ids) + 1
    length = length if tokenizer.frame else max(2, min(length, longest))
    ends = np.cumsum([len(one) for one in ids])
    pieces = (
        (TokenPiece(one), np.arange(end - len(one), end, dtype=np.int32) + 1)
        for one, end in zip(ids, ends.tolist(), strict=True)
    )
    found = cut_pieces(pieces, tokenizer, length, options)
    places = found.values
    assert places is not None
    of_text = np.concatenate([[_NONE], np.repeat(np.arange(len(ids)), [len(one) for one in ids])])
    by_token = np.concatenate([[_NONE], *codes])
    by_text = np.array([number[one.label or ""] for one in given] if whole else [], np.int32)
    return LabeledContexts(
        np.asarray(found.tokens),
        found.counted,
        found.framed,
        options,
        of_text[places].astype(np.int32),
        by_text if whole else by_token[places].astype(np.int32),
        tuple(classes),
    )


_OPENED = 32  # contexts with which a model is opened where there are no texts but the labeled ones


@contextlib.contextmanager
def text_file(given: Sequence[LabeledText], tokenizer: Tokenizer) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Labeled texts as a file on which a model can be opened, and the options with which it can be read."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "labeled.jsonl"
        lines = (json.dumps({"text": one.text}) + "\n" for one in given[: 8 * _OPENED])
        file.write_text("".join(lines), encoding="utf-8")
        packing = "packed" if tokenizer.frame else "documents"
        yield file, {"field": None, "packing": packing, "roles": None, "contexts": _OPENED, "tokens": None}


def _classes(one: LabeledText) -> Iterator[str]:
    if one.label is not None:
        yield one.label
    yield from (name for name in one.tokens or () if name is not None)
    yield from (name for _, _, name in one.spans or () if name)


def _order(name: str) -> tuple[int, int, str]:
    """Numbers by value, before other names."""
    digits = name.removeprefix("-")
    return (0, int(name), name) if digits.isascii() and digits.isdecimal() else (1, 0, name)


def _check_classes(classes: Sequence[str], given: Sequence[LabeledText]) -> None:
    spans = any(one.spans is not None for one in given)
    if not classes or (len(classes) < 2 and not spans):
        what = f"are all {classes[0]!r}" if classes else "name no class"
        raise SAEError(f"the labels {what}; a probe tells one class from others, so give two or more.")
    if len(classes) > _MOST_CLASSES:
        raise SAEError(
            f"the labels name {len(classes):,} classes, such as {quoted(classes[0])} and "
            f"{quoted(classes[-1])}; probes are of at most {_MOST_CLASSES}: give classes, not amounts or ids."
        )


def _codes_of(one: LabeledText, offsets: Sequence[tuple[int, int]], number: dict[str, int]) -> np.ndarray:
    """The class of each token: that of the span in which its first character other than white space is."""
    if one.tokens is not None:
        return np.array([_NONE if name is None else number[name] for name in one.tokens], np.int32)
    spans = sorted(one.spans or ())
    starts = [start for start, _, _ in spans]
    found = np.full(len(offsets), len(number), np.int32)
    for place, (start, end) in enumerate(offsets):
        while start < end - 1 and one.text[start].isspace():
            start += 1
        at = bisect.bisect_right(starts, start) - 1
        if at >= 0 and start < spans[at][1]:
            found[place] = number[spans[at][2]] if spans[at][2] else _NONE
    return found


@dataclass(frozen=True)
class LabelProbes:
    """Probes that tell one class from the rest.

    Attributes:
        examples: texts or tokens of the class, and of the rest.
        sparse: probe on the k latents whose means differ most, by k.
        loss: cross-entropy of the best single pre-activation, in nats per example.
        prior: the same of always saying the class's frequency.
    """

    examples: tuple[int, int]
    sparse: dict[int, SparseProbe]
    loss: float
    prior: float


def probe_labels(
    sae: SAE,
    source: ModelActivations,
    labeled: LabeledContexts,
    *,
    balanced: bool = True,
    seed: int = 0,
) -> dict[str, LabelProbes]:
    """Probes for each class against all others (of two classes, for the second against the first).

    An example is a text, by the mean of its tokens that count, or a token. Half of the examples fit and the
    other half judges; tokens of one text stay in one half.

    Args:
        sae: SAE that reads the first of the source's sites.
        source: the model; its own text is not read.
        labeled: labeled texts.
        balanced: whether the class and the rest weigh the same, however many examples each has.
        seed: seed of the halves, and of what is left out where examples do not fit in memory.

    Returns:
        Probes by class, without classes of which, or of whose rest, there are fewer than `LEAST` examples.

    Raises:
        SAEError: that leaves none.
    """
    labeled = labeled.some(_room(sae, labeled), seed)
    pre, codes, groups = _examples(sae, source, labeled, lambda d, x: d.pre_activations(x))
    names = {place: name for place, name in enumerate(labeled.classes)}
    counts = np.bincount(codes, minlength=len(names))
    if len(names) == 2 and counts[2:].sum() == 0:
        del names[0]  # the same question asked twice
    of = "tokens" if labeled.by_token else "texts"
    tasks, few = {}, []
    for place, name in names.items():
        yes = codes == place
        if (fewer := min(int(yes.sum()), int((~yes).sum()))) >= LEAST:
            tasks[name] = yes
        else:
            few.append(f"{name!r} {fewer}")
    if not tasks:
        raise SAEError(
            f"there are too few labeled {of} that count, of a class or of the rest ({', '.join(few[:8])}); a "
            f"probe takes {LEAST} of each."
        )
    best = best_probes(pre, tasks)
    del pre
    values, _, _ = _examples(sae, source, labeled, lambda d, x: d.encode(x))
    found = {}
    for name, yes in tasks.items():
        sparse = {
            k: sparse_probe(values, yes, min(k, sae.n_latents), seed=seed, balanced=balanced, groups=groups)
            for k in _KS
        }
        examples = int(yes.sum()), int((~yes).sum())
        found[name] = LabelProbes(examples, sparse, best[name].loss, best[name].prior)
    return found


def _room(sae: SAE, labeled: LabeledContexts) -> int:
    """Contexts whose examples fit in memory."""
    length = labeled.tokens.shape[1]
    rows = HELD // sae.n_latents
    return max(1, rows // length if labeled.by_token else rows)


def _examples(
    sae: SAE, source: ModelActivations, labeled: LabeledContexts, what: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Rows `[examples, n]`, their classes, and of tokens the number of the text, which they share."""
    own = labeled.source(source)
    run, length = jax.jit(what), own.tokens.shape[1]
    filled, start = own.batch * length, 0
    texts = labeled.texts.reshape(-1)
    rows, kept = [], []
    sums: dict[int, np.ndarray] = {}
    tokens: dict[int, int] = {}
    for (x, *_), counts in read_passes(own):
        found = np.asarray(run(sae, jnp.asarray(np.pad(x, ((0, filled - len(x)), (0, 0))))))[: len(x)]
        here = texts[start : start + len(x)]
        there = counts & (here != _NONE)
        if labeled.by_token:
            there &= labeled.codes.reshape(-1)[start : start + len(x)] != _NONE
            rows.append(found[there])
        else:
            for text in np.unique(here[there]).tolist():
                mine = there & (here == text)
                sums[text] = sums.get(text, 0) + found[mine].sum(axis=0)
                tokens[text] = tokens.get(text, 0) + int(mine.sum())
        kept.append(there)
        start += len(x)
    if labeled.by_token:
        chosen = np.concatenate(kept)
        return np.concatenate(rows), labeled.codes.reshape(-1)[chosen], texts[chosen]
    if not sums:
        raise SAEError(
            "no token of the labeled texts counts by the rule for tokens (skip_positions, skip_special, "
            "max_norm_multiple); relax it, or give longer texts."
        )
    order = sorted(sums)
    means = np.stack([sums[text] / np.float32(tokens[text]) for text in order])
    return means, labeled.codes[order], None


def _scores(sae: SAE, evidence: Evidence, options: Options) -> Scores:
    labeled: LabeledContexts = evidence.get("own_labels")
    found = probe_labels(sae, evidence.source, labeled, balanced=options.balance, seed=options.seed)
    rates = np.array([one.examples[0] / sum(one.examples) for one in found.values()])
    majority = float(np.maximum(rates, 1 - rates).mean())
    examples = sum(next(iter(found.values())).examples)
    of = "tokens" if labeled.by_token else "texts, each the mean of its tokens"
    against_rest = "one class against the rest" if len(found) > 1 else f"class {next(iter(found))!r}"
    many = f"{examples:,} {of}; {against_rest}"
    left_out = len(labeled.classes) - len(found) if len(labeled.classes) > 2 else 0
    fewer = f", {left_out} classes with under {LEAST} examples omitted" if left_out else ""
    how = "classes balanced by weights, so 0.5 is always one answer"
    how = how if options.balance else f"classes as frequent as they are, so {majority:.3g} is the majority"
    for k in _KS:
        mean = float(np.mean([one.sparse[k].accuracy for one in found.values()]))
        yield f"accuracy_{k}", mean, f"probe on {k} latents, held-out, mean of {len(found)}{fewer}; {how}"
    for k in _KS:
        mean = float(np.mean([one.sparse[k].f1 for one in found.values()]))
        yield f"f1_{k}", mean, f"the same probes; {_always_yes(rates, options.balance):.3g} always saying yes"
    worst = min(found, key=lambda name: found[name].sparse[_KS[-1]].accuracy)
    yield "worst", found[worst].sparse[_KS[-1]].accuracy, f"accuracy_{_KS[-1]} of the class {worst!r}"
    yield "base_rate", float(rates.mean()), f"fraction of the examples that are of a class: {many}"
    yield "majority", majority, "accuracy of always saying the more frequent, classes not balanced"
    loss = float(np.mean([one.loss / one.prior for one in found.values()]))
    yield "relative_loss", loss, "best latent's over always saying the class's frequency; 1 useless"


def _always_yes(rates: np.ndarray, balanced: bool) -> float:
    rates = np.full_like(rates, 0.5) if balanced else rates
    return float((2 * rates / (1 + rates)).mean())


METRIC = Metric(
    name="labels",
    about="your own labels of texts or tokens that few latents tell",
    units={
        "accuracy_1": "", "accuracy_2": "", "accuracy_5": "", "f1_1": "", "f1_2": "", "f1_5": "",
        "worst": "", "base_rate": "", "majority": "", "relative_loss": "",
    },
    measure=_scores,
    needs=("own_labels",),
)  # fmt: skip
