"""What a fine-tuning is told: how long, how fast, which parameters, and what it must not forget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from mergelab.errors import TuningError, did_you_mean

__all__ = ["LoraSettings", "TuningSettings", "settings_from"]

Role = Literal["auto", "all", "assistant"]

_RATES = {False: 2e-5, True: 2e-4}
"""Peak learning rates where none is given, of whole parameters and of LoRA factors."""


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank factors that are trained in place of the parameters (Hu et al. 2021, arXiv:2106.09685).

    Attributes:
        rank: columns of the factors.
        alpha: numerator of the scale `alpha / rank` of the product; twice the rank if None.
        targets: modules that get factors: names in files or here, their ends or globs (`q_proj`, `attn.q`,
            `*.mlp.*`); all linear layers of the blocks if empty.
    """

    rank: int = 16
    alpha: float | None = None
    targets: tuple[str, ...] = ()

    @property
    def numerator(self) -> float:
        """`alpha`, or what stands for it."""
        return 2.0 * self.rank if self.alpha is None else float(self.alpha)

    @property
    def scale(self) -> float:
        """Factor of `B @ A`."""
        return self.numerator / self.rank


@dataclass(frozen=True)
class TuningSettings:
    """Settings of one fine-tuning.

    Attributes:
        tokens: tokens that are trained on in all, read again where the text has fewer; by `epochs` if None.
        epochs: passes over the text.
        learning_rate: peak of the learning rate; 2e-5, or 2e-4 with LoRA, if None.
        optimizer: `adamw`, or `muon` for matrices of the blocks with AdamW for all else.
        batch: contexts in one forward pass.
        accumulate: forward passes whose gradients make one step.
        context: tokens in a context; 512, or as many as the model has positions, if None.
        warmup: fraction of the steps in which the learning rate rises.
        weight_decay: AdamW's and Muon's, on matrices only; 0 leaves what is not learned where it was.
        beta2: decay of the mean squared gradient.
        clip_norm: global norm that gradients are scaled down to.
        lora: factors that are trained in place of the parameters; None trains the parameters.
        kl: weight of `KL(teacher || model)`, in nats a token, beside the cross-entropy.
        roles: tokens of conversations that are learned; `auto` takes the assistants' turns of conversations,
            and all of a text.
        held_out_share: fraction of the contexts, the last ones, that are judged and not learned; unused where
            there is a text for that.
        evaluate_every: steps between two judgments on it; a fifth of the steps if None.
        dtype: dtype of the forward pass; that of the parameters if None. What is trained is float32.
        seed: seed of the order of contexts, and of LoRA's factors.
    """

    tokens: int | None = None
    epochs: float = 1.0
    learning_rate: float | None = None
    optimizer: Literal["adamw", "muon"] = "adamw"
    batch: int = 8
    accumulate: int = 1
    context: int | None = None
    warmup: float = 0.05
    weight_decay: float = 0.0
    beta2: float = 0.999
    clip_norm: float = 1.0
    lora: LoraSettings | None = None
    kl: float = 0.0
    roles: Role = "auto"
    held_out_share: float = 0.05
    evaluate_every: int | None = None
    dtype: str | None = None
    seed: int = 0

    @property
    def peak(self) -> float:
        """The learning rate at its highest."""
        return _RATES[self.lora is not None] if self.learning_rate is None else self.learning_rate

    def check(self, *, teacher: bool) -> None:
        """Checks the numbers.

        Args:
            teacher: whether there is one.

        Raises:
            TuningError: some have no meaning; all are named.
        """
        lora = self.lora or LoraSettings()
        rules = [
            ("tokens", self.tokens, self.tokens is None or self.tokens >= 1, "at least 1"),
            ("epochs", self.epochs, 0 < self.epochs < float("inf"), "a number above 0"),
            ("learning_rate", self.peak, 0 < self.peak < float("inf"), "a number above 0"),
            ("optimizer", self.optimizer, self.optimizer in ("adamw", "muon"), "adamw or muon"),
            ("batch", self.batch, self.batch >= 1, "at least 1"),
            ("accumulate", self.accumulate, self.accumulate >= 1, "at least 1"),
            ("context", self.context, self.context is None or self.context >= 2, "at least 2"),
            ("warmup", self.warmup, 0 <= self.warmup < 1, "a fraction from 0 to below 1"),
            ("weight_decay", self.weight_decay, 0 <= self.weight_decay < float("inf"), "0 or more"),
            ("beta2", self.beta2, 0 < self.beta2 < 1, "a number between 0 and 1"),
            ("clip_norm", self.clip_norm, self.clip_norm > 0, "a number above 0"),
            ("kl", self.kl, 0 <= self.kl < float("inf"), "0 or more"),
            ("roles", self.roles, self.roles in ("auto", "all", "assistant"), "auto, all or assistant"),
            (
                "held_out_share",
                self.held_out_share,
                0 <= self.held_out_share < 1,
                "a fraction from 0 to below 1",
            ),
            ("lora.rank", lora.rank, lora.rank >= 1, "at least 1"),
            ("lora.alpha", lora.numerator, 0 < lora.numerator < float("inf"), "a number above 0"),
            (
                "evaluate_every",
                self.evaluate_every,
                self.evaluate_every is None or self.evaluate_every >= 1,
                "at least 1",
            ),
        ]
        faults = [
            f"{name} is {value!r}, but needs {wanted}." for name, value, holds, wanted in rules if not holds
        ]
        if teacher and not self.kl:
            faults.append("a teacher is given, but the weight kl is 0: give one, such as 0.5.")
        if self.kl and not teacher:
            faults.append(f"kl is {self.kl:g}, but there is no teacher: give a model (teacher), or omit kl.")
        if faults:
            raise TuningError(faults)


def settings_from(settings: TuningSettings | None, options: Mapping[str, Any]) -> TuningSettings:
    """Settings, with some replaced by name; `lora` may be a rank.

    Raises:
        TuningError: there is no such setting.
    """
    known = [field.name for field in fields(TuningSettings)]
    if faults := [
        f"there is no setting {name!r}{did_you_mean(name, known)}; there are {', '.join(known)}."
        for name in options
        if name not in known
    ]:
        raise TuningError(faults)
    given = dict(options)
    if isinstance(given.get("lora"), int):
        given["lora"] = LoraSettings(given["lora"])
    return replace(settings or TuningSettings(), **given)
