"""`patchscopes demo`: the main job on the bundled model, in seconds."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from patchscopes.cli.inspect import metric, title
from patchscopes.cli.options import load_model
from patchscopes.cli.terminal import data, progress
from patchscopes.core.files import make_folder, told

CAPITAL = "The capital of {x} is"
MENTION, ENTITY = "We talked about France until late at night", "France"
NEXT = (
    'patchscopes inspect "My sister wrote a song about Marie Curie" --at Curie --scope "{x} comes from"',
    f'patchscopes inspect "{MENTION}" --at {ENTITY} --scope "{CAPITAL}" --target-layer all --figure map.png',
    "patchscopes check atlas",
)
LEGEND = (
    "Each row is a layer ℓ of the model. nothing, random, others and text are evidence in bits: how much likelier the words are "
    "with this state than with nothing, random vectors or other prompts' states in its place, and than after the source's own "
    "words. The verdict is 'above' where the state beats the first three."
)


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pictures and tables.")] = Path("patchscopes-demo"),
    model: Annotated[str, typer.Option(hidden=True)] = "atlas",
) -> None:
    """Read hidden states of a small model that comes along."""
    started = time.monotonic()
    make_folder(out)
    loaded = load_model(model)
    from rich.text import Text

    from patchscopes.scopes import Source, describe, extract
    from patchscopes.views.heatmap import heatmap
    from patchscopes.views.word_map import WordMap

    console = data()

    def heading(number: int, text: str) -> None:
        console.print(Text(f"\n{number}. {text}\n", style="bold"))

    console.print(
        Text(f"{loaded.name}: {loaded.n_layers} layers, {loaded.d_model} numbers in a hidden state, on {loaded.device}")
    )
    france = Source(loaded, MENTION, ENTITY)
    heading(1, f"{loaded.name} reads {MENTION!r}. Its hidden state at {ENTITY!r}, put into another prompt in x's place:")
    with progress() as report:
        by_layer = extract(CAPITAL)(france, progress=report)
    console.print(by_layer)
    console.print(Text(f"\n{LEGEND}"))
    heading(2, "What do the states at 'Wales' say of Diana, Princess of Wales?")
    with progress() as report:
        wales = describe(stop=(",", "\n"))(Source(loaded, "Diana, Princess of Wales", "Wales"), progress=report)
    console.print(wales)
    heading(3, f"{CAPITAL!r} again: each layer of {ENTITY!r}, written at each layer")
    with progress() as report:
        everywhere = extract(CAPITAL, layer="all")(france, progress=report)
    grid = everywhere.grid(metric(everywhere))
    console.print(WordMap(grid))
    with told(out):
        paths = [heatmap(grid, out / "capital.png", title=title(everywhere))]
        paths += [
            readings.save(out / name) for name, readings in (("capital", by_layer), ("wales", wales), ("capital-map", everywhere))
        ]
    console.print(Text(f"\nDone in {time.monotonic() - started:.0f} s. Written:", style="bold"))
    for path in paths:
        console.print(Text(f"  {path}"), soft_wrap=True)
    console.print(Text("\nThree things to try next:", style="bold"))
    for command in NEXT:
        console.print(Text(f"  {command}"), soft_wrap=True)
