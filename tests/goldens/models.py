"""Tiny models for the recorded merges, made from numbers alone: the repository keeps what mergekit made of
them, and every checkout makes the models again, bit for bit.

The weights are random and show mechanics, never quality. On purpose `ft1`'s norms and `ft2`'s
`layers.2.self_attn.v_proj` equal the base, `ft1` is sharded, `llama-tok` is ft2 with two tokens more, and
`llama-perm` is ft3 with its vocabulary in another order. A hundredth of each change is ten times as large.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

HERE = Path(__file__).parent
WIDTH, INNER, HEADS, VOCABULARY, POSITIONS = 64, 128, 4, 512, 128
# A draw without two equal magnitudes just where a recipe ceases to keep them: mergekit keeps either.
DRAW = 1
Tensors = dict[str, np.ndarray]

_LLAMA: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS // 2,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 4, "tie_word_embeddings": False, **_LLAMA},
    "mistral": {"num_hidden_layers": 3, "tie_word_embeddings": False, "sliding_window": None, **_LLAMA},
    "qwen2": {"num_hidden_layers": 3, "tie_word_embeddings": True, **_LLAMA},
    "gpt2": {
        "n_embd": WIDTH, "n_layer": 2, "n_head": HEADS, "n_positions": POSITIONS, "n_ctx": POSITIONS,
        "layer_norm_epsilon": 1e-05,
    },
}  # fmt: skip
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
TOKENIZER = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "unk_token": "<unk>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "model_max_length": 512,
    "clean_up_tokenization_spaces": False,
}
CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
SPECIAL = {name: TOKENIZER[name] for name in ("unk_token", "bos_token", "eos_token", "pad_token")}


def _raw(key: str, count: int) -> np.ndarray:
    """Uniform whole numbers below 2**32, from the stream of bits that NumPy promises never to change."""
    words = np.random.PCG64(zlib.crc32(f"{DRAW} {key}".encode())).random_raw((count + 1) // 2)
    return np.stack([words >> np.uint64(32), words & np.uint64(0xFFFFFFFF)], 1).ravel()[:count]


def draw(key: str, *shape: int) -> np.ndarray:
    """Nearly normal numbers of variance one: sums of four uniform ones, exact up to the last factor."""
    parts = _raw(key, 4 * math.prod(shape)).reshape(*shape, 4)
    return (parts.sum(-1).astype(np.float64) / 2.0**32 - 2.0) * math.sqrt(3)


def _shapes(family: str) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    if family == "gpt2":
        for layer in range(FAMILIES[family]["n_layer"]):
            of = f"transformer.h.{layer}."
            for name, rows, columns in (
                ("attn.c_attn", WIDTH, 3 * WIDTH), ("attn.c_proj", WIDTH, WIDTH),
                ("mlp.c_fc", WIDTH, 4 * WIDTH), ("mlp.c_proj", 4 * WIDTH, WIDTH),
            ):  # fmt: skip
                shapes |= {f"{of}{name}.weight": (rows, columns), f"{of}{name}.bias": (columns,)}
            for name in ("ln_1", "ln_2"):
                shapes |= {f"{of}{name}.weight": (WIDTH,), f"{of}{name}.bias": (WIDTH,)}
        shapes |= {
            "transformer.wte.weight": (VOCABULARY, WIDTH),
            "transformer.wpe.weight": (POSITIONS, WIDTH),
        }
        return shapes | {"transformer.ln_f.weight": (WIDTH,), "transformer.ln_f.bias": (WIDTH,)}
    shapes["model.embed_tokens.weight"] = (VOCABULARY, WIDTH)
    for layer in range(FAMILIES[family]["num_hidden_layers"]):
        of = f"model.layers.{layer}."
        shapes[f"{of}input_layernorm.weight"] = (WIDTH,)
        for name, rows in (("q", WIDTH), ("k", WIDTH // 2), ("v", WIDTH // 2), ("o", WIDTH)):
            shapes[f"{of}self_attn.{name}_proj.weight"] = (rows, WIDTH)
            if family == "qwen2" and name != "o":
                shapes[f"{of}self_attn.{name}_proj.bias"] = (rows,)
        shapes[f"{of}post_attention_layernorm.weight"] = (WIDTH,)
        for name, rows, columns in (("gate", INNER, WIDTH), ("up", INNER, WIDTH), ("down", WIDTH, INNER)):
            shapes[f"{of}mlp.{name}_proj.weight"] = (rows, columns)
    shapes["model.norm.weight"] = (WIDTH,)
    if family != "qwen2":
        shapes["lm_head.weight"] = (VOCABULARY, WIDTH)
    return shapes


def _is_norm(name: str) -> bool:
    return "norm" in name or (".ln_" in name and name.endswith("weight"))


def _base(family: str) -> Tensors:
    return {
        name: (1 + 0.05 * draw(f"{family}.{name}", *shape))
        if _is_norm(name)
        else 0.02 * draw(f"{family}.{name}", *shape)
        for name, shape in _shapes(family).items()
    }


def _tuned(base: Tensors, family: str, number: int) -> Tensors:
    """The base and a change of its own; what stays as it was does so on purpose (see above)."""
    tuned: Tensors = {}
    for name, value in base.items():
        same = (number == 1 and _is_norm(name)) or (number == 2 and "layers.2.self_attn.v_proj.w" in name)
        key = f"{family}.{number}.{name}"
        large = np.where(_raw(f"{key}.large", value.size).reshape(value.shape) < 2**32 // 100, 0.01, 0.001)
        tuned[name] = value if same else value + large * draw(key, *value.shape)
    return tuned


def _save(tensors: Tensors, file: Path, dtype: Any) -> None:
    """A safetensors file, by its definition: the writers of libraries differ in how they take bfloat16."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, value in sorted(tensors.items()):
        raw = value.astype(np.float32).astype(dtype).tobytes()
        header[name] = {"dtype": "F32" if dtype == np.float32 else "BF16", "shape": list(value.shape)}
        header[name]["data_offsets"] = [len(data), len(data) + len(raw)]
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def _write_json(content: Any, file: Path) -> None:
    file.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _write(
    folder: Path,
    family: str,
    tensors: Tensors,
    *,
    tokenizer: str = "base",
    bfloat16: bool = False,
    shards: int = 1,
) -> None:
    folder.mkdir(parents=True)
    dtype = ml_dtypes.bfloat16 if bfloat16 else np.float32
    rows = next(len(v) for name, v in tensors.items() if "embed_tokens" in name or "wte" in name)
    config = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, "model_type": family}
    config |= {"architectures": [ARCHITECTURES[family]], "vocab_size": rows, **FAMILIES[family]}
    _write_json(config | {"torch_dtype": "bfloat16" if bfloat16 else "float32"}, folder / "config.json")
    (folder / "tokenizer.json").write_bytes((HERE / "tokenizers" / f"{tokenizer}.json").read_bytes())
    chat = {"chat_template": CHATML} if tokenizer == "tok" else {}
    _write_json(TOKENIZER | chat, folder / "tokenizer_config.json")
    _write_json(SPECIAL, folder / "special_tokens_map.json")
    if shards == 1:
        return _save(tensors, folder / "model.safetensors", dtype)
    names = list(tensors)
    ends = [len(names) * (shard + 1) // shards for shard in range(shards)]
    weight_map: dict[str, str] = {}
    for shard, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        _save({name: tensors[name] for name in names[start:end]}, folder / file, dtype)
        weight_map |= dict.fromkeys(names[start:end], file)
    size = sum(value.size for value in tensors.values()) * np.dtype(dtype).itemsize
    _write_json(
        {"metadata": {"total_size": size}, "weight_map": weight_map}, folder / "model.safetensors.index.json"
    )


def _write_adapter(folder: Path) -> None:
    folder.mkdir(parents=True)
    tensors: Tensors = {}
    for layer in range(FAMILIES["llama"]["num_hidden_layers"]):
        for module, rows in (("q_proj", WIDTH), ("v_proj", WIDTH // 2)):
            stem = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{stem}.lora_A.weight"] = 0.05 * draw(f"{stem}.A", 4, WIDTH)
            tensors[f"{stem}.lora_B.weight"] = 0.05 * draw(f"{stem}.B", rows, 4)
    _save(tensors, folder / "adapter_model.safetensors", np.float32)
    config: dict[str, Any] = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8}
    config |= {"lora_dropout": 0.0, "bias": "none", "target_modules": ["q_proj", "v_proj"]}
    config |= {"fan_in_fan_out": False, "inference_mode": True, "modules_to_save": None}
    _write_json(config | {"base_model_name_or_path": "models/llama-base"}, folder / "adapter_config.json")


def _reordered(tensors: Tensors) -> Tensors:
    """Rows where llama-perm's tokenizer has the base's tokens."""
    old, new = (
        json.loads((HERE / "tokenizers" / f"{name}.json").read_text(encoding="utf-8"))["model"]["vocab"]
        for name in ("base", "perm")
    )
    back = {number: old[token] for token, number in new.items()}
    order = [back[row] for row in range(VOCABULARY)]
    return {name: value[order] if len(value) == VOCABULARY else value for name, value in tensors.items()}


def write_models(folder: Path) -> None:
    """Writes every model of the recorded merges into `folder`."""
    for family, tuned in (("llama", 3), ("gpt2", 2), ("qwen2", 2), ("mistral", 2)):
        base = _base(family)
        of = {"base": base} | {f"ft{n}": _tuned(base, family, n) for n in range(1, tuned + 1)}
        for name, tensors in of.items():
            shards = 3 if (family, name) == ("llama", "ft1") else 1
            _write(folder / f"{family}-{name}", family, tensors, shards=shards)
            if family == "llama":
                _write(folder / f"{family}-{name}-bf16", family, tensors, shards=shards, bfloat16=True)
        if family == "llama":
            more = {
                name: np.concatenate([value, 0.02 * draw(f"tok.{name}", 2, WIDTH)])
                if len(value) == VOCABULARY
                else value
                for name, value in of["ft2"].items()
            }
            _write(folder / "llama-tok", family, more, tokenizer="tok")
            _write(folder / "llama-perm", family, _reordered(of["ft3"]), tokenizer="perm")
    _write_adapter(folder / "llama-lora")
