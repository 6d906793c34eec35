"""Checkpoints to merge: a base model and three siblings a small step away, Qwen2-shaped, in bfloat16."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

__all__ = ["MODELS", "QWEN2_0_5B", "TINY", "Shape", "build_family"]

MODELS = ("base", "first", "second", "third")


@dataclass(frozen=True)
class Shape:
    """The sizes of a Qwen2 model with tied embeddings, under the names `config.json` gives them."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of every tensor, in the order files hold them."""
        wide, narrow = self.hidden_size, self.intermediate_size
        key_value = wide // self.num_attention_heads * self.num_key_value_heads
        yield "model.embed_tokens.weight", (self.vocab_size, wide)
        for layer in range(self.num_hidden_layers):
            block = f"model.layers.{layer}."
            yield block + "input_layernorm.weight", (wide,)
            yield block + "mlp.down_proj.weight", (wide, narrow)
            yield block + "mlp.gate_proj.weight", (narrow, wide)
            yield block + "mlp.up_proj.weight", (narrow, wide)
            yield block + "post_attention_layernorm.weight", (wide,)
            for name, rows in (("q", wide), ("k", key_value), ("v", key_value)):
                yield f"{block}self_attn.{name}_proj.bias", (rows,)
                yield f"{block}self_attn.{name}_proj.weight", (rows, wide)
            yield block + "self_attn.o_proj.weight", (wide, wide)
        yield "model.norm.weight", (wide,)

    @property
    def parameters(self) -> int:
        return sum(int(np.prod(shape)) for _, shape in self.tensors())


QWEN2_0_5B = Shape(896, 24, 14, 2, 4864, 151_936)
TINY = Shape(64, 3, 4, 2, 128, 256)


def build_family(folder: Path, shape: Shape, shards: int = 1) -> dict[str, Path]:
    """Writes the four models below `folder` unless an earlier call did, and returns their folders by name.

    Weights are normal with standard deviation .02; a sibling adds a normal step of .001 to each. They show
    speed, never quality: no text was seen.
    """
    folders = {name: folder / name for name in MODELS}
    done, wanted = folder / "done.json", json.dumps(asdict(shape) | {"shards": shards})
    if done.is_file() and done.read_text() == wanted:
        return folders
    for sibling, (name, path) in enumerate(folders.items()):
        path.mkdir(parents=True, exist_ok=True)
        _write_weights(path, shape, sibling, shards)
        _write_description(path, shape, name)
    done.write_text(wanted)
    return folders


def _weights(name: str, shape: tuple[int, ...], sibling: int) -> np.ndarray:
    base = np.random.Generator(np.random.SFC64(zlib.crc32(name.encode())))
    values = base.standard_normal(shape, dtype=np.float32)
    values *= np.float32(0.02)
    if sibling:
        step = np.random.Generator(np.random.SFC64([sibling, zlib.crc32(name.encode())]))
        values += np.float32(0.001) * step.standard_normal(shape, dtype=np.float32)
    return values.astype(ml_dtypes.bfloat16)


def _write_weights(path: Path, shape: Shape, sibling: int, shards: int) -> None:
    names = dict(shape.tensors())
    groups = np.array_split(np.array(list(names)), shards)
    where: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        file = "model.safetensors" if shards == 1 else f"model-{number:05}-of-{shards:05}.safetensors"
        tensors = {str(name): _weights(str(name), names[str(name)], sibling) for name in group}
        save_file(tensors, path / file, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, file)
    if shards > 1:
        index = {"metadata": {"total_size": 2 * shape.parameters}, "weight_map": where}
        (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _write_description(path: Path, shape: Shape, name: str) -> None:
    config = asdict(shape) | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    (path / "config.json").write_text(json.dumps(config, indent=2))
    bytes_as_text = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {
        token: number for number, token in enumerate(["<|end|>", *bytes_as_text[: shape.vocab_size - 1]])
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "model_max_length": 32_768,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
