"""The tables inside an experiment: models, prompts, maps, scopes; and the kinds of their values."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from patchscopes.core.errors import InputError
from patchscopes.core.names import LENSES, SLOT, ControlName, DtypeName, Preset
from patchscopes.experiment import grammar
from patchscopes.experiment.keys import KEYS
from patchscopes.experiment.table import Table


def described(key: str, default: Any = None, **more: Any) -> Any:
    """A field described by `keys.KEYS`."""
    return Field(default, description=KEYS[key], **more)


Scalar = str | int | float | bool | None
Name = Annotated[str, BeforeValidator(grammar.name)]
File = Annotated[str, BeforeValidator(grammar.path, json_schema_input_type=str)]
At = Annotated[
    int | str | tuple[int | str, ...], BeforeValidator(grammar.position, json_schema_input_type=int | str | list[int | str])
]
LayerText = Annotated[int | str | tuple[int, ...], BeforeValidator(grammar.layers, json_schema_input_type=int | str | list[int])]
TargetLayer = Annotated[
    int | str | tuple[int, ...], BeforeValidator(grammar.target_layers, json_schema_input_type=int | str | list[int])
]
_Site = Literal["resid", "attn_in", "attn_out", "mlp_in", "mlp_out"]
SiteName = Annotated[_Site, BeforeValidator(grammar.site, json_schema_input_type=_Site)]
Spans = Annotated[int | Literal["piece"], BeforeValidator(grammar.span, json_schema_input_type=int | Literal["piece"])]
_Spread = Literal["here", "below"] | tuple[int, ...]
SpreadName = Annotated[_Spread, BeforeValidator(grammar.spread, json_schema_input_type=Literal["here", "below"] | list[int])]
WriteName = Literal["replace", "add", "add_matched", "replace_matched"]
Count = Annotated[int, Field(ge=1)]
Temperature = Annotated[float, Field(ge=0)]
Texts = Annotated[tuple[str, ...], BeforeValidator(grammar.listed, json_schema_input_type=str | list[str])]
Looks = Annotated[str | tuple[str, ...], BeforeValidator(grammar.as_tuple, json_schema_input_type=str | list[str])]
Ids = Annotated[
    tuple[Annotated[int, Field(ge=0)], ...],
    BeforeValidator(grammar.ids, json_schema_input_type=list[int]),
]
ControlNames = Annotated[
    bool | tuple[ControlName, ...],
    BeforeValidator(grammar.controls, json_schema_input_type=bool | ControlName | list[ControlName]),
]


class ModelSpec(Table):
    """A model, and how to load it."""

    name: Annotated[str, BeforeValidator(grammar.model)] = Field(
        description="A bundled model (atlas), a folder, or a Hugging Face id."
    )
    revision: str | None = described("revision")
    dtype: Annotated[DtypeName, BeforeValidator(grammar.dtype, json_schema_input_type=DtypeName)] | None = described("dtype")
    device: str | None = described("device")
    device_map: str | dict[str, int | str] | None = described("device_map")
    attention: str | None = described("attention")
    trust_remote_code: bool = described("trust_remote_code", False)

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        placed = [key for key in ("device", "device_map") if getattr(self, key) is not None]
        if len(placed) > 1:
            raise InputError(f"{' and '.join(placed)} both say where the model goes; expected one of them")
        return self

    @property
    def key(self) -> str:
        """How it is called where several models are told apart: its name, with all that was chosen."""
        chosen = {k: v for k, v in self.model_dump(exclude_defaults=True, exclude={"name", "revision"}).items()}
        revision = f"@{self.revision}" if self.revision else ""
        return " ".join([f"{self.name}{revision}", *(f"{k}={v}" for k, v in chosen.items())])


OneModel = Annotated[ModelSpec, BeforeValidator(grammar.model_of, json_schema_input_type=str | ModelSpec)]
Models = Annotated[
    tuple[OneModel, ...],
    BeforeValidator(grammar.some, json_schema_input_type=str | ModelSpec | list[str | ModelSpec]),
]


class PromptSpec(Table):
    """A prompt: its text or its token ids, where to read it, and what is known of it."""

    text: Annotated[str, BeforeValidator(grammar.prompt_text)] | None = described("text")
    ids: Ids | None = described("ids")
    at: At | None = described("at")
    chat: bool = described("chat", False)
    labels: Annotated[dict[str, Scalar], BeforeValidator(grammar.labels, json_schema_input_type=dict[str, Scalar])] = Field(
        {}, description="What is known of the prompt, carried along into the table of results."
    )

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if (self.text is None) == (self.ids is None):
            raise InputError(
                f"{'text and ids were both' if self.text else 'neither text nor ids was'} given; expected one of them"
            )
        if self.chat and self.ids is not None:
            raise InputError("chat was given with ids; expected text for a chat template")
        return self


class PromptFile(Table):
    """Prompts in a file."""

    file: File = Field(description=KEYS["file"])
    column: str = described("column", "prompt")
    at_column: str | None = described("at_column")
    labels: Texts = described("labels", [], validate_default=True)
    split: str | None = described("split")
    limit: Count | None = described("limit")
    sample: Count | None = described("sample")
    chat: bool = described("chat", False)

    @model_validator(mode="after")
    def _limit_or_sample(self) -> Self:
        if self.limit is not None and self.sample is not None:
            raise InputError("limit and sample were both given; expected the first rows or drawn ones")
        return self


class VectorFile(Table):
    """Vectors in a file."""

    vectors: File = Field(description=KEYS["vectors"])
    tensor: str | None = described("tensor")


def _form(value: Any) -> str:
    keys = value if isinstance(value, dict) else type(value).model_fields if isinstance(value, Table) else ()
    return "<file>" if "file" in keys else "<vectors>" if "vectors" in keys else "<inline>"


OnePrompt = Annotated[PromptSpec, BeforeValidator(grammar.text_of, json_schema_input_type=str | PromptSpec)]
Prompts = Annotated[
    Annotated[tuple[OnePrompt, ...], Tag("<inline>")]
    | Annotated[PromptFile, Tag("<file>")]
    | Annotated[VectorFile, Tag("<vectors>")],
    Discriminator(_form),
    BeforeValidator(grammar.prompts, json_schema_input_type=str | PromptSpec | list[str | PromptSpec] | PromptFile | VectorFile),
]


class ScaleMap(Table):
    """f(h) = scale · h."""

    scale: float = Field(description="What each state is multiplied by.")


class AffineMap(Table):
    """f(h) = W h + b."""

    affine: File = Field(description="A safetensors file with weight and bias, as maps.save_map writes it.")


class FileMap(Table):
    """Any map, one for each pair of layers too."""

    file: File = Field(description="A safetensors file of a map of any kind, as maps.save_map and maps.fit write it.")


class TunedLensMap(Table):
    """f(h) = h + W h + b of each layer, into the last."""

    tuned_lens: File = Field(
        description="A tuned lens: a safetensors file, a folder that training left or a public one. It is compared with the model."
    )


class JacobianLensMap(Table):
    """f(h) = J h of each layer, into the last."""

    jacobian_lens: File = Field(description="A file of a Jacobian lens. It is compared with the model before it is used.")


def _which(value: Any) -> str:
    keys = value if isinstance(value, dict) else type(value).model_fields if isinstance(value, Table) else ()
    return next((f"<{kind}>" for kind in grammar.MAPS if kind in keys), "<identity>")


MapSpec = Literal["identity"] | ScaleMap | AffineMap | FileMap | TunedLensMap | JacobianLensMap
OneMap = Annotated[
    Annotated[Literal["identity"], Tag("<identity>")]
    | Annotated[ScaleMap, Tag("<scale>")]
    | Annotated[AffineMap, Tag("<affine>")]
    | Annotated[FileMap, Tag("<file>")]
    | Annotated[TunedLensMap, Tag("<tuned_lens>")]
    | Annotated[JacobianLensMap, Tag("<jacobian_lens>")],
    Discriminator(_which),
    BeforeValidator(grammar.map_of, json_schema_input_type=MapSpec),
]
Maps = Annotated[tuple[OneMap, ...], BeforeValidator(grammar.some, json_schema_input_type=MapSpec | list[MapSpec])]


class TargetPrompt(Table):
    """A target prompt: its text or its token ids."""

    text: Annotated[str, BeforeValidator(grammar.prompt_text)] | None = described("text")
    ids: Ids | None = described("ids")

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if (self.text is None) == (self.ids is None):
            raise InputError(
                f"{'text and ids were both' if self.text else 'neither text nor ids was'} given; expected one of them"
            )
        return self


OneTarget = Annotated[TargetPrompt, BeforeValidator(grammar.text_of, json_schema_input_type=str | TargetPrompt)]
Targets = Annotated[
    tuple[OneTarget, ...],
    BeforeValidator(grammar.some, json_schema_input_type=str | TargetPrompt | list[str | TargetPrompt]),
]


class ScopeSpec(Table):
    """A scope: a preset, or target prompts of your own. What is absent is the experiment's, and then the preset's."""

    name: Name | None = Field(None, description="What tables call it. Absent: the preset's name, or the prompt.")
    preset: Preset | None = Field(None, description="A scope of the paper.")
    prompt: Targets | None = Field(
        None, description="Target prompts; {x} marks where the state goes, or `at` says it. Several multiply out."
    )
    at: At | None = Field(
        None,
        description="Where the state goes in prompts without {x}: a piece of text or an index, or several; same: where it was read. "
        "Absent: x; back-patch: where it was read.",
    )
    layer: TargetLayer | None = described("target_layer")
    map: Maps | None = described("map")
    tokens: Count | None = described("tokens")
    stop: Texts | None = described("stop")
    site: SiteName | None = Field(
        None, description="Where it is written: resid, attn_in, attn_out, mlp_in or mlp_out. Absent: resid."
    )
    write: WriteName | None = Field(
        None, description="replace, add, add_matched or replace_matched (in proportion to what is there). Absent: replace."
    )
    spread: SpreadName | None = Field(
        None,
        description="At which layers beside the target layer it is written: here (at none), below (every one below), or distances from it "
        "such as [0, 1]. Absent: here.",
    )
    carry: Literal["one", "each"] | None = Field(
        None,
        description="What is written in them: one (the same vector in all), or each (the state of the layer as far from the one read). "
        "Absent: one.",
    )
    guidance: float | None = Field(
        None,
        description="w: tokens are chosen by p + w (p - u), with p the logits with the state in place, u those without. Absent: 0.",
    )
    temperature: Temperature | None = described("temperature")
    draws: Count | None = described("draws")
    edits: File | None = Field(
        None, description="A safetensors file of further edits of every target run, as edits.save_edits writes it."
    )
    model: OneModel | None = Field(None, description="M*, the model that is patched. Absent: the one that is read.")

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.preset is None) == (self.prompt is None):
            raise InputError("preset and prompt were both given; expected one of them" if self.preset else _NO_SCOPE)
        if self.preset in LENSES and not (self.layer is None and self.tokens is None):
            raise InputError(
                f"the {_spelt(self.preset)} writes at the last layer and says one token; expected no layer and no tokens"
            )
        slots = self.prompt is not None and all(SLOT in (one.text or "") for one in self.prompt)
        if self.at is not None and (slots or self.preset not in (None, "back-patch")):
            raise InputError(f"at was given, but {SLOT} already says where the state goes; expected one of them")
        return self

    @property
    def called(self) -> str:
        """Its name in tables."""
        if self.name is not None or self.preset is not None:
            return self.name or self.preset or ""
        first = self.prompt[0] if self.prompt else None
        return "scope" if first is None or first.text is None else first.text


def _spelt(preset: str | None) -> str:
    return (preset or "").replace("-", " ")


_NO_SCOPE = "neither preset nor prompt was given; expected a scope's name or a prompt with {x}"
OneScope = Annotated[ScopeSpec, BeforeValidator(grammar.scope_of, json_schema_input_type=Preset | str | ScopeSpec)]
Scopes = Annotated[
    tuple[OneScope, ...],
    BeforeValidator(grammar.some, json_schema_input_type=Preset | str | ScopeSpec | list[Preset | str | ScopeSpec]),
]
