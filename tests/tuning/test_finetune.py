"""Fine-tuning in memory: it learns, repeats itself, keeps near a teacher, and is the same on a mesh."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
import pytest

from mergelab.checkpoints import open_checkpoint, with_lora
from mergelab.errors import CorpusError, MeshError, TuningError
from mergelab.models.load import load_model
from mergelab.models.save import save_model
from mergelab.sharding import make_mesh
from mergelab.text.tokenizer import Tokenizer, load_tokenizer
from mergelab.tuning import LoraRecord, Tuned, finetune, save_adapter
from tests.tuning import small

OPTIONS: dict[str, Any] = {
    "context": small.LENGTH, "batch": 8, "epochs": 3, "learning_rate": 0.02, "held_out_share": 0.1, "seed": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def whole(folder: Path, tokenizer: Tokenizer) -> Tuned:
    return finetune(*load_model(folder), tokenizer, small.text(1000), **OPTIONS)


def test_the_held_out_loss_falls_and_the_start_stays(folder: Path, whole: Tuned) -> None:
    params, record = whole
    assert record.before is not None and record.after is not None
    assert record.before == pytest.approx(np.log(32), abs=0.3)
    assert record.after < 0.6 * record.before
    assert [line["step"] for line in record.held_out] == [0, 6, 12, 18, 24, 28]
    assert [line["step"] for line in record.steps] == [*range(1, 29)]
    chex.assert_trees_all_equal_shapes_and_dtypes(params, load_model(folder)[1])


def test_equal_calls_give_equal_bits_on_a_mesh_nearly(
    folder: Path, tokenizer: Tokenizer, whole: Tuned
) -> None:
    again = finetune(*load_model(folder), tokenizer, small.text(1000), **OPTIONS)
    chex.assert_trees_all_equal(again.params, whole.params)
    assert again.record == whole.record
    mesh = make_mesh({"data": 2, "fsdp": 2})
    spread = finetune(*load_model(folder, mesh=mesh), tokenizer, small.text(1000), **OPTIONS)
    assert spread.params["embed"]["embedding"].sharding.spec[1] == "fsdp"
    # Sums over devices round otherwise, and 28 steps carry that on.
    chex.assert_trees_all_close(spread.params, whole.params, atol=2e-3)
    with pytest.raises(MeshError, match="multiple of 4"):
        finetune(*load_model(folder, mesh=mesh), tokenizer, small.text(1000), **{**OPTIONS, "batch": 6})


def test_accumulated_passes_are_one_large_batch(folder: Path, tokenizer: Tokenizer, whole: Tuned) -> None:
    split = finetune(
        *load_model(folder), tokenizer, small.text(1000), **{**OPTIONS, "batch": 2, "accumulate": 4}
    )
    chex.assert_trees_all_close(split.params, whole.params, atol=2e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_factors_learn_and_become_an_adapter(
    folder: Path, tokenizer: Tokenizer, whole: Tuned, tmp_path: Path, optimizer: str
) -> None:
    model, start = load_model(folder)[0], whole.params
    options = {**OPTIONS, "lora": 8, "optimizer": optimizer}
    params, record = finetune(model, start, tokenizer, small.text(1000, least=3), **options)
    assert isinstance(record, LoraRecord)
    assert record.before is not None and record.after is not None and record.after < record.before - 0.3
    chex.assert_trees_all_equal(params["embed"], start["embed"])
    # The adapter, merged by what merges read adapters with, is the model that was trained.
    base = save_model(model, start, tmp_path / "base")
    made = save_adapter(record, tmp_path / "adapter", base=base)
    _, merged = load_model(with_lora(open_checkpoint(base), made))
    chex.assert_trees_all_close(merged, params, atol=1e-6)


def test_a_teacher_holds_the_model_back(folder: Path, tokenizer: Tokenizer, whole: Tuned) -> None:
    model, start = load_model(folder)
    options = {**OPTIONS, "kl": 30.0}
    _, record = finetune(model, start, tokenizer, small.text(1000), teacher=(model, start), **options)
    first, last = record.steps[0], record.steps[-1]
    assert first["kl"] == pytest.approx(0, abs=1e-6) and last["kl"] > 0
    assert last["loss"] == pytest.approx(last["cross_entropy"] + 30 * last["kl"], rel=1e-5)
    assert record.before is not None and record.after is not None and whole.record.after is not None
    assert record.before - record.after < 0.5 * (record.before - whole.record.after)


def test_of_conversations_the_answers_are_learned(folder: Path, tokenizer: Tokenizer) -> None:
    from mergelab.tuning.contexts import read_rows
    from mergelab.tuning.settings import TuningSettings

    turns = [{"role": "user", "content": "w1 w2 w3"}, {"role": "assistant", "content": "w5 w6"}]
    model, settings = load_model(folder)[0], TuningSettings(context=8, held_out_share=0.0)
    rows, _ = read_rows(model, tokenizer, [turns] * 4, None, settings)
    tokens, counted = rows.take(slice(None))
    learned = tokens[:, 1:][counted].tolist()
    assert rows.roles == "assistant"
    assert set(learned) == {tokenizer.encode(word)[0] for word in ("w5", "w6", "</s>")}
    both, _ = read_rows(
        model, tokenizer, [turns] * 4, None, TuningSettings(context=8, held_out_share=0.0, roles="all")
    )
    assert both.take(slice(None))[1].all()


def test_faults_are_all_named_before_any_work(folder: Path, tokenizer: Tokenizer) -> None:
    given = (*load_model(folder), tokenizer, small.text(100))
    with pytest.raises(TuningError) as caught:
        finetune(*given, context=12, batch=0, kl=1.0, warmup=1.5)
    assert len(caught.value.faults) == 3
    with pytest.raises(TuningError, match=r"no setting 'learning_rat' .did you mean 'learning_rate'"):
        finetune(*given, learning_rat=1.0)
    with pytest.raises(TuningError, match=r"called 'q_prj' .did you mean 'q_proj'"):
        from mergelab.tuning import LoraSettings

        finetune(*given, context=12, lora=LoraSettings(4, targets=("q_prj", "mlp.up")))
    with pytest.raises(CorpusError, match="do not fill one context"):
        finetune(*given[:3], "w1 w2", context=12)
    with pytest.raises(TuningError, match="fills one context of 12"):
        finetune(*given[:3], small.text(20), context=12)
    with pytest.raises(TuningError, match=r"diverged at step \d+"):
        bad = jax.tree.map(lambda leaf: leaf * np.float32(np.nan), given[1])
        finetune(given[0], bad, *given[2:], context=12)
