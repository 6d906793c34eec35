"""Makes `released/`: small files in the layouts of published SAEs, with what other libraries make of them.

Run where sae-lens 6.54.12, circuit-tracer 0.5.0 and torch are installed:
`python tests/sae/formats/record_releases.py tests/sae/formats/released`. The hub is replaced by the folder.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from circuit_tracer.transcoder.activation_functions import JumpReLU
from circuit_tracer.transcoder.cross_layer_transcoder import (
    CrossLayerTranscoder,
    load_clt,
    load_gemma_scope_2_clt,
)
from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder, load_relu_transcoder
from sae_lens.loading import pretrained_sae_loaders as loaders
from sae_lens.registry import get_sae_class
from safetensors.torch import load_file, save_file

D, N, K, LAYERS, TOKENS = 8, 24, 4, 3, 6
X = torch.tensor(np.random.default_rng(1).standard_normal((TOKENS, D)), dtype=torch.float32)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.tensor(np.random.default_rng([seed, *shape]).standard_normal(shape), dtype=torch.float32)


def keep(path: Path, x: torch.Tensor, codes: torch.Tensor, out: torch.Tensor) -> None:
    save_file({"x": x, "codes": codes.detach().contiguous(), "out": out.detach().contiguous()}, path)


def by_saelens(root: Path, repo: str, within: str, kind: str, name: str, fold: float | None = None) -> None:
    """Loads it with SAELens' own loader of the kind, and keeps the codes and the output."""
    cfg, state, _ = loaders.NAMED_PRETRAINED_SAE_LOADERS[kind](repo, within, "cpu", False, None)
    cfg |= {"d_in": D, "d_sae": N, "dtype": "float32"} | ({"d_out": D} if "d_out" in cfg else {})
    cfg = loaders.handle_config_defaulting(cfg)
    sae_class, config_class = get_sae_class(cfg["architecture"])
    sae = sae_class(config_class.from_dict(cfg))
    state = {key: value.float().contiguous() for key, value in state.items()}
    sae.process_state_dict_for_loading(state)
    sae.load_state_dict(state)
    if fold is not None:
        sae.fold_activation_norm_scaling_factor(fold)
    with torch.no_grad():
        codes = sae.encode(X)
        out = sae(X) if hasattr(sae, "W_skip") else sae.decode(codes)
    keep(root / f"{name}.safetensors", X, codes, out)


def folder(root: Path, repo: str, within: str = "") -> Path:
    path = root / repo / within
    path.mkdir(parents=True, exist_ok=True)
    return path


def gemma_scope(root: Path) -> None:
    arrays = {
        "W_enc": random(D, N), "W_dec": random(N, D), "b_enc": random(N), "b_dec": random(D),
        "threshold": random(N, seed=1).abs(),
    }  # fmt: skip
    repo, within = "google/gemma-scope-2b-pt-res", "layer_3/width_16k/average_l0_59"
    np.savez(
        folder(root, repo, within) / "params.npz", **{name: value.numpy() for name, value in arrays.items()}
    )
    by_saelens(root, repo, within, "gemma_2", "gemma_scope")
    repo, within = "google/gemma-scope-2b-pt-transcoders", "layer_3/width_16k/average_l0_54"
    np.savez(
        folder(root, repo, within) / "params.npz", **{name: value.numpy() for name, value in arrays.items()}
    )
    by_saelens(root, repo, within, "gemma_2_transcoder", "gemma_scope_transcoder")


def gemma_scope_2(root: Path) -> None:
    repo = "google/gemma-scope-2-1b-pt"
    plain = {
        "w_enc": random(D, N), "w_dec": random(N, D), "b_enc": random(N), "b_dec": random(D),
        "threshold": random(N, seed=1).abs(),
    }  # fmt: skip
    skip = {"affine_skip_connection": random(D, D)}
    for within, tensors, name in (
        ("resid_post/layer_3_width_16k_l0_medium", plain, "gemma_scope_2_resid"),
        ("attn_out/layer_3_width_16k_l0_medium", plain, "gemma_scope_2_attn"),
        ("mlp_out/layer_3_width_16k_l0_medium", plain, "gemma_scope_2_mlp"),
        ("transcoder/layer_3_width_16k_l0_medium", plain, "gemma_scope_2_transcoder"),
        ("transcoder/layer_3_width_16k_l0_medium_affine", plain | skip, "gemma_scope_2_affine"),
    ):
        save_file(tensors, folder(root, repo, within) / "params.safetensors")
        config = loaders._infer_gemma_3_raw_cfg_dict(repo, within)  # what the released config.json says
        (root / repo / within / "config.json").write_text(json.dumps(config))
        by_saelens(root, repo, within, "gemma_3", name)
    causal = torch.triu(torch.ones(LAYERS, LAYERS))
    files = {}
    for i in range(LAYERS):
        tensors = {
            "w_enc": random(D, N, seed=i), "b_enc": random(N, seed=i), "b_dec": random(D, seed=i),
            "w_dec": random(N, LAYERS, D, seed=i) * causal[i][None, :, None],
            "threshold": random(N, seed=9 + i).abs(), "affine_skip_connection": random(D, D, seed=i),
        }  # fmt: skip
        for within in ("clt/width_262k_l0_medium_affine", "crosscoder/layer_7_13_17_width_262k_l0_medium"):
            files[i] = str(folder(root, repo, within) / f"params_layer_{i}.safetensors")
            kept = (
                tensors
                if within.startswith("clt")
                else {k: v for k, v in tensors.items() if "affine" not in k}
            )
            save_file(kept, files[i])
    by_saelens(
        root, repo, "clt/width_262k_l0_medium_affine/params_layer_1", "gemma_3", "gemma_scope_2_clt_layer"
    )
    x = random(LAYERS, TOKENS, D, seed=2)
    for within, name in (
        ("clt/width_262k_l0_medium_affine", "gemma_scope_2_clt"),
        ("crosscoder/layer_7_13_17_width_262k_l0_medium", "gemma_scope_2_crosscoder"),
    ):
        files = {i: str(root / repo / within / f"params_layer_{i}.safetensors") for i in range(LAYERS)}
        # It stops before the highest layer it is given.
        model = load_gemma_scope_2_clt(files | {LAYERS: ""}, dtype=torch.float32)
        codes = model.encode(x)
        keep(root / f"{name}.safetensors", x, codes, model.decode(codes, x))


def llama_scope(root: Path) -> None:
    decoder = random(D, N)
    tensors = {
        "encoder.weight": random(N, D), "encoder.bias": random(N), "decoder.bias": random(D),
        "decoder.weight": decoder / decoder.norm(dim=0),
    }  # fmt: skip
    repo, within = "fnlp/Llama3_1-8B-Base-LXR-8x", "Llama3_1-8B-Base-L3R-8x"
    save_file(
        {name: value.bfloat16() for name, value in tensors.items()},
        folder(root, repo, f"{within}/checkpoints") / "final.safetensors",
    )
    said = {
        "hook_point_in": "blocks.3.hook_resid_post", "hook_point_out": "blocks.3.hook_resid_post",
        "d_model": D, "d_sae": N, "expansion_factor": N // D, "act_fn": "jumprelu", "top_k": 50,
        "jump_relu_threshold": 0.25, "norm_activation": "dataset-wise", "use_decoder_bias": True,
        "dataset_average_activation_norm": {"in": 1.75, "out": 1.75},
        "apply_decoder_bias_to_pre_encoder": False, "sparsity_include_decoder_norm": True,
    }  # fmt: skip
    (root / repo / within / "hyperparams.json").write_text(json.dumps(said))
    by_saelens(root, repo, within, "llama_scope", "llama_scope", fold=D**0.5 / 1.75)
    repo, within = "fnlp/Llama-Scope-R1-Distill", "400M-Slimpajama-400M-OpenR1-Math-220k/L3R"
    save_file(
        tensors | {"log_jumprelu_threshold": random(N, seed=3) - 1},
        folder(root, repo, within) / "sae_weights.safetensors",
    )
    said = {"d_model": D, "expansion_factor": N // D, "hook_point_in": "blocks.3.hook_resid_post"}
    (root / repo / within / "config.json").write_text(json.dumps(said))
    from sae_lens.loading.pretrained_saes_directory import get_norm_scaling_factor

    scale = get_norm_scaling_factor("llama_scope_r1_distill", "l3r_400m_slimpajama_400m_openr1_math")
    by_saelens(root, repo, within, "llama_scope_r1_distill", "llama_scope_r1", fold=scale)


def torch_files(root: Path) -> None:
    linear = {"weight": random(N, D), "bias": random(N)}, {"weight": random(D, N), "bias": random(D)}

    def named(form: str) -> dict[str, torch.Tensor]:
        return {
            form.format(side, part): value
            for side, parts in zip(("encoder", "decoder"), linear, strict=True)
            for part, value in parts.items()
        }

    repo, within = "Goodfire/Llama-3.1-8B-Instruct-SAE-l19", "Llama-3.1-8B-Instruct-SAE-l19.pth"
    torch.save(named("{}_linear.{}"), folder(root, repo) / within)
    by_saelens(root, repo, within, "goodfire", "goodfire")
    repo, within = "qresearch/DeepSeek-R1-Distill-Llama-8B-SAE-l19", "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt"
    torch.save(named("{}.{}"), folder(root, repo) / within)
    by_saelens(root, repo, within, "deepseek_r1", "deepseek_r1")
    repo, within = f"Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}", "layer3.sae.pt"
    arrays = {"W_enc": random(N, D), "W_dec": random(D, N), "b_enc": random(N), "b_dec": random(D)}
    torch.save(arrays, folder(root, repo) / within)
    by_saelens(root, repo, within, "qwen_scope", "qwen_scope")
    repo, within = "ckkissane/attn-saes-gpt2-small-all-layers", "gpt2-small_L3_Hcat_z.pt"
    arrays = {"W_enc": random(D, N), "W_dec": random(N, D), "b_enc": random(N), "b_dec": random(D)}
    torch.save(arrays, folder(root, repo) / within)
    said = {"act_size": D, "dict_size": N, "act_name": "blocks.3.attn.hook_z"}
    (root / repo / "gpt2-small_L3_Hcat_z_cfg.json").write_text(json.dumps(said))
    cfg_kind = loaders.NAMED_PRETRAINED_SAE_LOADERS["connor_rob_hook_z"]

    def flat(*args: Any) -> Any:  # heads side by side already
        cfg, state, other = cfg_kind(*args)
        return cfg | {"reshape_activations": "none", "hook_name": "blocks.3.hook_resid_post"}, state, other

    loaders.NAMED_PRETRAINED_SAE_LOADERS["connor_rob_hook_z"] = flat
    by_saelens(root, repo, within, "connor_rob_hook_z", "hook_z")


def transcoders(root: Path) -> None:
    repo = "mwhanna/qwen3-1.7b-transcoders-lowl0"
    place = folder(root, repo)
    config = {
        "model_name": "Qwen/Qwen3-1.7B", "model_kind": "transcoder_set", "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "mlp.hook_out",
    }  # fmt: skip
    (place / "config.yaml").write_text("".join(f'{key}: "{value}"\n' for key, value in config.items()))
    wandb = "".join(
        f"{k}:\n  value: {v}\n" for k, v in {"d_model": D, "d_feature": N, "batch_size": 2}.items()
    )
    (place / "wandb-config.yaml").write_text(wandb)
    for number, name, jumps, skip in (
        (3, "mwhanna", False, False), (4, "circuit_tracer_skip", False, True),
        (5, "circuit_tracer_jump", True, False),
    ):  # fmt: skip
        function = JumpReLU(torch.zeros(N)) if jumps else torch.nn.functional.relu
        model = SingleLayerTranscoder(D, N, function, number, skip_connection=skip, dtype=torch.float32)
        randomize(model)
        model.to_safetensors(str(place / f"layer_{number}.safetensors"))
        model = load_relu_transcoder(str(place / f"layer_{number}.safetensors"), number)
        codes = model.encode(X)
        keep(root / f"{name}.safetensors", X, codes, model.decode(codes, X))
    by_saelens(root, repo, "layer_3.safetensors", "mwhanna_transcoder", "mwhanna")


def cross_layer(root: Path) -> None:
    x = random(LAYERS, TOKENS, D, seed=2)
    for repo, name, function in (
        ("mntss/clt-gemma-2-2b-2.5M", "clt_relu", "relu"), ("mntss/clt-jump", "clt_jump", "jump_relu"),
    ):  # fmt: skip
        model = CrossLayerTranscoder(
            LAYERS, N, D, activation_function=function, lazy_decoder=False, dtype=torch.float32
        )
        randomize(model)
        place = folder(root, repo)
        model.to_safetensors(str(place))
        (place / "config.yaml").write_text(
            'model_name: "google/gemma-2-2b"\nmodel_kind: "cross_layer_transcoder"\n'
            'feature_input_hook: "hook_resid_mid"\nfeature_output_hook: "hook_mlp_out"\n'
        )
        model = load_clt(str(place), dtype=torch.float32)
        codes = model.encode(x)
        keep(root / f"{name}.safetensors", x, codes, model.decode(codes))
    by_saelens(root, "mntss/clt-gemma-2-2b-2.5M", "1", "mntss_clt_layer_transcoder", "clt_layer")


def randomize(module: torch.nn.Module) -> None:
    for number, (name, value) in enumerate(sorted(module.named_parameters())):
        noise = random(*value.shape, seed=number)
        value.data = noise.abs() if name.endswith("threshold") else noise


def local_hub(root: Path) -> None:
    """Puts the folder in place of the hub."""

    def download(repo_id: str, filename: str, *, subfolder: str = "", **_: Any) -> str:
        path = root / repo_id / subfolder / filename
        if not path.is_file():
            raise loaders.EntryNotFoundError(f"no {path}")
        return str(path)

    loaders.hf_hub_download = download
    loaders.get_safetensors_tensor_shapes = lambda repo, name: {
        key: list(value.shape) for key, value in load_file(root / repo / name).items()
    }


RECORDERS: tuple[Callable[[Path], None], ...] = (
    gemma_scope, gemma_scope_2, llama_scope, torch_files, transcoders, cross_layer,
)  # fmt: skip

if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir()
    local_hub(target)
    for record in RECORDERS:
        record(target)
