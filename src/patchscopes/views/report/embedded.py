"""The readings that a report carries: columns as JSON, gzip, base64; decoded by the page itself.

Numbers are rounded to four digits; NaN and infinity stay what they are (as texts), what is missing is null. If everything is too big,
the first prompts of every view are carried with all that belongs to them; what that leaves out is told.
"""

from __future__ import annotations

import base64
import gzip
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import polars as pl

from patchscopes.core.names import CONTROLS, USUAL_CONTROLS
from patchscopes.scopes.readings import UNITS
from patchscopes.views.by_layer import PLACE
from patchscopes.views.report.markup import shown
from patchscopes.views.report.scrub import scrub

if TYPE_CHECKING:
    from patchscopes.runs.folder import Run

KINDS = (*USUAL_CONTROLS, *(name for name in CONTROLS if name not in USUAL_CONTROLS))
METRICS = (
    "bits_over_others",
    "bits_over_nothing",
    "bits_over_random",
    "bits_over_text",
    "surprisal",
    "logprob",
    "norm_ratio",
    "p_value",
)
NAMES = {
    "bits_over_others": "evidence over others",
    "bits_over_nothing": "evidence over nothing",
    "bits_over_random": "evidence over random",
    "bits_over_text": "evidence over text",
    "surprisal": "surprisal",
    "logprob": "log-probability",
    "norm_ratio": "norm ratio",
    "p_value": "p-value",
}
DIGITS = 4
MOST = 300_000  # readings that a page can hold
SHORT = 40  # characters of a text where there is little room
STATUS = ("ok", "failed", "skipped", "waiting")
LEVELS = (  # what is left out of every reading, and characters of a text, where the first prompt of each view would not fit
    ("", None),
    ("What the controls said is left out here; it is in the run folder (shards/, column control).", None),
    (f"Texts are cut to {SHORT} characters, and what the controls said is left out here; both are in the run folder.", SHORT),
)


@dataclass(frozen=True)
class Embedded:
    """payload: base64. left_out: what a reader must know of it."""

    payload: str
    left_out: tuple[str, ...]


class Strings:
    """Every text once."""

    def __init__(self, longest: int | None):
        self.index: dict[str, int] = {}
        self.longest = longest

    def of(self, texts: list[str | None]) -> list[int | None]:
        """The numbers of texts."""
        return [None if text is None else self.index.setdefault(self._cut(text), len(self.index)) for text in texts]

    def _cut(self, text: str) -> str:
        return text if self.longest is None or len(text) <= self.longest else f"{text[: self.longest - 1]}…"


def embed(run: Run, readings: pl.DataFrame, controls: pl.DataFrame, room: int) -> Embedded:
    """As much of `readings` and their `controls` (see `planned_rows`) as `room` characters hold."""
    readings = readings.with_columns(pl.col("prompt").rank("dense").over("look").alias("rank"))
    prompts = int(readings["rank"].max() or 0)  # type: ignore[arg-type]
    for note, longest in LEVELS:
        n = _at_most(readings, prompts)
        while n >= 1:
            some = readings.filter(pl.col("rank") <= n)
            payload = _packed(run, some, controls if not note else None, longest)
            if len(payload) <= room:
                left = (
                    [f"Cell by cell this page shows the first {n:,} of {prompts:,} prompts of each view."] if n < prompts else []
                )
                return Embedded(payload, (*left, *([note] if note else ())))
            n = min(n - 1, int(n * 0.97 * room / len(payload)))
    some = readings.filter(pl.col("rank") == 1).head(MOST)
    while True:
        payload = _packed(run, some, None, SHORT)
        if len(payload) <= room or some.is_empty():
            left = f"Cell by cell this page shows the first {some.height:,} of {readings.height:,} readings."
            return Embedded(payload, (left, LEVELS[-1][0]))
        some = some.head(int(some.height * 0.97 * room / len(payload)))


def _at_most(readings: pl.DataFrame, prompts: int) -> int:
    """How many prompts of each view have `MOST` readings together."""
    if readings.height <= MOST:
        return prompts
    sizes = readings.group_by("rank").len().sort("rank").select(pl.col("len").cum_sum())["len"]
    return int((sizes <= MOST).sum())


def _packed(run: Run, readings: pl.DataFrame, controls: pl.DataFrame | None, longest: int | None) -> str:
    strings = Strings(longest)
    looks = [_look(run, number, some, controls, strings) for (number,), some in readings.group_by("look", maintain_order=True)]
    metrics = [{"name": m, "label": NAMES[m], "units": UNITS[m], "signed": m.startswith("bits_over_")} for m in METRICS]
    document = {"metrics": metrics, "status": STATUS, "kinds": KINDS, "looks": looks, "strings": list(strings.index)}
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    content = gzip.compress(text.encode("utf-8", "replace"), compresslevel=6, mtime=0)
    return base64.b64encode(content).decode()


def _look(run: Run, number: Any, readings: pl.DataFrame, controls: pl.DataFrame | None, strings: Strings) -> dict[str, Any]:
    about = run.record["looks"][number]
    columns: dict[str, list[Any]] = {
        name: readings[name].to_list() for name in ("prompt", "position", "source_layer", "target", "target_layer", "draw")
    }
    columns |= {name: strings.of(readings[name].to_list()) for name in ("token", "map", "text", "next_token", "verdict")}
    columns["error"] = strings.of([scrub(text) for text in readings["error"].to_list()])
    columns["status"] = _codes(readings["status"])
    columns |= {name: numbers(readings[name]) for name in METRICS}
    said = {} if controls is None else _controls(readings, controls.filter(pl.col("look") == number), strings)
    targets = about.get("provenance", {}).get("scope", {}).get("targets", [])
    return {
        **scrub({key: about[key] for key in ("part", "model", "scope")}),
        "targets": [shown(target["text"]) if target["text"] != "x" else "" for target in targets],
        "prompts": _prompts(run, about, readings, strings),
        "columns": columns,
        "controls": said,
    }


def _prompts(run: Run, about: dict[str, Any], readings: pl.DataFrame, strings: Strings) -> dict[str, Any]:
    own = run.prompts.filter((pl.col("part") == about["part"]) & (pl.col("model") == about["model"]))
    own = own.join(readings.select("prompt").unique(), on="prompt", how="semi").sort("prompt")
    labels = [name for name in own.columns if name not in ("part", "model", "prompt", "prompt_text", "ids")]
    told = [
        {name: str(value) for name, value in row.items() if value is not None} for row in own.select(labels).iter_rows(named=True)
    ]
    return {
        "number": own["prompt"].to_list(),
        "text": strings.of(own["prompt_text"].to_list()),
        "labels": told if labels else None,
    }


def _controls(readings: pl.DataFrame, controls: pl.DataFrame, strings: Strings) -> dict[str, Any]:
    found = {}
    for kind in KINDS:
        rows = controls.filter(pl.col("control") == kind).select(*PLACE, "status", "text", "next_token")
        if rows.is_empty():
            continue
        rows = readings.select(PLACE).join(rows, on=PLACE, how="left", maintain_order="left")
        found[kind] = {
            "text": strings.of(rows["text"].to_list()),
            "next_token": strings.of(rows["next_token"].to_list()),
            "status": _codes(rows["status"]),
        }
    return found


def _codes(status: pl.Series) -> list[int | None]:
    known = {name: k for k, name in enumerate(STATUS)}
    return [known.get(one, known["skipped"]) if one is not None else None for one in status.to_list()]


def numbers(values: pl.Series) -> list[Any]:
    """Numbers rounded to four digits; NaN and infinities as texts, since JSON has none; what is missing is None."""
    numbers = values.cast(pl.Float64)
    finite = numbers.is_finite().fill_null(False)
    rounded = numbers.round_sig_figs(DIGITS).zip_with(finite, numbers)  # older polars rounds infinities to NaN
    if rounded.is_finite().fill_null(True).all():
        return rounded.to_list()
    names = {"inf": "Infinity", "-inf": "-Infinity", "nan": "NaN"}
    return [names.get(str(value), value) for value in rounded.to_list()]
