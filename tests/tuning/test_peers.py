"""Three steps of AdamW beside those of transformers and peft, whose adapter ours reads like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergelab.models.load import load_model
from mergelab.tuning import LoraRecord, LoraSettings, TuningSettings, finetune, init_factors, save_adapter
from mergelab.tuning.contexts import Rows, batch_of
from mergelab.tuning.optimizers import Optimizer
from tests.tuning import small

ROWS = np.random.default_rng(0).integers(3, 32, (24, small.LENGTH)).astype(np.int32)
SETTINGS = TuningSettings(
    batch=4, accumulate=2, tokens=3 * 8 * small.LENGTH, learning_rate=0.01, warmup=0.4, weight_decay=0.1,
    clip_norm=0.5, held_out_share=0.0, seed=3, beta2=0.99,
)  # fmt: skip


def trained_elsewhere(module: Any, trained: list[Any]) -> list[float]:
    """Losses of three steps by torch: all of a step's targets in one mean, matrices alone decay."""
    import torch

    matrices, others = ([p for p in trained if (p.ndim > 1) == wide] for wide in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=(0.9, 0.99), eps=1e-8)
    rate = Optimizer(3, 0.01, 1).rate()
    losses = []
    for step in range(3):
        tokens, _ = batch_of(Rows(ROWS), step, SETTINGS)
        ids = torch.tensor(tokens.reshape(-1, small.LENGTH)).long()
        loss = module(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.5)
        for group in optimizer.param_groups:
            group["lr"] = float(np.asarray(rate(step)))
        optimizer.step()
    return losses


@pytest.mark.oracle
def test_whole_parameters_take_the_steps_of_transformers(tmp_path: Path) -> None:
    import transformers

    folder = small.write(tmp_path / "base")
    model, params = load_model(folder)
    tuned, record = finetune(model, params, None, ROWS, settings=SETTINGS)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    losses = trained_elsewhere(theirs, list(theirs.parameters()))
    np.testing.assert_allclose([line["loss"] for line in record.steps], losses, rtol=2e-5)
    down = theirs.model.layers[0].mlp.down_proj.weight.detach().numpy().T
    np.testing.assert_allclose(tuned["blocks_0"]["mlp"]["down"]["kernel"], down, atol=2e-4)
    embedding = theirs.model.embed_tokens.weight.detach().numpy()
    np.testing.assert_allclose(tuned["embed"]["embedding"], embedding, atol=2e-4)
    assert np.abs(embedding - params["embed"]["embedding"]).max() > 5e-3


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")  # peft's and transformers' own
def test_factors_take_the_steps_of_peft_which_reads_the_adapter(tmp_path: Path) -> None:
    import peft
    import torch
    import transformers

    folder = small.write(tmp_path / "base")
    model, params = load_model(folder)
    settings = LoraSettings(rank=4, alpha=6.0, targets=("q_proj", "down_proj"))
    _, record = finetune(model, params, None, ROWS, settings=SETTINGS, lora=settings)
    assert isinstance(record, LoraRecord)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], lora_dropout=0.0
    )
    theirs = peft.get_peft_model(base, config)
    named = dict(theirs.named_parameters())
    for module, pair in init_factors(record.factors, SETTINGS.seed).items():
        for part, array in pair.items():
            name = f"base_model.model.{module}.lora_{part}.default.weight"
            named[name].data = torch.tensor(np.asarray(array))
    losses = trained_elsewhere(theirs, [p for p in theirs.parameters() if p.requires_grad])
    np.testing.assert_allclose([line["loss"] for line in record.steps], losses, rtol=2e-5)
    for module, pair in record.trained.items():
        for part, array in pair.items():
            name = f"base_model.model.{module}.lora_{part}.default.weight"
            np.testing.assert_allclose(array, named[name].detach().numpy(), atol=2e-4)
    # What is written gives PEFT the logits of the model that was trained here.
    made = save_adapter(record, tmp_path / "adapter", base=folder)
    again = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    read = peft.PeftModel.from_pretrained(again, str(made))
    ids = torch.tensor(ROWS[:2]).long()
    with torch.no_grad():
        ours, wanted = read(input_ids=ids).logits, theirs(input_ids=ids).logits
    np.testing.assert_allclose(ours.numpy(), wanted.numpy(), atol=1e-3)
