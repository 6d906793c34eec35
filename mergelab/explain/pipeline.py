"""A recipe, an SAE of its base and a text turned into a folder that says what the merge did in features."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mergelab.checkpoints.locations import local_path
from mergelab.checkpoints.model_card import portable_name
from mergelab.checkpoints.output_target import MARKER
from mergelab.checkpoints.publish import WorkFolder
from mergelab.checkpoints.remote_output import writes_anywhere
from mergelab.checkpoints.source import Checkpoint
from mergelab.errors import SAEError
from mergelab.explain.changes import Changes, find_changes, found_by_chance, retained
from mergelab.explain.explanation import Explanation, GainedLatent, SpecialistStory, counted
from mergelab.explain.fates import Fate, fate_of
from mergelab.explain.models import MergeInputs, find_family, load_one, merged_model
from mergelab.explain.readings import ModelReading, SharedContexts, codes_at, passes, read_model, rotated
from mergelab.explain.restoration import restore
from mergelab.merging.recipe.recipe_file import load_recipe
from mergelab.merging.recipe.schema import Recipe
from mergelab.models.model import Model, Params
from mergelab.models.streamed import Streaming
from mergelab.report.explanation import render_explanation
from mergelab.sae.formats import load_sae
from mergelab.sae.sae import SAE
from mergelab.sae.splice import check_reconstructs
from mergelab.sae.subject_model import judging_rule, open_subject_model
from mergelab.text.tokenizer import Tokenizer, load_tokenizer
from mergelab.version import __version__

__all__ = ["explain_merge"]

_RESTORED = 32
"""Latents that are put back together, at most."""

_EXAMPLES, _AROUND = 2, 10
"""Pieces of text of a latent, and tokens on either side of its strongest."""

Progress = Callable[[str, int, int], object]


@writes_anywhere()
def explain_merge(
    recipe: Recipe | str | Path,
    sae: SAE | str | Path,
    texts: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    base: str | Path | None = None,
    site: str | None = None,
    context: int | None = None,
    contexts: int | None = 256,
    batch: int = 8,
    latents: int = 200,
    dtype: Any = None,
    streamed: Streaming | None = None,
    any_model: bool = False,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Explanation:
    """Says which latents each parent of a merge gained, what became of them, and whether that matters.

    Base, parents and merge run on the same text. A latent is gained where its mean code per context rises
    against the base beyond what tosses of a coin give any latent (`mergelab.explain.find_changes`); beside it
    stand the same search in a space turned at random, and on contexts dealt at random. What the merge
    lost is put back by an edit at the SAE's site, and so are other latents of the same length.

    Args:
        recipe: a merge, or its file.
        sae: an autoencoder of one site of the base, or its folder.
        texts: files, globs, folders or data sets of texts; those that the parents are for.
        out: folder to write: `explanation.json` and `explanation.html`.
        base: the common base, where the recipe names none.
        site: site that the SAE reads; the one it says if None.
        context: tokens in a context; as in the SAE's training if None.
        contexts: largest number of contexts; all of the texts if None.
        batch: contexts in one forward pass.
        latents: largest number of latents of each parent that are told in full.
        dtype: dtype that the models are run in; the stored one if None.
        streamed: how activations wait, where the weights of all models stay in their files
            (`mergelab.models.Streaming`); None to load one after the other.
        any_model: accept an SAE of other weights than the base's.
        seed: seed of all draws.
        overwrite: replace a folder that mergelab wrote.
        progress: function that is told what is being done.

    Raises:
        RecipeError: the recipe cannot be read, names no base, or builds on others.
        SAEError: the SAE reconstructs no site of the base, or the text is too short.
        CheckpointError: a model or the SAE cannot be read.
        OutputError: the folder cannot be written.
    """
    made = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    places = [texts] if isinstance(texts, str | Path) else [*texts]
    name = portable_name(made.origin.path) if made.origin.path else "the recipe"
    inputs = [path for path in (made.origin.path, *_local(places)) if path is not None]
    with WorkFolder(out, inputs=inputs, overwrite=overwrite) as work:
        work.prepare()
        family = find_family(made, base)
        saes = sae if isinstance(sae, SAE) else load_sae(local_path(sae))
        check_reconstructs(saes)
        stages = len(family.parents) + 2
        progress("reading models", 0, stages)
        source = open_subject_model(
            saes,
            family.base.paths[0],
            places,
            site=site,
            length=context,
            contexts=contexts,
            any_model=any_model,
            # Norms differ from model to model; the tokens that count must not.
            rule=replace(judging_rule(saes), max_norm_multiple=None),
            streamed=streamed,
        )
        tokenizer = load_tokenizer(family.base.paths[0])
        told = source.counted
        targets = np.ones_like(source.tokens[:, 1:], bool) if told is None else told[:, 1:]
        there = source.by_place.any(axis=1) & targets.any(axis=1)
        if there.sum() < 4:
            raise SAEError(
                f"the texts fill {there.sum()} contexts of {source.tokens.shape[1]} tokens, and chance is "
                "told by comparing contexts; give at least 4, better 100, or shorter ones (--context)."
            )
        text = SharedContexts(
            np.asarray(source.tokens)[there], source.by_place[there], targets[there], source.sites[0], batch
        )
        work_on = _Work(family, saes, text, source.model, dtype, streamed, seed, latents, tokenizer)
        loaded = [source.params] if dtype is None else []
        del source
        found = work_on.explained(name, loaded, lambda done: progress("reading models", done, stages))
        said = found.to_json()
        work.clear()
        marker = {"mergelab": __version__}
        files = {"explanation.json": _text(said), MARKER: _text(marker)}
        files["explanation.html"] = render_explanation(said, title=f"What {name} did, in features").encode()
        for file, content in files.items():
            (work.path / file).write_bytes(content)
        identity = hashlib.sha256(files["explanation.json"]).hexdigest()
        work.publish(identity)
    return found


def _local(places: Sequence[str | Path]) -> list[Path]:
    return [path for path in map(Path, places) if path.exists()]


def _text(content: Any) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


class _Work:
    """The passes over the models, one model in memory at a time."""

    def __init__(
        self,
        family: MergeInputs,
        sae: SAE,
        text: SharedContexts,
        model: Model,
        dtype: Any,
        streamed: Streaming | None,
        seed: int,
        most: int,
        tokenizer: Tokenizer,
    ) -> None:
        self.family, self.sae, self.text, self.model = family, sae, text, model
        self.streamed = streamed
        self.dtype, self.seed, self.most, self.tokenizer = dtype, seed, most, tokenizer

    def explained(self, name: str, loaded: list[Params], progress: Callable[[int], object]) -> Explanation:
        """All of it.

        Args:
            name: the recipe's name.
            loaded: parameters of the base, which are taken out of the list, where they are loaded already.
            progress: function that is told how many models have been read.
        """
        model = self.model
        if loaded:
            params = loaded.pop()
        else:
            model, params = self._loaded(self.family.base.checkpoint, "the base")
        control = rotated(self.sae, self._center(model, params), self.seed)
        base = read_model(self.sae, control, model, params, self.text)
        del params
        progress(1)
        readings: dict[str, ModelReading] = {}
        changes: dict[str, Changes] = {}
        for number, (parent, found) in enumerate(self.family.parents.items()):
            model, params = self._loaded(found.checkpoint, parent)
            readings[parent] = read_model(self.sae, control, model, params, self.text)
            del params
            changes[parent] = find_changes(base.mean, readings[parent].mean, seed=self.seed)
            progress(2 + number)
        codes = {parent: self._codes(parent, changes[parent].raised) for parent in readings}
        model, params = merged_model(self.family.recipe, self.model, self.dtype, self.streamed)
        merge = read_model(self.sae, control, model, params, self.text)
        stories = [
            self._story(parent, base, readings, changes, merge, codes[parent], model, params)
            for parent in readings
        ]
        progress(2 + len(readings))
        risen = set(find_changes(base.mean, merge.mean, seed=self.seed).raised.tolist())
        risen -= {latent for one in changes.values() for latent in one.raised.tolist()}
        return Explanation(
            name,
            portable_name(self.family.base.name),
            self.text.site,
            len(self.text.tokens),
            int(self.text.kept.sum()),
            self.sae.n_latents,
            base.loss,
            merge.loss,
            stories,
            sorted(risen),
            next(iter(changes.values())).level,
        )

    def _loaded(self, checkpoint: Checkpoint, name: str) -> tuple[Model, Params]:
        return load_one(checkpoint, self.model, name, self.dtype, self.streamed)

    def _center(self, model: Model, params: Params) -> np.ndarray:
        """The mean activation of the first contexts, about which the control's space is turned."""
        here, x, _ = next(passes(model, params, self.text))
        return x[self.text.kept[here]].mean(axis=0)

    def _codes(self, parent: str, gained: np.ndarray) -> np.ndarray:
        """The specialist's codes of the latents that are told in full, at every token."""
        if not len(gained):
            return np.zeros((*self.text.tokens.shape, 0), np.float32)
        model, params = self._loaded(self.family.parents[parent].checkpoint, parent)
        return codes_at(self.sae, model, params, self.text, gained[: self.most])[0]

    def _story(
        self,
        parent: str,
        base: ModelReading,
        readings: dict[str, ModelReading],
        changes: dict[str, Changes],
        merge: ModelReading,
        codes: np.ndarray,
        model: Model,
        params: Params,
    ) -> SpecialistStory:
        own, change = readings[parent], changes[parent]
        gained = change.raised
        opposed = {n for other, one in changes.items() if other != parent for n in one.lowered.tolist()}
        shares = retained(base.mean[:, gained], own.mean[:, gained], merge.mean[:, gained], seed=self.seed)
        fates: list[Fate] = [
            fate_of(*shares[:, place].tolist(), opposed=latent in opposed)
            for place, latent in enumerate(gained.tolist())
        ]
        told = [
            GainedLatent(
                latent,
                _three(base.fired, own.fired, merge.fired, latent),
                _three(base.mean, own.mean, merge.mean, latent),
                float(change.p[latent]),
                float(shares[0, place]),
                (float(shares[1, place]), float(shares[2, place])),
                fates[place],
                self._examples(codes[..., place]),
            )
            for place, latent in enumerate(gained[: self.most].tolist())
        ]
        lost = np.array(
            [place for place, one in enumerate(told) if one.fate not in ("survived", "amplified")], int
        )
        gap = np.array([told[place].means[1] - told[place].means[2] for place in lost.tolist()])
        lost = lost[np.argsort(-gap, kind="stable")][:_RESTORED]
        restoration = None
        others = np.setdiff1d(np.flatnonzero(base.fired.any(axis=0)), gained)
        if len(others) < len(lost):
            others = np.setdiff1d(np.arange(self.sae.n_latents), gained)
        if len(lost) and len(others):
            restoration = restore(
                self.sae, model, params, self.text, gained[lost], codes[..., lost],
                (merge.losses, own.losses), others, seed=self.seed,
            )  # fmt: skip
        return SpecialistStory(
            parent,
            own.loss,
            len(gained),
            len(change.lowered),
            len(find_changes(base.turned, own.turned, seed=self.seed).raised),
            found_by_chance(base.mean, own.mean, seed=self.seed),
            counted(fates),
            told,
            restoration,
        )

    def _examples(self, codes: np.ndarray) -> tuple[tuple[tuple[str, float], ...], ...]:
        """Where a latent is strongest, one piece of each of the strongest contexts."""
        found = []
        peak = float(codes.max(initial=0))
        for row in np.argsort(-codes.max(axis=1), kind="stable")[:_EXAMPLES].tolist():
            if peak > 0 and codes[row].max() > 0:
                at = int(codes[row].argmax())
                places = range(max(0, at - _AROUND), min(codes.shape[1], at + _AROUND + 1))
                tokens = self.text.tokens[row]
                found.append(
                    tuple(
                        (self.tokenizer.shown_piece(int(tokens[n])), round(float(codes[row, n]) / peak, 3))
                        for n in places
                    )
                )
        return tuple(found)


def _three(base: np.ndarray, own: np.ndarray, merge: np.ndarray, latent: int) -> tuple[float, float, float]:
    first, second, third = (float(values[:, latent].mean()) for values in (base, own, merge))
    return first, second, third
