"""Named sites: how one forward pass reads and edits its activations, without hooks or hidden state."""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import jax
from jax.tree_util import Partial

from mergelab.compat import register_dataclass
from mergelab.errors import SiteError, did_you_mean
from mergelab.models.cache import ArrayLeaf

__all__ = ["Edit", "Shape", "Tap", "TokenPlaces", "as_partials", "match_sites", "takes"]

# An edit maps an activation to one of the same shape and dtype; it is `f(array)`, or `f(array, site)`, and
# names as further parameters what it asks for of the tokens (`TokenPlaces`).
Edit = Callable[..., jax.Array]
# A symbolic shape: numbers, and names such as "batch" and "length" for what a call decides.
Shape = tuple[str | int, ...]


@register_dataclass
@dataclass(frozen=True)
class TokenPlaces:
    """What edits are told of the tokens of a pass; an edit asks by a parameter of the same name.

    Attributes:
        positions: positions in their rows, counting real tokens, int32 `[batch, length]`.
        mask: True for real tokens, bool `[batch, length]`.
        columns: columns of the tokens that the caller gave, int32 `[batch, length]`; in a generation new
            tokens follow the prompt's, and what pads a prompt further has negative ones. None in a pass
            without a cache, whose columns are counted from 0.
        generated: True for tokens that a generation has added to its prompt, bool `[batch, length]`.
    """

    positions: ArrayLeaf
    mask: ArrayLeaf
    columns: ArrayLeaf | None
    generated: ArrayLeaf


_ASKED = tuple(field.name for field in fields(TokenPlaces))


def as_partials(edit: Mapping[str, Edit] | None) -> dict[str, Partial]:
    """Edits as pytrees that compiled functions take as arguments.

    An edit that is a `jax.tree_util.Partial` already keeps its arrays as arguments: another steering vector
    then needs no new compilation.
    """
    return {site: f if isinstance(f, Partial) else Partial(f) for site, f in (edit or {}).items()}


def match_sites(sites: Mapping[str, Shape], pattern: str) -> list[str]:
    """The sites that a name or glob pattern (`blocks.*.attn.z`; `*` spans dots) selects, in forward order.

    Raises:
        SiteError: no site matches.
    """
    found = [pattern] if pattern in sites else [name for name in sites if fnmatch.fnmatchcase(name, pattern)]
    if not found:
        raise SiteError(
            f"no site of this model matches {pattern!r}{did_you_mean(_without_hooks(pattern), sites)}; "
            "Model.sites() lists its sites."
        )
    return found


_HOOKS = {
    "hook_attn_out": "attn.out", "hook_mlp_out": "mlp.out", "hook_": "", "ln1.": "attn_norm.",
    "ln2.": "mlp_norm.", "ln_final.": "final_norm.",
}  # fmt: skip
"""What TransformerLens says where sites here say something else."""


def _without_hooks(name: str) -> str:
    """A hook of TransformerLens (`blocks.3.hook_resid_post`) as the site would be called here."""
    for theirs, ours in _HOOKS.items():
        name = name.replace(theirs, ours)
    return name


class Tap:
    """The reads and edits of one forward pass: the model calls it with every site's name and value.

    It is made by the call that uses it and dies with it. A captured value is the edited one. Several edits of
    one site apply in the order given.

    Args:
        sites: the model's sites, in forward order.
        capture: names or glob patterns to keep.
        edit: functions by name or glob pattern; a tuple of them applies in its order.
        to_the_end: whether the pass must run on after the last captured site.
        places: what edits are told of the tokens; None where there is none.

    Raises:
        SiteError: a name or pattern selects no site.
    """

    def __init__(
        self,
        sites: Mapping[str, Shape],
        capture: str | Sequence[str] = (),
        edit: Mapping[str, Edit | tuple[Edit, ...]] | None = None,
        to_the_end: bool = True,
        places: TokenPlaces | None = None,
    ) -> None:
        patterns = [capture] if isinstance(capture, str) else capture
        self._wanted = {name for pattern in patterns for name in match_sites(sites, pattern)}
        self._missing = set(self._wanted)
        self._edits: dict[str, list[Edit]] = {}
        for pattern, function in (edit or {}).items():
            for name in match_sites(sites, pattern):
                self._edits.setdefault(name, []).extend(
                    function if isinstance(function, tuple) else [function]
                )
        self._to_the_end, self._places = to_the_end, places
        self.captured: dict[str, jax.Array] = {}

    def __call__(self, site: str, value: jax.Array) -> jax.Array:
        """Edits and keeps the value of a site, and returns what the forward pass goes on with.

        Raises:
            SiteError: an edit returned another shape or dtype.
        """
        for function in self._edits.get(site, ()):
            takes_name, asked = takes(function)
            told = {} if self._places is None else {name: getattr(self._places, name) for name in asked}
            edited = function(value, site, **told) if takes_name else function(value, **told)
            value = _same_kind(site, value, edited)
        if site in self._wanted:
            self.captured[site] = value
            self._missing.discard(site)
        return value

    def uses(self, site: str) -> bool:
        """Whether the site is captured or edited: a fused computation may skip a site that is neither."""
        return site in self._wanted or site in self._edits

    def edits(self, site: str) -> bool:
        """Whether the site is edited: what follows must then be computed from what the edit makes of it."""
        return site in self._edits

    @property
    def done(self) -> bool:
        """True once nothing after this point is asked for."""
        return not self._to_the_end and not self._missing


def takes(function: Edit) -> tuple[bool, tuple[str, ...]]:
    """Whether an edit takes the site's name, as its second required parameter; and what of `TokenPlaces`."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False, ()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    asked = tuple(
        p.name for p in parameters if p.name in _ASKED and p.kind != inspect.Parameter.POSITIONAL_ONLY
    )
    required = [p for p in parameters if p.default is inspect.Parameter.empty and p.name not in asked]
    return sum(p.kind in positional for p in required) >= 2, asked


def _same_kind(site: str, before: jax.Array, after: Any) -> jax.Array:
    shape, dtype = getattr(after, "shape", None), getattr(after, "dtype", None)
    if shape != before.shape or dtype != before.dtype:
        raise SiteError(
            f"the edit of site {site!r} returned {dtype} {shape} for {before.dtype} {before.shape}; an edit "
            "must keep shape and dtype."
        )
    return after
