"""Makes `recorded/`: SAEs as the libraries themselves write them, with their codes and outputs.

Run where sae-lens 6.54, eai-sparsify 1.3 and dictionary-learning 0.1 are installed, or for some of them:
`python tests/sae/formats/record.py tests/sae/formats/recorded sparsify dictionary_learning`. What else
SAELens reads is recorded by `record_saelens.py`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

D, N, K, TOKENS = 8, 24, 4, 6


def _random(module: torch.nn.Module) -> None:
    rng = np.random.default_rng(0)
    for name, value in sorted(module.named_parameters()):
        noise = torch.tensor(rng.standard_normal(tuple(value.shape)), dtype=torch.float32)
        value.data = noise.abs() if name == "threshold" else noise


def _keep(folder: Path, x: torch.Tensor, codes: torch.Tensor, out: torch.Tensor) -> None:
    arrays = {"x": x, "codes": codes, "out": out}
    save_file(
        {name: np.ascontiguousarray(value.detach().numpy()) for name, value in arrays.items()},
        folder / "expected.safetensors",
    )


def saelens(root: Path, x: torch.Tensor) -> None:
    import sae_lens

    kinds = {
        "topk": sae_lens.TopKSAEConfig(
            D, N, k=K, apply_b_dec_to_input=True, rescale_acts_by_decoder_norm=True
        ),
        "standard": sae_lens.StandardSAEConfig(D, N, apply_b_dec_to_input=False),
        "gated": sae_lens.GatedSAEConfig(D, N),
        "jumprelu": sae_lens.JumpReLUSAEConfig(D, N, normalize_activations="layer_norm"),
    }
    for name, config in kinds.items():
        model = sae_lens.SAE.get_sae_class_for_architecture(config.architecture())(config)
        _random(model)
        folder = root / f"saelens_{name}"
        model.save_model(folder)
        codes = model.encode(x)
        _keep(folder, x, codes, model.decode(codes))


def sparsify(root: Path, x: torch.Tensor) -> None:
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # which needs a GPU
    from sparsify import SparseCoder, SparseCoderConfig

    kinds = {
        "sae": {},
        "skip": {"transcode": True, "skip_connection": True},
        "transcoder": {"transcode": True},
        "groupmax": {"activation": "groupmax"},
        "groupmax_skip": {"activation": "groupmax", "transcode": True, "skip_connection": True},
        "autoencoder_skip": {"skip_connection": True},
        "expansion": {"num_latents": 0, "expansion_factor": N // D},
    }
    for name, options in kinds.items():
        model = SparseCoder(D, SparseCoderConfig(**{"num_latents": N, "k": K, **options}))
        _random(model)
        folder = root / f"sparsify_{name}"
        model.save_to_disk(folder)
        with torch.no_grad():
            found = model(x)
        codes = torch.zeros(len(x), N).scatter(1, found.latent_indices, found.latent_acts)
        _keep(folder, x, codes, found.sae_out)


def dictionary_learning(root: Path, x: torch.Tensor) -> None:
    from dictionary_learning import AutoEncoder, GatedAutoEncoder, JumpReluAutoEncoder
    from dictionary_learning.dictionary import AutoEncoderNew
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK
    from dictionary_learning.utils import load_dictionary

    for model in (
        AutoEncoderTopK(D, N, K),
        BatchTopKSAE(D, N, K),
        JumpReluAutoEncoder(D, N),
        AutoEncoder(D, N),
        AutoEncoderNew(D, N),
        GatedAutoEncoder(D, N),
        MatryoshkaBatchTopKSAE(D, N, K, [N // 4, N - N // 4]),
    ):
        _random(model)
        name = type(model).__name__
        if name in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
            model.threshold.fill_(0.7)
        folder = root / f"dictionary_learning_{name}"
        folder.mkdir()
        torch.save(model.state_dict(), folder / "ae.pt")
        trainer = {"dict_class": name, "activation_dim": D, "dict_size": N, "k": K}
        (folder / "config.json").write_text(json.dumps({"trainer": trainer}))
        model, _ = load_dictionary(str(folder), "cpu")
        with torch.no_grad():
            codes = model.encode(x)
            _keep(folder, x, codes, model.decode(codes))


def openai(root: Path, x: torch.Tensor) -> None:
    """Follows the released `sparse_autoencoder` 5, which is not on PyPI: formulas of its model.py."""
    rng = np.random.default_rng(0)
    shapes = {"pre_bias": (D,), "latent_bias": (N,), "encoder.weight": (N, D), "decoder.weight": (D, N)}
    state = {name: torch.tensor(rng.standard_normal(s), dtype=torch.float32) for name, s in shapes.items()}
    mean = x.mean(-1, keepdim=True)
    scale = (x - mean).std(-1, keepdim=True) + 1e-5
    pre = ((x - mean) / scale - state["pre_bias"]) @ state["encoder.weight"].T + state["latent_bias"]
    values, indices = pre.topk(K)
    codes = torch.zeros_like(pre).scatter(1, indices, values.relu())
    out = (codes @ state["decoder.weight"].T + state["pre_bias"]) * scale + mean
    folder = root / "openai"
    folder.mkdir()
    statistics = {
        "stats_last_nonzero": torch.zeros(N, dtype=torch.int64),
        "latents_activation_frequency": torch.zeros(N),
        "latents_mean_square": torch.zeros(N),
    }
    kind = {"activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": "ReLU"}}
    torch.save({**state, **statistics, **kind}, folder / "autoencoder.pt")
    _keep(folder, x, codes, out)


if __name__ == "__main__":
    torch.manual_seed(0)
    target = Path(sys.argv[1])
    target.mkdir(exist_ok=True)
    wanted = sys.argv[2:]
    inputs = torch.tensor(np.random.default_rng(1).standard_normal((TOKENS, D)), dtype=torch.float32)
    for record in (saelens, sparsify, dictionary_learning, openai):
        if not wanted or record.__name__ in wanted:
            record(target, inputs)
