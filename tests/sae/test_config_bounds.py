"""Whatever a training configuration holds, it is read, or refused in a sentence, in bounded time."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mergelab.errors import MergelabError, SAEError
from mergelab.sae.training.config import TrainConfig, TrainingRecipe, load_config
from mergelab.sae.training.data import open_data
from mergelab.sae.training.memory import check_memory, state_bytes
from mergelab.sae.training.settings_text import plain_settings
from mergelab.sae.variants import VARIANTS, make_variant

CONFIG = """sae: {variant: topk, n_latents: 32, k: 4}
data: {kind: toy, toy: {d_in: 16, n_features: 24, l0: 2.0}}
train: {batch_size: 64, tokens: 512}
"""
SETTINGS = yaml.safe_load(CONFIG)
ODD = [
    *(
        "null",
        "x",
        "1.5",
        "[]",
        "{}",
        "[1, 2]",
        "{a: 1}",
        "2001-01-01",
        "2001-13-45",
        "0",
        "-1",
        "true",
        "yes",
    ),
    *(".nan", ".inf", "1e999", "1e300", "1e-300", "2147483648", "1" + "0" * 20, "9" * 400, "9" * 5000, '""'),
    *("0x" + "f" * 6000, "1_000", "x" * 300, "/".join("d" * 300), '"\\0"', "~nobody/x", "/dev/zero", "1:30"),
]
VARIANT_OPTIONS = sorted({name for kind in VARIANTS.values() for name in kind.__dataclass_fields__})
KEYS = [
    *(
        "sae",
        "data",
        "train",
        "checkpoint",
        "mesh",
        "log_to",
        "metadata",
        "nonsense",
        "sae.variant",
        "sae.d_in",
    ),
    *(f"sae.{name}" for name in VARIANT_OPTIONS),
    *("mesh.data", "mesh.latents", "metadata.site"),
    *(
        f"{section}.{name}"
        for section in ("data", "train", "checkpoint")
        for name in get_args(TrainConfig.model_fields[section].annotation)
        or TrainConfig.model_fields[section].annotation.model_fields  # type: ignore[union-attr]
    ),
    *(
        f"data.toy.{name}"
        for name in ("d_in", "n_features", "l0", "exponent", "group_size", "lift", "rows", "seed")
    ),
]


def use(config: TrainConfig) -> None:
    """What a training does with a configuration before it computes anything."""
    recipe = config.train.build()
    source, target, _ = open_data(config.data, recipe.tokens)
    variant = config.sae.build(source.d_in, None if target is None else target.d_in)
    check_memory(variant, recipe, None, min(config.data.buffer_rows, source.rows))


@pytest.mark.parametrize("key", KEYS)
def test_an_odd_value_of_any_key_is_used_or_refused_in_a_sentence(key: str) -> None:
    accepted = 0
    for value in ODD:
        try:
            use(load_config(SETTINGS, [f"{key}={value}"]))
            accepted += 1
        except MergelabError as error:
            assert len(str(error)) <= 2000
    assert accepted < len(ODD)


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_odd_options_of_every_variant_are_refused(variant: str) -> None:
    for name in VARIANTS[variant].__dataclass_fields__:
        for value in ("x", [], {}, float("nan"), 10**20, 10**5000, np.datetime64("2001-01-01"), object()):
            if name == "prefixes" and isinstance(value, list):
                continue
            with pytest.raises(SAEError):
                make_variant(variant, **{"d_in": 16, "n_latents": 32, "k": 4, "l0": 4, name: value})


@pytest.mark.parametrize("value", ["null", "x", "1.5", "[]", "2001-01-01"])
def test_k_has_to_be_a_whole_number(value: str) -> None:
    with pytest.raises(SAEError, match=r"^sae\.k is .*; expected a whole number\.$"):
        use(load_config(SETTINGS, [f"sae.k={value}"]))


def test_numbers_are_read_as_the_types_they_stand_for() -> None:
    variant = make_variant("matryoshka", d_in=16, n_latents="32", k=4.0, prefixes=[8, 32], skip="no")
    assert (variant.n_latents, variant.skip) == (32, False)
    assert (variant.k, variant.prefixes) == (4, (8, 32))  # type: ignore[attr-defined]
    assert load_config(SETTINGS, ["mesh.data=-1"]).mesh == {"data": -1}
    config = load_config(SETTINGS, ["train.lr=1e-3", "train.center=no", "sae.variant=relu"])
    assert config.train.lr == 1e-3
    assert config.train.center is False
    assert make_variant("relu", d_in=16, n_latents=32, l1="1e-3").l1 == 1e-3  # type: ignore[attr-defined]


@pytest.mark.parametrize("count", [2147483648, 10**20])
def test_more_latents_than_32_bits_number_are_refused_with_their_memory(count: int) -> None:
    with pytest.raises(SAEError, match=r"n_latents is .* would take [0-9,]+ TB"):
        use(load_config(SETTINGS, [f"sae.n_latents={count}"]))


def test_more_latents_than_this_machine_holds_are_refused_before_they_are_made() -> None:
    with pytest.raises(SAEError, match=r"state of the training takes [0-9.,]+ [GT]B, and this machine has"):
        use(load_config(SETTINGS, ["sae.n_latents=2000000000"]))
    with pytest.raises(SAEError, match="batch_size is 2,000,000,000"):
        use(load_config(SETTINGS, ["train.batch_size=2000000000", "train.tokens=2e9", "sae.k=1"]))


def test_the_estimate_is_the_size_of_the_state() -> None:
    import jax

    from mergelab.sae.training.initialize import fresh_state, sample_shapes

    variant, recipe = (
        make_variant("topk", d_in=16, n_latents=4096, k=4),
        TrainingRecipe(steps=9, batch_size=8),
    )
    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    state = jax.eval_shape(lambda k, s: fresh_state(variant, recipe, k, s), key, sample_shapes(variant))
    exact = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert state_bytes(variant, recipe) == pytest.approx(exact, rel=0.03)


BOMB = "\n".join(
    [
        "a0: &a0 [x, x, x, x, x, x, x, x, x]",
        *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)),
    ]
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{BOMB}\nmetadata: *a9\n", r"more than 100,000 values"),
        (CONFIG + "metadata: &m {m: *m}\n", r"s\.yaml:4: nested too deeply"),
        ("a: " + "[" * 3000, "not valid YAML|nested too deeply"),
        (CONFIG + "---\nx: 1\n", "second document"),
        ("sae: 1\nsae: 2\n", "duplicate key, first set on line 1"),
        (CONFIG + "".join(f"k{i}: 1\n" for i in range(3000)), "and 2,9[0-9]+ more"),
        ("", "found NoneType"),
        ("- a", "found list"),
        ("a: !!python/object:os.system x", "tag"),
    ],
)
def test_hostile_text_is_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(SAEError, match=message) as caught:
        load_config(file)
    assert len(str(caught.value)) <= 2000
    assert len(caught.value.faults) <= 21


def test_what_is_no_file_of_text_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "latin").write_bytes(b"sae: \xff")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(3 * 10**9)
    for path in (
        tmp_path,
        tmp_path / "pipe",
        tmp_path / "huge",
        tmp_path / "latin",
        "/dev/zero",
        "x" * 300,
        "a\0b",
    ):
        with pytest.raises(SAEError) as caught:
            load_config(path)
        assert ("not a file name" in str(caught.value)) == (path == "a\0b")


def test_text_is_utf_8_whatever_the_locale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("locale.getpreferredencoding", lambda *_: "ascii")
    (tmp_path / "s.yaml").write_bytes(b"\xef\xbb\xbf" + (CONFIG + "metadata: {site: größe}\n").encode())
    assert load_config(tmp_path / "s.yaml").metadata == {"site": "größe"}


def test_a_mapping_that_contains_itself_is_refused() -> None:
    data: dict[str, Any] = yaml.safe_load(CONFIG)
    data["metadata"] = data
    with pytest.raises(SAEError, match="contains itself"):
        load_config(data)


SNIPPETS = st.sampled_from(
    ["[", "{", "&a ", "*a", ": ", "- ", "\n", "!!int ", "0x", "9" * 50, ".nan", "null", "\t"]
)


@given(
    st.lists(
        st.tuples(st.integers(0, len(CONFIG)), st.integers(0, 8), st.one_of(SNIPPETS, st.text(max_size=3)))
    )
)
def test_a_mutated_configuration_is_used_or_refused(edits: list[tuple[int, int, str]]) -> None:
    text = CONFIG
    for start, cut, new in edits[:4]:
        text = text[:start] + new + text[start + cut :]
    try:
        data = plain_settings(text, "s.yaml")
        if isinstance(data, dict):
            use(load_config(copy.deepcopy(data)))
    except MergelabError as error:
        assert len(str(error)) <= 2000
