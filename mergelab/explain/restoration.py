"""The causal check: what the merge lost of a specialist is put back, and so are latents of no account."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from mergelab.explain.readings import SharedContexts, codes_at, losses_with
from mergelab.models.model import Model, Params
from mergelab.sae.sae import SAE

__all__ = ["Restoration", "restore"]

_BOOTSTRAPS = 999


@dataclass(frozen=True)
class Restoration:
    """Losses of the merge, in nats a token, means over contexts.

    Attributes:
        latents: latents that were put back at the specialist's strength.
        merge: loss of the merge as it is.
        specialist: loss of the specialist.
        restored: loss of the merge with them.
        random: loss with as many other latents in their place, of the same length at every token: a mean
            over draws.
        draws: loss in each of those draws.
        better: `random - restored`, and the ends of its 95 % interval over contexts: above 0 these latents
            are what helps, not any change of that size.
    """

    latents: tuple[int, ...]
    merge: float
    specialist: float
    restored: float
    random: float
    draws: tuple[float, ...]
    better: tuple[float, float, float]

    @property
    def recovered(self) -> float | None:
        """Share of what the merge lost against the specialist that comes back; None where it lost nothing."""
        lost = self.merge - self.specialist
        return (self.merge - self.restored) / lost if lost > 0 else None


def restore(
    sae: SAE,
    model: Model,
    merged: Params,
    contexts: SharedContexts,
    latents: np.ndarray,
    wanted: np.ndarray,
    losses: tuple[np.ndarray, np.ndarray],
    others: np.ndarray,
    *,
    draws: int = 5,
    seed: int = 0,
) -> Restoration:
    """Puts latents back at the SAE's site of the merge, token by token.

    What is added is `(wanted - codes) @ W_dec`: everything that the SAE does not explain stays as it is.

    Args:
        sae: SAE of the site, an autoencoder.
        model: the merge.
        merged: its parameters.
        contexts: the text.
        latents: indices of the latents.
        wanted: their codes in the specialist: `[contexts, length, latents]`, 0 at tokens that do not count.
        losses: losses of each context of the merge and of the specialist.
        others: latents that the control draws from.
        draws: draws of the control.
        seed: their seed.
    """
    codes, units = codes_at(sae, model, merged, contexts, latents)
    change = (wanted - codes) * units
    decoder = np.asarray(sae.W_dec, np.float32)

    def put_back(start: int, stop: int) -> np.ndarray:
        return change[start:stop] @ decoder[latents]

    def in_their_place(start: int, stop: int, *, chosen: np.ndarray) -> np.ndarray:
        length = np.linalg.norm(put_back(start, stop), axis=-1, keepdims=True)
        found = change[start:stop] @ decoder[chosen]
        own = np.linalg.norm(found, axis=-1, keepdims=True)
        return np.divide(found * length, own, out=np.zeros_like(found), where=own > 0)

    restored = losses_with(model, merged, contexts, put_back)
    draw = np.random.default_rng([seed, 3])
    controls = []
    for _ in range(draws):
        chosen = draw.choice(others, len(latents), replace=len(others) < len(latents))
        controls.append(losses_with(model, merged, contexts, partial(in_their_place, chosen=chosen)))
    random = np.mean(controls, axis=0)
    count = len(restored)
    gain = random - restored
    resampled = draw.multinomial(count, np.full(count, 1 / count), _BOOTSTRAPS) @ gain / count
    low, high = np.quantile(resampled, [0.025, 0.975])
    merge, specialist = losses
    return Restoration(
        tuple(latents.tolist()),
        float(merge.mean()),
        float(specialist.mean()),
        float(restored.mean()),
        float(random.mean()),
        tuple(float(one.mean()) for one in controls),
        (float(gain.mean()), float(low), float(high)),
    )
