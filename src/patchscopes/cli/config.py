"""`patchscopes config`: settings that hold for every experiment, and where each comes from; `patchscopes schema` for editors."""

from __future__ import annotations

import json as json_
from pathlib import Path
from typing import Annotated, Any

import typer

from patchscopes.cli.options import Json
from patchscopes.cli.settings import gather, project_file, user_file
from patchscopes.cli.terminal import print_json

app = typer.Typer(name="config", help="Show settings, and where they come from.", no_args_is_help=True)


@app.command()
def show(
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="An experiment file, to see it with its settings.")
    ] = None,
    origin: Annotated[bool, typer.Option("--origin", help="Say of each where it comes from.")] = False,
    json: Json = False,
) -> None:
    """Show the settings of an experiment that were made for all: in the user's file, the project's, the environment.

    What is printed is TOML, as the files are.
    """
    from patchscopes.experiment.spec import Experiment, Outputs

    found = gather(file)
    Experiment.said({"prompts": "none", **found.filled()}, found.origin)
    values = {key: field.default for key, field in Experiment.model_fields.items() if key not in ("prompts", "parts")}
    values |= found.loading | found.loading_all
    values |= found.document
    values["outputs"] = Outputs().model_dump() | values["outputs"]
    said = {key: found.origin.get(key, "default") for key in values}
    if json:
        print_json({key: {"value": value, "origin": said[key]} if origin else value for key, value in values.items()})
        return
    lines = {key: f"# {key} is not set" if value is None else f"{key} = {as_toml(value)}" for key, value in values.items()}
    width = min(max(map(len, lines.values())), 60)
    for key, line in lines.items():
        print(f"{line:{width}}  # {said[key]}" if origin else line)


@app.command()
def path(json: Json = False) -> None:
    """Print where the settings of the user and of the project are looked for, in this order; later ones win."""
    paths = {"user": user_file(), "project": project_file()}
    if json:
        print_json({kind: {"path": str(path), "exists": path.is_file()} for kind, path in paths.items()})
        return
    for found in paths.values():
        print(found)


def schema() -> None:
    """Print the JSON Schema of experiment files, from which editors complete and check them.

    \b
    patchscopes schema > experiment.schema.json
    """
    from patchscopes.experiment.spec import schema as of_experiments

    print_json(of_experiments())


def as_toml(value: Any) -> str:
    """A value as TOML writes it, in one line. What is None is left out."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_key(key)} = {as_toml(one)}" for key, one in value.items() if one is not None) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(as_toml(one) for one in value) + "]"
    return json_.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # texts, numbers, true, false: as in JSON


def _key(key: str) -> str:
    return key if key.replace("_", "").replace("-", "").isalnum() and key.isascii() else as_toml(key)
