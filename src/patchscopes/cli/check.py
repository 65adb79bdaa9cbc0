"""`patchscopes check`: what the self-check found on a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchscopes.cli.options import Device, Dtype, Json, load_model
from patchscopes.cli.terminal import data, print_json

if TYPE_CHECKING:
    from patchscopes.model import Model

ROUTES = {
    "stairs": "one pass that each row joins at its own layer, on a shared prefix",
    "whole": "one pass that each row joins at its own layer, without a prefix",
    "hooks": "a full pass for every row: exact, and slow",
}


def check(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A bundled model, a folder, or a Hugging Face id.", show_default=False)
    ],
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Measure what works on MODEL, and why the rest does not.

    Its parts, its sites, and its abilities, each compared on a short random prompt with full passes.
    """
    report = describe(load_model(model, device, dtype))
    if json:
        print_json(report)
    else:
        show(report)


def describe(model: Model) -> dict[str, Any]:
    """What is known of a loaded model."""
    from patchscopes.engine.check import MEANING

    return {
        "model": model.name,
        "architecture": type(model.hf).__name__,
        "n_layers": model.n_layers,
        "d_model": model.d_model,
        "vocab": model.vocab,
        "context": model.context,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "parts": model.engine.anatomy.parts(),
        "sites": sites(model),
        "abilities": {
            name: {"ok": ability.ok, "meaning": MEANING[name], "error": ability.error, "reason": ability.reason}
            for name, ability in model.capabilities.abilities.items()
        },
        "tolerance": model.capabilities.tolerance,
        "route": model.capabilities.route,
        "readout_route": model.capabilities.readout_route,
    }


def sites(model: Model) -> list[str]:
    """All sites that can be read and written."""
    writers = [len(some) for some in model.engine.anatomy.writers]
    found = [f"resid.{layer}" for layer in range(model.n_layers + 1)]
    found += [f"attn_out.{b}" for b, count in enumerate(writers) if count >= 1]
    return found + [f"mlp_out.{b}" for b, count in enumerate(writers) if count >= 2]


def _in_digits(error: float) -> str:
    """Of the largest logit; nothing where the attempt raised (NaN)."""
    return "" if error != error else f"{error:.0e}" if error else "0"


def _in_short(sites: list[str]) -> str:
    """ "resid.0 to resid.8, …"; gaps are kept."""
    runs: list[list[tuple[str, int]]] = []
    for site in sites:
        name, index = site.rsplit(".", 1)
        if runs and runs[-1][-1] == (name, int(index) - 1):
            runs[-1].append((name, int(index)))
        else:
            runs.append([(name, int(index))])
    return ", ".join(f"{r[0][0]}.{r[0][1]}" + (f" to {r[-1][1]}" if len(r) > 1 else "") for r in runs)


def show(report: dict[str, Any]) -> None:
    """The report for a terminal."""
    from rich.table import Table
    from rich.text import Text

    facts = Table.grid(padding=(0, 2))
    context = f"{report['context']} tokens" if report["context"] else "no limit named"
    size = f"{report['n_layers']} layers, d_model {report['d_model']}, vocab {report['vocab']}, context {context}"
    lacking = [name for name, ability in report["abilities"].items() if not ability["ok"]]
    for name, value in (
        ("model", report["model"]),
        ("architecture", report["architecture"]),
        ("size", size),
        ("runs in", f"{report['dtype']} on {report['device']}"),
        *report["parts"].items(),
        ("sites", _in_short(report["sites"])),
        ("route", f"{report['route']}: {ROUTES[report['route']]}"),
        ("next-token route", f"{report['readout_route']}: {ROUTES[report['readout_route']]}"),
    ):
        facts.add_row(Text(name, style="bold"), Text(str(value)))
    abilities = Table(caption_justify="left")
    for heading in ("ability", "", "off by", "meaning, and why not"):
        abilities.add_column(
            heading, no_wrap=heading != "meaning, and why not", justify="right" if heading == "off by" else "left"
        )
    for name, ability in report["abilities"].items():
        style = "" if ability["ok"] else "yellow"
        error = "" if name == "hooks_seen" else _in_digits(ability["error"])  # there a difference is what is wanted
        why = ability["meaning"] + ("" if ability["ok"] else f"\nnot here: {ability['reason']}")
        abilities.add_row(*(Text(t, style=style) for t in (name, "ok" if ability["ok"] else "no", error, why)))
    console = data()
    console.print(facts)
    console.print(abilities)
    total = len(report["abilities"])
    console.print(
        Text(
            "All abilities are there."
            if not lacking
            else f"{total - len(lacking)} of {total} abilities; without: {', '.join(lacking)}."
        )
    )
