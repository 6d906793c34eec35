"""Sparse autoencoders as they are used: parameters, configuration, encode and decode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from mergelab.compat import register_dataclass
from mergelab.errors import SAEError, did_you_mean
from mergelab.sae.activation_functions import ACTIVATION_FUNCTIONS, ActivationFunction
from mergelab.sae.kernels.rows import sum_of_rows
from mergelab.sae.normalizations import NORMALIZATIONS, normalized
from mergelab.sharding import put

__all__ = [
    "LATENT_AXIS",
    "SAE",
    "Crosscoder",
    "SAEConfig",
    "Transcoder",
    "at_sites",
    "place_sae",
    "sae_shardings",
    "with_metadata",
]


LATENT_AXIS = {
    "W_enc": 1, "b_enc": 0, "W_dec": 0, "threshold": 0, "magnitude_scale": 0, "magnitude_bias": 0,
}  # fmt: skip
"""Which axis of an array of an SAE runs over latents; the others have none."""


@dataclass(frozen=True)
class SAEConfig:
    """How the arrays of an SAE are used.

    Attributes:
        activation: name of a function of `mergelab.sae.activation_functions`: `topk` keeps the k largest
            pre-activations, `abs_topk` the k of largest absolute value, `group_max` the largest of each of k
            groups; `batch_topk` and `jump_relu` those above `threshold`; `relu` the positive ones; `gated`
            decides by one path and measures by another.
        k: latents per token, for `topk`, `abs_topk` and `group_max`.
        subtract_b_dec: whether `b_dec` is subtracted from the input before it is encoded.
        normalization: `none`, or `layer_norm`: each token loses its mean over the width and is divided by its
            unbiased standard deviation + 1e-5, and the reconstruction is put back (OpenAI's); or
            `constant_norm`: each token is scaled to the norm `sqrt(d)`, and back. What a transcoder writes
            has a scale of its own and stays as it is.
        sites: number of activations that stand side by side in the input, for a crosscoder.
        reads: the sites whose activations are read, one for each of `sites`; None where they are not known.
            Taken from `site` of the metadata where it is not given.
        writes: the sites whose activations are reconstructed; None where they are not known. Taken from
            `target_site` of the metadata where it is not given.
        transcoder: True where what is written is another activation than what is read, also if the sites
            have no name here; False for an autoencoder; None where nobody said. Follows from the sites where
            both are known.
        metadata: everything else that is known: `site`, `model`, `model_hash`, training figures. Plain JSON.
    """

    activation: str = "topk"
    k: int | None = None
    subtract_b_dec: bool = False
    normalization: str = "none"
    sites: int = 1
    reads: tuple[str, ...] | None = None
    writes: tuple[str, ...] | None = None
    transcoder: bool | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not isinstance(self.activation, str) or self.activation not in ACTIVATION_FUNCTIONS:
            raise SAEError(f"activation is {self.activation!r}; it may be {', '.join(ACTIVATION_FUNCTIONS)}.")
        if self.normalization not in NORMALIZATIONS:
            raise SAEError(f"normalization is {self.normalization!r}; it may be {', '.join(NORMALIZATIONS)}.")
        if self.needs_k and (not isinstance(self.k, int) or self.k < 1):
            raise SAEError(f"a top-k SAE needs k of at least 1, but k is {self.k}.")
        reads, writes, transcoder = _resolved(self)
        object.__setattr__(self, "reads", reads)
        object.__setattr__(self, "writes", writes)
        object.__setattr__(self, "transcoder", transcoder)

    @property
    def needs_k(self) -> bool:
        """Whether the activation function keeps k latents of each token."""
        return "k" in ACTIVATION_FUNCTIONS[self.activation].needs()


def _resolved(
    config: SAEConfig,
) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None, bool | None]:
    """`reads`, `writes` and `transcoder`, each completed from the others."""
    said = config.metadata if config.sites == 1 and isinstance(config.metadata, Mapping) else {}
    reads = _names("reads", config.reads if config.reads is not None else said.get("site"))
    writes = _names("writes", config.writes if config.writes is not None else said.get("target_site"))
    transcoder = config.transcoder
    if transcoder not in (None, True, False):
        raise SAEError(f"transcoder is {transcoder!r}; it may be true, false or null.")
    if reads is not None and len(reads) != config.sites:
        raise SAEError(f"reads names {len(reads)} sites, but the SAE reads {config.sites}.")
    if reads is not None and writes is not None:
        if transcoder is not None and transcoder != (reads != writes):
            kind = "a transcoder" if transcoder else "an autoencoder"
            raise SAEError(
                f"the SAE is said to be {kind}, but reads {', '.join(reads)} and writes "
                f"{', '.join(writes)}; correct one of them."
            )
        transcoder = reads != writes
    elif transcoder is False:
        reads = writes = reads if reads is not None else writes
    return reads, writes, transcoder


def _names(field: str, value: Any) -> tuple[str, ...] | None:
    names = (value,) if isinstance(value, str) else value
    if names is None:
        return None
    if (
        not isinstance(names, Sequence)
        or not names
        or not all(isinstance(name, str) and name for name in names)
    ):
        raise SAEError(f"{field} is {value!r}; expected names of sites, such as 'blocks.8.resid_post'.")
    return tuple(names)


_ARRAYS = (
    "W_enc", "b_enc", "W_dec", "b_dec", "threshold", "W_skip", "magnitude_scale", "magnitude_bias",
)  # fmt: skip

_ELSEWHERE = {
    **dict.fromkeys(
        ("from_pretrained", "from_disk", "load_from_disk", "load_from_pretrained", "load"),
        "`mergelab.load_sae(path)` reads an SAE of any known format",
    ),
    **dict.fromkeys(
        ("save_model", "save_pretrained", "save_to_disk", "save"),
        "`mergelab.save_sae(sae, path)` writes it",
    ),
    **dict.fromkeys(
        ("run_with_cache", "run_with_hooks", "run_with_saes", "add_sae"),
        "`model.apply(params, tokens, capture=[site])` reads a model's activations, and "
        "`edit={site: splice(sae)}` puts reconstructions in their place",
    ),
    "cfg": "it is called `config`",
    "hook_name": "`sae.config.reads` names the sites",
    "forward": "call the SAE: `sae(x)`",
    "encode_with_hidden_pre": "`sae.pre_activations(x)` and `sae.encode(x)` give the two",
    "state_dict": "`sae.arrays()` has the arrays by name",
    "to": "`place_sae(sae, mesh)` puts it on devices",
}
"""Names that users of other libraries try, and what to use."""


def _no_attribute(owner: str, name: str, known: Sequence[str]) -> NoReturn:
    if name.startswith("_"):  # what JAX, copy and pickle look for on any object
        raise AttributeError(name)
    hint = f"; {_ELSEWHERE[name]}" if name in _ELSEWHERE else did_you_mean(name, known)
    raise AttributeError(f"{owner} has no attribute {name!r}{hint}")


class _Named(type):
    """Type of `SAE`: what is looked up on the class in vain is answered too."""

    if not TYPE_CHECKING:  # a type checker should still see what is missing

        def __getattr__(cls, name: str) -> NoReturn:
            _no_attribute(f"type object {cls.__name__!r}", name, dir(cls))


@dataclass(frozen=True, repr=False)
class SAE(metaclass=_Named):
    """A sparse autoencoder of activations: pure functions of its arrays.

    One that writes other activations than it reads is a `Transcoder`, one of several sites a `Crosscoder`;
    both are SAEs. `checked` gives each its class.

    Attributes:
        W_enc: `[d_in, n]`.
        b_enc: `[n]`.
        W_dec: `[n, d_out]`; a row is the direction a latent writes.
        b_dec: `[d_out]`.
        config: use of the arrays.
        threshold: `[n]`, for `jump_relu` and `batch_topk`.
        W_skip: `[d_in, d_out]`, added to the output of a skip transcoder.
        magnitude_scale: `[n]`, for `gated`: `exp` of it scales the product that measures.
        magnitude_bias: `[n]`, for `gated`.
    """

    W_enc: Array
    b_enc: Array
    W_dec: Array
    b_dec: Array
    config: SAEConfig
    threshold: Array | None = None
    W_skip: Array | None = None
    magnitude_scale: Array | None = None
    magnitude_bias: Array | None = None

    @property
    def d_in(self) -> int:
        """Width of what is read."""
        return self.W_enc.shape[0]

    @property
    def d_out(self) -> int:
        """Width of what is reconstructed."""
        return self.W_dec.shape[1]

    @property
    def n_latents(self) -> int:
        """Number of latents."""
        return self.W_enc.shape[1]

    @property
    def d_sae(self) -> int:
        """`n_latents`, by its name in SAELens."""
        return self.n_latents

    @property
    def activation(self) -> ActivationFunction:
        """Function from pre-activations to codes."""
        kind = ACTIVATION_FUNCTIONS[self.config.activation]
        return kind(**{name: self.config.k if name == "k" else getattr(self, name) for name in kind.needs()})

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> NoReturn:
            _no_attribute(f"{type(self).__name__!r} object", name, [*dir(type(self)), *_ARRAYS])

    def __repr__(self) -> str:
        config = self.config
        said = config.activation + (f" k={config.k}" if config.k is not None else "")
        shapes = [getattr(array, "shape", None) or ("?", "?") for array in (self.W_enc, self.W_dec)]
        if len(shapes[0]) == len(shapes[1]) == 2:
            said += f", {shapes[0][0]} -> {shapes[0][1]} -> {shapes[1][1]}"
        sites = [", ".join(names) for names in (config.reads, config.writes) if names is not None]
        return f"{type(self).__name__}({said}{', ' if sites else ''}{' -> '.join(dict.fromkeys(sites))})"

    @property
    def is_autoencoder(self) -> bool:
        """Whether it writes what it reads: only then may its output stand in for its input.

        Where nobody said (`target_known` is False), two equal widths without a skip path count as one
        activation.
        """
        if self.config.transcoder is not None:
            return not self.config.transcoder
        return self.d_in == self.d_out and self.W_skip is None

    @property
    def target_known(self) -> bool:
        """Whether it is known to be an autoencoder or a transcoder, and not only taken for an autoencoder."""
        return self.config.transcoder is not None or not self.is_autoencoder

    def mapping(self) -> str:
        """What it reads and writes, for messages: `blocks.3.resid_mid -> blocks.3.mlp.out`."""
        reads, writes = self.config.reads, self.config.writes
        left = "an activation of unknown site" if reads is None else ", ".join(reads)
        if self.is_autoencoder and writes is None:
            writes = reads
        return f"{left} -> {'another of unknown site' if writes is None else ', '.join(writes)}"

    def checked(self) -> SAE:
        """Itself, as a `Transcoder` or `Crosscoder` where it is one.

        Raises:
            SAEError: an array is missing or has a shape that does not fit the others.
        """
        for name in ("W_enc", "W_dec"):
            if getattr(self, name).ndim != 2:
                raise SAEError(f"{name} has shape {list(getattr(self, name).shape)}; two axes were expected.")
        d, n, out = self.d_in, self.n_latents, self.d_out
        if self.config.transcoder is False and d != out:
            raise SAEError(f"an autoencoder writes what it reads, but this one maps {d} to {out} wide.")
        wanted: dict[str, tuple[int, ...]] = {
            "W_enc": (d, n),
            "b_enc": (n,),
            "W_dec": (n, out),
            "b_dec": (out,),
        }
        needed = ACTIVATION_FUNCTIONS[self.config.activation].needs()
        wanted |= {name: (n,) for name in needed if name != "k"}
        if self.W_skip is not None:
            wanted["W_skip"] = (d, out)
        for name, shape in wanted.items():
            value = getattr(self, name)
            if value is None:
                raise SAEError(f"an SAE with activation {self.config.activation!r} needs {name}.")
            if tuple(value.shape) != shape:
                raise SAEError(f"{name} has shape {list(value.shape)}, but {list(shape)} was expected.")
        if self.config.subtract_b_dec and d != out:
            raise SAEError(f"b_dec of width {out} cannot be subtracted from inputs of width {d}.")
        if self.config.needs_k and self.config.k is not None and self.config.k > n:
            raise SAEError(f"k is {self.config.k}, but the SAE has only {n} latents.")
        if self.config.activation == "group_max" and n % (self.config.k or 1):
            raise SAEError(
                f"{n} latents do not make {self.config.k} groups of one size; k has to divide them."
            )
        return _of_its_kind(self)

    def _side_by_side(self, x: Array) -> Array:
        """Activations of a site with heads, `[..., heads, d]`, as one vector of `d_in` for each token."""
        x, reads = jnp.asarray(x), self.config.reads
        heads = reads is not None and reads[0].endswith((".attn.q", ".attn.k", ".attn.v", ".attn.z"))
        if heads and x.ndim > 1 and x.shape[-1] != self.d_in == x.shape[-1] * x.shape[-2]:
            return x.reshape(*x.shape[:-2], self.d_in)
        return x

    def _normalized(self, x: Array) -> tuple[Array, Array | None, Array | None]:
        return normalized(self.config.normalization, x)

    def pre_activations(self, x: Float[Array, "*tokens d_in"]) -> Float[Array, "*tokens n"]:
        """What the activation function is given; the gate's, for `gated`."""
        rows, shape = _rows("activations", self._side_by_side(x), self.d_in, "d_in")
        return self._pre_activations(rows).reshape(*shape, self.n_latents)

    def _pre_activations(self, x: Array) -> Array:
        x, _, _ = self._normalized(x)
        if self.config.subtract_b_dec:
            x = x - self.b_dec[None, :]
        return x @ self.W_enc + self.b_enc[None, :]

    def encode(self, x: Float[Array, "*tokens d_in"]) -> Float[Array, "*tokens n"]:
        """The codes, dense; of a site with heads also of activations `[..., heads, d]`."""
        rows, shape = _rows("activations", self._side_by_side(x), self.d_in, "d_in")
        return self.activation.codes(self._pre_activations(rows)).reshape(*shape, self.n_latents)

    def sparse_codes(
        self, x: Float[Array, "*tokens d_in"]
    ) -> tuple[Float[Array, "*tokens k"], Int[Array, "*tokens k"]]:
        """Values and latents of the k codes of each token, for functions that have so many.

        Raises:
            SAEError: the number of the SAE's active latents varies.
        """
        rows, shape = _rows("activations", self._side_by_side(x), self.d_in, "d_in")
        values, indices = self.activation.pairs(self._pre_activations(rows))
        return values.reshape(*shape, -1), indices.reshape(*shape, -1)

    def decode(self, codes: Float[Array, "*tokens n"]) -> Float[Array, "*tokens d_out"]:
        """What codes stand for, without a skip path and without undoing a normalization."""
        rows, shape = _rows("codes", codes, self.n_latents, "n_latents")
        return (rows @ self.W_dec + self.b_dec[None, :]).reshape(*shape, self.d_out)

    def decode_sparse(
        self, values: Float[Array, "*tokens k"], indices: Int[Array, "*tokens k"]
    ) -> Float[Array, "*tokens d_out"]:
        """The reconstruction that `decode` gives, from pairs."""
        shape, k = values.shape[:-1], values.shape[-1]
        written = sum_of_rows(values.reshape(-1, k), indices.reshape(-1, k), self.W_dec)
        return (written + self.b_dec[None, :]).reshape(*shape, self.d_out)

    def reconstruct(
        self, x: Float[Array, "*tokens d_in"], codes: Float[Array, "*tokens n"]
    ) -> Float[Array, "*tokens d_out"]:
        """What these codes make of `x`, in its shape where it is reconstructed."""
        flat = self._side_by_side(x)
        rows, shape = _rows("activations", flat, self.d_in, "d_in")
        out = self.decode(_rows("codes", codes, self.n_latents, "n_latents")[0])
        whole = self._completed(rows, out).reshape(*shape, self.d_out)
        return whole.reshape(x.shape) if self.is_autoencoder and flat.shape != x.shape else whole

    def _completed(self, x: Array, out: Array) -> Array:
        """What is decoded, with the skip path added and in the scale of `x`, both of them rows."""
        normal, mean, scale = self._normalized(x)
        if not self.is_autoencoder:
            # What is written has a scale of its own; a skip path reads the activation as it is (SAELens).
            return out if self.W_skip is None else out + x @ self.W_skip
        if self.W_skip is not None:
            out = out + normal @ self.W_skip
        out = out if scale is None else out * scale
        return out if mean is None else out + mean

    def __call__(self, x: Float[Array, "*tokens d_in"]) -> Float[Array, "*tokens d_out"]:
        """The reconstruction."""
        return self.reconstruct(x, self.encode(x))

    def arrays(self) -> dict[str, Array]:
        """The arrays that it has, by name."""
        names = (f for f in self.__dataclass_fields__ if f != "config" and getattr(self, f) is not None)
        return {name: getattr(self, name) for name in names}

    def as_numpy(self) -> dict[str, np.ndarray]:
        """The arrays by name, on the host."""
        return {name: np.asarray(value) for name, value in self.arrays().items()}


class Transcoder(SAE):
    """An SAE that writes other activations than it reads, such as the output of an MLP from its input."""


class Crosscoder(SAE):
    """An SAE of several sites side by side: `config.sites` activations make one input."""


for _kind in (SAE, Transcoder, Crosscoder):
    register_dataclass(_kind, data_fields=_ARRAYS, meta_fields=("config",))


def _of_its_kind(sae: SAE) -> SAE:
    kind = Crosscoder if sae.config.sites > 1 else SAE if sae.is_autoencoder else Transcoder
    return sae if type(sae) is kind else kind(**sae.arrays(), config=sae.config)


def _rows(what: str, x: Array, width: int, name: str) -> tuple[Array, tuple[int, ...]]:
    """`[..., width]` -> `[rows, width]`, and the leading axes."""
    x = jnp.asarray(x)
    if not x.ndim or x.shape[-1] != width:
        raise SAEError(
            f"the {what} have shape {list(x.shape)}, but the SAE has {name}={width}; give [..., {width}]."
        )
    return (x if x.ndim == 2 else x.reshape(-1, width)), x.shape[:-1]


def at_sites(sae: SAE, site: str | None = None, target_site: str | None = None) -> SAE:
    """The SAE, told the sites at which it is used: they win over what it says itself.

    Args:
        sae: SAE of one site.
        site: site that it reads; the one it names if None. An autoencoder then writes it too.
        target_site: site that it writes, for a transcoder, or for an SAE that does not say what it is.

    Raises:
        SAEError: an autoencoder is given another target, or a transcoder its own input.
    """
    if site is None and target_site is None:
        return sae
    config = sae.config
    reads = config.reads if site is None else (site,)
    known = config.transcoder is not None
    if target_site is not None:
        writes: tuple[str, ...] | None = (target_site,)
        if known and sae.is_autoencoder and reads not in (None, writes):
            raise SAEError(
                f"the SAE is an autoencoder and writes what it reads, not {target_site!r}; omit the "
                "target (target_site, --target-site)."
            )
    else:
        writes = reads if known and sae.is_autoencoder else config.writes
    kind = None if reads is not None and writes is not None else config.transcoder
    if config.transcoder and reads == writes and reads is not None:
        raise SAEError(
            f"the SAE is a transcoder, so it does not write {reads[0]!r}, which it reads; name the "
            "site it was trained to write (target_site, --target-site)."
        )
    # The names in the metadata would be taken for a site that is not given here.
    metadata = {key: value for key, value in config.metadata.items() if key not in ("site", "target_site")}
    changed = replace(config, reads=reads, writes=writes, transcoder=kind, metadata=metadata)
    return _of_its_kind(replace(sae, config=changed))


def with_metadata(sae: SAE, metadata: Mapping[str, Any]) -> SAE:
    """The SAE with more metadata, which wins over what it says itself; sites are told by `at_sites`.

    Args:
        sae: SAE whose other metadata stays.
        metadata: plain JSON, such as `model`, `context` and `model_hash`.
    """
    return replace(sae, config=replace(sae.config, metadata={**sae.config.metadata, **metadata}))


def place_sae(sae: SAE, mesh: Mesh) -> SAE:
    """Puts an SAE, the same in every process, on a mesh, its latents split over the axis `latents`."""
    return jax.tree.map(put, sae, sae_shardings(sae, mesh))


def sae_shardings(sae: SAE, mesh: Mesh) -> SAE:
    """How an SAE, or the shapes of one, lies on a mesh: a tree of shardings like it.

    Its latents are split over the axis `latents`, if the mesh has one that divides their number.
    """
    latents = "latents" if sae.n_latents % mesh.shape.get("latents", 1) == 0 else None
    latents = latents if "latents" in mesh.axis_names else None

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        axis = LATENT_AXIS.get(path[0].name)
        return NamedSharding(mesh, PartitionSpec(*(latents if i == axis else None for i in range(leaf.ndim))))

    return jax.tree_util.tree_map_with_path(sharding, sae)
