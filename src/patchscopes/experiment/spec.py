"""An experiment as data: what is read, through which scopes, with which controls. The same table is the Python object, the TOML,
YAML or JSON file, the options of the command line, and the JSON Schema that editors complete from.

Everything that can be wrong without a model is said here, as an InputError with its place ("parts[1].layers").
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from patchscopes.core.errors import InputError
from patchscopes.core.names import LENSES
from patchscopes.experiment import grammar
from patchscopes.experiment.documents import each_path, read_document, rooted
from patchscopes.experiment.spec_tables import (
    At,
    ControlNames,
    Count,
    LayerText,
    Looks,
    Maps,
    Models,
    ModelSpec,
    Name,
    PromptFile,
    Prompts,
    Scopes,
    SiteName,
    Spans,
    TargetLayer,
    Temperature,
    Texts,
    described,
)
from patchscopes.experiment.table import Table, told

DRAFT = "https://json-schema.org/draft/2020-12/schema"
NOT_IN_DIGEST = ("name", "shard", "on_bad_prompt")


class Outputs(Table):
    """What is kept beside the table."""

    top_k: Annotated[int, Field(ge=0)] = described("top_k", 0)
    vectors: bool = described("save_vectors", False)
    logits: bool = described("save_logits", False)


class Part(Table):
    """A part of an experiment. What it lacks it takes from the experiment."""

    name: Name = Field(description="What tables call the part.")
    model: Models | None = described("model")
    prompts: Prompts | None = described("prompts")
    at: At | None = described("at")
    layers: LayerText | None = described("layers")
    span: Spans | None = described("span")
    site: SiteName | None = described("site")
    scope: Scopes | None = described("scope")
    map: Maps | None = described("map")
    target_layer: TargetLayer | None = described("target_layer")
    tokens: Count | None = described("tokens")
    stop: Texts | None = described("stop")
    temperature: Temperature | None = described("temperature")
    draws: Count | None = described("draws")
    seed: int | None = described("seed")
    controls: ControlNames | None = described("controls")
    evidence: bool | None = described("evidence")
    second_look: Looks | None = described("second_look")


class Experiment(Table):
    """What is read, through which scopes, with which controls."""

    elsewhere = {  # noqa: RUF012 (a ClassVar of Table)
        **dict.fromkeys(ModelSpec.model_fields, "model"),
        **dict.fromkeys(PromptFile.model_fields, "prompts"),
        **dict.fromkeys(Outputs.model_fields, "outputs"),
    }
    name: Name = described("name", "sweep")
    model: Models = described("model", "atlas", validate_default=True)
    prompts: Prompts | None = described("prompts")
    at: At = described("at", -1)
    layers: LayerText = described("layers", "all")
    span: Spans = described("span", 1)
    site: SiteName = described("site", "resid")
    scope: Scopes = described("scope", "describe", validate_default=True)
    map: Maps = described("map", "identity", validate_default=True)
    target_layer: TargetLayer | None = described("target_layer")
    tokens: Count | None = described("tokens")
    stop: Texts | None = described("stop")
    temperature: Temperature = described("temperature", 0.0)
    draws: Count = described("draws", 1)
    seed: int = described("seed", 0)
    controls: ControlNames = described("controls", True)
    evidence: bool = described("evidence", True)
    second_look: Looks | None = described("second_look")
    outputs: Outputs = described("outputs", {}, validate_default=True)
    shard: Count | None = described("shard")
    on_bad_prompt: Literal["refuse", "skip"] = described("on_bad_prompt", "refuse")
    parts: Annotated[tuple[Part, ...], BeforeValidator(grammar.as_tuple, json_schema_input_type=list[Part])] = described(
        "parts", ()
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        names = [part.name for part in self.parts]
        if twice := [name for k, name in enumerate(names) if name in names[:k]]:
            raise InputError(f"two parts are named {twice[0]!r}; expected a name of its own for each")
        for k, one in enumerate(self.split()):
            where = f"parts[{k}]" if self.parts else ""
            _check(one, f"{where}." if where else "")
        return self

    def split(self) -> list[Experiment]:
        """The parts, each as an experiment of its own without parts; this one, if it has none."""
        return [
            self.model_copy(
                update={**{k: v for k in type(part).model_fields if (v := getattr(part, k)) is not None}, "parts": ()}
            )
            for part in self.parts
        ] or [self]

    def models(self) -> list[ModelSpec]:
        """Every model that is read or patched, each once, in order."""
        found: dict[str, ModelSpec] = {}
        for part in self.split():
            for model in (*part.model, *(scope.model for scope in part.scope)):
                if model is not None:
                    found.setdefault(model.key, model)
        return list(found.values())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The experiment of a TOML, YAML or JSON file; relative paths in it are seen from its folder. InputError names what is wrong."""
        path = Path(path).expanduser()
        return cls.said({**rooted(read_document(path), path.resolve().parent)}, path.name)

    @classmethod
    def said(cls, document: Mapping[str, Any], where: str | Mapping[str, str]) -> Self:
        """The experiment of a document, errors naming the file it was said in; or, for each key, where it was said."""
        try:
            return super(Table, cls).model_validate(dict(document))
        except ValidationError as e:
            if isinstance(where, str):
                raise InputError(f"{where}: {told(e)}") from None
            raise told(e, where) from None

    def document(self) -> dict[str, Any]:
        """Everything in it as plain JSON, defaults and absolute paths included: `model_validate(document)` gives an equal one."""
        return self.model_dump(mode="json")

    @property
    def digest(self) -> str:
        """A hash of what it asks for: "sha256:…". Files count with their content, not their paths; name, shard and on_bad_prompt do
        not count. InputError if a file is not there."""
        from patchscopes.experiment.prompts import content  # which reads files

        document = {key: value for key, value in self.document().items() if key not in NOT_IN_DIGEST}
        hashed = each_path(document, lambda path, _: content(Path(path)))
        return "sha256:" + hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()


def _check(one: Experiment, where: str) -> None:
    """InputError if settings that are right each do not fit together. `where` begins the place."""
    if one.prompts is None:
        raise InputError(f"{where}prompts: nothing to read was given; expected prompts, or a table that names a file")
    for key, names in (("scope", [scope.called for scope in one.scope]), ("model", [model.key for model in one.model])):
        if twice := [name for k, name in enumerate(names) if name in names[:k]]:
            hint = "give each a name" if key == "scope" else "expected each once"
            raise InputError(f"{where}{key}: {twice[0]!r} is there twice; {hint}")
    if all(scope.preset in LENSES for scope in one.scope) and not (one.target_layer is None and one.tokens is None):
        raise InputError(
            f"{where}scope: the logit lens writes at the last layer and says one token; expected no target_layer and no tokens"
        )
    for k, scope in enumerate(one.scope):
        draws = one.draws if scope.draws is None else scope.draws
        temperature = one.temperature if scope.temperature is None else scope.temperature
        if draws > 1 and temperature == 0:
            key = f"scope[{k}].draws" if scope.draws is not None else "draws"
            raise InputError(f"{where}{key}: {draws} draws at temperature 0 would all be the same; give a temperature above 0")


def schema() -> dict[str, Any]:
    """The JSON Schema of an experiment file."""
    found = Experiment.model_json_schema(mode="validation")
    found = {"$schema": DRAFT, **found, "title": "patchscopes experiment"}
    return found
