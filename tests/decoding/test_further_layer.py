"""The model's own layer of multi-token prediction as a draft: planted guesses whose hits are known."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

from mergelab.cli.main import cli
from mergelab.decoding import generate, greedy, pad_prompts, sample, speculate
from mergelab.decoding.transforms import Temperature
from mergelab.errors import CheckpointError
from mergelab.models.families import model_from_config
from mergelab.models.further_tokens import FurtherLayer, load_further_layer
from mergelab.models.load import load_model
from mergelab.models.model import Model, Params
from mergelab.models.table import stored_shapes
from tests.decoding.test_speculative import chi_square
from tests.models.tiny_models import CONFIGS

NEW = 9
PROMPTS = [[3, 1, 4, 5, 6], [2, 3], [6]]  # the last two follow each other, as planted
Loaded = tuple[Model, Params, FurtherLayer, Params]


def written(folder: Path, kind: str, **changes: Any) -> Path:
    """A model whose files hold a layer of multi-token prediction, weights drawn."""
    config = {**CONFIGS[kind], "vocab_size": 8, "num_nextn_predict_layers": 1, **changes}
    # The config of a model one layer longer names the tensors of its last layer.
    longer = model_from_config({**config, "num_hidden_layers": config["num_hidden_layers"] + 1})
    shapes = stored_shapes(longer.table())
    width, place = config["hidden_size"], f"model.layers.{config['num_hidden_layers']}"
    shapes |= {f"{place}.{name}.weight": (width,) for name in ("enorm", "hnorm", "shared_head.norm")}
    shapes |= {f"{place}.eh_proj.weight": (width, 2 * width)}
    shapes |= {f"{place}.{name}.weight": (8, width) for name in ("embed_tokens", "shared_head.head")}
    rng = np.random.default_rng(5)
    tensors = {}
    for name, shape in shapes.items():
        drawn = 0.4 * rng.normal(size=shape).astype(np.float32)
        tensors[name] = drawn + np.float32("norm" in name)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def loaded(folder: Path) -> Loaded:
    with pytest.warns(UserWarning, match="another head"):
        model, params = load_model(folder)
    return model, params, *load_further_layer(folder, model)


@pytest.fixture(scope="module")
def glm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("further") / "glm", "glm4_moe", num_hidden_layers=1)


def counting(found: Loaded, by: str) -> tuple[Params, Params]:
    """Weights by which token `t` is followed by `t + 1`, modulo 8, and the layer guesses so.

    Its guess is made of the embedding of the last token, or of the hidden state of the one before it, two
    steps on; `wrong` guesses the last token again.
    """
    model, params, _, own = found
    width = model.config.d_model
    silent = {"o": 0.0, "down": 0.0, "out": 0.0}

    def quiet(tree: Any, name: str = "") -> Any:
        if isinstance(tree, dict):
            return {key: quiet(value, key if key != "kernel" else name) for key, value in tree.items()}
        return tree * silent.get(name, 1.0)

    turn = np.roll(np.eye(8, dtype=np.float32), 1, axis=1)  # row t is one at t + 1
    embedding = np.eye(8, width, dtype=np.float32)
    unembedding = np.zeros((width, 8), np.float32)
    unembedding[:8] = turn
    ones = {"scale": np.ones(width, np.float32)}
    given = {name: quiet(tree) for name, tree in params.items()}
    given |= {"embed": {"embedding": embedding}, "unembed": {"kernel": unembedding}, "final_norm": ones}
    join = np.zeros((2 * width, width), np.float32)
    if by == "embedding":
        join[:8, :8] = np.eye(8)
    elif by == "hidden":  # of token t: a vector of token t + 1, which is followed by t + 2
        join[width : width + 8, :8] = turn
    else:
        join[:8, :8] = turn.T
    norms = dict.fromkeys(("embed_norm", "stream_norm", "final_norm"), ones)
    return given, {"block": quiet(own["block"]), **norms, "join": {"kernel": join}}


def test_planted_guesses_are_kept_as_often_as_they_are_right(glm: Path) -> None:
    found = loaded(glm)
    model, _, layer, _ = found
    expected = [[(prompt[-1] + i) % 8 for i in range(1, NEW + 1)] for prompt in PROMPTS]
    for by, hits in (("embedding", 2), ("hidden", 2), ("wrong", 0)):
        params, own = counting(found, by)
        said = speculate(
            model, params, layer, own, *pad_prompts(PROMPTS), max_new_tokens=NEW, ahead=2, sampler=greedy()
        )
        assert said.generated.rows() == expected
        # A prompt of one token has no hidden state before it: its first guesses are those of nothing.
        for row in range(2 if by == "hidden" else 3):
            assert said.rounds[row] == -(-NEW // (hits + 1)), by
            assert said.accepted[row] == NEW - said.rounds[row], by


@pytest.mark.parametrize("kind", ["glm4_moe", "deepseek_v3"])
def test_greedy_tokens_are_those_of_the_model_alone(kind: str, glm: Path, tmp_path: Path) -> None:
    folder = glm if kind == "glm4_moe" else written(tmp_path / "model", kind)
    model, params, layer, own = loaded(folder)
    alone = generate(model, params, *pad_prompts(PROMPTS), max_new_tokens=NEW, sampler=greedy())
    found = speculate(
        model, params, layer, own, *pad_prompts(PROMPTS), max_new_tokens=NEW, ahead=2, sampler=greedy()
    )
    assert found.generated.rows() == alone.rows()


def test_samples_have_the_models_distribution(glm: Path) -> None:
    model, params, layer, own = loaded(glm)
    options: dict[str, Any] = {"max_new_tokens": 2, "sampler": sample(Temperature(1.5)), "samples": 4000}
    found = speculate(model, params, layer, own, [[3, 1]], ahead=2, key=3, **options)
    counts = Counter(map(tuple, found.generated.rows()))
    texts = np.array([[3, 1, a, b] for a in range(8) for b in range(8)], np.int32)
    logits = np.asarray(jax.jit(lambda p, t: model.apply(p, t).logits)(params, texts))[:, 1:3] / 1.5
    chances = np.exp(logits - logits.max(axis=2, keepdims=True)).astype(np.float64)
    chances /= chances.sum(axis=2, keepdims=True)
    known = {
        (int(a), int(b)): float(row[0, a] * row[1, b])
        for (_, _, a, b), row in zip(texts, chances, strict=True)
    }
    assert chi_square(counts, known) < 1.7 and 0 < found.accepted.mean() < 2
    other = {(a, b): chance for (b, a), chance in known.items()}
    assert chi_square(counts, other) > 20  # the same count would see another distribution


def test_what_has_no_such_layer_is_refused(glm: Path, tmp_path: Path) -> None:
    model, _ = load_model_of("llama", tmp_path)
    with pytest.raises(CheckpointError, match="run for deepseek_v3 and glm4_moe, but this is a 'llama'"):
        load_further_layer(tmp_path / "llama", model)
    plain = model_from_config({**CONFIGS["glm4_moe"], "num_nextn_predict_layers": 0})
    with pytest.raises(CheckpointError, match=r"no layer of multi-token prediction \(num_nextn.* = 0\)"):
        load_further_layer(glm, plain)


def load_model_of(kind: str, tmp_path: Path) -> tuple[Model, Params]:
    from tests.models.tiny_models import write

    return load_model(write(tmp_path / kind, kind))


def test_the_command_drafts_with_it(glm: Path) -> None:
    options = ["--token-ids", "3,1,4", "--max-new-tokens", "6", "--greedy", "--ignore-end", "--json"]
    with pytest.warns(UserWarning, match="another head"):
        run = CliRunner().invoke(cli, ["generate", str(glm), *options, "--draft", "mtp"])
        alone = CliRunner().invoke(cli, ["generate", str(glm), *options])
    assert run.exit_code == alone.exit_code == 0, run.output
    found, expected = (json.loads(one.stdout.strip().splitlines()[-1]) for one in (run, alone))
    assert found["token_ids"] == expected["token_ids"] and found["draft"]["passes"] >= 2
