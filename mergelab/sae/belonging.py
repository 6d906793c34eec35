"""Whether an SAE from elsewhere belongs to a model: one batch at its site, and at its neighbors.

An SAE that does not say by a digest whose activations it was trained on may meet another model, another
site, or texts without the BOS token it always saw; its figures then look bad and say nothing. What it makes
of one batch tells: a sound SAE has a normalized error of 0.05 to 0.5, and the mean of the tokens has 1.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import jax
import numpy as np

from mergelab.activations.kept import median_norm, row_norms
from mergelab.activations.model_activations import ModelActivations
from mergelab.sae.sae import SAE

__all__ = ["Belonging", "check_belongs", "warn_where_foreign"]

_SOUND, _POOR, _BETTER = 0.3, 0.7, 0.8
"""NMSE below which nothing else is tried, and above which a warning is due; part of it that tells a better
place: on SmolLM2-135M the next block has 1.2 to 1.5 times the NMSE of the right one."""

_ROWS, _CODES = 1024, 1 << 26
_NEIGHBORS = ("resid_pre", "resid_mid", "resid_post", "attn.out", "mixer.out", "mlp.input", "mlp.out")
_BOS, _CENTERED = "BOS in front of each context", "the mean over the width subtracted"


@dataclass(frozen=True)
class Belonging:
    """What one batch says.

    Attributes:
        site: the site that was read.
        nmse: squared error over that of the mean, on the tokens that count by the source's rule.
        tokens: how many those are.
        elsewhere: the same figure at other sites of the block, at the same site of the blocks beside it, and
            in other ways the SAE may have been trained; empty where `nmse` is that of a sound SAE.
        target_known: whether the SAE says what it writes, or was taken for an autoencoder.
    """

    site: str
    nmse: float
    tokens: int
    elsewhere: Mapping[str, float]
    target_known: bool = True

    def best(self) -> str | None:
        """What fits much better than the site, and better than the mean, if anything does."""
        name = min(self.elsewhere, key=lambda one: self.elsewhere[one], default=None)
        if name is None or not self.elsewhere[name] < min(_BETTER * self.nmse, 1):
            return None
        return name

    def warning(self) -> str | None:
        """The sentence that is due; None where the SAE fits."""
        best = self.best()
        if best is None and not self.nmse > _POOR:
            return None
        said = (
            f"the SAE has an NMSE of {self.nmse:.2f} at {self.site} of this model (on {self.tokens} tokens; "
            "1 is the mean, and sound SAEs have 0.05 to 0.5)"
        )
        if best is None:
            target = "" if self.target_known else ", or a transcoder (target_site, --target-site)"
            return f"{said}: it is of another model or site, was trained on other texts{target}"
        found = f"{self.elsewhere[best]:.2f}"
        if best == _BOS:
            return f"{said}, but {found} with {best}: give it contexts that begin with it"
        if best == _CENTERED:
            return f"{said}, but {found} with {best}: it was trained on a model with centered weights"
        return f"{said}, but {found} at {best}: name that site (site, --site)"


def check_belongs(
    sae: SAE, source: ModelActivations, *, bos: Callable[[], int | None] = lambda: None
) -> Belonging:
    """What the first tokens of a source say of an SAE that reads its first site.

    Args:
        sae: SAE of one site.
        source: model and text; of a transcoder with its target as second site.
        bos: gives the id of the token that begins texts; called only where the figure is poor.
    """
    length = source.tokens.shape[1]
    rows = max(min(_ROWS, _CODES // sae.n_latents), length)
    contexts = max(rows // length, 1)
    counted = None if source.counted is None else source.counted[:contexts]
    few = replace(source, tokens=source.tokens[:contexts], counted=counted)
    found = source.read_sites(0, few.rows)  # by the program that the evaluation will run
    nmse, tokens = _nmse(sae, found[0], found[-1], few)
    site = source.sites[0]
    if nmse < _SOUND:
        return Belonging(site, nmse, tokens, {})
    return Belonging(site, nmse, tokens, _elsewhere(sae, few, found, bos()), sae.target_known)


def warn_where_foreign(
    sae: SAE, source: ModelActivations, *, bos: Callable[[], int | None] = lambda: None
) -> None:
    """Warns, with the figure, where an SAE does not fit the source; arguments as of `check_belongs`."""
    said = check_belongs(sae, source, bos=bos).warning()
    if said is not None:
        warnings.warn(said, stacklevel=3)


@jax.jit
def _output(sae: SAE, x: jax.Array) -> jax.Array:
    return sae(x)


def _nmse(sae: SAE, x: np.ndarray, target: np.ndarray, few: ModelActivations) -> tuple[float, int]:
    """The error on tokens that count over that of their mean, and how many they are."""
    plain = replace(sae, config=replace(sae.config, metadata={}))  # shares compiled programs
    out = np.asarray(_output(plain, x), np.float64)
    norms, usual = row_norms(x), few.by_place.reshape(-1)
    usual = usual & ~(norms > few.rule.norm_limit(median_norm(norms[usual])))
    wanted = target[usual].astype(np.float64)
    spread = float(np.square(wanted - wanted.mean(axis=0)).sum())
    error = float(np.square(wanted - out[usual]).sum())
    return error / spread if spread > 0 else float("nan"), int(usual.sum())


def _elsewhere(
    sae: SAE, few: ModelActivations, found: tuple[np.ndarray, ...], bos: int | None
) -> dict[str, float]:
    site, target = few.sites[0], None if len(few.sites) == 1 else found[-1]
    tried: dict[str, float] = {}
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", site)
    if block is not None:
        known, number = few.model.sites(), int(block[1])
        # The same site of the blocks beside it: libraries count from 0, from 1, and from the embeddings.
        names = [f"blocks.{number}.{name}" for name in _NEIGHBORS]
        names += [f"blocks.{beside}.{block[2]}" for beside in (number - 1, number + 1)]
        names = tuple(name for name in names if name not in few.sites and len(known.get(name, ())) == 3)
        others = replace(few, sites=names)
        for name, x in zip(names, others.read_sites(0, few.rows) if names else (), strict=True):
            if x.shape[1] == sae.d_in:
                tried[name] = _nmse(sae, x, x if target is None else target, few)[0]
    if target is None and "resid" in site:
        centered = found[0] - found[0].mean(axis=1, keepdims=True)
        tried[_CENTERED] = _nmse(sae, centered, centered, few)[0]
    if bos is not None and not (few.tokens[:, 0] == bos).all():
        begun = np.concatenate([np.full_like(few.tokens[:, :1], bos), few.tokens[:, :-1]], axis=1)
        with_bos = replace(few, tokens=begun)
        rows = with_bos.read_sites(0, few.rows)
        tried[_BOS] = _nmse(sae, rows[0], rows[-1], with_bos)[0]
    return tried
