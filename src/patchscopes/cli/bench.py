"""`patchscopes bench`: this engine beside other ways to the same cells."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchscopes.cli.options import DTYPES, Device, Json, require_device
from patchscopes.cli.terminal import Progress, data, print_json, progress, say
from patchscopes.core.errors import InputError, UnknownName, nearest
from patchscopes.core.files import make_folder, told

if TYPE_CHECKING:
    from patchscopes.bench.report import Figure

# as in patchscopes.bench, which would import torch
PARTS = ("grid", "stops", "prefix", "reads", "memory", "decoding", "runs")
CONTESTANTS = (
    "ours",
    "one_at_a_time",
    "hooks",
    "prefix_cache",
    "generate",
    "nnsight",
    "transformer_lens",
    "interp_engine",
)
MARKS = {True: ("reached", "green"), False: ("not reached", "red"), None: ("", "")}


def bench(
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="gpt2-small, gpt2:12x768 (layers x width), llama:160m, llama:22x2048 (all random), a bundled model, a folder, "
            "or a Hugging Face id.",
        ),
    ] = "gpt2-small",
    tokens: Annotated[str, typer.Option(help="Tokens said by each cell; a grid for each number.")] = "1,20",
    prefix: Annotated[int, typer.Option(min=1, help="Tokens of the target before the patched position.")] = 22,
    vectors: Annotated[int, typer.Option(min=1, help="Source vectors; the grid is these x all target layers.")] = 12,
    repeat: Annotated[int, typer.Option(min=1, help="Repetitions in which all contestants take turns.")] = 5,
    parts: Annotated[
        str | None,
        typer.Option(
            help=f"Of {', '.join(PARTS)}. Default: all; decoding on a GPU only, stops if atlas is here.", show_default=False
        ),
    ] = None,
    contestants: Annotated[str, typer.Option(help=f"Of {', '.join(CONTESTANTS)}; or all.")] = "all",
    alone: Annotated[
        int, typer.Option(min=0, help="Cells that one_at_a_time runs, its time being scaled to the grid; 0: all of them.")
    ] = 24,
    rows: Annotated[int, typer.Option(min=1, help="Rows of the grid of the part decoding.")] = 1000,
    peers_python: Annotated[
        Path | None,
        typer.Option(help="A Python that has the peers. Default: the one of .venv-peers, else this one.", show_default=False),
    ] = None,
    device: Device = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype", help=f"{', '.join(DTYPES)}. Default: float32 for random models and on a CPU.", show_default=False
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of random weights, targets and vectors.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON document to this file.", show_default=False)] = None,
    json: Json = False,
) -> None:
    """Measure this engine beside other ways to the same cells.

    Ratios of wall time, FLOPs and bytes against what is necessary, peak memory; and whether all contestants say the same.
    `make bench-peers` installs the libraries it is compared with.

    \b
    patchscopes bench
    patchscopes bench --model llama:160m --parts grid,memory --out bench.json
    """
    counts = _numbers(tokens)
    asked = _names(parts, PARTS, "part") if parts is not None else None
    names = CONTESTANTS if contestants == "all" else _names(contestants, CONTESTANTS, "contestant")
    if peers_python is not None and not peers_python.exists():
        raise InputError(f"there is no Python at {peers_python}; make bench-peers makes one at .venv-peers/bin/python")
    if device is not None:
        require_device(device)
    if dtype is not None and dtype not in DTYPES:
        raise UnknownName(f"unknown dtype {dtype!r}. {nearest(dtype, DTYPES)}")
    if out is not None:
        make_folder(out.parent)
    import torch
    import transformers

    from patchscopes import bench as benchmark
    from patchscopes import organisms
    from patchscopes.bench.models import is_random

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    is_random(model)  # a size that is none is told before anything is loaded
    if asked is None:
        on = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        asked = [p for p in benchmark.default_parts(on) if p != "stops" or "atlas" in organisms.bundled()]
    settings = benchmark.Settings(counts, prefix, 2, vectors, repeat, alone or None, rows, seed)
    say(f"{model}: {', '.join(asked)}; {repeat} repetitions. A quiet machine gives steadier figures")
    with progress() as bar:
        document = benchmark.bench(
            model,
            settings,
            parts=asked,
            contestants=names,
            device=device,
            dtype=dtype,
            peers_python=peers_python,
            progress=_also_in_words(bar),
        )
    if out is not None:
        _write(document, out)
    if json:
        print_json(document)
    else:
        show(document)


def show(document: dict[str, Any]) -> None:
    """The figures for a terminal, each with its goal and whether it is reached."""
    from rich.table import Table
    from rich.text import Text

    from patchscopes.bench.report import Figure, in_words

    figures = [Figure(**{k: v for k, v in f.items() if k != "reached"}) for f in document["figures"]]
    table = Table(caption_justify="left")
    table.add_column("figure", overflow="fold")
    table.add_column("ratio", justify="right", no_wrap=True)
    table.add_column("goal", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("", overflow="fold", style="dim")
    for figure in figures:
        mark, style = MARKS[figure.reached]
        table.add_row(Text(figure.name), _ratio(figure), figure.goal, Text(mark, style=style), Text(figure.note))
    console = data()
    console.print(table)
    for line in (_model(document["model"]), in_words(document["machine"]), *_agreements(document["contestants"])):
        console.print(Text(line))
    goals = [f.reached for f in figures if f.reached is not None]
    if goals:
        console.print(Text(f"{sum(goals)} of {len(goals)} goals that could be measured are reached."))


def _agreements(contestants: dict[str, Any]) -> list[str]:
    """A line a grid: who says the same, by how much logits differ, and ties."""
    lines = []
    for what, scores in contestants.items():
        compared = {name: s["agreement"] for name, s in scores.items() if s["agreement"] is not None}
        wrong = [name for name, a in compared.items() if not a["ok"]]
        error = max((a["error"] for a in compared.values() if a["error"] is not None), default=0.0)
        ties = [f"{name}: {tie}" for name, a in compared.items() for tie in a["ties"]]
        verdict = f"disagreeing: {', '.join(wrong)}" if wrong else "all say the same"
        some = f"; {len(ties)} ties, such as {ties[0]}" if ties else ""
        lines.append(f"{what}: {verdict}; logits differ by at most {error:.0e} of the largest{some}")
    return lines


def _ratio(figure: Figure) -> str:
    if figure.value is None:
        return ""
    return f"{figure.value:.{3 if figure.value < 2 else 2 if figure.value < 10 else 1}f}"


def _model(m: dict[str, Any]) -> str:
    size = f"{m['parameters'] / 1e6:.1f} million parameters, {m['n_layers']} layers, d_model {m['d_model']}, vocab {m['vocab']}"
    return f"{m['name']}: {m['architecture']}, {size}, {m['dtype']} on {m['device']}"


def _write(document: dict[str, Any], out: Path) -> None:
    import json

    with told(out):
        out.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _numbers(text: str) -> tuple[int, ...]:
    """ "1,20" as numbers, each at least 1."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise InputError(f"--tokens is {text!r}; expected numbers of at least 1 with commas between them, as in 1,20")
    return tuple(dict.fromkeys(map(int, text.split(","))))


def _names(text: str, known: Sequence[str], what: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise UnknownName(f"unknown {what} {name!r}. {nearest(name, known)}")
    return list(dict.fromkeys(names))


def _also_in_words(bar: Progress) -> Progress:
    """The bar, and a line on stderr when a new thing begins, which also shows where there is no bar."""
    begun: set[str] = set()

    def report(done: int, of: int, what: str) -> None:
        if what not in begun:
            begun.add(what)
            say(what)
        bar(done, of, what)

    return report
