"""Files of SAELens, version 3 to 6: what their `cfg.json` says and which tensors they hold.

`record_saelens.py` asks SAELens itself for the codes and reconstructions of each, and needs numpy and SAELens
alone; `test_saelens.py` compares.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

D, N, OUT, K, TOKENS = 6, 12, 5, 3, 4

_OLD = {"d_in": D, "d_sae": N, "dtype": "float32", "device": "cpu", "model_name": "gpt2",
        "hook_name": "blocks.2.hook_resid_post", "hook_layer": 2, "prepend_bos": True,
        "context_size": 128, "finetuning_scaling_factor": False}  # fmt: skip
_NEW = {"d_in": D, "d_sae": N, "dtype": "float32", "device": "cpu", "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.54.12", "model_name": "gpt2",
                     "hook_name": "blocks.2.hook_resid_post"}}  # fmt: skip
_MAPS = {"d_out": OUT, "apply_b_dec_to_input": False,
         "metadata": {**_NEW["metadata"], "hook_name": "blocks.2.ln2.hook_normalized",
                      "hook_name_out": "blocks.2.hook_mlp_out"}}  # fmt: skip
_K = {"activation_fn_kwargs": {"k": K}}


@dataclass(frozen=True)
class Case:
    """A file of SAELens.

    Attributes:
        cfg: content of `cfg.json`.
        tensors: kind of architecture, which says the tensors.
        extra: values of tensors that a random draw would not show.
        by: which SAELens to ask: `6`; `5` for what version 6 refuses; `train` for checkpoints of trainings.
        factor: factor that is folded in by SAELens before it is asked, and that stands beside our file.
        whitens: whether SAELens folds a whitening in, whose matrices stand beside our file.
        heads: number of heads that SAELens flattens; 0 for none.
    """

    cfg: Mapping[str, Any]
    tensors: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    by: str = "6"
    factor: float | None = None
    whitens: bool = False
    heads: int = 0


def _old(
    tensors: str = "standard", extra: Mapping[str, Any] | None = None, by: str = "6", **cfg: Any
) -> Case:
    kept = {key: value for key, value in {**_OLD, **cfg}.items() if value is not ...}
    return Case(kept, tensors, extra or {}, by)


def _new(tensors: str, architecture: str | None = None, **cfg: Any) -> Case:
    maps = _MAPS if "transcoder" in tensors else {"apply_b_dec_to_input": True}
    said = {"normalize_activations": "none", "architecture": architecture or tensors}
    return Case({**_NEW, **said, **maps, **cfg}, tensors)


def cases() -> dict[str, Case]:
    """All of them, by name."""
    found = {
        "v3_standard": _old(architecture="standard", activation_fn_str="relu", apply_b_dec_to_input=True),
        "v3_no_architecture": _old(apply_b_dec_to_input=False, normalize_activations="none"),
        "v3_hook_point": _old(hook_name=..., hook_point="blocks.2.hook_resid_pre", hook_point_layer=2),
        "v3_topk": _old(architecture="standard", activation_fn_str="topk", **_K, normalize_activations="none",
                        apply_b_dec_to_input=True),
        "v3_topk_layer_norm": _old(architecture="standard", activation_fn_str="topk", **_K,
                                   normalize_activations="layer_norm", apply_b_dec_to_input=False),
        "v4_topk_activation_fn": _old(architecture="standard", activation_fn="topk", **_K),
        "v5_topk": _old(architecture="topk", activation_fn_str="topk", **_K, normalize_activations="none"),
        "v5_topk_kwargs_alone": _old(architecture="topk", **_K),
        "v5_gated": _old("gated", architecture="gated", activation_fn_str="relu"),
        "v5_jumprelu": _old("jumprelu", architecture="jumprelu", activation_fn_str="relu",
                            apply_b_dec_to_input=False),
        "v5_false": _old(architecture="standard", normalize_activations=False),
        "v5_null": _old(architecture="standard", normalize_activations=None),
        "v5_constant_norm": _old(architecture="standard", normalize_activations="constant_norm_rescale"),
        "v5_gated_layer_norm": _old("gated", architecture="gated", normalize_activations="layer_norm"),
        "v5_true": _old(architecture="standard", normalize_activations=True),
        "v5_finetuned": _old(extra={"scaling_factor": np.linspace(0.5, 1.5, N)}, by="5",
                             finetuning_scaling_factor=True, architecture="standard",
                             activation_fn_str="relu", activation_fn_kwargs={}, normalize_activations="none",
                             apply_b_dec_to_input=True, dataset_path="x", dataset_trust_remote_code=True,
                             sae_lens_training_version="4.0.0", hook_head_index=None),
        "v5_finetuned_jumprelu": _old("jumprelu", {"scaling_factor": np.linspace(0.5, 1.5, N)}, "5",
                                   finetuning_scaling_factor=True, architecture="jumprelu",
                                   activation_fn_str="relu", activation_fn_kwargs={},
                                   normalize_activations="layer_norm", apply_b_dec_to_input=True,
                                   dataset_path="x", dataset_trust_remote_code=True,
                                   sae_lens_training_version="4.0.0", hook_head_index=None),
        "v5_factors_of_one": _old(extra={"scaling_factor": np.ones(N)}, finetuning_scaling_factor=True),
        "v5_hook_z": Case({**_OLD, "hook_name": "blocks.2.attn.hook_z"}, "standard", heads=2),
    }  # fmt: skip
    for kind in ("standard", "gated", "topk", "jumprelu", "abstopk"):
        k = {"k": K} if "topk" in kind else {}
        for normalization in ("none", "layer_norm", "constant_norm_rescale", "expected_average_only_in"):
            name = f"v6_{kind}_{normalization}"
            found[name] = _new(kind, normalize_activations=normalization, **k)
        found[f"v6_{kind}_keeps_b_dec"] = _new(kind, apply_b_dec_to_input=False, **k)
        scaled = found[f"v6_{kind}_expected_average_only_in"]
        found[f"v6_{kind}_scaled"] = Case(scaled.cfg, kind, factor=0.37)
        for subtracts in (True, False):
            cfg = {
                **scaled.cfg,
                "normalize_activations": "covariance_whitening",
                "apply_b_dec_to_input": subtracts,
            }
            found[f"v6_{kind}_whitened_{subtracts}"] = Case(cfg, kind, whitens=True)
    for kind in ("topk", "abstopk"):
        found[f"v6_{kind}_rescaled"] = _new(kind, k=K, rescale_acts_by_decoder_norm=True)
    for kind in ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"):
        for normalization in ("none", "layer_norm", "constant_norm_rescale"):
            found[f"v6_{kind}_{normalization}"] = _new(kind, normalize_activations=normalization)
    for kind in ("batchtopk", "matryoshka_batchtopk"):
        for rescales in (True, False):
            widths = {"matryoshka_widths": [4, N]} if kind != "batchtopk" else {}
            case = _new(kind, k=2.5, rescale_acts_by_decoder_norm=rescales, **widths)
            found[f"v6_{kind}_checkpoint_{rescales}"] = Case(
                case.cfg, "topk", {"topk_threshold": np.float64(0.8)}, by="train"
            )
    hook_z = {**_NEW["metadata"], "hook_name": "blocks.2.attn.hook_z"}
    found["v6_hook_z"] = Case(
        {**_NEW, "architecture": "standard", "reshape_activations": "hook_z", "metadata": hook_z}, "standard",
        heads=3,
    )  # fmt: skip
    return found


def tensors_of(case: Case) -> dict[str, np.ndarray]:
    """The tensors of a file, the same wherever they are drawn."""
    rng = np.random.default_rng(sum(map(ord, case.tensors)))
    out = OUT if "transcoder" in case.tensors else D
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (D, N), "W_dec": (N, out), "b_dec": (out,)}
    if case.tensors == "gated":
        shapes |= {"b_gate": (N,), "b_mag": (N,), "r_mag": (N,)}
    else:
        shapes["b_enc"] = (N,)
    if "jumprelu" in case.tensors:
        shapes["threshold"] = (N,)
    if "skip" in case.tensors:
        shapes["W_skip"] = (out, D)
    found = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    if "threshold" in found:
        found["threshold"] = np.abs(found["threshold"])
    whole = {name: np.asarray(value) for name, value in case.extra.items()}
    return found | {
        name: v if name == "topk_threshold" else v.astype(np.float32) for name, v in whole.items()
    }


def inputs() -> np.ndarray:
    """Activations float32 `[TOKENS, D]`."""
    return (2 * np.random.default_rng(7).standard_normal((TOKENS, D)) + 0.5).astype(np.float32)


def whitening() -> dict[str, np.ndarray]:
    """What a training that whitens keeps: `mean`, `matrix`, `inverse_matrix`."""
    matrix = np.random.default_rng(8).standard_normal((D, D)) + 3 * np.eye(D)
    mean = np.linspace(-1, 1, D)
    arrays = {"mean": mean, "matrix": matrix, "inverse_matrix": np.linalg.inv(matrix)}
    return {name: np.ascontiguousarray(value, np.float32) for name, value in arrays.items()}
