"""How a sparse autoencoder is trained: every hyper-parameter that is not the variant's, with its default."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mergelab.errors import SAEError, quoted

__all__ = ["TrainingRecipe"]


@dataclass(frozen=True)
class TrainingRecipe:
    """The recipe of "Scaling and evaluating sparse autoencoders" (arXiv 2406.04093), each piece a switch.

    Attributes:
        steps: optimizer steps in all.
        batch_size: tokens per step, over all devices.
        learning_rate: peak learning rate; None chooses it from the number of latents and the steps
            (`mergelab.sae.training.update.automatic_learning_rate`).
        warmup: part of the training over which the learning rate rises linearly from 0.
        decay: part of the training, at its end, over which it falls linearly to 0.
        b1: Adam's decay of the mean gradient.
        b2: Adam's decay of the mean square gradient; None averages it over a twenty-fifth of the training, at
            least 10 and at most 1000 steps (the paper's 0.999).
        eps: Adam's epsilon.
        encoder_rate: learning rate of the encoder's rows, relative to the decoder's; 1 is the paper's.
        bias_rate: learning rate of the encoder's bias, relative to the decoder's; 1 is the paper's.
        clip: global norm to which gradients are clipped; None does not.
        ema: decay of the moving average of the parameters that is kept beside them; None averages over a
            fiftieth of the training, at most 1000 steps (the paper's 0.999); 0 keeps none.
        aux_k: dead latents that help a token; None takes the power of two nearest to half the width of the
            targets, 0 switches AuxK off.
        aux_coefficient: of the auxiliary loss.
        dead_after_tokens: a latent that has not fired for so many tokens is dead; None takes 10 million, or a
            tenth of a shorter training.
        lift: a latent that has been quiet for a sixteenth of that has its bias raised by so many learning
            rates a step, until it fires; 0 switches this off. It is not of the paper: AuxK alone teaches dead
            latents codes as small as the error they explain, too small to be among the k largest again.
        project_gradients: removes the part of a decoder gradient that is parallel to its row, which only
            the renormalization would undo.
        unit_decoder: renormalizes the decoder's rows after each step, where the variant keeps them at norm 1.
        center: starts `b_pre` at the geometric median of a sample; otherwise at 0.
        normalize: `scale` brings inputs to unit variance per coordinate while training, which is folded into
            the weights of the finished SAE; `layer_norm` normalizes each token, which the SAE
            then does too; `none` does neither.
        tie_initial: starts the encoder as the decoder's transpose, scaled; otherwise independently.
        initial_scale: that scale; None takes the one with which the first reconstructions err least
            (`mergelab.sae.training.initialize.best_initial_scale`), 1 is the paper's.
        compute_dtype: of the factors of the encoder's product, `float32` or `bfloat16`; state is float32.
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
    lift: float = 2.0
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
        if self.lift < 0:
            raise SAEError(f"lift is {self.lift}; it must be at least 0.")
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
    def lift_after(self) -> int:
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
