"""The YAML of `mergelab sae train`: what SAE, from what data, trained how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from mergelab.checkpoints.text_file import read_text
from mergelab.checkpoints.yaml_data import MAX_DEPTH, parse_yaml
from mergelab.errors import SAEError, did_you_mean, quoted, shortened
from mergelab.sae.training.recipe import TrainingRecipe
from mergelab.sae.variants import VARIANTS, Variant, make_variant
from mergelab.sae.variants.options import checked_options

__all__ = [
    "CheckpointSection",
    "DataSection",
    "SAESection",
    "TrainConfig",
    "TrainSection",
    "load_config",
    "plain_settings",
]


MAX_CONFIG = 16 * 2**20
"""Bytes of the largest configuration that is read."""

_MOST = 2**31 - 1


def _no_switch(value: Any) -> Any:
    # Python takes true for 1.
    if isinstance(value, bool):
        raise ValueError("input should be a number")
    return value


Whole = Annotated[int, BeforeValidator(_no_switch)]
Count = Annotated[Whole, Field(ge=1, le=_MOST)]
Fraction = Annotated[float, BeforeValidator(_no_switch), Field(ge=-3e38, le=3e38, allow_inf_nan=False)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SAESection(BaseModel):
    """The SAE: `variant`, and its hyper-parameters (`mergelab.sae.variants`) under their own names.

    Attributes:
        variant: a name of `mergelab.sae.variants.VARIANTS`.
        d_in: width of the activations; taken from the data where it is left away.
        n_latents: how many latents.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    variant: str = "topk"
    d_in: Whole | None = None
    n_latents: Whole

    def build(self, d_in: int, d_out: int | None) -> Variant:
        """The variant, for data of these widths.

        Raises:
            SAEError: an option is unknown or out of range, or `d_in` is not that of the data.
        """
        if self.d_in not in (None, d_in):
            raise SAEError(
                f"sae.d_in is {quoted(self.d_in)}, but the data is {d_in} wide; correct it or leave it away."
            )
        options = {"n_latents": self.n_latents, **(self.model_extra or {})}
        if d_out is not None and options.setdefault("d_out", d_out) != d_out:
            raise SAEError(f"sae.d_out is {quoted(options['d_out'])}, but the targets are {d_out} wide.")
        if self.variant in VARIANTS:
            options = checked_options(VARIANTS[self.variant], options, "sae.", most=2**200)
        return make_variant(self.variant, **{**options, "d_in": d_in})


class DataSection(_Section):
    """Where activations come from.

    Attributes:
        kind: `files`: arrays `[tokens, d]` in `.npy` or `.safetensors` files, such as `mergelab activations`
            writes; `model`: a model computes them while the training runs; `toy`: generated with known
            features.
        path: of `files`: a path or glob, or several.
        target_path: of `files`, for a transcoder: the targets of the same tokens.
        model: of `model`: a Hugging Face folder with its tokenizer.
        site: of `model`: such as `blocks.8.resid_post`.
        target_site: of `model`, for a transcoder.
        text: of `model`: a text file, or several.
        context: of `model`: tokens in a context, at most the model's positions.
        toy: of `toy`: options of `mergelab.sae.toy.ToyTruth`.
        buffer_rows: rows that are shuffled together.
    """

    kind: Literal["files", "model", "toy"]
    path: str | list[str] | None = None
    target_path: str | list[str] | None = None
    model: str | None = None
    site: str | None = None
    target_site: str | None = None
    text: str | list[str] | None = None
    context: Count = 64
    toy: dict[str, Any] = Field(default_factory=dict)
    buffer_rows: Count = 65_536


class TrainSection(_Section):
    """How it is trained; omitted fields take the defaults of `TrainingRecipe`.

    Attributes:
        batch_size: tokens per step.
        tokens: tokens in all; the last, incomplete batch is left away.
        seed: of parameters and order.
        lr: peak learning rate, or `auto`.
    """

    batch_size: Count
    tokens: Annotated[Whole, Field(ge=1, le=2**62)]
    seed: Annotated[Whole, Field(ge=0, le=2**63 - 1)] = 0
    lr: Fraction | Literal["auto"] = "auto"
    warmup: Fraction = 0.05
    decay: Fraction = 0.95
    b1: Fraction = 0.9
    b2: Fraction | None = None
    eps: Fraction = 6.25e-10
    encoder_rate: Fraction = 0.4
    bias_rate: Fraction = 2.0
    clip: Fraction | None = None
    ema: Fraction | None = None
    aux_k: Annotated[Whole, Field(le=_MOST)] | None = None
    aux_coefficient: Fraction = 1 / 32
    dead_after_tokens: Annotated[Whole, Field(le=_MOST)] | None = None
    lift: Fraction = 2.0
    project_gradients: bool = True
    unit_decoder: bool = True
    center: bool = True
    normalize: str = "scale"
    tie_initial: bool = True
    initial_scale: Fraction | None = None
    compute_dtype: str = "float32"

    def build(self) -> TrainingRecipe:
        """The recipe.

        Raises:
            SAEError: a value is out of range, or there are fewer tokens than a batch has.
        """
        if self.tokens < self.batch_size:
            raise SAEError(f"train.tokens is {self.tokens}, less than one batch of {self.batch_size}.")
        options = self.model_dump(exclude={"tokens", "seed", "lr"})
        rate = None if self.lr == "auto" else self.lr
        return TrainingRecipe(steps=self.tokens // self.batch_size, learning_rate=rate, **options)


class CheckpointSection(_Section):
    """What is kept on the way.

    Attributes:
        every: steps between checkpoints.
        keep: how many of the last are kept.
        log_every: steps between lines of metrics.
    """

    every: Count = 1000
    keep: Count = 2
    log_every: Count = 50


class TrainConfig(_Section):
    """All of it.

    Attributes:
        sae: the SAE.
        data: the activations.
        train: the recipe.
        checkpoint: what is kept on the way.
        mesh: devices along the axes `data` and `latents`; one device where it is left away.
        log_to: where metrics go besides `metrics.jsonl`: `tensorboard`, `wandb`.
        metadata: kept in the finished SAE: `site`, `target_site`, `model`, ....
    """

    sae: SAESection
    data: DataSection
    train: TrainSection
    checkpoint: CheckpointSection = CheckpointSection()
    mesh: dict[str, Annotated[Whole, Field(ge=-1, le=_MOST)]] | None = None
    log_to: list[Literal["tensorboard", "wandb"]] = Field(default_factory=list)
    metadata: dict[str, Any] = Field(default_factory=dict)


def load_config(
    config: TrainConfig | Mapping[str, Any] | str | Path, overrides: Sequence[str] = ()
) -> TrainConfig:
    """Reads and checks a configuration.

    Args:
        config: a YAML file, or what it would hold.
        overrides: `section.key=value`, value in YAML; they win over the file.

    Raises:
        SAEError: the file cannot be read, a key is unknown, or a value has the wrong type; the message names
            every such field.
    """
    name = "the configuration"
    if isinstance(config, TrainConfig):
        data: Any = config.model_dump()
    elif isinstance(config, Mapping):
        data = _plain(config, 0)
    else:
        name = shortened(str(config), 200)
        data = plain_settings(read_text(config, MAX_CONFIG, error=SAEError), name)
    if not isinstance(data, dict):
        raise SAEError(f"{name}: expected the sections sae, data and train, found {type(data).__name__}.")
    for override in overrides:
        data = _with_override(data, override)
    try:
        return TrainConfig.model_validate(data)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        # Far more than are shown: the rest are counted, and looking for what was meant takes its time.
        explained = (f"{name}: {_sentence(fault)}" for fault in faults[:100])
        raise SAEError([*explained, *(name for _ in faults[100:])]) from error


def plain_settings(text: str, source: str = "the configuration") -> Any:
    """The one value of a YAML text as plain data, None if it is empty.

    Raises:
        SAEError: the text is not YAML as configurations have it, or has a second document.
    """
    documents = parse_yaml(text, source, SAEError)
    if len(documents) > 1:
        raise SAEError(f"{source}:{documents[1].line}: a second document begins here; keep one in a file.")
    return documents[0].data if documents else None


def _plain(value: Any, depth: int) -> Any:
    """Mappings of any kind, and lists of them, as plain SAEs and lists."""
    if depth > MAX_DEPTH:
        raise SAEError(f"the configuration is nested more than {MAX_DEPTH} levels deep, or contains itself.")
    if isinstance(value, Mapping):
        return {key: _plain(inner, depth + 1) for key, inner in value.items()}
    return [_plain(inner, depth + 1) for inner in value] if isinstance(value, list) else value


def _with_override(data: dict[str, Any], override: str) -> dict[str, Any]:
    path, equals, text = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise SAEError(f"--set {shortened(override)}: expected section.key=value, such as train.seed=1.")
    changed = dict(data)
    here = changed
    for key in keys[:-1]:
        inner = here.get(key)
        here[key] = dict(inner) if isinstance(inner, dict) else {}
        here = here[key]
    here[keys[-1]] = plain_settings(text, f"--set {shortened(path)}")
    return changed


_SECTIONS: Mapping[str, type[BaseModel]] = {
    "data": DataSection,
    "train": TrainSection,
    "checkpoint": CheckpointSection,
}


def _sentence(fault: Any) -> str:
    path = [str(part) for part in fault["loc"]]
    where = shortened(".".join(path), 200)
    if fault["type"] == "extra_forbidden":
        section = _SECTIONS.get(path[0], TrainConfig) if len(path) > 1 else TrainConfig
        return f"{where} is not a known key{did_you_mean(path[-1], section.model_fields)}."
    if fault["type"] == "missing":
        return f"{where} is missing."
    said = str(fault["ctx"]["error"]) if fault["type"] == "value_error" else fault["msg"]
    return f"{where}: {said[:1].lower()}{said[1:]}, found {quoted(fault['input'])}."
