"""`patchscopes inspect`: what do the hidden states of a prompt say?"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchscopes.cli.options import Device, Dtype, Json, ModelName, load_model
from patchscopes.cli.terminal import data, print_json, progress, say
from patchscopes.core.errors import InputError, PositionError
from patchscopes.core.files import make_folder, told
from patchscopes.core.layers import Layers, resolve_layers
from patchscopes.core.names import CONTROLS, SCOPES, SLOT, named_controls, require_scope

if TYPE_CHECKING:
    from patchscopes.model import Tokens
    from patchscopes.scopes import Patchscope, Readings


def inspect(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text whose hidden states are read.", show_default=False)],
    model: ModelName = "atlas",
    at: Annotated[
        str,
        typer.Option(
            help="Where to read: a piece of the prompt's text (its last token; word#2 for the second occurrence), an "
            "index (-1 is the last token), or all. A whole number is an index: for the text 1984 write 1984#1."
        ),
    ] = "-1",
    layers: Annotated[
        str, typer.Option(help="Layers to read: 3, or 3,5,9, or 0:8 (8 excluded), or 0:8:2, or all. 0 = embeddings, -1 = last.")
    ] = "all",
    scope: Annotated[
        str,
        typer.Option(
            help=f"{', '.join(SCOPES)}, or a prompt of your own with {SLOT} where the state goes: 'The capital of {SLOT} is'."
        ),
    ] = "describe",
    target_layer: Annotated[
        str | None,
        typer.Option(
            help="Where to write: same (as read), all, or layers as above. Default: the scope's own.", show_default=False
        ),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens said at most. Default: the scope's own.", show_default=False)
    ] = None,
    controls: Annotated[bool, typer.Option(help="Also run what a reading must be compared with, and weigh its evidence.")] = True,
    control: Annotated[
        list[str] | None,
        typer.Option(help=f"A control to run: {', '.join(CONTROLS)}; may be given several times.", show_default=False),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the model's chat template, as a user's turn.")
    ] = False,
    device: Device = None,
    dtype: Dtype = None,
    save: Annotated[
        Path | None, typer.Option(help="Keep the table and its provenance in this folder.", show_default=False)
    ] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw a heat map: .png, .svg or .pdf.", show_default=False)] = None,
    json: Json = False,
) -> None:
    """Read what the hidden states of PROMPT say.

    A table by layer, each reading beside what the same scope says without it.

    \b
    patchscopes inspect "Diana, Princess of Wales" --at Wales
    patchscopes inspect "We met in France" --scope "The capital of {x} is"
    """
    require_options(scope, target_layer, tokens)
    if control and not controls:
        raise InputError("--control and --no-controls were given; expected one of them")
    asked = named_controls(control) if control else controls
    if figure is not None:
        from patchscopes.views.heatmap import require_suffix

        require_suffix(figure)
    loaded = load_model(model, device, dtype)
    from patchscopes.scopes import Source

    built = build_scope(scope, target_layer, tokens)
    words = loaded.tokens(prompt, chat=chat)
    position = resolve_at(words, at)
    source = Source(loaded, words, position, layers)
    read = source.layers()
    if figure is not None and position == "all" and several(built.layer, loaded.n_layers):
        raise InputError(
            "every token and several target layers make no flat picture; give one of --at and --target-layer for --figure"
        )
    for note in words.notes if position == "all" else words.notes_at(int(position)):
        say(f"note: {note}")
    where = "every token" if position == "all" else f"token {position} {words.strings[int(position)]!r}"
    span = ", ".join(map(str, read)) if len(read) < 5 else f"{read[0]} to {read[-1]}"
    shown = words.text if len(words.text) <= 60 else f"{words.text[:59]}…"
    say(f"{loaded.name} reads {shown!r} at {where}, layer{'s' * (len(read) > 1)} {span}")
    for folder in (save, figure and figure.parent):
        if folder is not None:
            make_folder(folder)
    with progress() as report:
        readings = built(source, controls=asked, progress=report)
    keep(readings, save, figure)
    if json:
        print_json(document(readings, words.text, loaded.name, scope))
    else:
        show(readings)


def require_options(scope: str, target_layer: str | None, tokens: int | None) -> None:
    """An error if `scope` is none, or takes no such options; before anything is loaded."""
    require_scope(scope)
    if scope == "logit-lens" and not (target_layer is None and tokens is None):
        raise InputError("the logit lens writes at the last layer and says one token; expected no --target-layer and no --tokens")


def build_scope(scope: str, target_layer: str | None, tokens: int | None) -> Patchscope:
    """The scope called so, or that of a prompt with a slot."""
    from patchscopes.scopes.named import named

    built = named(scope)
    if target_layer is not None:
        built = replace(built, layer=target_layer)
    return built if tokens is None else replace(built, max_new_tokens=tokens)


def resolve_at(words: Tokens, at: str) -> int | str:
    """The position that `at` names, or "all"."""
    if at == "all":
        return at
    if not re.fullmatch(r"[+-]?\d+", at.strip()):
        return words.position(at)
    try:
        return words.position(int(at))
    except PositionError as e:
        hint = f". A whole number is an index; for the text write --at '{at}#1'" if at in words.text else ""
        raise PositionError(f"{e}{hint}") from None


def several(layer: Layers, n_layers: int) -> bool:
    """Whether a scope's ℓ* is more than one layer for a source layer."""
    return layer != "same" and len(resolve_layers(layer, n_layers)) > 1


def is_map(readings: Readings) -> bool:
    """Whether the readings span two dimensions: layers, and target layers or positions, but not both."""
    some = readings.readings
    across = some.group_by("source_layer").n_unique()
    targets, positions = across["target_layer"].to_list(), across["position"].to_list()
    return (max(targets) > 1) != (max(positions) > 1)


def metric(readings: Readings) -> str:
    """What a heat map shows: how much the texts tell of their source; without controls, how they surprise the source model."""
    return "bits_over_others" if readings.readings["bits_over_others"].is_not_null().any() else "surprisal"


def title(readings: Readings) -> str:
    """What was read, through what."""
    source, scope = readings.provenance["sources"], readings.provenance["scope"]
    tokens = readings.readings["token"]
    token = f"{tokens[0].strip()!r} in " if len(source) == 1 else ""
    through = repr(scope["targets"][0]["text"]) if scope["name"] == "extract" else scope["name"]
    return f"{token}{source[0]['text']!r}, read through {through}"


def keep(readings: Readings, save: Path | None, figure: Path | None) -> None:
    """Write what was asked for, and say where."""
    if save is not None:
        with told(save):
            say(f"saved to {readings.save(save)}")
    if figure is None and save is not None and is_map(readings):
        figure = save / "heatmap.png"
    if figure is not None:
        from patchscopes.views.heatmap import heatmap

        grid = readings.grid(metric(readings))
        with told(figure):
            say(f"drew {heatmap(grid, figure, title=title(readings))}")


def show(readings: Readings) -> None:
    """The table on stdout; below it the map, if it is one."""
    console = data()
    console.print(readings)
    if is_map(readings):
        from patchscopes.views.word_map import WordMap

        console.print(WordMap(readings.grid(metric(readings))))


def document(readings: Readings, prompt: str, model: str, scope: str) -> dict[str, Any]:
    """The readings as one JSON document."""
    table = readings.table
    return {
        "prompt": prompt,
        "model": model,
        "scope": scope,
        "readings": readings.readings.to_dicts(),
        "controls": table.filter(table["control"] != "none").to_dicts(),
        "provenance": readings.provenance,
    }
