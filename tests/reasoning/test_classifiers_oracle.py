"""Heads that transformers saves give what transformers computes, and it opens those that are saved here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mergelab.reasoning.reward_files import load_reward_model, save_reward_model
from tests.models.tiny_models import CONFIGS, MASK, TOKENS, weights
from tests.reasoning.classifiers import CASES, in_transformers, write_classifier

pytestmark = pytest.mark.oracle


@pytest.mark.parametrize(("kind", "head"), CASES)
def test_a_classifier_gives_what_transformers_computes(kind: str, head: str, tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "theirs", kind, head)
    reward, params = load_reward_model(folder)
    expected = in_transformers(folder, head)
    found = np.asarray(reward.apply(params, TOKENS, MASK))
    real = slice(None) if head == "sequence" else MASK
    np.testing.assert_allclose(found[real], expected[real], rtol=0, atol=1e-4)
    assert np.abs(expected[real]).max() > 0.1
    # What is saved here opens there, with every tensor in its place.
    saved = save_reward_model(reward, params, tmp_path / "ours")
    np.testing.assert_allclose(in_transformers(saved, head)[real], expected[real], rtol=0, atol=1e-5)


def test_a_head_of_two_layers_is_torchs_sequence(tmp_path: Path) -> None:
    """The head of Qwen2.5-Math-PRM: `Sequential(Linear, ReLU, Linear)` on the last hidden states."""
    import torch
    import transformers

    width = CONFIGS["qwen2"]["hidden_size"]
    rng = np.random.default_rng(1)
    layers = {
        "score.0.weight": rng.normal(0, 0.3, (width, width)),
        "score.0.bias": rng.normal(0, 0.3, width),
        "score.2.weight": rng.normal(0, 0.3, (2, width)),
        "score.2.bias": rng.normal(0, 0.3, 2),
    }
    layers = {name: x.astype(np.float32) for name, x in layers.items()}
    folder = write_classifier(tmp_path / "model", "qwen2", "token", 2, **layers)
    reward, params = load_reward_model(folder)
    assert reward.hidden == (width,) and reward.biases
    config = transformers.AutoConfig.for_model(**CONFIGS["qwen2"])
    base = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
    names = {
        name.removeprefix("model."): torch.tensor(x)
        for name, x in weights(reward.model).items()
        if name.startswith("model.")
    }
    base.load_state_dict(names, strict=True)
    head = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.ReLU(), torch.nn.Linear(width, 2))
    head.load_state_dict({name.removeprefix("score."): torch.tensor(x) for name, x in layers.items()})
    with torch.no_grad():
        hidden = base(
            torch.tensor(TOKENS, dtype=torch.int64),
            attention_mask=torch.tensor(MASK.astype(np.int64)),
            position_ids=torch.tensor(np.maximum(MASK.cumsum(1) - 1, 0)),
        ).last_hidden_state
        expected = head(hidden).numpy()
    found = np.asarray(reward.apply(params, TOKENS, MASK))
    np.testing.assert_allclose(found[MASK], expected[MASK], rtol=0, atol=1e-4)


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_losses_and_their_gradients_are_torchs(eps: float) -> None:
    """DPO's loss and PPO's objective as torch writes them, in float64."""
    import jax
    import torch

    from mergelab.reasoning.preferences import bradley_terry_loss, dpo_loss
    from mergelab.reasoning.rewards import clipped_objective, group_advantages

    rng = np.random.default_rng(0)
    four = rng.normal(-3, 1, (4, 9)).astype(np.float32)
    torched = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in four]
    margin = 0.3 * ((torched[0] - torched[2]) - (torched[1] - torched[3]))
    sure = torch.nn.functional.logsigmoid
    loss = (-(1 - eps) * sure(margin) - eps * sure(-margin)).mean()
    loss.backward()
    ours = jax.value_and_grad(lambda *x: dpo_loss(*x, beta=0.3, label_smoothing=eps).mean(), argnums=(0, 1))
    value, slopes = ours(*four)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-6)
    for slope, x in zip(slopes, torched, strict=False):
        np.testing.assert_allclose(slope, x.grad.numpy(), rtol=1e-5, atol=1e-8)

    rewards = rng.normal(size=(3, 6)).astype(np.float32)
    theirs = torch.tensor(rewards, dtype=torch.float64)
    scaled = (theirs - theirs.mean(1, keepdim=True)) / (theirs.std(1, keepdim=True) + 1e-4)
    advantages = group_advantages(rewards)
    np.testing.assert_allclose(advantages, scaled.numpy(), rtol=1e-5)
    new, old = rng.normal(-1, 0.3, (2, 3, 6)).astype(np.float32)
    policy = torch.tensor(new, dtype=torch.float64, requires_grad=True)
    ratio = torch.exp(policy - torch.tensor(old, dtype=torch.float64))
    objective = torch.minimum(ratio * scaled, torch.clamp(ratio, 0.8, 1.2) * scaled).mean()
    objective.backward()
    value, slope = jax.value_and_grad(lambda x: clipped_objective(x, old, advantages).mean())(new)
    np.testing.assert_allclose(value, objective.item(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(slope, policy.grad.numpy(), rtol=1e-4, atol=1e-6)

    pair = [torch.tensor(x, dtype=torch.float64) for x in four[:2]]
    np.testing.assert_allclose(
        bradley_terry_loss(four[0], four[1], margin=0.5), -sure(pair[0] - pair[1] - 0.5).numpy(), rtol=1e-5
    )
