"""Whatever a `config.json` holds, it is a model, or refused in a sentence before anything is made of it."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from mergelab.checkpoints.json_data import parse_json, read_json_object, read_optional_json
from mergelab.errors import CheckpointError, MergelabError
from mergelab.models.families import model_from_config
from mergelab.models.footprint import take_inventory
from mergelab.models.load import load_model
from mergelab.models.table import stored_shapes
from tests.models.tiny_models import CONFIGS

# A field that nothing is known of is a warning.
pytestmark = pytest.mark.filterwarnings("ignore:.*unknown here")

ODD: list[Any] = [
    *(None, "x", [1], {"a": 1}, True, 0, -1, 1.5, 10**9, 10**299, float("nan"), 1e300, 1e-300),
]
FAMILIES = {config["model_type"]: config for config in reversed(CONFIGS.values())}


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Fails where what is inside is still running after `seconds` of CPU time."""

    def stop(*_: object) -> None:
        raise AssertionError(f"still running after {seconds:g} CPU seconds")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def use(config: dict[str, Any]) -> None:
    """What is computed from a configuration before any weight is read, for weights of two layers."""
    with time_limit(30):
        model = model_from_config(config)
        model = model.for_tensors([f"model.layers.{i}.{part}" for i in range(2) for part in range(20)])
        stored_shapes(model.table())
        model.sites()


EVERY = [False, pytest.param(True, marks=pytest.mark.slow)]
"""Every third pair of a field and an odd value, other ones in each family; or all, which takes a minute."""


@pytest.mark.parametrize("every", EVERY, ids=["sampled", "all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_odd_value_of_any_field_is_a_model_or_refused(family: str, every: bool) -> None:
    config, start = FAMILIES[family], list(FAMILIES).index(family)
    use(config)
    fields = {
        *config,
        "head_dim",
        "sliding_window",
        "layer_types",
        "tie_word_embeddings",
        "torch_dtype",
        "nonsense",
    }
    for place, name in enumerate(sorted(fields)):
        for value in ODD if every else ODD[(start + place) % 3 :: 3]:
            try:
                use({**config, name: value})
            except MergelabError as error:
                assert len(str(error)) <= 2000


@pytest.mark.parametrize("every", EVERY, ids=["sampled", "all"])
@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "yarn", "longrope"])
def test_an_odd_rotary_scaling_is_a_model_or_refused(kind: str, every: bool) -> None:
    config = FAMILIES["llama"]
    scaling: dict[str, Any] = {
        "rope_type": kind,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        **({"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}),
        **({"short_factor": [1.0] * 3, "long_factor": [2.0] * 3} if kind == "longrope" else {}),
        **({"beta_fast": 32, "mscale": 1.0, "mscale_all_dim": 1.0} if kind == "yarn" else {}),
    }
    for place, name in enumerate((*scaling, "rope_theta", "partial_rotary_factor", "nonsense")):
        for value in ODD if every else ODD[place % 3 :: 3]:
            try:
                use({**config, "rope_scaling": {**scaling, name: value}})
            except MergelabError as error:
                assert len(str(error)) <= 2000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"num_hidden_layers": 10**9},
            "num_hidden_layers = 1000000000, but expected a whole number from 1 to 10,000",
        ),
        ({"num_hidden_layers": 9_999}, "9,999 layers, but its weights hold only"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers = 2.0, but expected a whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0"),
        ({"num_attention_heads": 25, "num_key_value_heads": 25}, "25 heads for a width of 24"),
        ({"num_key_value_heads": 3}, "4 heads for 3 key-value heads"),
        ({"vocab_size": -5}, "vocab_size = -5"),
        ({"hidden_size": 2**31}, "hidden_size = 2147483648"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps = '1e-5', but expected a number above 0"),
    ],
)
def test_sizes_that_no_weights_have_are_refused_at_once(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = FAMILIES["llama"]
    shapes = stored_shapes(model_from_config(config).table())
    save_file(
        {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, tmp_path / "model.safetensors"
    )
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    began = time.process_time()
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)
    (fault,) = take_inventory(tmp_path).faults
    assert message in fault
    assert time.process_time() - began < 5


def test_an_inventory_names_twenty_faults_and_counts_the_rest(tmp_path: Path) -> None:
    config = FAMILIES["llama"]
    save_file({f"odd.{i}": np.zeros(1, np.float32) for i in range(1000)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    faults = take_inventory(tmp_path).faults
    assert len(faults) <= 21
    assert faults[-1].startswith("and ")
    assert sum(map(len, faults)) <= 2000


@pytest.mark.parametrize("kind", ["folder", "pipe", "dangling link", "huge"])
def test_a_config_that_is_no_file_is_refused_and_not_passed_over(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "dangling link":
        path.symlink_to(tmp_path / "nothing")
    else:
        with path.open("wb") as file:
            file.truncate(3 * 10**9)
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    for read in (read_optional_json, read_json_object, lambda p: take_inventory(p.parent)):
        with pytest.raises(CheckpointError, match=r"config\.json"):
            read(path)
    assert read_optional_json(tmp_path / "other.json") == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": ' + "[" * 200 + "]" * 200 + "}", "nested too deeply"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "has 5000 digits"),
        ('{"a": 1e999}', "beyond the range of float64"),
        ('{"a": 1, "a": 2}', "the key 'a' twice"),
        ("{" + ", ".join(f'"k{i}": 1' for i in range(50_000)) + ', "k7": 2}', "the key 'k7' twice"),
        ('{"' + "k" * 5000 + '": 1, "' + "k" * 5000 + '": 1}', "twice"),
        ("\ud800".encode("utf-16-le", "surrogatepass").decode("latin-1"), "not valid JSON"),
    ],
)
def test_hostile_json_is_refused(text: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        parse_json(text.encode(), "config.json")
    assert len(str(caught.value)) <= 2000


def test_what_genuine_files_hold_is_read(tmp_path: Path) -> None:
    raw = b'\xef\xbb\xbf{"model_max_length": 1000000000000000019884624838656, "limits": [0.0, Infinity]}'
    assert parse_json(raw, "x") == {
        "model_max_length": 1000000000000000019884624838656,
        "limits": [0.0, float("inf")],
    }
    (tmp_path / "index.json").write_bytes(b'{"a": "b"}')
    assert read_json_object(tmp_path / "index.json", limit=10) == {"a": "b"}
    with pytest.raises(CheckpointError, match="has 10 bytes, more than the 9"):
        read_json_object(tmp_path / "index.json", limit=9)


TEXT = json.dumps(FAMILIES["llama"])
SNIPPETS = st.sampled_from(
    ["[", "{", '"', ":", "null", "1e999", "9" * 400, "NaN", "-", "\\ud800", "}", "true", "0"]
)


@given(
    st.lists(
        st.tuples(st.integers(0, len(TEXT)), st.integers(0, 8), st.one_of(SNIPPETS, st.text(max_size=3)))
    )
)
def test_a_mutated_config_is_a_model_or_refused(edits: list[tuple[int, int, str]]) -> None:
    text = TEXT
    for start, cut, new in edits[:4]:
        text = text[:start] + new + text[start + cut :]
    try:
        data = parse_json(text.encode("utf-8", "surrogatepass"), "config.json")
        if isinstance(data, dict):
            use(data)
    except MergelabError as error:
        assert len(str(error)) <= 2000
