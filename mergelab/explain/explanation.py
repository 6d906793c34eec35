"""What a merge did to the latents of its parents, as plain data, and in sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mergelab.explain.fates import FATES, Fate
from mergelab.explain.restoration import Restoration

__all__ = ["Explanation", "GainedLatent", "SpecialistStory"]


@dataclass(frozen=True)
class GainedLatent:
    """A latent that a specialist has more of than the base.

    Attributes:
        latent: its number.
        rates: fraction of tokens at which it is active, in base, specialist and merge.
        means: mean code over tokens, in the same.
        p: probability of such a find among all latents by chance.
        retained: share of the gain that the merge keeps.
        interval: 95 % interval of that over contexts.
        fate: what became of it.
        examples: pieces of text where it is strongest in the specialist: token and strength from 0 to 1.
    """

    latent: int
    rates: tuple[float, float, float]
    means: tuple[float, float, float]
    p: float
    retained: float
    interval: tuple[float, float]
    fate: Fate
    examples: tuple[tuple[tuple[str, float], ...], ...] = ()


@dataclass(frozen=True)
class SpecialistStory:
    """One parent.

    Attributes:
        name: its name.
        loss: its loss on the text, in nats a token.
        gained: number of latents that it gained, surer than one search in twenty by chance.
        lowered: number that it has less of.
        turned: control: how many are gained of an SAE that reads the space turned at random.
        shuffled: control: how many are gained, on average, where contexts are dealt at random.
        fates: number of latents of each fate.
        latents: those gained, the surest first, at most as many as were asked for.
        restoration: what putting lost latents back into the merge does; None where none was lost.
    """

    name: str
    loss: float
    gained: int
    lowered: int
    turned: int
    shuffled: float
    fates: Mapping[str, int]
    latents: Sequence[GainedLatent]
    restoration: Restoration | None

    def sentence(self) -> str:
        """What became of it, in a sentence."""
        if not self.gained:
            return f"{self.name} gained no latent that the criterion tells from chance."
        kinds = ", ".join(f"{self.fates[fate]} {fate}" for fate in FATES if self.fates.get(fate))
        control = f"a random direction set finds {self.turned}, shuffled documents {self.shuffled:.1f}"
        found = f"{self.name} gained {self.gained} latents ({control}); in the merge {kinds}."
        return f"{found} {self._causal()}"

    def _causal(self) -> str:
        tried = self.restoration
        if tried is None:
            return "None was lost, so none was put back."
        count = len(tried.latents)
        if tried.recovered is None:
            return (
                f"The merge is no worse than it on this text ({tried.merge:.3f} and {tried.specialist:.3f} "
                f"nats): putting back {count} latents makes {tried.restored:.3f}."
            )
        low, high = tried.better[1:]
        holds = "more" if low > 0 else "less" if high < 0 else "no surer"
        lost = tried.merge - tried.specialist
        return (
            f"Putting back {count} of them returns {tried.recovered:.0%} of the {lost:.3f} nats that the "
            f"merge lost, {holds} than random latents of the same size do "
            f"({(tried.merge - tried.random) / lost:.0%})."
        )


@dataclass(frozen=True)
class Explanation:
    """The whole of it.

    Attributes:
        recipe: the recipe's name.
        base: the base's.
        site: site that the SAE reads.
        contexts: number of contexts.
        tokens: number of tokens whose latents count.
        latents: number of latents of the SAE.
        base_loss: loss of the base on the text, in nats a token.
        merge_loss: loss of the merge.
        specialists: the parents.
        emerged: latents that the merge gained and no parent did.
        level: probability of a false find among all latents.
    """

    recipe: str
    base: str
    site: str
    contexts: int
    tokens: int
    latents: int
    base_loss: float
    merge_loss: float
    specialists: Sequence[SpecialistStory]
    emerged: Sequence[int]
    level: float

    def to_json(self) -> dict[str, Any]:
        """All of it as plain JSON."""
        return {**asdict(self), "verdict": self.verdict()}

    def verdict(self) -> list[str]:
        """The sentences that matter."""
        losses = ", ".join(f"{one.name} {one.loss:.3f}" for one in self.specialists)
        first = f"Loss in nats a token: base {self.base_loss:.3f}, {losses}, merge {self.merge_loss:.3f}."
        found = [first, *(one.sentence() for one in self.specialists)]
        if self.emerged:
            found.append(f"{len(self.emerged)} latents rose in the merge that rose in no parent.")
        return found


def counted(fates: Sequence[Fate]) -> dict[str, int]:
    """How many there are of each fate."""
    found = Counter(fates)
    return {fate: found[fate] for fate in FATES}
