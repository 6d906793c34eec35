"""The typed recipe: all of mergekit's YAML as frozen pydantic models, built from a file or in Python."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    PlainValidator,
    PrivateAttr,
    StrictBool,
    StrictInt,
    StrictStr,
    Tag,
    ValidationError,
    model_validator,
)

from mergelab.errors import quoted, shortened
from mergelab.merging.recipe.faults import FieldPath, LocatedError, Origin, field_faults
from mergelab.merging.recipe.model_refs import model_ref_text, parse_model_ref
from mergelab.merging.recipe.settings import Setting, parse_setting
from mergelab.names_elsewhere import advice

__all__ = [
    "EmbeddingRule",
    "InputModel",
    "ModuleRecipe",
    "OutputSlice",
    "Recipe",
    "SliceSource",
    "TokenSource",
    "TokenizerSpec",
]


def _checked_model(text: str) -> str:
    parse_model_ref(text)
    return text


def _checked_range(value: tuple[int, int]) -> tuple[int, int]:
    start, stop = value
    if max(abs(start), abs(stop)) > 2**31:
        raise ValueError(f"layer range {quoted(list(value))} is beyond every model")
    if start < 0 or stop < start:
        raise ValueError(f"layer range [{start}, {stop}] is negative: [a, b] is layers a to b - 1")
    return value


def _checked_path(text: str) -> str:
    if not text.strip():
        raise ValueError("names no folder: give the folder or file that 'mergelab statistics' has written")
    return text


def _none_is_empty(value: Any) -> Any:
    return {} if value is None else value


def _setting_data(setting: Setting) -> Any:
    return setting.to_data()


def _kind_of_token_source(value: Any) -> str:
    return "model" if isinstance(value, str) else "rule"


ModelText = Annotated[StrictStr, BeforeValidator(model_ref_text), AfterValidator(_checked_model)]
PathText = Annotated[StrictStr, AfterValidator(_checked_path)]
LayerRange = Annotated[tuple[StrictInt, StrictInt], AfterValidator(_checked_range)]
SettingField = Annotated[Setting, PlainValidator(parse_setting), PlainSerializer(_setting_data)]
SettingFields = Annotated[dict[str, SettingField], BeforeValidator(_none_is_empty)]
DTypeName = Literal["bfloat16", "float16", "float32", "float64", "int64"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class InputModel(_Part):
    """One entry of `models:`; `statistics` is a folder or file of tensors named as the model's."""

    model: ModelText
    parameters: SettingFields = {}
    statistics: PathText | None = None


class SliceSource(_Part):
    """One entry of a slice's `sources:`: layers `[a, b)` of a model."""

    model: ModelText
    layer_range: LayerRange
    parameters: SettingFields = {}
    statistics: PathText | None = None


class OutputSlice(_Part):
    """One entry of `slices:`: consecutive output layers made from equally many layers of each source."""

    sources: tuple[SliceSource, ...] = Field(min_length=1)
    base_model: ModelText | None = None
    residual_weight: float | None = None
    parameters: SettingFields = {}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [source.model for source in self.sources]
        if len(set(names)) < len(names):
            seen: set[str] = set()
            repeated = next(name for name in names if name in seen or seen.add(name))
            raise ValueError(
                f"model {quoted(repeated)} is listed twice in one slice: put it in a slice of its own"
            )
        lengths = [stop - start for start, stop in (source.layer_range for source in self.sources)]
        if len(set(lengths)) > 1:
            pairs = zip(names, lengths, strict=True)
            found = shortened(", ".join(f"{name}: {n}" for name, n in islice(pairs, 20)), 400)
            raise ValueError(f"the sources of a slice must have equally many layers, found {found}")
        return self


class ModuleRecipe(_Part):
    """One entry of `modules:`: a tower of a multi-part model, given by `models` or `slices`."""

    models: tuple[InputModel, ...] | None = None
    slices: tuple[OutputSlice, ...] | None = None
    parameters: SettingFields = {}

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if bool(self.models) == bool(self.slices):
            raise ValueError("a module needs exactly one of 'models' and 'slices'")
        return self


class TokenSource(_Part):
    """Where a token's embedding comes from: zeros, or a row of one model."""

    kind: Literal["zero", "model_token"]
    model: ModelText | None = None
    token: StrictStr | None = None
    token_id: StrictInt | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        given = [name for name in ("model", "token", "token_id") if getattr(self, name) is not None]
        if self.kind == "zero" and given:
            raise ValueError(f"kind 'zero' takes no {given[0]!r}")
        if self.kind == "model_token" and (self.model is None or len(given) != 2):
            raise ValueError("kind 'model_token' needs 'model' and exactly one of 'token' and 'token_id'")
        return self


class EmbeddingRule(_Part):
    """How one token's embedding is chosen; `force` overrides it in models that have the token too."""

    source: (
        Annotated[
            Annotated[ModelText, Tag("model")] | Annotated[TokenSource, Tag("rule")],
            Discriminator(_kind_of_token_source),
        ]
        | None
    ) = None
    force: StrictBool = False


class TokenizerSpec(_Part):
    """The output vocabulary: `union`, `base`, or the vocabulary of one model."""

    source: ModelText = "union"
    tokens: Annotated[dict[str, EmbeddingRule], BeforeValidator(_none_is_empty)] = {}
    pad_to_multiple_of: Annotated[StrictInt, Field(gt=0, le=2**20)] | None = None


class _RecipeType(type(BaseModel)):
    """Answers names that other libraries' recipes have, such as `Recipe.load`."""

    if not TYPE_CHECKING:  # as in `Recipe` itself

        def __getattr__(cls, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError as error:
                raise AttributeError(f"{error}{advice(name, 'Recipe')}") from None


class Recipe(_Part, metaclass=_RecipeType):
    """One merge, or the last of several that build on one another.

    Attributes:
        merge_method: a name in `mergelab.operators.OPERATORS`.
        models, slices, modules: what is merged; exactly one is given.
        base_model: the model differences are taken from; one that `models` lacks counts as its last entry.
        dtype, out_dtype: the stored dtype (`out_dtype` wins); None keeps the promotion of the inputs' own.
            Arithmetic is float32 whatever is stored.
        tokenizer_source, tokenizer: the output vocabulary, short and long form; at most one is given.
        chat_template: `auto`, a builtin name or literal jinja.
        parameters: hyper-parameters for the whole merge.
        name: how other recipes refer to this one's result.
        merges: the recipes whose names this one (or each other) uses as models.

    Raises:
        RecipeError: fields that are unknown, missing or of the wrong type, all named at once.
    """

    merge_method: StrictStr
    models: tuple[InputModel, ...] | None = None
    slices: tuple[OutputSlice, ...] | None = None
    modules: dict[str, ModuleRecipe] | None = None
    base_model: ModelText | None = None
    dtype: DTypeName | None = None
    out_dtype: DTypeName | None = None
    tokenizer_source: ModelText | None = None
    tokenizer: TokenizerSpec | None = None
    chat_template: StrictStr | None = None
    parameters: SettingFields = {}
    name: StrictStr | None = None
    merges: tuple[Recipe, ...] = ()

    _origin: Origin = PrivateAttr(default_factory=Origin)

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise LocatedError(field_faults(error, fields, type(self))) from None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        given = [name for name in ("models", "slices", "modules") if getattr(self, name)]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(f"exactly one of 'models', 'slices' and 'modules' must be given, found {found}")
        if self.tokenizer is not None and self.tokenizer_source is not None:
            raise ValueError("'tokenizer_source' and 'tokenizer' say the same thing: keep one")
        return self

    if not TYPE_CHECKING:  # type checkers know the fields, and report any other name

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError as error:
                raise AttributeError(f"{error}{advice(name, 'Recipe')}") from None

    @property
    def origin(self) -> Origin:
        """Where it was read from (for messages and relative paths)."""
        return self._origin

    @property
    def vocabulary(self) -> TokenizerSpec | None:
        """`tokenizer`, or what `tokenizer_source` abbreviates."""
        if self.tokenizer_source is not None:
            return TokenizerSpec(source=self.tokenizer_source)
        return self.tokenizer

    def parts(self) -> Iterator[tuple[FieldPath, str | None, ModuleRecipe]]:
        """`(path, module name, recipe)` of each module; one nameless part unless `modules` is given."""
        if self.modules:
            for name, module in self.modules.items():
                yield ("modules", name), name, module
        else:
            yield (), None, ModuleRecipe(models=self.models, slices=self.slices)

    def model_texts(self) -> dict[str, FieldPath]:
        """Every model whose weights are merged, in recipe order with the base last if it is not listed."""
        found: dict[str, FieldPath] = {}
        bases: dict[str, FieldPath] = {}
        for path, _, part in self.parts():
            for i, model in enumerate(part.models or ()):
                found.setdefault(model.model, (*path, "models", i, "model"))
            for i, piece in enumerate(part.slices or ()):
                for j, source in enumerate(piece.sources):
                    found.setdefault(source.model, (*path, "slices", i, "sources", j, "model"))
                if piece.base_model is not None:
                    bases.setdefault(piece.base_model, (*path, "slices", i, "base_model"))
        if self.base_model is not None:
            bases.setdefault(self.base_model, ("base_model",))
        return {**found, **{name: path for name, path in bases.items() if name not in found}}

    def statistics(self) -> dict[tuple[str, str], FieldPath]:
        """Every (model, statistics) that is given, with its place."""
        found: dict[tuple[str, str], FieldPath] = {}
        for path, _, part in self.parts():
            entries = [((*path, "models", i), model) for i, model in enumerate(part.models or ())]
            for i, piece in enumerate(part.slices or ()):
                entries += [((*path, "slices", i, "sources", j), s) for j, s in enumerate(piece.sources)]
            for place, entry in entries:
                if entry.statistics is not None:
                    found.setdefault((entry.model, entry.statistics), (*place, "statistics"))
        return found

    def referenced(self) -> dict[str, FieldPath]:
        """`model_texts`, and the models that only the tokenizer section names."""
        found = self.model_texts()
        spec = self.vocabulary
        if spec is None:
            return found
        short = self.tokenizer_source is not None
        if spec.source not in ("union", "base"):
            found.setdefault(spec.source, ("tokenizer_source",) if short else ("tokenizer", "source"))
        for token, rule in spec.tokens.items():
            source = rule.source.model if isinstance(rule.source, TokenSource) else rule.source
            if source is not None:
                found.setdefault(source, ("tokenizer", "tokens", token, "source"))
        return found
