"""The parts of a report that say how its run was made: caveats, failed cells, provenance, prompts, how to make it again, whom to cite."""

from __future__ import annotations

import json
import re
import shlex
from typing import TYPE_CHECKING, Any

import polars as pl

from patchscopes.views.report.markup import Markup, el, join, said, table
from patchscopes.views.report.scrub import scrub

if TYPE_CHECKING:
    from patchscopes.runs.folder import Run

FAILED, PROMPTS, REASONS, SETTINGS, CHARACTERS = 50, 100, 20, 40, 60_000  # of each list, and characters of the experiment
PRIVATE = ("host",)  # of a machine
PAPER = (
    "Asma Ghandeharioun, Avi Caciularu, Adam Pearce, Lucas Dixon, Mor Geva (2024). Patchscopes: A Unifying Framework for Inspecting "
    "Hidden Representations of Language Models. ICML 2024. arXiv:2401.06102"
)
LENS = "nostalgebraist (2020). interpreting GPT: the logit lens. LessWrong"
NCE = "Aaron van den Oord, Yazhe Li, Oriol Vinyals (2018). Representation Learning with Contrastive Predictive Coding. arXiv:1807.03748"


def caveats(run: Run, left_out: tuple[str, ...]) -> Markup:
    """What a reader must know."""
    told = [
        *left_out,
        *(scrub(text) for text in run.caveats),
        "Numbers on this page are rounded to four digits; the run folder has all.",
    ]
    return el("ul", *(el("li", text) for text in told))


def failures(readings: pl.DataFrame, controls: pl.DataFrame) -> Markup:
    """The failed readings with their errors, and why controls are missing."""
    failed = readings.filter(pl.col("status") == "failed")
    parts: list[object] = []
    if failed.is_empty():
        parts.append(el("p", "No reading failed."))
    else:
        parts.append(_reasons(failed, "Why readings failed"))
        names = ["part", "model", "scope", "prompt", "position", "token", "source_layer", "target_layer", "error"]
        headings: list[object] = ["part", "model", "scope", "prompt", "position", "token", "ℓ", "ℓ*", "error"]
        rows = [[said(str(scrub(value))) for value in row] for row in failed.select(names).head(FAILED).iter_rows()]
        first = f"the first {FAILED} of {failed.height:,}" if failed.height > FAILED else f"{failed.height:,}"
        parts.append(table(headings, rows, caption=f"Failed readings: {first}", numbers=(3, 4, 6, 7)))
    missing = controls.filter(pl.col("status").is_in(["failed", "skipped"]))
    if not missing.is_empty():
        parts.append(_reasons(missing, "Why controls are missing"))
    return join(*parts)


def _reasons(rows: pl.DataFrame, caption: str) -> Markup:
    found = rows.group_by("status", "error").len().sort("len", "error", descending=[True, False])
    shown = [[status, said(scrub(error)), f"{n:,}"] for status, error, n in found.head(REASONS).iter_rows()]
    more = f" (the {REASONS} most frequent of {found.height:,})" if found.height > REASONS else ""
    return table(["what became of them", "reason", "cells"], shown, caption=caption + more, numbers=(2,))


def provenance(run: Run) -> Markup:
    """Models, weights, versions, machines, settings, seeds: for each set of conditions that rows hang on."""
    parts: list[object] = []
    for number, entry in enumerate(run.provenance):
        conditions = entry.get("conditions", {})
        models = {
            name: {**about, **entry.get("models", {}).get(name, {})} for name, about in conditions.get("models", {}).items()
        }
        machines = [_machine(one) for one in entry.get("machines", [])]
        about = {
            "models": {name: {k: v for k, v in one.items() if k not in ("versions", "model")} for name, one in models.items()},
            "device": conditions.get("device"),
            "versions": conditions.get("versions"),
            "machines": machines,
        }
        if len(run.provenance) > 1:
            parts.append(el("h4", f"Rows of provenance {number}"))
        parts.append(_tree(scrub(about)))
    looks = run.record["looks"]
    for look in looks[:SETTINGS]:
        named = " · ".join(scrub([look["part"], look["model"], look["scope"]]))
        settings = {k: v for k, v in look.get("provenance", {}).items() if k != "controls"}
        told = {**settings, "controls": _controls(look.get("provenance", {}).get("controls"))}
        parts.append(el("details", el("summary", f"Settings of {named}"), _tree(scrub(told))))
    if len(looks) > SETTINGS:
        parts.append(el("p", f"The settings of {len(looks) - SETTINGS:,} more views stand in run.json, under looks."))
    return join(*parts)


def _machine(about: dict[str, Any]) -> dict[str, Any]:
    """Without the host's name, and without the name of its kernel; the command as it was typed."""
    own = {key: value for key, value in about.items() if key not in PRIVATE}
    if command := own.get("command"):
        own["command"] = scrub(shlex.join(scrub(command)))
    if isinstance(system := own.get("system"), str):
        kind = re.search(r"x86_64|aarch64|arm64|AMD64|ppc64le|riscv64", system)
        own["system"] = " ".join([system.partition("-")[0], *([kind[0]] if kind else [])])
    return own


def _controls(about: dict[str, Any] | None) -> Any:
    """The pool of other sources by its name; the numbers of others once each."""
    if about is None:
        return "not run"
    others = sorted(set(about.get("others_per_reading") or []))
    return {**{k: v for k, v in about.items() if k != "pool_prompts"}, "others_per_reading": others}


def _tree(value: Any) -> Markup:
    """A document as nested lists of terms."""
    if isinstance(value, dict):
        some = [(key, item) for key, item in value.items() if item is not None and item != [] and item != {}]
        return el("dl", *(join(el("dt", str(key).replace("_", " ")), el("dd", _tree(item))) for key, item in some), cls="tree")
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return join(*(_tree(item) for item in value))
    if isinstance(value, list):
        return el("span", said(", ".join(map(str, value))))
    return said(str(value).lower() if isinstance(value, bool) else str(value))


def prompts(run: Run) -> Markup:
    """The prompts with their token ids, collapsed."""
    some = run.prompts.sort("part", "model", "prompt", maintain_order=True)
    labels = [name for name in some.columns if name not in ("part", "model", "prompt", "prompt_text", "ids")]
    rows = []
    for row in some.head(PROMPTS).iter_rows(named=True):
        ids = "" if row["ids"] is None else " ".join(map(str, row["ids"][:400])) + (" …" if len(row["ids"]) > 400 else "")
        told = ", ".join(f"{name}: {row[name]}" for name in labels if row[name] is not None)
        rows.append([scrub(row["part"]), row["prompt"], said(row["prompt_text"][:2000]), said(told), el("code", ids)])
    first = f"the first {PROMPTS} of {some.height:,}" if some.height > PROMPTS else f"{some.height:,}"
    whole = table(["part", "number", "prompt", "labels", "token ids"], rows, caption=f"Prompts: {first}", numbers=(1,))
    return el("details", el("summary", f"Prompts and token ids: {first}"), whole)


def again(run: Run) -> Markup:
    """How to make the run again, and the experiment itself."""
    if run.spec is None:  # saved by an older version
        return el("p", "Readings that were saved without their experiment cannot be made again by a command.")
    spec = scrub(run.spec)
    text = json.dumps(spec, ensure_ascii=False, indent=1)
    cut = len(text) > CHARACTERS
    shown = text[:CHARACTERS] + ("\n… (cut here; the whole stands in run.json under spec)" if cut else "")
    return join(
        el("p", "With the run folder at hand, compute a sample of it anew and compare; or run the same experiment elsewhere:"),
        el("pre", f"patchscopes reproduce {scrub(run.path.name)}\npatchscopes sweep experiment.json"),
        el(
            "p",
            "Hash of the experiment: ",
            el("code", run.record.get("digest", "")),
            ". Paths are shortened to names on this page.",
        ),
        el("details", el("summary", "The experiment, with all its settings (experiment.json)"), el("pre", shown)),
    )


def cite(run: Run) -> Markup:
    """Whose methods these are, and under which licences."""
    lens = any(
        look["scope"] == "logit-lens" or look.get("provenance", {}).get("scope", {}).get("name") == "logit-lens"
        for look in run.record["looks"]
    )
    evidence = any(look.get("controls") for look in run.record["looks"])
    version = run.provenance[0].get("conditions", {}).get("versions", {}).get("patchscopes", "") if run.provenance else ""
    works = [
        join("Patchscopes: ", PAPER),
        *([join("Logit lens: ", LENS)] if lens else []),
        *([join("Evidence over other sources is an estimate of the kind of InfoNCE: ", NCE)] if evidence else []),
        join(f"Software: patchscopes {version} (Apache-2.0), run {run.id}, {run.record.get('digest', '')}"),
    ]
    return join(
        el("ul", *(el("li", work) for work in works)),
        el(
            "p",
            "Models and prompts have licences of their own; name the models with their revisions or the hashes of their weights above.",
        ),
    )
