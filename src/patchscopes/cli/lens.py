"""`patchscopes lens`: train a tuned lens or a soft prompt, and see whether a lens belongs to a model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchscopes.cli.options import Device, Dtype, Json, ModelName, load_model
from patchscopes.cli.terminal import data, duration, print_json, progress, say
from patchscopes.core.files import make_folder

if TYPE_CHECKING:
    from patchscopes.lenses import LensReport, TrainingProgress

EVERY = 30.0  # seconds between lines about training

app = typer.Typer(name="lens", help="Train tuned lenses and soft prompts, and compare lenses with models.", no_args_is_help=True)
Texts = Annotated[
    Path, typer.Option(help="Texts: a line each (.txt), or a column of JSONL, CSV, TSV or Parquet.", show_default=False)
]
Column = Annotated[str, typer.Option(help="The column that holds the texts.")]


@app.command()
def train(
    texts: Texts,
    out: Annotated[
        Path, typer.Option(help="Folder for the lens; training that was stopped goes on from here.", show_default=False)
    ],
    model: ModelName = "atlas",
    column: Column = "text",
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 250,
    tokens_per_step: Annotated[int, typer.Option(help="Tokens of a step; the paper takes 262144.")] = 2**14,
    optimizer: Annotated[str, typer.Option(help="sgd (as in the paper) or adam.")] = "sgd",
    rate: Annotated[float, typer.Option(help="Times the optimizer's own learning rate.")] = 1.0,
    held_out: Annotated[float, typer.Option(help="Share of the texts that the report is about.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Of the order of the texts, and of which are held out.")] = 0,
    checkpoint: Annotated[float, typer.Option(help="Minutes between checkpoints.")] = 2.0,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Train a tuned lens for a model on texts. Stop it with Ctrl-C; the same command goes on."""
    from patchscopes.lenses.training import Recipe, train_tuned_lens
    from patchscopes.lenses.windows import read_texts

    recipe = Recipe(steps, tokens_per_step, optimizer, rate, held_out=held_out, seed=seed)
    some = read_texts(texts, column)
    make_folder(out)
    loaded = load_model(model, device, dtype)
    with _resumable(out):
        lens = train_tuned_lens(
            loaded, some, out, recipe, checkpoint_seconds=60 * checkpoint, progress=_teller("KL, mean over layers")
        )
    found = lens.provenance["report"]
    if json:
        print_json({"lens": str(out), **found})
    else:
        _show(found["layers"])


@app.command("soft-prompt")
def soft_prompt(
    texts: Texts,
    out: Annotated[
        Path, typer.Option(help="Folder for the soft prompt; training that was stopped goes on from here.", show_default=False)
    ],
    layer: Annotated[int, typer.Option(help="Of the states that it reads; they are written at the same.", show_default=False)],
    model: ModelName = "atlas",
    column: Column = "text",
    slots: Annotated[int, typer.Option(help="Embeddings that are learned.")] = 10,
    ahead: Annotated[int, typer.Option(help="Tokens that it is to say.")] = 3,
    per_text: Annotated[int, typer.Option(help="Positions drawn of each text.")] = 4,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 500,
    batch: Annotated[int, typer.Option(help="States of a step.")] = 8,
    rate: Annotated[
        float, typer.Option(help="AdamW's learning rate; small models with small embeddings want a larger one.")
    ] = 5e-4,
    held_out: Annotated[float, typer.Option(help="Share of the texts that the report is about.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    checkpoint: Annotated[float, typer.Option(help="Minutes between checkpoints.")] = 2.0,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Train the soft prompt of a future lens on texts. Stop it with Ctrl-C; the same command goes on."""
    from patchscopes.lenses import PromptRecipe, read_texts, train_soft_prompt

    recipe = PromptRecipe(slots, ahead, per_text, steps, batch, rate, held_out=held_out, seed=seed)
    some = read_texts(texts, column)
    make_folder(out)
    loaded = load_model(model, device, dtype)
    with _resumable(out):
        found = train_soft_prompt(loaded, some, layer, out, recipe, checkpoint_seconds=60 * checkpoint, progress=_teller("KL"))
    report = found.provenance["report"]
    if json:
        print_json({"soft_prompt": str(out), "layer": found.layer, **report})
        return
    from rich.table import Table

    table = Table(title=f"Precision@1 on {report['n']:,} states at layer {found.layer}, held out", title_justify="left")
    table.add_column("")
    for k in range(1, found.ahead + 1):
        table.add_column(f"{k} ahead", justify="right")
    for way, values in report["precision"].items():
        table.add_row(way, *(f"{value:.1%}" for value in values))
    data().print(table)


@app.command()
def check(
    lens: Annotated[
        Path,
        typer.Argument(
            metavar="LENS", help="A folder or file of a tuned lens, or a file of a Jacobian lens (.pt).", show_default=False
        ),
    ],
    model: ModelName = "atlas",
    texts: Annotated[
        Path | None, typer.Option(help="Texts to compare on. Default: what the model says itself.", show_default=False)
    ] = None,
    column: Column = "text",
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Does LENS, one of ours or a public one, belong to a model? Exit code 6 if it does not."""
    from patchscopes.lenses import load_jacobian_lens, load_tuned_lens, measure, read_texts, windows
    from patchscopes.lenses.windows import own_windows

    loaded = load_model(model, device, dtype)
    is_jacobian = lens.is_file() and (lens.suffix in (".pt", ".pth") or _method(lens) == "Jacobian lens")
    found = (load_jacobian_lens if is_jacobian else load_tuned_lens)(lens, loaded, check=False)
    some = None if texts is None else read_texts(texts, column)
    found.check(loaded, some)
    below = sorted(layer for layer, _ in found.map.maps if layer < loaded.n_layers)
    with progress() as report:
        told = measure(loaded, found.map, own_windows(loaded) if some is None else windows(loaded, some), below, progress=report)
    if json:
        print_json({"lens": str(lens), "model": model, **_document(told)})
    else:
        _show(_document(told)["layers"])


def _teller(what: str) -> Callable[[TrainingProgress], None]:
    """Says how training goes, now and then."""
    told = -EVERY

    def report(p: TrainingProgress) -> None:
        nonlocal told
        if time.monotonic() - told >= EVERY or p.step == p.steps:
            told = time.monotonic()
            speed = f"{p.tokens_per_second:.0f} tokens a second"
            say(f"step {p.step} of {p.steps}, {p.kl:.3f} bits ({what}), {speed}, {duration(p.eta)} left")

    return report


@contextmanager
def _resumable(out: Path) -> Iterator[None]:
    """Says, when it is stopped, whether there is something to go on from."""
    from patchscopes.lenses.descent import CHECKPOINT

    try:
        yield
    except (KeyboardInterrupt, SystemExit):  # Ctrl-C, SIGTERM
        kept = (out / CHECKPOINT).exists()
        say(f"{out} keeps the last finished step; the same command goes on from it" if kept else "there was no finished step yet")
        raise


def _method(path: Path) -> str:
    from patchscopes.maps import provenance_of

    made = provenance_of(path)
    return "Jacobian lens" if made.get("format") == "jacobian-lens" else str(made.get("method", ""))


def _document(report: LensReport) -> dict[str, Any]:
    return {"model_ce": report.model_ce, "n": report.n, "layers": report.table.to_dicts()}


def _show(layers: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table()
    for heading in ("layer", "KL, bits", "logit lens", "CE, bits", "logit lens", "top 1", "logit lens"):
        table.add_column(heading, justify="right")
    for one in layers:
        bits = (f"{one[key]:.2f}" for key in ("kl", "logit_lens_kl", "ce", "logit_lens_ce"))
        table.add_row(str(one["layer"]), *bits, f"{one['top1']:.1%}", f"{one['logit_lens_top1']:.1%}")
    data().print(table)
