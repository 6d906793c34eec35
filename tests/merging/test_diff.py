"""Models compared, against numpy in float64 and against cases whose answer is known."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

from mergelab.cli.main import cli
from mergelab.errors import CheckpointError, OutputError
from mergelab.merging import diff_models
from mergelab.merging.diff.block_sums import PIECE
from mergelab.merging.diff.pairs import pair_tensors
from mergelab.merging.diff.samples import DENSITIES, EDGES, change_shares, sign_conflict
from mergelab.merging.diff.spectra import Spectrum
from mergelab.merging.diff.streaming import gather
from tests.merging.recipes import write_model

SHAPES = {"model.embed_tokens.weight": (40, 24), "model.norm.weight": (24,)} | {
    f"model.layers.{i}.{name}.weight": shape
    for i in (0, 1, 10)
    for name, shape in (("self_attn.q_proj", (24, 24)), ("mlp.up_proj", (300, 240)), ("norm", (24,)))
}  # up_proj has more entries than are computed on at a time


def family(folder: Path, dtype: Any = np.float32, **changes: float) -> None:
    """A base of deviation 0.02, and models that differ from it by so much of that; strangers if infinite."""
    rng = np.random.default_rng(0)
    base = {name: 0.02 * rng.standard_normal(shape) for name, shape in SHAPES.items()}
    for name, change in {"base": 0.0, **changes}.items():
        delta = {tensor: 0.02 * rng.standard_normal(x.shape) for tensor, x in base.items()}
        tensors = delta if np.isinf(change) else {t: x + change * delta[t] for t, x in base.items()}
        write_model(folder / name, {t: x.astype(dtype) for t, x in tensors.items()})


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def wide(folder: str) -> dict[str, np.ndarray]:
    return {n: x.astype(np.float64) for n, x in load_file(Path(folder) / "model.safetensors").items()}


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.vdot(x, y) / np.linalg.norm(x) / np.linalg.norm(y))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float64], ids=["f32", "bf16", "f64"])
def test_numbers_of_two_models_are_those_of_float64(dtype: Any, place: Path) -> None:
    family(place, dtype, a=0.05)
    found, a, b = diff_models("a", "base"), wide("a"), wide("base")
    assert [tensor.name for tensor in found.tensors] == list(load_file("a/model.safetensors"))
    for tensor in found.tensors:
        x, y = a[tensor.name], b[tensor.name]
        first = tensor.relations.first
        assert first.relative_change == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(y), rel=1e-6)
        assert first.cosine == pytest.approx(cosine(x, y), abs=1e-9)
        assert first.norm_ratio == pytest.approx(np.linalg.norm(x) / np.linalg.norm(y), rel=1e-6)
        assert tensor.relations.unchanged == np.mean(x == y)
        assert tensor.relations.small == np.mean(np.abs(x - y).astype(np.float32) < np.float32(1e-3))
        if x.size <= 65536:
            assert tensor.spread == pytest.approx(np.std(y), rel=1e-5)
            assert tensor.below_spread == pytest.approx(np.mean(np.abs(x - y) < 0.01 * np.std(y)), abs=1e-3)
        assert sum(tensor.histogram) == pytest.approx(1)
    for layer in found.layers:
        inside = [name for name in a if name.startswith(layer.layer + ".")]
        change, size = (math.sqrt(sum(np.sum(t**2) for t in ts)) for ts in (
            [a[n] - b[n] for n in inside], [b[n] for n in inside]))  # fmt: skip
        assert layer.relations.first.relative_change == pytest.approx(change / size, rel=1e-6)
    assert [layer.layer for layer in found.layers] == [f"model.layers.{i}" for i in (0, 1, 10)]


def test_several_models_are_compared_with_their_base_and_each_other(place: Path) -> None:
    family(place, a=0.05, b=0.02, c=0.03)
    found = diff_models("a", "b", "c", base="base")
    a, b, c, base = map(wide, ("a", "b", "c", "base"))
    for tensor in found.tensors:
        x, y, z, o = (each[tensor.name] for each in (a, b, c, base))
        relations = tensor.relations
        assert relations.first.relative_change == pytest.approx(
            np.linalg.norm(x - y) / np.linalg.norm(y), rel=1e-5
        )
        assert relations.first.cosine == pytest.approx(cosine(x, y), abs=1e-8)
        ratios = [np.linalg.norm(m - o) / np.linalg.norm(o) for m in (x, y, z)]
        assert [task.relative for task in relations.tasks] == pytest.approx(ratios, rel=1e-5)
        told = {(m, n): value for m, n, value in relations.task_cosines}
        assert told["a", "c"] == pytest.approx(cosine(x - o, z - o), abs=1e-5)
        others = {(pair.model, pair.other): pair for pair in relations.pairs}
        far = np.linalg.norm(y - z) / np.linalg.norm(z)
        assert others["b", "c"].relative_change == pytest.approx(far, rel=1e-5)
        if x.size <= 65536:
            deltas = np.stack([(m - o).reshape(-1) for m in (x, y, z)])
            assert tensor.sign_conflict == pytest.approx(conflict(deltas), abs=2e-3)
    assert found.base == "base" and found.descent.given and not found.descent.doubts


def conflict(deltas: np.ndarray) -> list[float]:
    """The definition, by sorting."""
    found = []
    for density in DENSITIES:
        kept = max(1, int(density * deltas.shape[1]))
        signs = np.zeros_like(deltas)
        for row, delta in zip(signs, deltas, strict=True):
            chosen = np.argsort(-np.abs(delta))[:kept]
            row[chosen] = np.sign(delta[chosen])
        several = np.count_nonzero(signs, axis=0) > 1
        unlike = several & (np.abs(signs.sum(axis=0)) < np.count_nonzero(signs, axis=0))
        found.append(unlike.sum() / max(several.sum(), 1))
    return found


def test_signs_and_sizes_of_known_changes() -> None:
    deltas = np.array([[3.0, 2.0, -1.0, 0.0], [3.0, -2.0, -1.0, 5.0]])
    assert sign_conflict(deltas, [1.0]) == [1 / 3]
    assert sign_conflict(deltas, [0.5]) == [0.0]  # one keeps entries 0 and 1, the other 0 and 3
    assert sign_conflict(np.stack([deltas[0], -deltas[0]]), [0.25, 1.0]) == [1.0, 1.0]
    shares = change_shares(np.array([0.0, 0.25, -0.3, 1e-30, 99.0, 8.0, 2.0**-30]))
    assert {edge: round(7 * share) for edge, share in zip(EDGES, shares, strict=True) if share} == {
        0.0: 2,
        2.0**-30: 1,
        0.25: 2,
        8.0: 2,
    }


def test_a_small_angle_is_exact_where_its_cosine_is_one(place: Path) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 300, 300))
    y -= np.vdot(x, y) / np.vdot(x, x) * x
    y *= np.linalg.norm(x) / np.linalg.norm(y)
    write_model(place / "a", {"h.0.w": math.cos(1e-6) * x + math.sin(1e-6) * y})
    write_model(place / "b", {"h.0.w": x})
    first = diff_models("a", "b").total.first
    assert first.angle == pytest.approx(math.degrees(1e-6), rel=1e-6)
    assert first.cosine == pytest.approx(1, abs=1e-11)


def test_sums_do_not_depend_on_threads(place: Path) -> None:
    from mergelab.checkpoints import open_checkpoint

    family(place, a=0.05, b=0.01)
    models = {name: open_checkpoint(place / name) for name in ("a", "b", "base")}
    tensors = pair_tensors(models, {}).tensors
    assert max(tensor.size for tensor in tensors) > PIECE
    one, four = (list(gather(tensors, 2, pair=True, threads=n)) for n in (1, 4))
    for x, y in zip(one, four, strict=True):
        assert x.tensor.name == y.tensor.name
        np.testing.assert_array_equal(x.sums.gram, y.sums.gram)
        np.testing.assert_array_equal(x.sample, y.sample)


def test_equal_models_and_a_model_with_itself(place: Path) -> None:
    family(place, a=0.05, twin=0.0)
    for found in (diff_models("base", "twin"), diff_models("a", "a")):
        assert found.total.equal and found.total.first.relative_change == 0
        assert found.total.first.cosine == 1 and found.base is None
        assert not found.moved_rows
    again = diff_models("base", "twin", base="a")
    assert again.total.first.relative_change == 0 and again.total.equal


def test_the_base_is_found_by_its_weights(place: Path) -> None:
    family(place, a=0.05, b=0.06, c=0.05, stranger=np.inf)
    found = diff_models("a", "base", "b", "c")
    assert found.base == "base" and not found.descent.given
    assert "right angles" in found.descent.reasons[0]
    assert diff_models("a", "b", "c").base is None
    assert diff_models("a", "base").base == "base" == diff_models("base", "a").base
    assert diff_models("a", "b").base is None
    strange = diff_models("a", "stranger")
    assert strange.base is None and strange.descent.strangers == (("a", "stranger"),)
    sibling = diff_models("a", "b", base="c").descent
    assert "share a direction" in sibling.doubts[0]


def test_an_average_of_siblings_is_not_their_base(place: Path) -> None:
    """It sees one of three siblings and the base at right angles, as a base would."""
    family(place, a=0.2, b=0.2, c=0.2)
    every = [load_file(f"{name}/model.safetensors") for name in "abc"]
    write_model(place / "mean", {n: np.mean([x[n] for x in every], axis=0) for n in every[0]})
    found = diff_models("mean", "a", "base").descent
    assert found.base is None and "'mean' lies between the others" in found.reasons[0]
    assert diff_models("b", "a", "base").base == "base"


def test_of_two_models_that_shrank_none_is_named(place: Path) -> None:
    """Weight decay moves along the weights, so that the change is at right angles to neither model."""
    family(place)
    rng = np.random.default_rng(5)
    tensors = {n: 0.98 * x + 1e-4 * rng.standard_normal(x.shape) for n, x in wide("base").items()}
    write_model(place / "decayed", {n: x.astype(np.float32) for n, x in tensors.items()})
    found = diff_models("decayed", "base")
    assert found.base is None and "--base" in found.descent.reasons[0]


def tokenizer(folder: Path, tokens: list[str]) -> None:
    data = {"model": {"type": "WordLevel", "vocab": {t: i for i, t in enumerate(tokens)}, "unk_token": "t0"}}
    (folder / "tokenizer.json").write_text(json.dumps(data))


def test_rows_are_compared_token_by_token(place: Path) -> None:
    rng = np.random.default_rng(0)
    rows = {f"t{i}": rng.standard_normal(8) for i in range(10)}
    order = [f"t{i}" for i in (3, 1, 0, 2, 9, 5, 6, 7, 8, 4)] + ["new"]
    moved = {**rows, "new": rng.standard_normal(8), "t7": rows["t7"] * 1.5, "t2": rows["t2"] * 0.9}
    name = "model.embed_tokens.weight"
    write_model(place / "a", {name: np.stack([moved[t] for t in order]).astype(np.float32)})
    write_model(place / "b", {name: np.stack(list(rows.values())).astype(np.float32)})
    tokenizer(place / "a", order)
    tokenizer(place / "b", list(rows))
    found = diff_models("a", "b")
    assert [(row.token, row.row) for row in found.moved_rows] == [("t7", 7), ("t2", 3)]
    assert [row.relative_change for row in found.moved_rows] == pytest.approx([0.5, 0.1], rel=1e-5)
    (settings,) = found.settings
    assert (settings.only, settings.lost, settings.moved) == (1, 0, 5) and settings.examples["only"] == (
        "new",
    )
    assert found.tensors[0].relations.unchanged == 0.8
    # Without the tokenizers rows of the same number are compared, as far as both have them.
    (place / "a" / "tokenizer.json").unlink()
    assert diff_models("a", "b").total.entries == 80
    far = diff_models("a", "b").total.first.relative_change
    assert far is not None and far > 0.5


def test_names_that_differ_by_a_prefix_and_tensors_that_one_model_lacks(place: Path) -> None:
    family(place, a=0.05)
    tensors = load_file("a/model.safetensors")
    bare = {name.removeprefix("model."): x for name, x in tensors.items()}
    write_model(place / "bare", {**bare, "lm_head.weight": np.zeros((40, 24), np.float32)})
    found, plain = diff_models("bare", "base"), diff_models("a", "base")
    assert found.total == plain.total.__class__(
        **{**plain.total.__dict__, "pairs": found.total.pairs, "tasks": found.total.tasks}
    )
    assert found.total.first.relative_change == plain.total.first.relative_change
    assert found.lacking == {"bare": ("lm_head.weight",)} and "spells its tensors" in found.notes[0]
    write_model(place / "other", {"x.weight": np.zeros(3, np.float32)})
    with pytest.raises(CheckpointError, match="no tensor in common"):
        diff_models("a", "other")
    with pytest.raises(CheckpointError, match="1 model to compare"):
        diff_models("a")


def test_spectra_of_known_changes(place: Path) -> None:
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal((n, 6)))[0] for n in (40, 90))
    change = left @ np.diag([4.0, 4, 4, 1e-3, 1e-3, 1e-3]) @ right.T
    base = {"layers.0.w": rng.standard_normal((40, 90)), "layers.1.w": rng.standard_normal((90, 40))}
    write_model(place / "b", base)
    write_model(
        place / "a", {"layers.0.w": base["layers.0.w"] + change, "layers.1.w": base["layers.1.w"] + change.T}
    )
    for tensor in diff_models("a", "b", spectra=True).tensors:
        found = tensor.spectra["a"]
        assert (found.rank, found.rank_90, found.rank_99) == (40, 3, 3)
        assert found.largest == pytest.approx(4, rel=1e-9)
        assert found.stable_rank == pytest.approx(3, rel=1e-6)
        assert found.effective_rank == pytest.approx(3, abs=0.02)
        assert found.energy[1] == pytest.approx(1 / 3, rel=1e-6) and found.energy[16] == pytest.approx(1)
    assert Spectrum.of_squares(np.zeros(3)).effective_rank == 0
    assert Spectrum.of_squares(np.full(7, 9.0)).effective_rank == pytest.approx(7)


def test_what_is_not_finite_is_counted_and_json_stays_json(place: Path) -> None:
    family(place, a=0.05)
    tensors = load_file("a/model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    tensors[name][0, :3] = [np.nan, np.inf, -np.inf]
    write_model(place / "a", tensors)
    found = diff_models("a", "base")
    assert found.total.nonfinite == {"a": 3}
    assert [t.relations.first.relative_change is None for t in found.tensors] == [
        t.name == name for t in found.tensors
    ]
    json.dumps(found.as_data(), allow_nan=False)
    large = {"layers.0.w": np.full((8, 8), 1e30, np.float32)}  # whose squares float32 cannot hold
    write_model(place / "large", large)
    write_model(place / "larger", {n: 3 * x for n, x in large.items()})
    assert diff_models("larger", "large").total.first.relative_change == pytest.approx(2)


def test_the_command_prints_the_contract_and_a_table(place: Path) -> None:
    family(place, a=0.05, b=0.02)
    result = CliRunner().invoke(cli, ["diff", "a", "base", "--json"])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    a, b = wide("a"), wide("base")
    assert {"name", "relative_change", "cosine", "norm_ratio", "histogram"} <= set(data["tensors"][0])
    for tensor in data["tensors"]:
        x, y = a[tensor["name"]], b[tensor["name"]]
        assert tensor["relative_change"] == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(y), rel=1e-6)
    assert [layer["layer"] for layer in data["layers"]] == [f"model.layers.{i}" for i in (0, 1, 10)]
    result = CliRunner().invoke(cli, ["diff", "a", "b", "--base", "base", "--out", "out"])
    assert result.exit_code == 0, result.output
    assert "all tensors" in result.stdout and "task cosine" in result.stdout
    assert (place / "out" / "figure.png").stat().st_size > 10_000
    assert "<h2>Layers</h2>" in (place / "out" / "page.html").read_text()
    assert json.loads((place / "out" / "diff.json").read_text())["base"]["base"] == "base"


def test_faults_are_said_at_once_and_nothing_is_written_over_an_input(place: Path) -> None:
    family(place, a=0.05)
    result = CliRunner().invoke(cli, ["diff", "a", "nowhere", "neither"])
    assert result.exit_code == 2
    assert "'nowhere' does not exist" in result.stderr and "'neither' does not exist" in result.stderr
    with pytest.raises(OutputError):
        diff_models("a", "base", out="a", overwrite=True)
    assert load_file("a/model.safetensors")
