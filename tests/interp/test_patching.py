"""Patching finds planted paths; attribution patching is its first order; path patching keeps paths apart."""

from __future__ import annotations

import numpy as np
import pytest
from jax.tree_util import Partial

from mergelab.errors import SiteError
from mergelab.interp.logit_metrics import logit_difference
from mergelab.interp.patching import attribution_patching, patch_grid
from mergelab.interp.path_patching import path_patching
from tests.interp.domains import Trained, lines
from tests.interp.meshes import on_mesh
from tests.interp.planted import planted
from tests.interp.running import logits_of, sites_of

LENGTH = 5
TARGET = np.random.default_rng(1).integers(0, 12, (3, LENGTH)).astype(np.int32)
SOURCE = np.where(np.arange(LENGTH)[None] == 1, (TARGET + 5) % 12, TARGET).astype(np.int32)
METRIC = logit_difference([1] * 3, [2] * 3)


def test_patching_finds_the_planted_path() -> None:
    model, params = planted()
    grid = patch_grid(model, params, SOURCE, TARGET, "blocks.*.resid_pre", METRIC, batch=2, cells_at_once=3)
    assert grid.sites == ("blocks.0.resid_pre", "blocks.1.resid_pre")
    assert grid.patched.shape == (3, 2, LENGTH)
    recovered = grid.recovered
    # Before block 0 the difference is at token 1 alone; block 0 spreads it over all later tokens.
    np.testing.assert_allclose(recovered[0], [0, 1, 0, 0, 0], atol=1e-3)
    assert recovered[1, 0] == 0 and (recovered[1, 1:] > 0.1).all()
    heads = patch_grid(model, params, SOURCE, TARGET, "blocks.*.attn.z", METRIC, by_head=True)
    assert heads.patched.shape == (3, 2, LENGTH, 4)
    big = np.abs(heads.recovered) > 0.02
    assert set(zip(*(axis.tolist() for axis in np.nonzero(big.any(axis=1))), strict=True)) == {
        (0, 1), (0, 3), (1, 2),
    }  # fmt: skip
    # A cell is the pass in which that activation is replaced.
    taken = sites_of(model, params, SOURCE, "blocks.0.attn.z")["blocks.0.attn.z"]
    edit = {"blocks.0.attn.z": lambda z: z.at[:, 3, 1].set(taken[:, 3, 1])}
    logits = logits_of(model, params, TARGET, edit=edit)
    np.testing.assert_allclose(heads.patched[:, 0, 3, 1], logits[:, -1, 1] - logits[:, -1, 2], rtol=1e-5)
    assert (np.abs(heads.effect[:, 0, 3, 1]) > 1e-3).all()
    assert not big[0, :-1, 3].any() and not big[1, :-1, 2].any(), "writers of logits act at the last token"


def test_attribution_patching_is_the_first_order(domains: Trained) -> None:
    """For prompts whose activations differ little, the estimate's error is of second order."""
    model, params = domains.model, domains.params
    table = params["embed"]["embedding"]
    target, place = lines(0, 4, 8), np.arange(8)[None] == 1
    source, target = np.where(place, 12, target), np.where(place, 2, target)
    metric = logit_difference([3] * 4, [13] * 4)

    def errors(step: float) -> tuple[float, float]:
        # Token 12 becomes one that is a small step away from token 2.
        near = {**params, "embed": {"embedding": table.at[12].set((1 - step) * table[2] + step * table[12])}}
        arguments = (model, near, source, target, "blocks.*.attn.out", metric)
        exact, estimate = patch_grid(*arguments).effect, attribution_patching(*arguments).effect
        return float(np.abs(exact - estimate).max()), float(np.abs(exact).max())

    (error, size), (smaller, smaller_size) = errors(0.2), errors(0.05)
    assert smaller < 0.1 * smaller_size
    assert smaller_size < size / 3 and smaller < error / 8, (error, size, smaller, smaller_size)


def test_path_patching_keeps_the_two_ways_apart() -> None:
    model, params = planted()
    direct = path_patching(model, params, SOURCE, TARGET, "blocks.0.attn.z", "logits", METRIC, by_head=True)

    def through(head: int | None) -> np.ndarray:
        found = path_patching(
            model, params, SOURCE, TARGET, "blocks.0.attn.z", "blocks.1.attn.v", METRIC, by_head=True,
            receiver_head=head, batch=2,
        )  # fmt: skip
        assert found.patched.shape == (3, 1, 1, 4)
        return np.abs(found.recovered[0, 0])

    one, other = np.abs(direct.recovered[0, 0]), through(None)
    assert one.argmax() == 3 and other.argmax() == 1
    assert np.delete(one, 3).max() < 0.01 < 0.05 < one[3]
    assert np.delete(other, 1).max() < 0.01 < 0.5 < other[1]
    # The two ways together are all there is, and of the receiver's heads only the second reads.
    assert one.sum() + other.sum() == pytest.approx(1, abs=0.02)
    np.testing.assert_allclose(through(2), other, atol=1e-6)
    assert through(0).max() < 1e-6


@pytest.mark.slow
def test_grids_do_not_depend_on_batches_or_on_the_mesh(domains: Trained) -> None:
    model, params = domains.model, domains.params
    source, target = lines(0, 3, 6), lines(1, 3, 6)
    metric = Partial(lambda logits: logits[:, -1, 2:12].sum(axis=-1))
    whole = patch_grid(model, params, source, target, "blocks.*.mlp.out", metric)
    parts = patch_grid(
        model, on_mesh(model, params), source, target, "blocks.*.mlp.out", metric, batch=2, cells_at_once=5
    )
    np.testing.assert_allclose(parts.patched, whole.patched, rtol=1e-4, atol=1e-3)


def test_positions_are_those_of_each_prompts_real_tokens() -> None:
    model, params = planted()
    # The first prompt is padded in front, the second behind, the third not at all.
    mask = np.array([[0, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool)
    metric = Partial(lambda logits: (logits[..., 1] - logits[..., 2]).sum(axis=-1))
    arguments = (model, params, (TARGET + 5) % 12, TARGET, "blocks.*.resid_pre", metric)
    whole = patch_grid(*arguments, mask=mask, batch=2)
    found = patch_grid(*arguments, mask=mask, positions=(1, -1), batch=2, cells_at_once=3)
    assert whole.patched.shape == (3, 2, LENGTH) and found.patched.shape == (3, 2, 2)
    columns = np.array([[2, 4], [1, 2], [1, 4]])
    wanted = np.take_along_axis(whole.patched, columns[:, None], axis=2)
    np.testing.assert_allclose(found.patched, wanted, rtol=1e-5)
    assert np.abs(found.patched[..., 0] - found.patched[..., 1]).min() > 1e-3
    np.testing.assert_allclose(found.source, whole.source)
    with pytest.raises(SiteError, match="positions is empty"):
        patch_grid(*arguments, mask=mask, positions=())
    with pytest.raises(SiteError, match="position 3"):
        patch_grid(*arguments, mask=mask, positions=3)


def test_what_cannot_be_patched_is_refused() -> None:
    model, params = planted()
    with pytest.raises(SiteError, match="do not pair up"):
        patch_grid(model, params, SOURCE[:2], TARGET, "embed", METRIC)
    with pytest.raises(SiteError, match="not one activation for each token"):
        patch_grid(model, params, SOURCE, TARGET, "blocks.0.attn.pattern", METRIC)
    with pytest.raises(SiteError, match="equally many"):
        patch_grid(model, params, SOURCE, TARGET, "blocks.0.mlp.out", METRIC, by_head=True)
    with pytest.raises(SiteError, match="there are 3 prompts"):
        patch_grid(model, params, SOURCE, TARGET, "embed", logit_difference([1, 1], [2, 2]))
    with pytest.raises(SiteError, match="does not come before"):
        path_patching(model, params, SOURCE, TARGET, "blocks.1.attn.z", "blocks.1.attn.v", METRIC)
    with pytest.raises(SiteError, match="no head 4"):
        path_patching(
            model, params, SOURCE, TARGET, "blocks.0.attn.z", "blocks.1.attn.v", METRIC, receiver_head=4
        )
