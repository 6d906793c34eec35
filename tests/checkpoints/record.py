"""Writes the recorded answers of torch and peft under data/: `python tests/checkpoints/record.py`.

The oracle tests build the same cases anew and compare; the other tests read what was recorded.
"""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data"


def torch_cases() -> dict[str, Any]:
    """Objects that torch saves, by file name."""
    import torch

    grid = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    state = torch.nn.Linear(6, 2).state_dict()
    state["weight"] = torch.nn.Parameter(torch.arange(12.0).reshape(2, 6) / 8)
    state["bias"] = torch.tensor([0.5, -2.0])
    state["transposed"] = grid.t()
    state["columns"] = grid[:, 1:4]
    state["shared_tail"] = grid.flatten()[20:]
    state["expanded"] = torch.tensor([[1.0], [2.0]]).expand(2, 5)
    state["bf16"] = torch.arange(6).to(torch.bfloat16)
    state["half_3d"] = torch.arange(24).reshape(2, 3, 4).half().permute(2, 0, 1)
    state["fp8"] = torch.tensor([1.0, -0.5, 448.0]).to(torch.float8_e4m3fn)
    state["fp8_wide"] = torch.tensor([1.0, -0.5]).to(torch.float8_e5m2)
    state["uint16"] = torch.tensor([1, 65535], dtype=torch.uint16)
    state["long"] = torch.tensor(7)
    state["bool"] = torch.tensor([True, False])
    state["empty"] = torch.zeros(0, 3)
    lightning = {"state_dict": {"w": grid}, "epoch": 3, "optimizer": {"lr": 0.1, "state": {0: {"m": grid}}}}
    return {"state_dict.pt": state, "lightning.pt": lightning}


def lora_cases() -> dict[str, dict[str, Any]]:
    """Arguments of `peft.LoraConfig`, and the base's dtype, by case name."""
    return {
        "linear": {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "up"]},
        "rslora_patterns": {
            "r": 4,
            "lora_alpha": 4,
            "use_rslora": True,
            "target_modules": ["q_proj", "up"],
            "rank_pattern": {"up": 2},
            "alpha_pattern": {r"layers\.1\.q_proj": 10},
        },
        "conv1d": {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True},
        "embedding": {"r": 2, "target_modules": ["embed"]},
        "bias_and_saved": {
            "r": 2,
            "target_modules": ["q_proj"],
            "bias": "all",
            "modules_to_save": ["head"],
        },
        "lora_bias": {"r": 2, "target_modules": ["q_proj"], "lora_bias": True},
        "bfloat16": {"r": 2, "target_modules": ["q_proj"], "dtype": "bfloat16"},
        "dora": {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "up"], "use_dora": True},
        "dora_columns": {"r": 2, "target_modules": ["c_attn"], "use_dora": True, "fan_in_fan_out": True},
        "dora_embedding": {"r": 2, "target_modules": ["embed"], "use_dora": True, "use_rslora": True},
        "pissa": {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "up"], "init_lora_weights": "pissa"},
        "pissa_columns": {
            "r": 2,
            "target_modules": ["c_attn"],
            "init_lora_weights": "pissa",
            "fan_in_fan_out": True,
        },
        "pissa_dora": {"r": 2, "target_modules": ["up"], "init_lora_weights": "pissa", "use_dora": True},
        "pissa_converted": {"r": 2, "target_modules": ["up"], "init_lora_weights": "pissa"},
        "olora": {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "up"], "init_lora_weights": "olora"},
        "tokens": {
            "r": 2,
            "target_modules": ["q_proj"],
            "trainable_token_indices": {"embed": [7, 0, 3], "head": [2]},
        },
        "experts": {
            "r": 2,
            "lora_alpha": 3,
            "target_modules": ["q_proj"],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        },
    }


def lora_model(dtype: str, *, experts: bool = False) -> Any:
    """A small module with every kind of layer a plain adapter may change."""
    import torch
    from transformers.pytorch_utils import Conv1D

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj = torch.nn.Linear(6, 6)
            self.up = torch.nn.Linear(6, 10, bias=False)
            self.c_attn = Conv1D(18, 6)

    class Experts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = torch.nn.Parameter(torch.randn(3, 8, 6))
            self.down_proj = torch.nn.Parameter(torch.randn(3, 6, 4))

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(11, 6)
            self.layers = torch.nn.ModuleList([Layer(), Layer()])
            self.head = torch.nn.Linear(6, 11, bias=False)
            if experts:
                self.layers[0].experts = Experts()

    torch.manual_seed(0)
    return Model().to(getattr(torch, dtype))


def make_lora(case: str, folder: Path) -> None:
    """Writes base, adapter and what peft's `merge_and_unload` makes of them into `folder`."""
    import peft
    import torch
    from safetensors.torch import save_file

    options = dict(lora_cases()[case])
    model = lora_model(options.pop("dtype", "float32"), experts=case == "experts")
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    # Saved from one copy and merged into another: some variants alter the base they begin with.
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**options))
    convert: dict[str, Any] = {}
    if case == "pissa_converted":  # to a plain adapter of twice the rank, for the unaltered base
        adapted.peft_config["default"].init_lora_weights = True
        adapted.save_pretrained(str(folder / "start"))
        adapted.peft_config["default"].init_lora_weights = "pissa"
        convert = {"path_initial_model_for_weight_conversion": str(folder / "start")}
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        trained = any(word in name for word in ("lora_", "modules_to_save", "trainable_tokens_delta"))
        if trained or (name.endswith("bias") and "bias" in options):
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.data = noise * 0.5
    adapted.save_pretrained(str(folder / "adapter"), save_embedding_layers=False, **convert)
    shutil.rmtree(folder / "start", ignore_errors=True)
    (folder / "adapter" / "README.md").unlink(missing_ok=True)
    loaded = peft.PeftModel.from_pretrained(model, str(folder / "adapter"))
    merged = loaded.merge_and_unload().state_dict()
    save_file({name: tensor.contiguous() for name, tensor in merged.items()}, folder / "merged.safetensors")


TIED_OPTIONS: dict[str, dict[str, Any]] = {
    "saved beside": {"target_modules": ["Q"]},
    "copy of the embedding": {"target_modules": ["Q"], "modules_to_save": ["E"]},
    "copy of the head": {"target_modules": ["Q"], "modules_to_save": ["H"]},
    "copies of both": {"target_modules": ["Q"], "modules_to_save": ["E", "H"]},
    "one copy of both": {"target_modules": ["Q"], "modules_to_save": ["E", "H"], "ensure_weight_tying": True},
    "factors on the head": {"target_modules": ["Q", "H"]},
    "factors on the embedding": {"target_modules": ["Q", "E"]},
    "factors on both": {"target_modules": ["Q", "E", "H"]},
    "factors on the head, tied": {"target_modules": ["Q", "H"], "ensure_weight_tying": True},
    "factors and a copied head": {"target_modules": ["Q", "E"], "modules_to_save": ["H"]},
    "factors and a copied embedding": {"target_modules": ["Q", "H"], "modules_to_save": ["E"]},
    "resized": {"target_modules": ["Q"], "modules_to_save": ["E"]},
    "trained tokens": {"target_modules": ["Q"], "trainable_token_indices": (2, 0)},
    "magnitudes on the head": {"target_modules": ["Q", "H"], "use_dora": True},
    "begun as pissa on the head": {"target_modules": ["Q", "H"], "init_lora_weights": "pissa"},
}
"""Arguments of `peft.LoraConfig` for a model with a tied head; Q, E, H stand for the family's names."""
TIED_NAMES = {
    "llama": {"Q": "q_proj", "E": "embed_tokens", "H": "lm_head"},
    "gpt2": {"Q": "c_attn", "E": "wte", "H": "lm_head"},
}


def tied_case(kind: str, case: str, folder: Path) -> dict[str, Any]:
    """What PEFT saves and merges for a tiny model with a tied head: only what touches embedding and head."""
    import peft
    import torch
    import transformers
    from safetensors.torch import load_file

    if kind == "llama":
        config = transformers.LlamaConfig(
            vocab_size=3, hidden_size=2, intermediate_size=2, num_hidden_layers=1, num_attention_heads=1,
            num_key_value_heads=1, tie_word_embeddings=True, max_position_embeddings=8,
        )  # fmt: skip
    else:
        config = transformers.GPT2Config(vocab_size=3, n_embd=2, n_layer=1, n_head=1, n_positions=8)
    names = TIED_NAMES[kind]
    given = TIED_OPTIONS[case]
    options = {k: [names[n] for n in v] if isinstance(v, list) else v for k, v in given.items()}
    options = {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder / "base")
    if case == "resized":
        model.resize_token_embeddings(4)
        model.save_pretrained(folder / "base")
    embedding = model.get_input_embeddings().weight.detach().clone()
    lora = peft.LoraConfig(r=1, lora_alpha=2, task_type="CAUSAL_LM", **options)
    adapted = peft.get_peft_model(model, lora)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
        if case == "saved beside":
            adapted.get_input_embeddings().weight.add_(torch.ones_like(embedding))
    beside = True if case in ("saved beside", "resized") else "auto"
    adapted.save_pretrained(str(folder / "adapter"), save_embedding_layers=beside)
    again = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    merged = peft.PeftModel.from_pretrained(again, folder / "adapter").merge_and_unload()
    saved = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    kept = ("r", "lora_alpha", "modules_to_save", "ensure_weight_tying", "fan_in_fan_out")
    kept += tuple(key for key in ("trainable_token_indices", "use_dora", "init_lora_weights") if key in given)
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    marks = (names["E"], names["H"])
    return {
        "model_type": kind,
        "config": {key: saved[key] for key in kept} | {"target_modules": sorted(saved["target_modules"])},
        "embedding": embedding.tolist(),
        "adapter": {k: v.tolist() for k, v in sorted(tensors.items()) if any(mark in k for mark in marks)},
        "merged_embedding": merged.get_input_embeddings().weight.tolist(),
        "merged_head": merged.get_output_embeddings().weight.tolist(),
    }


def main() -> None:
    """Records every case."""
    import torch

    DATA.mkdir(exist_ok=True)
    expected = {}
    for name, case in torch_cases().items():
        torch.save(case, DATA / name)
        torch.save(case, DATA / f"legacy_{name}", _use_new_zipfile_serialization=False)
        tensors = case.get("state_dict", case)
        expected[name] = {
            key: {"shape": list(t.shape), "hex": t.contiguous().view(torch.uint8).numpy().tobytes().hex()}
            if t.ndim and t.numel()
            else {"shape": list(t.shape), "hex": t.numpy().tobytes().hex()}
            for key, t in ((k, v.detach()) for k, v in tensors.items())
        }
    (DATA / "torch_expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    for case in lora_cases():
        make_lora(case, DATA / "lora" / case)
    record_tied()


def record_tied() -> None:
    """Records what PEFT makes of adapters of tied models."""
    found = {}
    for kind in TIED_NAMES:
        for case in TIED_OPTIONS:
            with tempfile.TemporaryDirectory() as folder:
                found[f"{kind}, {case}"] = tied_case(kind, case, Path(folder))
    lines = [f"{json.dumps(name)}: {json.dumps(case)}" for name, case in found.items()]
    (DATA / "tied_adapters.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
