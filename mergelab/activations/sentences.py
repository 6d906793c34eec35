"""Sentence embeddings: text through an encoder and its own tokenizer, pooled into one vector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mergelab.checkpoints.json_data import read_json, read_json_object
from mergelab.checkpoints.locations import local_path
from mergelab.checkpoints.model_files import open_tokenizer_file
from mergelab.errors import CheckpointError, quoted
from mergelab.models.load import load_model
from mergelab.models.model import Model, Params
from mergelab.models.token_checks import check_tokens

if TYPE_CHECKING:
    import tokenizers
    from jax.sharding import Mesh

__all__ = ["Pooling", "SentenceEncoder", "load_sentence_encoder", "pool"]

Pooling = Literal["mean", "cls"]

# Lengths are padded to a multiple of this, so that few of them are compiled.
_LENGTH_STEP = 16


def pool(
    hidden: Float[Array, "batch length width"], mask: Bool[Array, "batch length"], pooling: Pooling
) -> Float[Array, "batch width"]:
    """One vector a row: the mean of its real tokens' states, or the state of its first token."""
    if pooling == "cls":
        return hidden[:, 0]
    real = mask.astype(hidden.dtype)[:, :, None]
    return jnp.sum(hidden * real, axis=1) / jnp.maximum(jnp.sum(real, axis=1), 1)


@partial(jax.jit, static_argnums=(0, 4, 5))
def _embed(
    model: Model,
    params: Params,
    tokens: Int[Array, "batch length"],
    mask: Bool[Array, "batch length"],
    pooling: Pooling,
    normalize: bool,
) -> Float[Array, "batch width"]:
    hidden = model.apply(params, tokens, mask=mask).hidden
    assert hidden is not None
    vectors = pool(hidden.astype(jnp.float32), mask, pooling)
    if not normalize:
        return vectors
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


@dataclass(frozen=True)
class SentenceEncoder:
    """Text to vectors.

    Attributes:
        model: an encoder.
        params: its parameters.
        tokenizer: its own, without padding.
        pooling: how the states of a text's tokens become one vector.
        normalize: whether vectors have length 1.
        max_length: tokens of a text; the rest is cut off.
    """

    model: Model
    params: Params
    tokenizer: tokenizers.Tokenizer
    pooling: Pooling
    normalize: bool
    max_length: int

    def encode(self, texts: str | Sequence[str], *, batch_size: int = 32) -> np.ndarray:
        """The vectors of texts, `[texts, width]` float32, in their order; of a single text `[width]`.

        Args:
            texts: any number of them, or one.
            batch_size: texts that run together; texts of like length share a batch.

        Raises:
            TokenError: the tokenizer gives ids that the model has no embedding for.
        """
        if isinstance(texts, str):
            return self.encode([texts], batch_size=batch_size)[0]
        ids = [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts))]
        for each in ids:
            check_tokens(
                self.model, np.asarray(each, np.int64), place="the tokenizer of the sentence encoder"
            )
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        found = np.zeros((len(ids), self.model.config.d_model), np.float32)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            longest = -(-len(ids[rows[-1]]) // _LENGTH_STEP) * _LENGTH_STEP
            longest = min(longest, self.model.config.max_length)
            tokens = np.zeros((len(rows), longest), np.int32)
            mask = np.zeros((len(rows), longest), bool)
            for row, i in enumerate(rows):
                tokens[row, : len(ids[i])] = ids[i]
                mask[row, : len(ids[i])] = True
            found[rows] = _embed(self.model, self.params, tokens, mask, self.pooling, self.normalize)
        return found


def load_sentence_encoder(
    path: str | Path, *, mesh: Mesh | None = None, dtype: Any = None
) -> SentenceEncoder:
    """Loads a folder of the sentence-transformers layout: an encoder, `tokenizer.json`, `modules.json`.

    Without `modules.json` vectors are means and not normalized.

    Args:
        path: the folder, a model on the Hugging Face hub, or a URL.
        mesh: same as in `load_model`.
        dtype: same as in `load_model`.

    Raises:
        CheckpointError: a file is missing or damaged, the model is not an encoder, or a module of the folder
            is of a kind that is not implemented.
    """
    folder = local_path(path)
    pooling, normalize = _modules(folder)
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(f"{folder} has no tokenizer.json, which text needs; add the model's own.")
    tokenizer = open_tokenizer_file(file)
    tokenizer.no_padding()
    model, params = load_model(folder, mesh=mesh, dtype=dtype)
    if model.family.architecture.causal:
        raise CheckpointError(
            f"{folder} holds a {model.family.model_type!r} model, which sees only earlier tokens; sentence "
            "embeddings need an encoder such as 'bert'."
        )
    limit = model.config.max_length
    sizes = folder / "sentence_bert_config.json"
    if sizes.is_file():
        given = read_json_object(sizes).get("max_seq_length") or limit
        if type(given) is not int or given < 1:
            raise CheckpointError(
                f"{sizes} has max_seq_length = {quoted(given)}; expected a whole number above 0."
            )
        limit = min(limit, given)
    # The special tokens at both ends survive the cut.
    tokenizer.enable_truncation(limit)
    return SentenceEncoder(model, params, tokenizer, pooling, normalize, limit)


def _modules(folder: Path) -> tuple[Pooling, bool]:
    """The pooling, and whether vectors are normalized."""
    file = folder / "modules.json"
    if not file.is_file():
        return "mean", False
    modules = read_json(file)
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise CheckpointError(f"{file} is not a list of modules; download it again.")
    pooling: Pooling = "mean"
    kinds = [str(module.get("type")).rpartition(".")[2] for module in modules]
    for kind, module in zip(kinds, modules, strict=True):
        if kind not in ("Transformer", "Pooling", "Normalize"):
            raise CheckpointError(
                f"{file} has a module of type {kind!r}, but only Transformer, Pooling and Normalize are "
                "implemented; the vectors would be wrong without it."
            )
        if kind == "Pooling":
            pooling = _pooling(folder, str(module.get("path", "")))
    return pooling, "Normalize" in kinds


def _pooling(folder: Path, name: str) -> Pooling:
    file = folder / name / "config.json"
    if Path(name).name != name or not file.is_file():
        raise CheckpointError(
            f"{folder / 'modules.json'} names the pooling folder {name!r}, which is missing."
        )
    config = read_json_object(file)
    modes = [key for key, value in config.items() if key.startswith("pooling_mode") and value is True]
    known: dict[str, Pooling] = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    if len(modes) != 1 or modes[0] not in known:
        raise CheckpointError(
            f"{file} pools by {' and '.join(modes) or 'nothing'}, but only one of "
            f"{' or '.join(known)} is implemented."
        )
    return known[modes[0]]
