"""A traced decision: parts sum exactly, swaps end where they should, and the planted end is found."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner

from mergelab.cli import options
from mergelab.cli.main import cli
from mergelab.errors import DecodingError, TokenError
from mergelab.interp.attribution import direct_logit_attribution
from mergelab.models.load import load_model
from mergelab.models.residual_stream import unembedding
from mergelab.models.save import save_model
from mergelab.reasoning.decision_layers import attribute_difference, read_layers
from mergelab.reasoning.decision_pair import DecisionPair, open_pair, stacked
from mergelab.reasoning.decision_paths import direct_path, sparse_token_sum, token_analogy
from mergelab.reasoning.decision_prompts import find_stopping_prompts
from mergelab.reasoning.decision_swaps import swap_activations, swap_weights
from mergelab.reasoning.decision_trace import DecisionTrace, trace_decision
from mergelab.reasoning.decision_values import value_contributions
from mergelab.text.tokenizer import load_tokenizer
from tests.interp.running import logits_of
from tests.models.tiny_models import tiny
from tests.tuning import small

CONTEXTS = [[3, 4, 5, 6], [7, 8, 9, 10, 11]]
PROMPTS = ["w1 w2", "w3 w5 w7", "w4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write(tmp_path_factory.mktemp("decision") / "base")


@pytest.fixture(scope="module")
def pair(folder: Path) -> DecisionPair:
    """A model that always ends, and the same with an MLP that speaks against the end.

    Tokens have random embeddings, tied; the last norm's gain and one value vector decide.
    """
    model, params = load_model(folder)
    params = jax.tree.map(lambda x: x, params)
    rng = np.random.default_rng(0)
    embedding = rng.normal(0, 1, params["embed"]["embedding"].shape).astype(np.float32)
    params["embed"]["embedding"] = jnp.asarray(embedding)
    first, second = (jax.tree.map(lambda x: x, params) for _ in range(2))
    for one, sign in ((first, 1.0), (second, -1.0)):
        block = {name: dict(part) for name, part in one["blocks_0"].items()}
        block["mlp"]["down"] = {"kernel": jnp.asarray(sign * 40 * np.tile(embedding[0], (24, 1)))}
        # Every neuron is on: the gate is large on all that a context may hold.
        block["mlp"]["up"] = {"kernel": jnp.abs(block["mlp"]["up"]["kernel"])}
        one["blocks_0"] = block
    return open_pair((model, first), (model, second), ["w3", 7], tokenizer=load_tokenizer(folder), chat=False)


@pytest.fixture(scope="module")
def trace(pair: DecisionPair, tmp_path_factory: pytest.TempPathFactory) -> tuple[DecisionTrace, Path]:
    out = tmp_path_factory.mktemp("trace") / "out"
    found = trace_decision(
        pair.first, pair.second, PROMPTS, ["w3", 7], out, tokenizer=pair.tokenizer, chat=False,
        endings=("", "w9"), most=2, max_new_tokens=4, positions=3,
    )  # fmt: skip
    return found, out


def test_tokens_are_found_and_models_of_other_vocabularies_refused(pair: DecisionPair) -> None:
    assert pair.chosen == {"</s>": 0, "w3": 6, "w4": 7} and pair.ends == (0,) and pair.swappable
    other = replace(pair.first[0], config=replace(pair.first[0].config, vocab_size=99))
    with pytest.raises(TokenError, match="vocabulary of 32 tokens and second one of 99"):
        open_pair(pair.first, (other, {}), [], tokenizer=pair.tokenizer)
    with pytest.raises(TokenError, match="99 is not a token"):
        open_pair(pair.first, pair.second, [99], tokenizer=pair.tokenizer)
    with pytest.raises(TokenError, match="in memory"):
        open_pair(pair.first, pair.second, [])
    with pytest.raises(DecodingError, match="no prompts"):
        find_stopping_prompts(pair, [])


def test_the_parts_of_the_difference_sum_to_it(pair: DecisionPair) -> None:
    found = attribute_difference(pair, CONTEXTS)
    tokens, mask = stacked(CONTEXTS)
    own = [logits_of(*one, tokens, mask=jnp.asarray(mask))[:, -1, pair.ids] for one in pair.models]
    np.testing.assert_allclose(found.difference.sum(axis=1), own[1] - own[0], atol=1e-3, rtol=1e-5)
    assert found.names == ("embed", "blocks.0.attn.out", "blocks.0.mlp.out")
    # What was planted is where it was planted.
    assert np.abs(found.difference[:, 2, 0]).min() > 10 * np.abs(found.difference[:, :2, 0]).max()
    # Padding and other rows change nothing.
    alone = attribute_difference(pair, CONTEXTS[:1])
    np.testing.assert_allclose(alone.parts[:, 0], found.parts[:, 0], atol=1e-4)


def test_the_last_layer_read_is_the_model(pair: DecisionPair) -> None:
    tokens, mask = stacked(CONTEXTS)
    for loaded in pair.models:
        read = read_layers(loaded, CONTEXTS, pair.ids, positions=3)
        own = logits_of(*loaded, tokens, mask=jnp.asarray(mask))[:, -3:]
        np.testing.assert_allclose(read.logits[:, -1], own[..., pair.ids], atol=1e-4, rtol=1e-5)
        normal = np.log(np.exp(own - own.max(-1, keepdims=True)).sum(-1)) + own.max(-1)
        np.testing.assert_allclose(read.log_probs[:, -1], own[..., pair.ids] - normal[..., None], atol=1e-4)
        above = (own[..., None, :] > own[..., pair.ids][..., None]).sum(-1)
        np.testing.assert_array_equal(read.ranks[:, -1], above)


@pytest.mark.parametrize("name", ["gemma2", "gpt2"])
def test_contributions_of_neurons_sum_to_that_of_their_block(name: str) -> None:
    model, params = tiny(name)
    ids = np.array([5, 9], np.int32)
    directions = np.asarray(unembedding(model, params)[:, ids].T, np.float32)
    found = value_contributions((model, params), CONTEXTS, directions).sum(axis=1)
    tokens, mask = stacked(CONTEXTS)
    for number, token in enumerate(ids.tolist()):
        parts = direct_logit_attribution(model, params, tokens, np.full(2, token), mask=mask)
        for layer in range(2):
            whole = parts.of(f"blocks.{layer}.mlp.out")[:, -1].mean()
            if name == "gpt2":  # the bias of the output is no neuron's
                bias = params[f"blocks_{layer}"]["mlp"]["down"]["bias"]
                whole -= _of_bias(model, params, tokens, mask, np.asarray(bias), directions[number])
            np.testing.assert_allclose(found[layer, number], whole, rtol=1e-3, atol=1e-3)


def _of_bias(
    model: Any, params: Any, tokens: Any, mask: Any, bias: np.ndarray, direction: np.ndarray
) -> float:
    factor = model.apply(
        params, jnp.asarray(tokens), mask=jnp.asarray(mask), capture="final_norm.scale", logits=False
    ).captured["final_norm.scale"]
    read = direction * np.asarray(params["final_norm"]["scale"])
    return float((bias @ (read - read.mean())) * np.asarray(factor)[:, -1, 0].mean())


@pytest.mark.parametrize("swap", [swap_weights, swap_activations])
def test_swaps_begin_at_the_first_model_and_end_at_the_second(pair: DecisionPair, swap: Any) -> None:
    found = swap(pair, CONTEXTS, fewest=2)
    assert found.parts == ("embed", "blocks.0", "end")
    tokens, mask = stacked(CONTEXTS)
    own = [logits_of(*one, tokens, mask=jnp.asarray(mask))[:, -1] for one in pair.models]
    own = [
        x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)
        for x in own
    ]
    means = [x[:, pair.ids].mean(axis=0) for x in own]
    np.testing.assert_allclose(found.first, means[0], atol=1e-3)
    np.testing.assert_allclose(found.cumulative[-1], means[1], atol=1e-3)
    # All that differs is one block: it alone is enough, and the others are nothing.
    np.testing.assert_allclose(found.single[1], means[1], atol=1e-3)
    np.testing.assert_allclose(found.single[0], means[0], atol=1e-3)
    assert found.enough(0) == 1 and found.order(0)[0] == 1
    # A change of the same length in a random direction does not bring the second model's decision.
    assert abs(found.random[1, 0] - means[0][0]) < 0.5 * abs(means[1][0] - means[0][0])


def test_weights_alone_are_read_as_numpy_reads_them(pair: DecisionPair) -> None:
    model, params = pair.first
    embedding = np.asarray(params["embed"]["embedding"], np.float64)
    scale = np.asarray(params["final_norm"]["scale"])
    normed = embedding / np.sqrt((embedding**2).mean(1, keepdims=True) + 1e-6) * scale
    logits = normed @ embedding.T
    expected = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    np.testing.assert_allclose(direct_path(model, params, jnp.arange(3)), expected[:3], atol=1e-3)
    rows = embedding / np.linalg.norm(embedding, axis=1, keepdims=True)
    wanted = rows[3] - rows[4] + rows[5]
    cosines = rows @ wanted / np.linalg.norm(wanted)
    cosines[[3, 4, 5]] = -9
    ids, found = token_analogy(pair.first, [3, 5], [4], k=3)
    np.testing.assert_array_equal(ids, np.argsort(-cosines)[:3])
    np.testing.assert_allclose(found, np.sort(cosines)[::-1][:3], atol=1e-5)
    with pytest.raises(TokenError, match="cannot be added up"):
        token_analogy(pair.first, [99], [])


def test_the_end_is_a_sum_of_the_tokens_it_was_made_of(pair: DecisionPair) -> None:
    model, params = pair.first
    embedding = np.array(params["embed"]["embedding"])
    centered = embedding - embedding[1:].mean(axis=0)
    embedding[0] = embedding[1:].mean(axis=0) + 2 * centered[5] - centered[9]
    planted = {**params, "embed": {"embedding": jnp.asarray(embedding)}}
    found = sparse_token_sum((model, planted), 0, k=4)
    assert set(found.terms[:2]) == {5, 9} and found.explained > 0.97
    assert found.random < 0.8 and found.others < 0.8
    assert found.weights[0] == pytest.approx(2, abs=0.2)


def test_the_trace_tells_what_was_planted_and_writes_it(trace: tuple[DecisionTrace, Path]) -> None:
    found, out = trace
    assert found.parted == found.tried == 3 and len(found.prompts) == 2
    assert all(prompt.parted and prompt.lengths == (1, 4) for prompt in found.prompts)
    end, lengths = found.endings.end[..., 0], found.endings.lengths[..., 0]
    assert end[0].min() > 0.9 > 0.1 > end[1].max()
    assert (lengths[0] == 1).all() and (lengths[1] == 4).all()
    # Another ending is another context: `w9` speaks for itself, as all tokens do here.
    assert np.abs(found.endings.end[0, :, 1] - end[0]).min() > 0.1
    assert found.values is not None and found.weight_swaps is not None and found.activation_swaps is not None
    # The planted neurons do in the second model the opposite of what they do in the first.
    for one in found.values.promoters:
        first, second = one.contributions
        assert first is not None and second is not None and second > first
        assert second == pytest.approx(-first, rel=0.05, abs=1e-3)
    written = json.loads((out / "decision.json").read_text())
    assert written == json.loads(json.dumps(found.to_json()))
    page = (out / "decision.html").read_text()
    for heading in ("Endings", "Layers", "What adds to the logits", "by weights", "Bigrams", "Embeddings"):
        assert heading in page
    assert page.count("<img") == 4


def test_the_command_writes_the_same_trace(
    pair: DecisionPair,
    folder: Path,
    trace: tuple[DecisionTrace, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(options, "configure_jax", lambda: None)
    files = {name: (folder / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    for name, (model, params) in zip(("first", "second"), pair.models, strict=True):
        save_model(model, params, tmp_path / name, files=files)
    (tmp_path / "asked.txt").write_text("\n".join(PROMPTS) + "\n")
    arguments = [
        "trace-decision", tmp_path / "first", tmp_path / "second", "--prompts", tmp_path / "asked.txt",
        "--token", "w3", "--token", "w4", "--ending", "", "--ending", "w9", "--no-chat", "--most", 2,
        "--max-new-tokens", 4, "--positions", 3, "--overwrite", "--out",
    ]  # fmt: skip
    done = CliRunner().invoke(cli, [*map(str, arguments), str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    first, then, weights, activations, place = done.stdout.splitlines()
    assert first == "first ends its answer before second on 3 of 3 prompts tried"
    assert then.startswith("P(</s>) behind the answer: ") and place == str(tmp_path / "out")
    assert "by weights: blocks.0 does most of 3" in weights and weights.endswith("takes 1")
    assert "by activations: blocks.0 does most of 3" in activations
    found, expected = (json.loads((at / "decision.json").read_text()) for at in (tmp_path / "out", trace[1]))
    assert found == expected
    # A folder that is read is never the one that is written.
    refused = CliRunner().invoke(cli, [*map(str, arguments), str(tmp_path / "second")])
    assert refused.exit_code == 2 and "second is" in refused.stderr
    assert (tmp_path / "second" / "config.json").exists()
