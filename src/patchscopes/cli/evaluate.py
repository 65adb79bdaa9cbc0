"""`patchscopes evaluate`: the experiments of the papers, each with its controls, its statistics and its page."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchscopes.cli.live import watching
from patchscopes.cli.options import Device, Dtype, Json, ModelName
from patchscopes.cli.sweep import ExecutorName, RunsFolder, Workers
from patchscopes.cli.terminal import amount, data, duration, print_json, say
from patchscopes.core.errors import InputError, UnknownName, nearest
from patchscopes.core.files import make_folder, write_json

if TYPE_CHECKING:
    from patchscopes.evaluate.frame import Asked, Result

# name: (module, what it asks). A module has TITLE, PAPER, Settings, plan and evaluate (see `evaluate.frame`).
EXPERIMENTS = {
    "next-token": ("patchscopes.evaluate.next_token", "is the next token readable, layer by layer?"),
    "lens-pass": ("patchscopes.evaluate.lens_pass", "does a lens name what a model has in mind, at some layer?"),
    "attribute": ("patchscopes.evaluate.attribute", "can attributes of an entity be extracted, beside a probe?"),
    "entity": ("patchscopes.evaluate.entity", "do descriptions of an entity state true facts?"),
    "superscopes": ("patchscopes.evaluate.superscopes", "do amplified states say more that is true, and which α does?"),
    "detokenisation": (
        "patchscopes.evaluate.detokenisation",
        "at which layer does a word's last token stand for the whole word?",
    ),
    "token-erasure": (
        "patchscopes.evaluate.token_erasure",
        "do the last tokens of words lose the tokens that they were made of?",
    ),
    "multihop": ("patchscopes.evaluate.multihop", "do questions of two hops come out right one hop after the other?"),
    "hop-stages": ("patchscopes.evaluate.hop_stages", "at which layers is a question of two hops worked out?"),
    "back-patching": (
        "patchscopes.evaluate.back_patching",
        "do late states, written back earlier, correct questions of two hops?",
    ),
    "privileged": (
        "patchscopes.evaluate.privileged",
        "do readings tell anything that the text and the speaker's own knowledge do not?",
    ),
    "cross-model": (
        "patchscopes.evaluate.cross_model",
        "can a model say what another model's states hold, through an affine map?",
    ),
    "evidence": (
        "patchscopes.evaluate.evidence_study",
        "is the evidence of readings calibrated, and does it tell true readings from false?",
    ),
}


def evaluate(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="; ".join(f"{k}: {what}" for k, (_, what) in EXPERIMENTS.items()), show_default=False
        ),
    ],
    model: ModelName = "atlas",
    data_path: Annotated[
        Path | None,
        typer.Option(
            "--data",
            help="A file or folder in a public format (attribute TSVs, LRE, PopQA, PersonaQA, two-hop CSVs, lens items, words, texts). "
            "Default: what the bundled model knows.",
            show_default=False,
        ),
    ] = None,
    n: Annotated[
        int | None, typer.Option("--n", min=1, help="Items of each relation, or in all where there are none.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="A setting other than the default; may be given several times.", show_default=False
        ),
    ] = None,
    runs: RunsFolder = Path("runs"),
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Folder for page, figures and scores. Default: in the run's folder.", show_default=False
        ),
    ] = None,
    executor: ExecutorName = "here",
    workers: Workers = None,
    device: Device = None,
    dtype: Dtype = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few items: a look at whether it works.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would take; load no weights, compute nothing.")] = False,
    hardware: Annotated[
        str | None, typer.Option(help="With --dry-run: the card to reckon with, such as a100.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """Run the experiment NAME of a paper: as a recorded run, with its controls and intervals, as figures and as one HTML page.

    \b
    patchscopes evaluate attribute
    patchscopes evaluate attribute --model org/model --data patchscopes_tsv --dry-run --hardware a100
    Stopped, the same command goes on; asked again, it is instant.
    """
    if name not in EXPERIMENTS:
        raise UnknownName(f"unknown experiment {name!r}. {nearest(name, EXPERIMENTS)}")
    if hardware is not None and not dry_run:
        raise InputError("--hardware is for --dry-run; expected both, or none")
    module = importlib.import_module(EXPERIMENTS[name][0])
    from patchscopes.evaluate.frame import Asked, Unfinished, chosen_settings
    from patchscopes.experiment.documents import model_name
    from patchscopes.runs import Stop
    from patchscopes.runs.executors import executor_from

    settings = chosen_settings(module.Settings, _pairs(setting or []))
    named = {"name": model_name(model), "device": device if executor == "here" else None, "dtype": dtype}
    stop = Stop()
    with watching(quiet=json) as listener:
        asked = Asked(
            model={key: value for key, value in named.items() if value is not None},
            data=data_path,
            n=n,
            seed=seed,
            quick=quick,
            runs=runs,
            executor=executor_from(executor, workers=workers, device=device if executor != "here" else None),
            listeners=[listener],
            stop=stop,
        )
        if dry_run:
            _dry(module, asked, settings, hardware, workers or 1, json)
            return
        try:
            result: Result = module.evaluate(asked, settings)
        except Unfinished as e:
            say(str(e))
            raise typer.Exit(e.exit_code) from None
    folder = _save(result, out)
    failed = sum(run.counts["failed"] for run in result.runs)
    if json:
        print_json({**result.to_json(), "page": str(folder / "page.html")})
    else:
        _show(result)
        print(folder / "page.html")
    if failed:
        say(f"{failed:,} cells failed; try them again with: patchscopes retry RUN --failed")
        raise typer.Exit(3)


def _pairs(given: list[str]) -> dict[str, str]:
    found = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise InputError(f"--set {text!r} is no setting; expected KEY=VALUE, such as tokens=10")
        found[key] = value
    return found


def _dry(module: Any, asked: Asked, settings: Any, hardware: str | None, workers: int, json: bool) -> None:
    from patchscopes.runs.estimate import estimate

    found = [(one.name, estimate(one, probe=False, hardware=hardware, workers=workers)) for one in module.plan(asked, settings)]
    if json:
        print_json({"plans": [{"name": name, **one.to_json()} for name, one in found]})
        return
    from rich.table import Table

    for name, one in found:
        table = Table(show_header=False, box=None, title=name, title_justify="left")
        table.add_column(style="dim")
        table.add_column()
        for key, value in one.lines(amount, duration):
            table.add_row(key, value)
        data().print(table)
    say("nothing was recorded; what hangs on a chosen cell is reckoned as if every item were scored")


def _save(result: Result, out: Path | None) -> Path:
    from patchscopes.core.plain import plain
    from patchscopes.views.evaluation import save_figures, write

    folder = make_folder(out if out is not None else result.runs[-1].path / "evaluation")
    write_json(folder / "scores.json", plain(result.to_json()))
    save_figures(result.figures, folder)
    write(result, folder / "page.html")
    return folder


def _show(result: Result) -> None:
    from rich.table import Table
    from rich.text import Text

    from patchscopes.evaluate.statistics import Estimate
    from patchscopes.views.evaluation.page import value_text

    table = Table(title=result.title, title_justify="left")
    for heading, side in (("figure", "left"), ("value (95 % interval)", "right"), ("entities", "right")):
        table.add_column(heading, justify=side)  # type: ignore[arg-type]
    for name, value in result.headline.items():
        table.add_row(Text(name), Text(value_text(value)), f"{value.clusters:,}" if isinstance(value, Estimate) else "")
    data().print(table)
    for claim in result.claims:
        data().print(Text(f"* {claim}"))
    for caveat in result.caveats:
        say(f"note: {caveat}")
