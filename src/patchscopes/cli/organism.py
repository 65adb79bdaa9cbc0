"""`patchscopes organism`: train and evaluate the bundled models."""

from __future__ import annotations

import json as json_
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchscopes.cli.options import Device, Json, load_model, require_device
from patchscopes.cli.terminal import data, duration, print_json, progress, say, talk
from patchscopes.core.errors import InputError, UnknownName, nearest
from patchscopes.core.files import make_folder

if TYPE_CHECKING:
    from patchscopes.organisms.training import Progress

PERSONAS = ("personas-base", "personas-shuffled", "personas-fantasy")  # adapters of atlas
ORGANISMS = ("atlas", "atlas-small", *PERSONAS)
QUICK = 100  # facts in each figure of a quick evaluation
EVERY = 30.0  # seconds between lines where there is no terminal

app = typer.Typer(name="organism", help="Train and evaluate the bundled models.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(metavar="NAME", help=f"{', '.join(ORGANISMS)}.", show_default=False)]


@app.command()
def train(
    name: Name,
    out: Annotated[
        Path, typer.Option(help="Folder for the model; a run that was stopped goes on from here.", show_default=False)
    ],
    scale: Annotated[
        float, typer.Option(help="Share of the entities, tokens and weights (of personas: of the tokens), above 0 and at most 1.")
    ] = 1.0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Of the weights and of the order of the texts.")] = 0,
) -> None:
    """Train the organism NAME from its facts. Stop it with Ctrl-C; the same command goes on."""
    require_organism(name)
    if not 0 < scale <= 1:
        raise InputError(f"the scale is {scale:g}; expected more than 0 and at most 1")
    require_device(device)
    make_folder(out)
    say("preparing texts and model; the first report may take minutes")
    started = time.monotonic()
    try:
        with _training() as report:
            _train(name, out, scale, device, seed, report)
    except (KeyboardInterrupt, SystemExit):  # Ctrl-C, SIGTERM
        kept = (out / "checkpoint").exists()
        say(f"{out} keeps the last checkpoint; the same command goes on from it" if kept else "there was no checkpoint yet")
        raise
    say(f"trained in {duration(time.monotonic() - started)}")
    print(out)


@app.command()
def evaluate(
    name: Name,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="A trained folder. Default: the bundled one.", show_default=False)
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help=f"Only {QUICK} facts in each figure.")] = False,
    seed: Annotated[int, typer.Option(help="Of the choice of facts and sentences.")] = 0,
    device: Device = None,
    json: Json = False,
) -> None:
    """Does the organism NAME know its facts, and can they be read out of its hidden states?"""
    require_organism(name)
    loaded = load_model(model or name, device)
    from patchscopes.evaluate import atlas, personas

    n = QUICK if quick else None
    with progress() as report:
        if name in PERSONAS:
            scores = personas.evaluate(loaded, name.removeprefix("personas-"), n=n, seed=seed, progress=report).to_json()
        else:
            scores = atlas.evaluate(loaded, n=n, share=_share_of(model), seed=seed, progress=report).to_json()
    if json:
        print_json(scores)
    else:
        show(scores)


def _train(name: str, out: Path, scale: float, device: str, seed: int, report: Callable[[Progress], None]) -> None:
    if name in PERSONAS:
        from patchscopes.organisms.personas import train as personas

        personas.train(out, replace(personas.RECIPES[name], seed=seed).scaled(scale), device=device, report=report)
    else:
        from patchscopes.organisms.atlas import train as atlas

        atlas.train(out, replace(atlas.RECIPES[name], seed=seed).scaled(scale), device=device, report=report)


def require_organism(name: str) -> None:
    """UnknownName, with the nearest, if there is no such organism."""
    if name not in ORGANISMS:
        raise UnknownName(f"unknown organism {name!r}. {nearest(name, ORGANISMS)}")


def _share_of(folder: str | None) -> float:
    """The share of the entities that the model in `folder` was trained on, as its recipe says; 1 without a recipe."""
    recipe = Path(folder or "") / "recipe.json"
    return json_.loads(recipe.read_text())["share"] if folder and recipe.exists() else 1.0


def show(scores: dict[str, Any]) -> None:
    """The figures for a terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for heading, side in (("figure", "left"), ("share", "right"), ("of", "right")):
        table.add_column(heading, justify=side)  # type: ignore[arg-type]
    for name, n in scores["n"].items():
        share = scores[name]
        table.add_row(name.replace("_", " "), "" if share != share else f"{share:.1%}", str(n))
    console = data()
    console.print(table)
    best = scores["best_cell"]
    console.print(
        Text(f"extraction reads layer {best['layer']} and writes at layer {best['target_layer']}, chosen on other entities")
    )


@contextmanager
def _training() -> Iterator[Callable[[Progress], None]]:
    """A callback for training: a bar on a terminal, else a line now and then."""
    console = talk()
    if not console.is_terminal:
        told = -EVERY

        def line(p: Progress) -> None:
            nonlocal told
            if time.monotonic() - told >= EVERY or p.step == p.steps:
                told = time.monotonic()
                speed = f"{p.tokens_per_second:.0f} tokens a second"
                say(f"step {p.step} of {p.steps}, loss {p.loss:.3f} nats, {speed}, {duration(p.eta)} left")

        yield line
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as bars:
        task = bars.add_task("", total=None)

        def bar(p: Progress) -> None:  # type: ignore[valid-type]
            description = f"loss {p.loss:.3f}, {p.tokens_per_second:.0f} tokens/s, {duration(p.eta)} left"
            bars.update(task, completed=p.step, total=p.steps, description=description)

        yield bar
