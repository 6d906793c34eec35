"""How an SAE is trained: the hyper-parameters of training, and the YAML of `mergelab sae train`."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model

from mergelab.activations.kept import DEFAULT_RULE, TokenRule
from mergelab.checkpoints.text_file import read_text
from mergelab.errors import SAEError, did_you_mean, quoted, shortened
from mergelab.sae.training.settings_text import plain_data, plain_settings, with_override
from mergelab.sae.variants import VARIANTS, Variant, make_variant
from mergelab.sae.variants.options import checked_options
from mergelab.sharding import known_sae_axes
from mergelab.shipped import shipped_file, shipped_names
from mergelab.text.corpus import TextOptions

__all__ = [
    "CheckpointSection",
    "DataSection",
    "SAESection",
    "TrainConfig",
    "TrainSection",
    "TrainingRecipe",
    "load_config",
]


@dataclass(frozen=True)
class TrainingRecipe:
    """The recipe of "Scaling and evaluating sparse autoencoders" (arXiv 2406.04093), each piece a switch.

    Attributes:
        steps: number of optimizer steps.
        batch_size: tokens per step, over all devices.
        learning_rate: peak learning rate; None chooses it from the number of latents and the steps
            (`mergelab.sae.training.update.automatic_learning_rate`). `lr` in YAML.
        warmup: fraction of the training over which the learning rate rises linearly from 0.
        decay: fraction of the training, at its end, over which it falls linearly to 0.
        b1: Adam's decay of the mean gradient.
        b2: Adam's decay of the mean square gradient; None averages it over a twenty-fifth of the training, at
            least 10 and at most 1000 steps (the paper's 0.999).
        eps: Adam's epsilon.
        encoder_rate: learning rate of the encoder's rows, relative to the decoder's; 1 is the paper's.
        bias_rate: learning rate of the encoder's bias, relative to the decoder's; 1 is the paper's.
        clip: global norm to which gradients are clipped; None does not clip.
        ema: decay of the moving average of the parameters that is kept alongside them; None averages over a
            fiftieth of the training, at most 1000 steps (the paper's 0.999); 0 keeps none.
        aux_k: number of dead latents that help a token; None takes the power of two nearest to half the width
            of the targets, 0 switches AuxK off.
        aux_coefficient: weight of the auxiliary loss.
        dead_after_tokens: tokens without firing after which a latent is dead; None takes 10 million, or a
            tenth of a shorter training.
        bias_boost: learning rates a step by which the bias of a latent is raised that has not fired for a
            sixteenth of `dead_after_tokens`, until it fires; 0 switches this off. `lift` in YAML. Not in the
            paper: AuxK alone teaches dead latents codes as small as the error they explain, too small to be
            among the k largest again.
        boost_floor: fraction of the peak learning rate below which the rate of that lift does not fall, so
            that it does not fade with the learning rate. `lift_floor` in YAML.
        project_gradients: removes the component of a decoder gradient parallel to its row, which only the
            renormalization would undo.
        unit_decoder: renormalizes the decoder's rows after each step, where the variant keeps them at norm 1.
        center: starts `b_pre` at the geometric median of a sample; otherwise at 0.
        normalize: `scale` brings inputs to unit variance per coordinate while training, which is folded into
            the weights of the finished SAE; `layer_norm` normalizes each token, which the SAE
            then does too; `none` does neither.
        tie_initial: starts the encoder as the decoder's transpose, scaled; otherwise independently.
        initial_scale: scale of that transpose; None takes the one with which the first reconstructions err
            least (`mergelab.sae.training.initialize.best_initial_scale`), 1 is the paper's.
        compute_dtype: dtype of the factors of the encoder's product, `float32` or `bfloat16`; state is
            float32.
    """

    steps: int
    batch_size: int
    learning_rate: float | None = None
    warmup: float = 0.05
    decay: float = 0.95
    b1: float = 0.9
    b2: float | None = None
    eps: float = 6.25e-10
    encoder_rate: float = 0.4
    bias_rate: float = 2.0
    clip: float | None = None
    ema: float | None = None
    aux_k: int | None = None
    aux_coefficient: float = 1 / 32
    dead_after_tokens: int | None = None
    bias_boost: float = field(default=2.0, metadata={"key": "lift"})
    boost_floor: float = field(default=0.0, metadata={"key": "lift_floor"})
    project_gradients: bool = True
    unit_decoder: bool = True
    center: bool = True
    normalize: str = "scale"
    tie_initial: bool = True
    initial_scale: float | None = None
    compute_dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise SAEError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise SAEError(f"{name} is {value}; it must be a finite number.")
        if self.steps > 2**31 - 1:
            raise SAEError(f"the training has {quoted(self.steps)} steps; at most 2147483647 are counted.")
        for name in ("aux_k", "aux_coefficient", "dead_after_tokens", "eps"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise SAEError(f"{name} is {value}; it must be at least 0.")
        for name in ("warmup", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise SAEError(f"{name} is {getattr(self, name)}; it must be from 0 to 1.")
        for name in ("b1", "b2", "ema"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise SAEError(f"{name} is {value}; a running mean's decay must be at least 0 and below 1.")
        if self.warmup + self.decay > 1:
            raise SAEError(
                f"warmup={self.warmup} and decay={self.decay} are parts of one training; "
                "they must not add to more than 1."
            )
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise SAEError(f"compute_dtype is {self.compute_dtype!r}; it may be 'float32' or 'bfloat16'.")
        if self.normalize not in ("scale", "layer_norm", "none"):
            raise SAEError(f"normalize is {self.normalize!r}; it may be 'scale', 'layer_norm' or 'none'.")
        if self.bias_boost < 0:
            raise SAEError(f"lift is {self.bias_boost}; it must be at least 0.")
        if not 0 <= self.boost_floor <= 1:
            raise SAEError(f"lift_floor is {self.boost_floor}; it must be from 0 to 1.")
        for name in ("learning_rate", "clip", "initial_scale", "encoder_rate", "bias_rate"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise SAEError(f"{name} is {value}; it must be above 0.")

    @property
    def tokens(self) -> int:
        """Tokens seen in the whole training."""
        return self.steps * self.batch_size

    @property
    def dead_after(self) -> int:
        """Tokens without firing after which a latent counts as dead."""
        if self.dead_after_tokens is not None:
            return self.dead_after_tokens
        return min(10_000_000, max(self.tokens // 10, 1))

    @property
    def boost_after(self) -> int:
        """Tokens without firing after which a latent's bias is raised."""
        return max(self.dead_after // 16, 1)

    @property
    def square_decay(self) -> float:
        """Decay of Adam's mean square gradient."""
        return self.b2 if self.b2 is not None else 1 - 1 / min(max(self.steps / 25, 10), 1000)

    def rate_of(self, name: str) -> float:
        """The learning rate of a parameter, relative to the decoder's."""
        return {"encoder": self.encoder_rate, "encoder_bias": self.bias_rate}.get(name, 1.0)

    @property
    def ema_decay(self) -> float:
        """Decay of the moving average of the parameters."""
        return self.ema if self.ema is not None else 1 - 1 / min(max(self.steps / 50, 1), 1000)

    def auxiliary_k(self, width: int) -> int:
        """Dead latents that help a token whose target has this width."""
        return self.aux_k if self.aux_k is not None else 2 ** max(round_log2(width / 2), 0)


def round_log2(x: float) -> int:
    """The exponent of the power of two nearest to x on a logarithmic scale."""
    return round(math.log2(x)) if x > 1 else 0


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
        d_in: width of the activations; that of the data if omitted.
        n_latents: number of latents.
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
                f"sae.d_in is {quoted(self.d_in)}, but the data is {d_in} wide; correct or omit it."
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
        path: path or glob of `files`, or several.
        target_path: targets of the same tokens, of `files`, for a transcoder.
        model: Hugging Face folder with its tokenizer, of `model`; of `files`, the model they are of, where it
            is not where they say (`train.model_loss_every`).
        site: site of `model`, such as `blocks.8.resid_post`.
        target_site: site that is written, of `model`, for a transcoder.
        text: text of `model`, or several: files, globs, folders, data sets on the hub, URLs
            (`mergelab.text.corpus_files.corpus_files`).
        field: field of the records that is read, of `model` (`mergelab.text.corpus.TextOptions`).
        bos: whether a token that begins texts stands before each text and context, of `model`; `auto` does as
            the tokenizer does.
        packing: `packed` texts, or `documents` kept apart, of `model`.
        roles: tokens of conversations that count, of `model`: `all`, or those of the `assistant`.
        context: number of tokens in a context, of `model`; at most the model's positions.
        model_mesh: devices of each process that `model` is spread over, sizes of the axes `data`, `fsdp` and
            `tensor`; the first device of each process if omitted. Each process computes the rows it reads.
        dtype: dtype of the weights of `model`; the stored one if omitted.
        stream_layers: whether the weights of `model` stay in their files: each block is read once for all
            tokens of the text, for models that memory cannot hold.
        spill: folder in which the activations of `model` wait with `stream_layers`; in memory if omitted.
        toy: options of `toy`, those of `mergelab.sae.toy.ToyGroundTruth`.
        buffer_rows: number of rows that are shuffled together.
        skip_positions: number of first positions of each context that are left out
            (`mergelab.activations.TokenRule`); `auto` is what the files were written with, or 1.
        skip_special: whether special tokens are left out; `auto` is what the files were written with, or
            true.
        max_norm_multiple: largest norm of a row that counts, in medians; null for no limit; `auto` is what
            the files were written with, or 10.
    """

    kind: Literal["files", "model", "toy"]
    path: str | list[str] | None = None
    target_path: str | list[str] | None = None
    model: str | None = None
    site: str | None = None
    target_site: str | None = None
    text: str | list[str] | None = None
    field: str | None = None
    bos: bool | Literal["auto"] = "auto"
    packing: Literal["packed", "documents"] = "packed"
    roles: Literal["all", "assistant"] = "all"
    context: Count = 64
    model_mesh: dict[str, Annotated[Whole, Field(ge=-1, le=_MOST)]] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    stream_layers: bool = False
    spill: str | None = None
    toy: dict[str, Any] = Field(default_factory=dict)
    buffer_rows: Count = 65_536
    skip_positions: Annotated[Whole, Field(ge=0, le=_MOST)] | Literal["auto"] = "auto"
    skip_special: bool | Literal["auto"] = "auto"
    max_norm_multiple: Annotated[Fraction, Field(gt=1)] | Literal["auto"] | None = "auto"

    def rule(self, written: TokenRule | None = None) -> TokenRule:
        """Which tokens count.

        Args:
            written: the rule that files were written with, where that is known.
        """
        given = {name: getattr(self, name) for name in DEFAULT_RULE.facts()}
        return replace(
            written or DEFAULT_RULE, **{name: value for name, value in given.items() if value != "auto"}
        )

    @property
    def texts(self) -> list[str]:
        """The places of texts, of `model`."""
        return [] if self.text is None else [self.text] if isinstance(self.text, str) else self.text

    def text_options(self, tokens: int | None = None) -> TextOptions:
        """How texts become contexts, and of how many tokens."""
        return TextOptions(self.field, self.bos, self.packing, self.roles, tokens)


_OTHER_FORM = ("steps", "learning_rate")
"""Hyper-parameters that a configuration gives in another form: `tokens` and `lr`."""


def _key(option: dataclasses.Field[Any]) -> str:
    return option.metadata.get("key", option.name)


def _train_fields() -> dict[str, Any]:
    """The hyper-parameters that a configuration gives as they are: types and defaults by key."""
    number = Annotated[Whole, Field(le=_MOST)]
    types = {"float": Fraction, "int": number, "bool": bool, "str": str}
    found: dict[str, Any] = {}
    for option in fields(TrainingRecipe):
        kind, _, optional = str(option.type).partition(" | ")
        if option.name not in _OTHER_FORM and option.default is not dataclasses.MISSING:
            found[_key(option)] = (types[kind] | None if optional else types[kind], option.default)
    return found


# Keys stand in the order in which runs write them down.
_Hyperparameters: type[_Section] = create_model(
    "_Hyperparameters",
    __base__=_Section,
    **dict.fromkeys(("batch_size", "tokens", "seed", "lr"), (Any, None)),
    **_train_fields(),
)


class TrainSection(_Hyperparameters):
    """How it is trained: the keys below, and the other fields of `TrainingRecipe` with their defaults.

    Attributes:
        batch_size: tokens per step.
        tokens: tokens in all; the last, incomplete batch is omitted.
        seed: seed of parameters and order.
        lr: peak learning rate, or `auto`.
        model_loss_every: number of steps between measurements of the model's losses with the SAE spliced in,
            on the data's first contexts, which are then not trained on; 0 for never. Of activations of a
            model: `kind: model`, or files of `mergelab activations`.
    """

    batch_size: Count
    tokens: Annotated[Whole, Field(ge=1, le=2**62)]
    seed: Annotated[Whole, Field(ge=0, le=2**63 - 1)] = 0
    lr: Fraction | Literal["auto"] = "auto"
    model_loss_every: Annotated[Whole, Field(ge=0, le=_MOST)] = 0

    def build(self) -> TrainingRecipe:
        """The recipe.

        Raises:
            SAEError: a value is out of range, or there are fewer tokens than a batch has.
        """
        if self.tokens < self.batch_size:
            raise SAEError(f"train.tokens is {self.tokens}, less than one batch of {self.batch_size}.")
        options = {
            option.name: getattr(self, _key(option))
            for option in fields(TrainingRecipe)
            if option.name not in _OTHER_FORM
        }
        rate = None if self.lr == "auto" else self.lr
        return TrainingRecipe(steps=self.tokens // self.batch_size, learning_rate=rate, **options)


class CheckpointSection(_Section):
    """Checkpoints and log of a run.

    Attributes:
        every: number of steps between checkpoints.
        keep: number of checkpoints that are kept.
        log_every: number of steps between lines of metrics.
    """

    every: Count = 1000
    keep: Count = 2
    log_every: Count = 50


class TrainConfig(_Section):
    """A whole configuration.

    Attributes:
        sae: the SAE.
        data: the activations.
        train: the recipe.
        checkpoint: checkpoints and log.
        mesh: devices along the axes `data` and `latents`; one device if omitted.
        log_to: loggers besides `metrics.jsonl`: `tensorboard`, `wandb`.
        metadata: kept in the finished SAE: `site`, `target_site`, `model`, ....
        start_from: SAE from whose parameters the training starts, in any format that can be read: a folder,
            a run's folder, a place on the hub.
    """

    sae: SAESection
    data: DataSection
    train: TrainSection
    checkpoint: CheckpointSection = CheckpointSection()
    mesh: Annotated[
        dict[str, Annotated[Whole, Field(ge=-1, le=_MOST)]] | None, BeforeValidator(known_sae_axes)
    ] = None
    log_to: list[Literal["tensorboard", "wandb"]] = Field(default_factory=list)
    metadata: dict[str, Any] = Field(default_factory=dict)
    start_from: str | None = None


def load_config(
    config: TrainConfig | Mapping[str, Any] | str | Path, overrides: str | Sequence[str] = ()
) -> TrainConfig:
    """Reads and checks a configuration.

    Args:
        config: a YAML file, one of those that come with mergelab (`toy.yaml`), or what it would hold.
        overrides: `section.key=value`, value in YAML, several or one; they win over the file.

    Raises:
        SAEError: the file cannot be read, a key is unknown, or a value has the wrong type; the message names
            every such field.
    """
    name = "the configuration"
    if isinstance(config, TrainConfig):
        data: Any = config.model_dump()
    elif isinstance(config, Mapping):
        data = plain_data(config)
    else:
        name = shortened(str(config), 200)
        data = plain_settings(_file_text(config), name)
    if not isinstance(data, dict):
        raise SAEError(f"{name}: expected the sections sae, data and train, found {type(data).__name__}.")
    for override in [overrides] if isinstance(overrides, str) else overrides:
        data = with_override(data, override)
    try:
        return TrainConfig.model_validate(data)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        # Far more than are shown: the rest are counted, and looking for what was meant takes its time.
        explained = (f"{name}: {_sentence(fault)}" for fault in faults[:100])
        raise SAEError([*explained, *(name for _ in faults[100:])]) from error


def _file_text(path: str | Path) -> str:
    try:
        return read_text(shipped_file(path, "sae"), MAX_CONFIG, error=SAEError)
    except SAEError as error:
        if os.path.exists(path):  # False for a name that no file can have, where pathlib raises
            raise
        names = ", ".join(shipped_names("sae"))
        said = str(error).removesuffix(".")
        raise SAEError(f"{said}, or name one that comes with mergelab: {names}.") from None


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
