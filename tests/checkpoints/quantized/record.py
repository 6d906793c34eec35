"""Writes data/: small quantized files as other libraries write them, and digests of what these read in them.

`python tests/checkpoints/quantized/record.py SOURCES [CASE ...]`, with torch, transformers, bitsandbytes 0.50
and compressed-tensors 0.20 installed. SOURCES holds the unpacked wheel auto_gptq-0.7.1 (`auto_gptq/`) and the
unpacked `autoawq-0.2.9` source distribution (`awq/`), neither of which installs without a GPU; only the files
that pack and unpack are loaded from there. Each case is `NAME.safetensors`, which the library wrote or whose
tensors its own function made, and an entry of `expected.json`: the `config.json` beside it, and for every
dequantized tensor its shape, the SHA-256 of its float32 bytes as the library computes them (zeros without
their sign, which bitsandbytes' kernels and its own table give differently), and its first values.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file

DATA = Path(__file__).parent / "data"
Case = tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, torch.Tensor]]
CASES: dict[str, Callable[[], Case]] = {}
SOURCES = Path()


def case(function: Callable[[], Case]) -> Callable[[], Case]:
    CASES[function.__name__] = function
    return function


def weights(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def transformers_fp8(block: list[int] | None, scale_fmt: str = "float") -> Any:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

    config = SimpleNamespace(weight_block_size=block, scale_fmt=scale_fmt)
    owner = SimpleNamespace(quantization_config=config)
    return Fp8Quantize(owner), Fp8Dequantize(owner)


@case
def fp8_blocks() -> Case:
    quantize, dequantize = transformers_fp8([16, 32])
    plain = {
        "model.layers.0.mlp.up_proj.weight": weights(48, 64),
        "model.layers.0.mlp.experts.down_proj": weights(2, 32, 64, seed=1),
    }
    stored, expected = {}, {}
    for name, weight in plain.items():
        stored |= quantize.convert({name: weight})
        scale = stored[f"{name}_scale_inv"]
        expected[name] = dequantize._dequantize_one(stored[name], scale, torch.float32)
    stored["model.layers.0.mlp.up_proj.activation_scale"] = torch.tensor(0.5)
    stored["model.norm.weight"] = torch.ones(64, dtype=torch.bfloat16)
    config = {"quant_method": "fp8", "weight_block_size": [16, 32], "activation_scheme": "dynamic"}
    return stored, config, expected


@case
def fp8_per_tensor() -> Case:
    quantize, dequantize = transformers_fp8(None)
    name = "model.layers.0.self_attn.q_proj.weight"
    stored = quantize.convert({name: weights(32, 48)})
    stored[f"{name}_scale_inv"] = stored[f"{name}_scale_inv"].reshape(()).to(torch.bfloat16)
    expected = dequantize._dequantize_one(stored[name], stored[f"{name}_scale_inv"], torch.float32)
    return stored, {"quant_method": "fp8", "activation_scheme": "static"}, {name: expected}


@case
def fp8_exponent_scales() -> Case:
    quantize, dequantize = transformers_fp8([1, 32], "ue8m0")
    name = "model.layers.0.self_attn.q_proj.weight"
    stored = quantize.convert({name: weights(16, 64)})
    scale = stored[f"{name}_scale_inv"].view(torch.uint8)
    expected = {name: dequantize._dequantize_one(stored[name], scale, torch.float32)}
    other = "model.layers.0.mlp.experts.0.w1.weight"
    bytes_ = torch.randint(-128, 128, (16, 32), generator=torch.Generator().manual_seed(3), dtype=torch.int8)
    scales = torch.exp2(torch.arange(-16, 16).reshape(16, 2).float()).to(torch.float8_e8m0fnu)
    expected[other] = dequantize._dequantize_one(bytes_, scales, torch.float32)
    stored = {name: stored[name], f"{name}_scale_inv": scale}
    stored |= {other: bytes_, other.replace("weight", "scale"): scales.view(torch.uint8)}
    return stored, {"quant_method": "fp8", "scale_fmt": "ue8m0"}, expected


@case
def mxfp4_experts() -> Case:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(4)
    stem = "model.layers.0.mlp.experts."
    stored, expected = {}, {}
    for proj, shape in (("gate_up_proj", (2, 24, 2)), ("down_proj", (2, 32, 1))):
        blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(110, 130, shape, generator=generator, dtype=torch.uint8)
        stored |= {f"{stem}{proj}_blocks": blocks, f"{stem}{proj}_scales": scales}
        stored[f"{stem}{proj}_bias"] = torch.zeros(2, shape[1], dtype=torch.bfloat16)
        expected[f"{stem}{proj}"] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    return stored, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, expected


def compressed(schemes: dict[str, dict[str, Any]], inputs: dict[str, Any] | None = None) -> Case:
    """Linear layers as compressed-tensors packs them, and as it unpacks them with its scales in float32."""
    from compressed_tensors.compressors.base import BaseCompressor, compress_module, infer_module_format
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import dequantize
    from compressed_tensors.quantization.lifecycle.initialize import initialize_module_for_quantization
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    stored, expected, groups = {}, {}, {}
    for number, (name, settings) in enumerate(schemes.items()):
        settings = dict(settings)
        rows, columns = settings.pop("size", (32, 64))
        args = QuantizationArgs(**settings)
        activations = None if inputs is None else QuantizationArgs(**inputs)
        scheme = QuantizationScheme(targets=[f"re:.*{name}"], weights=args, input_activations=activations)
        linear = torch.nn.Linear(columns, rows, bias=False)
        linear.weight.data = weights(rows, columns, seed=10 + number) + 0.01
        initialize_module_for_quantization(linear, scheme)
        weight = linear.weight.data
        if args.strategy == "tensor":
            low, high = weight.min().reshape(1), weight.max().reshape(1)
        elif args.strategy == "channel":
            low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
        elif args.strategy == "block":
            tall, wide = args.block_structure
            padded = torch.nn.functional.pad(weight, (0, -columns % wide, 0, -rows % tall))
            cut = padded.unflatten(0, (-1, tall)).unflatten(2, (-1, wide))
            low, high = cut.amin((1, 3)), cut.amax((1, 3))
        else:
            cut = weight.unflatten(1, (-1, args.group_size))
            low, high = cut.amin(2), cut.amax(2)
        whole = None
        if hasattr(linear, "weight_global_scale"):
            whole = generate_gparam(weight.min(), weight.max())
            linear.weight_global_scale.data.copy_(whole)
        scale, zero = calculate_qparams(low, high, args, global_scale=whole)
        linear.weight_scale.data.copy_(scale.reshape(linear.weight_scale.shape))
        if hasattr(linear, "weight_zero_point"):
            linear.weight_zero_point.data.copy_(zero.reshape(linear.weight_zero_point.shape))
        compress_module(linear)
        state = {key: value.detach() for key, value in linear.state_dict().items()}
        stored |= {f"model.layers.0.{name}.{key}": value for key, value in state.items()}
        format_ = infer_module_format(torch.nn.Linear, scheme)
        compressor = BaseCompressor.get_value_from_registry(format_.value)
        if state["weight_scale"].dtype != torch.uint8 and "weight_global_scale" not in state:
            state["weight_scale"] = state["weight_scale"].float()
        if "weight_global_scale" in state:  # `decompress` computes these in bfloat16
            packed, whole = state["weight_packed"], state["weight_global_scale"]
            codes = unpack_fp4_from_uint8(packed, rows, columns, dtype=torch.float32)
            weight = dequantize(codes, state["weight_scale"].float(), args=args, global_scale=whole)
        else:
            weight = compressor.decompress(state, scheme)["weight"]
        expected[f"model.layers.0.{name}.weight"] = weight.float()
        groups[f"group_{number}"] = scheme
    config = QuantizationConfig(config_groups=groups, quantization_status="compressed")
    return stored, json.loads(config.model_dump_json()), expected


@case
def compressed_int8() -> Case:
    return compressed(
        {
            "q_proj": {"num_bits": 8, "type": "int", "strategy": "tensor", "symmetric": True},
            "k_proj": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True},
            "v_proj": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False},
        },
        {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True},
    )


@case
def compressed_fp8() -> Case:
    return compressed(
        {
            "q_proj": {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True},
            "k_proj": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True},
            "o_proj": {
                "num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 16],
                "symmetric": True, "size": (40, 56),
            },
        },
        {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False},
    )  # fmt: skip


@case
def compressed_packed() -> Case:
    group = {"type": "int", "strategy": "group", "group_size": 32}
    return compressed(
        {
            "q_proj": {**group, "num_bits": 4, "symmetric": True},
            "k_proj": {**group, "num_bits": 4, "symmetric": False},
            "v_proj": {
                "num_bits": 4,
                "type": "int",
                "strategy": "channel",
                "symmetric": False,
                "size": (20, 44),
            },
            "o_proj": {**group, "num_bits": 3, "symmetric": False},
            "up_proj": {**group, "num_bits": 8, "symmetric": True},
            "down_proj": {**group, "num_bits": 2, "symmetric": True},
            "gate_proj": {**group, "num_bits": 5, "symmetric": True, "size": (16, 96)},
        }
    )


@case
def compressed_fp4() -> Case:
    nv = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
    return compressed({"q_proj": nv})


@case
def compressed_mxfp4() -> Case:
    mx = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True}
    return compressed({"q_proj": {**mx, "scale_dtype": torch.uint8}})


LLAMA: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16,
}  # fmt: skip


def bitsandbytes(**settings: Any) -> Case:
    """A tiny Llama that transformers quantizes with bitsandbytes on a CPU, saves, and dequantizes."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    config = BitsAndBytesConfig(**settings)
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(f"{folder}/plain")
        options = {"device_map": "cpu", "dtype": torch.float32}
        model = AutoModelForCausalLM.from_pretrained(f"{folder}/plain", quantization_config=config, **options)
        model.save_pretrained(f"{folder}/quantized")
        stored = load_file(f"{folder}/quantized/model.safetensors")
        text = json.loads(Path(f"{folder}/quantized/config.json").read_text())
        again = AutoModelForCausalLM.from_pretrained(f"{folder}/quantized", **options)
        expected = {name: value.float() for name, value in again.dequantize().state_dict().items()}
    quantized = {name for name in expected if f"{name}.absmax" in stored or stored[name].dtype == torch.int8}
    stored = {
        name: value.to(torch.bfloat16) if value.dtype == torch.float32 and value.shape == (32, 32) else value
        for name, value in stored.items()
    }
    return stored, text, {name: expected[name] for name in quantized}


@case
def bitsandbytes_nf4() -> Case:
    return bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4")


@case
def bitsandbytes_nf4_nested() -> Case:
    return bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


@case
def bitsandbytes_fp4() -> Case:
    return bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_quant_storage="bfloat16")


@case
def bitsandbytes_int8() -> Case:
    return bitsandbytes(load_in_8bit=True)


def source_module(name: str, file: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, SOURCES / file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def quantized_matrix(out: int, inputs: int, bits: int, groups: torch.Tensor, seed: int) -> Any:
    """A linear layer with scales and zero points (never 0) in half precision, `[out, groups]`."""
    generator = torch.Generator().manual_seed(seed)
    count = int(groups.max()) + 1
    scales = (torch.rand(out, count, generator=generator) * 0.02 + 0.01).half().float()
    zeros = torch.randint(1, 2**bits, (out, count), generator=generator).float()
    codes = torch.randint(0, 2**bits, (out, inputs), generator=generator).float()
    linear = torch.nn.Linear(inputs, out, bias=False)
    linear.weight.data = (codes - zeros[:, groups]) * scales[:, groups]
    return linear, scales, zeros


@case
def gptq() -> Case:
    """AutoGPTQ's packing for 2, 3, 4 and 8 bits, in order and by `g_idx`, times the identity."""
    cuda = source_module("qlinear_cuda", "auto_gptq/nn_modules/qlinear/qlinear_cuda.py")
    stored, expected = {}, {}
    for number, (bits, shuffled) in enumerate([(4, False), (4, True), (2, False), (3, True), (8, False)]):
        name = f"model.layers.{number}.mlp.up_proj"
        groups = torch.arange(64) // 32
        if shuffled:
            groups = groups[torch.randperm(64, generator=torch.Generator().manual_seed(number))]
        linear, scales, zeros = quantized_matrix(32, 64, bits, groups, 20 + number)
        packed = cuda.QuantLinear(bits, 32, 64, 32, False)
        packed.pack(linear, scales, zeros, groups.int())
        stored |= {f"{name}.{key}": value for key, value in packed.state_dict().items()}
        stored[f"{name}.scales"] = packed.scales.half()
        packed.scales = packed.scales.float()
        expected[f"{name}.weight"] = packed(torch.eye(64)).T.contiguous()
    return (
        stored,
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": False},
        expected,
    )


@case
def awq() -> Case:
    """AutoAWQ's packing (version gemm), and its `dequantize_gemm` with scales in float32."""
    for name in ("awq", "awq.utils", "awq.modules"):
        sys.modules.setdefault(name, types.ModuleType(name))
    module, utils = types.ModuleType("awq.utils.module"), types.ModuleType("awq.utils.utils")
    vars(module)["try_import"] = lambda name: (None, "")
    vars(utils)["get_best_device"] = lambda: "cpu"
    sys.modules.update({"awq.utils.module": module, "awq.utils.utils": utils})
    sys.modules["awq.utils.packing_utils"] = source_module("packing_utils", "awq/utils/packing_utils.py")
    gemm = source_module("gemm", "awq/modules/linear/gemm.py")
    groups = torch.arange(64) // 32
    linear, scales, zeros = quantized_matrix(32, 64, 4, groups, 30)
    packed = gemm.WQLinear_GEMM.from_linear(
        linear, 4, 32, scales=scales.T.contiguous(), zeros=zeros.T.contiguous()
    )
    name = "model.layers.0.mlp.up_proj"
    stored = {f"{name}.{key}": value for key, value in packed.state_dict().items()}
    found = sys.modules["awq.utils.packing_utils"].dequantize_gemm(
        packed.qweight, packed.qzeros, packed.scales.float(), 4, 32
    )
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
    return stored, config, {f"{name}.weight": found.T.contiguous()}


def main() -> None:
    global SOURCES
    SOURCES = Path(sys.argv[1])
    DATA.mkdir(exist_ok=True)
    file = DATA / "expected.json"
    recorded = json.loads(file.read_text()) if file.exists() else {}
    for name in sys.argv[2:] or CASES:
        stored, config, expected = CASES[name]()
        save_file({key: value.contiguous() for key, value in stored.items()}, DATA / f"{name}.safetensors")
        whole = config if "model_type" in config else {"quantization_config": config}
        tensors = {
            key: {
                "shape": list(value.shape),
                "sha256": hashlib.sha256((value + 0).contiguous().numpy().tobytes()).hexdigest(),
                "first": value.flatten()[:3].tolist(),
            }
            for key, value in sorted(expected.items())
        }
        recorded[name] = {"config": whole, "tensors": tensors}
        print(name, len(tensors), (DATA / f"{name}.safetensors").stat().st_size)
    file.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
