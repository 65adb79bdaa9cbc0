"""A report is one file: everything is in it, nothing of it is interpreted, nothing private, never more than 5 MB."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import polars as pl
import pytest
from runs_made import make_run, said

import patchscopes as ps
from patchscopes.cli import app
from patchscopes.core.errors import InputError, UnknownName
from patchscopes.experiment import Experiment
from patchscopes.runs import open_run
from patchscopes.runs.compare import export
from patchscopes.runs.folder import Run, write_piece, write_record, write_table
from patchscopes.runs.schema import ROWS
from patchscopes.views.by_layer import binomial_tail, by_layer, planned_rows, spans
from patchscopes.views.figure import figure
from patchscopes.views.lines import interval
from patchscopes.views.report import report
from patchscopes.views.report.page import LARGEST, page
from patchscopes.views.report.scrub import scrub

EVIL = "</script><img src=x onerror=alert(1)><!-- {{script}} &amp; \u202e\x1b[31m"


class Page(HTMLParser):
    """What a browser would make of a page: elements with their attributes, and its text without scripts and styles."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.raw: dict[str, str] = {}
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.inside = (dict(attrs).get("id") or tag) if tag in ("script", "style") else ""

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside:
            self.raw[self.inside] = self.raw.get(self.inside, "") + data
        else:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    @property
    def data(self) -> dict:
        return json.loads(gzip.decompress(base64.b64decode(self.raw["data"])))


def opened(run: Run, **options) -> Page:
    return Page(page(run, **options))


# ---------------------------------------------------------------------------------------------------------------- structure


def test_one_file_with_all_its_parts(tmp_path):
    path = report(make_run(tmp_path / "2026-11-20_made-up_7f3c"), tmp_path / "new" / "report.html")
    found = Page(path.read_text(encoding="utf-8"))
    for words in ("made up", "Run 7f3c", "20 November 2026", "done", "In short", "Layers", "All readings", "How it was made", "Cite",
                  "arXiv:2401.06102", "patchscopes reproduce 2026-11-20_made-up_7f3c", "de23b6", "Consistent is not true"):  # fmt: skip
        assert words in found.text, words
    assert "“who is x”" in found.text
    ids = [about["id"] for _, about in found.elements if about.get("id")]
    assert len(ids) == len(set(ids))
    assert found.elements[0] == ("html", {"lang": "en"})


def test_nothing_is_loaded_from_anywhere_and_the_policy_names_its_own_script(tmp_path):
    text = page(make_run(tmp_path / "run"))
    found = Page(text)
    policy = next(about["content"] for tag, about in found.elements if about.get("http-equiv") == "Content-Security-Policy")
    for kind in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(found.raw[kind].encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy and "connect-src 'none'" in policy and "unsafe" not in policy
    assert not [about for _, about in found.elements if {"src", "srcset", "style"} & about.keys()]
    assert all(about["href"].startswith("#") for _, about in found.elements if "href" in about)
    assert not re.search(r"@import|url\(|innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|fetch\(", text)


def test_the_numbers_are_those_of_the_rows(tmp_path):
    run = make_run(tmp_path / "run", scopes=("describe", "identity"))
    looks = opened(run).data["looks"]
    assert [look["scope"] for look in looks] == ["describe", "identity"]
    rows = planned_rows(run).filter(pl.col("scope") == "identity")
    columns = looks[1]["columns"]
    for name in ("bits_over_others", "surprisal", "logprob", "norm_ratio", "p_value"):
        assert columns[name] == [float(f"{value:.4g}") for value in rows[name]]
    assert columns["source_layer"] == rows["source_layer"].to_list()


def test_controls_stand_beside_their_reading(tmp_path):
    run = make_run(tmp_path / "run")
    data = opened(run).data
    look = data["looks"][0]
    for i, text in enumerate(look["columns"]["text"]):
        k = int(data["strings"][text].split()[-1])
        for kind in ("nothing", "random", "other", "mean", "text"):
            assert data["strings"][look["controls"][kind]["text"][i]] == f" {kind} {k % 3}"


# -------------------------------------------------------------------------------------------------------------------- states


def some_nan(where):
    known = said(where)
    if where["source_layer"] == 2:
        known["bits_over_others"] = math.nan
        known["logprob"] = -math.inf
    if where["source_layer"] == 1:
        known["surprisal"] = None
    return known


def test_nan_stays_nan_and_missing_stays_missing(tmp_path):
    columns = opened(make_run(tmp_path / "run", cell=some_nan)).data["looks"][0]["columns"]
    by = dict(zip(columns["source_layer"], columns["bits_over_others"], strict=True))
    assert by[2] == "NaN" and isinstance(by[1], float)
    assert columns["logprob"][2] == "-Infinity"
    assert columns["surprisal"][1] is None


def half(where):
    if where["source_layer"] == 4:
        return None
    if where["source_layer"] == 3:
        own = where["control"] == "none"
        why = "the state at layer 3 is not finite: /home/someone/models/big/x.py" if own else "its reading failed"
        return {"status": "failed" if own else "skipped", "error": why}
    return said(where)


def test_an_unfinished_run_says_so(tmp_path):
    run = make_run(tmp_path / "2026-11-20_made-up_7f3c", cell=half, status="stopped")
    found = opened(run)
    assert "This run is not finished" in found.text and "18 of 90 cells are waiting" in found.text
    assert "patchscopes resume 2026-11-20_made-up_7f3c" in found.text
    states = found.data["status"]
    columns = found.data["looks"][0]["columns"]
    assert [states[code] for code in columns["status"][:5]] == ["ok", "ok", "ok", "failed", "waiting"]
    assert columns["surprisal"][3:5] == [None, None]


def test_failed_cells_are_listed_with_their_errors(tmp_path):
    found = opened(make_run(tmp_path / "run", cell=half, status="partial"))
    assert "Why readings failed" in found.text and "the state at layer 3 is not finite" in found.text
    assert "its reading failed" in found.text and "someone" not in found.text


def test_a_run_of_which_nothing_is_there_can_be_reported(tmp_path):
    found = opened(make_run(tmp_path / "run", cell=lambda where: None, status="planned"))
    assert "It was planned and has not begun" in found.text and "No reading has a verdict" in found.text


def test_without_controls_nothing_is_to_be_interpreted(tmp_path):
    def bare(where):
        nothing = dict.fromkeys(f"bits_over_{kind}" for kind in ("nothing", "random", "others", "text"))
        return {**said(where), **nothing, "p_value": None, "verdict": "not run"}

    found = opened(make_run(tmp_path / "run", controls=False, cell=bare))
    assert "not run: nothing here can be told from what the scope would say anyway" in found.text
    assert "controls not run" in found.text


@pytest.fixture(scope="module")
def readings():
    """What atlas really says."""
    model = ps.load("atlas")
    source = ps.Source(model, ["We talked about France", "She lives in Peru"], position=-1, layer=[0, 4, 8])
    return ps.scopes.extract("The capital of {x} is", layer="all", stop=["."])(source)


def test_readings_that_were_saved_without_a_run_can_be_reported(tmp_path, readings):
    found = opened(open_run(readings.save(tmp_path / "france")))
    assert "neither resumed nor reproduced" in found.text and "cannot be made again by a command" in found.text
    look = found.data["looks"][0]
    rows = readings.readings.sort("prompt", "source_layer", "target_layer")
    assert [found.data["strings"][k] for k in look["columns"]["text"]] == rows["text"].to_list()
    assert set(look["controls"]) == {"nothing", "random", "other", "mean", "text"}
    assert figure(open_run(tmp_path / "france"), tmp_path / "x.png").exists()


def test_a_map_is_that_of_the_readings(tmp_path, readings, monkeypatch):
    grids = []
    monkeypatch.setattr("patchscopes.views.figure.heatmap", lambda grid, path, title: grids.append(grid))
    figure(open_run(readings.save(tmp_path / "france")), tmp_path / "x.png", prompt=1)
    mine, own = grids[0], readings.grid("bits_over_others", prompt=1)
    assert (mine.values == own.values).all() and (mine.rows, mine.columns, mine.texts) == (own.rows, own.columns, own.texts)


def test_what_was_exported_can_be_reported(tmp_path):
    run = make_run(tmp_path / "run")
    export(run, tmp_path / "out", ["parquet"])
    assert opened(open_run(tmp_path / "out")).data["looks"] == opened(run).data["looks"]


# -------------------------------------------------------------------------------------------------------- escaping, privacy


def test_what_models_and_prompts_say_is_shown_and_not_interpreted(tmp_path):
    def evil(where):
        if where["source_layer"] == 1 and where["control"] == "none":
            return {"status": "failed", "error": EVIL}
        return {**said(where), "text": EVIL, "next_token": EVIL}

    run = make_run(tmp_path / "run", prompts=(EVIL, "b"), cell=evil, scopes=(EVIL,), name=EVIL, caveats=[EVIL])
    text = page(run, title=EVIL)
    found = Page(text)
    assert not [about for tag, about in found.elements if tag == "img" or any(name.startswith("on") for name in about)]
    assert text.count("<script") == 2 and text.count("</script>") == 2
    assert "onerror=alert(1)" in found.text
    assert "\u202e" not in text and "\x1b" not in text  # what turns lines around is made visible
    assert "{{script}}" in html.unescape(text)
    assert EVIL in found.data["strings"]  # the page itself shows it as text


def test_no_paths_and_no_secrets(tmp_path, monkeypatch):
    folder = tmp_path / "Jane Doe" / "work" / "2026-11-20_made-up_7f3c"
    model = "/home/jane/models/my-llama"
    command = [
        "patchscopes",
        "sweep",
        "/home/jane/exp.toml",
        "--token=hf_abcdefghijklmnop1234",
        "--api-key",
        "topsecret99",
        "/data/x y/z",
    ]
    entry = {"conditions": {"models": {model: {"files": "x"}}}, "machines": [{"host": "janes-laptop", "command": command}]}
    run = make_run(
        folder,
        model=model,
        provenance=[entry],
        caveats=["'/home/jane/secret place/prompts.csv' row 7 was skipped", "C:\\Users\\jane\\x\\y.txt is odd"],
        spec={"prompts": {"file": "/home/jane/prompts.csv"}, "model": [{"name": model}], "note": "api_key=abcdef123456"},
    )
    text = page(run)
    found = Page(text)
    everything = text + json.dumps(found.data)
    for private in ("jane", "Jane", "hf_abc", "abcdef123456", "topsecret99", str(tmp_path), str(Path.home()), "/data/"):
        assert private not in everything, private
    for kept in ("my-llama", "prompts.csv", "exp.toml", "y.txt"):
        assert kept in found.text


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("and/or", "and/or"),
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("see https://arxiv.org/abs/2401.06102", "see https://arxiv.org/abs/2401.06102"),
        ("/home/a/b c/model", "model"),
        ("file '/home/a/b c/x.csv' is gone", "file 'x.csv' is gone"),
        ("OSError: /usr/lib/x.so: cannot open", "OSError: x.so: cannot open"),
        ("~/models/x", "x"),
        ("Bearer abcdefgh12345", "Bearer (removed)"),
        ("https://me:pass@host/x", "https://(removed)@host/x"),
        ("tokens: 20 and the key: yes", "tokens: 20 and the key: yes"),
    ],
)
def test_what_is_scrubbed(text, left):
    assert scrub(text) == left
    assert scrub({"a": [text]}) == {"a": [left]}


# ----------------------------------------------------------------------------------------------------------------------- size


def big(folder: Path, *, prompts: int, layers: int, controls: bool, positions: int = 1) -> Run:
    """A run of many cells, made by columns."""
    run = make_run(folder, prompts=("a",), layers=1, controls=controls)
    kinds = ["none", "nothing", "random", "other", "mean", "text"] if controls else ["none"]
    names, places, depths = (
        pl.DataFrame({name: range(n)}, schema={name: pl.Int64})
        for name, n in (("prompt", prompts), ("position", positions), ("source_layer", layers))
    )
    cells = (
        names.join(places, how="cross")
        .join(depths, how="cross")
        .with_row_index("index")
        .join(pl.DataFrame({"control": kinds}), how="cross")
    )
    cells = cells.with_columns(pl.col("index").cast(pl.Int64), pl.lit(0).cast(pl.Int32).alias("look"))
    noise = (pl.int_range(pl.len()) * 7919 % 10007) / 10007
    hashes = [pl.col("index").hash(seed).cast(pl.String) for seed in (1, 2, 3)]
    fixed = {
        "part": "the part",
        "model": "atlas",
        "scope": "describe",
        "position": 3,
        "token": " t",
        "target": 0,
        "map": "identity",
    }
    measures = {name: noise * k for k, name in enumerate(("logprob", "surprisal", "norm_ratio", "p_value"), 3)}
    bits = {f"bits_over_{kind}": (noise - 0.5) * k for k, kind in enumerate(("nothing", "random", "others", "text"), 9)}
    rows = cells.with_columns(
        cell=pl.int_range(pl.len()).cast(pl.String),
        target_layer=pl.col("source_layer"),
        text=pl.concat_str(hashes).str.slice(0, 30),
        next_token=(noise * 1000).round().cast(pl.String),
        verdict=pl.when(noise < 0.5).then(pl.lit("above")).otherwise(pl.lit("same")),
        **{name: pl.lit(value) for name, value in {**fixed, "draw": 0, "status": "ok", "attempt": 0}.items()},
        **measures,
        **bits,
    )
    missing = [pl.lit(None, kind).alias(name) for name, kind in ROWS.items() if name not in rows.columns]
    rows = rows.with_columns(missing, shard=pl.lit(0).cast(pl.Int32), cost=pl.lit(1.0))
    for piece in run.pieces:
        piece.path.unlink()
    write_table(folder / "plan.parquet", rows.select(run.plan.columns).cast(run.plan.schema))
    write_piece(folder, 0, 0, rows.select(list(ROWS)).cast(pl.Schema(ROWS)))
    texts = names.with_columns(
        part=pl.lit("the part"), model=pl.lit("atlas"), prompt_text=pl.col("prompt").cast(pl.String), ids=pl.lit([1])
    )
    write_table(folder / "prompts.parquet", texts)
    write_record(folder, {**run.record, "cells": rows.height})
    return Run(folder)


@pytest.mark.slow
@pytest.mark.parametrize(("controls", "prompts"), [(True, 1000), (False, 6100)])
def test_a_big_run_stays_below_the_limit_and_says_what_is_left_out(tmp_path, controls, prompts):
    run = big(tmp_path / "run", prompts=prompts, layers=33, controls=controls)
    assert run.cells > 195_000
    path = report(run, tmp_path / "report.html")
    found = Page(path.read_text(encoding="utf-8"))
    assert path.stat().st_size < LARGEST
    shown = len(set(found.data["looks"][0]["columns"]["prompt"]))
    assert 200 < shown <= prompts
    told = f"Cell by cell this page shows the first {shown:,} of {prompts:,} prompts of each view."
    assert found.text.count(told) == (2 if shown < prompts else 0)  # at the map, and among the caveats
    assert f"of {prompts * 33:,}" in found.text  # the summary covers all


def test_one_prompt_that_is_too_big_is_cut_too(tmp_path, monkeypatch):
    monkeypatch.setattr("patchscopes.views.report.page.LARGEST", 125_000)
    run = big(tmp_path / "run", prompts=1, layers=20, positions=200, controls=True)
    text = page(run)
    assert len(text.encode()) < 125_000
    assert re.search(r"the first [\d,]+ of 4,000 readings", Page(text).text)


def test_the_example_is_small_and_that_of_its_experiment():
    docs = Path(__file__).resolve().parents[1] / "docs"
    text = (docs / "example-report.html").read_text(encoding="utf-8")
    assert len(text.encode()) < 1_500_000
    assert Experiment.load(docs / "example-experiment.toml").digest in text


# ------------------------------------------------------------------------------------------------------------------- by layer


def test_layers_against_chance(tmp_path):
    run = make_run(tmp_path / "run", prompts=[str(k) for k in range(8)])
    table = by_layer(planned_rows(run))
    assert table["interpret"].to_list() == ["yes", "yes", "yes", "no", "no"]
    assert table["above"].to_list() == [8, 8, 8, 0, 0] and table["chance"][0] == pytest.approx(0.05**8)


def test_positions_of_one_prompt_are_no_more_prompts(tmp_path):
    one = by_layer(planned_rows(make_run(tmp_path / "one", prompts=["a"], positions=range(50))))
    assert one["above"][0] == 50 and one["prompts"][0] == 1 and set(one["interpret"]) == {"too few prompts"}


@pytest.mark.parametrize(("k", "n"), [(0, 5), (1, 5), (3, 8), (40, 400), (5, 5)])
def test_the_tail_of_the_binomial(k, n):
    exact = sum(math.comb(n, i) * 0.05**i * 0.95 ** (n - i) for i in range(k, n + 1))
    assert binomial_tail(k, n, 0.05) == pytest.approx(exact, rel=1e-9)


def test_spans():
    assert spans([5, 0, 1, 2, 7, 8]) == "0–2, 5, 7–8" and spans([]) == ""


# -------------------------------------------------------------------------------------------------------------------- figures


@pytest.mark.parametrize("kind", ["map", "layers"])
@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_figures_of_a_run(tmp_path, kind, suffix):
    run = make_run(tmp_path / "run", cell=half, status="stopped")
    assert figure(run, tmp_path / f"x{suffix}", kind=kind).stat().st_size > 1000


def test_cells_that_are_not_there_are_hatched(tmp_path, monkeypatch):
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")
    svg = figure(make_run(tmp_path / "run", cell=half), tmp_path / "x.svg").read_text(encoding="utf-8")
    assert "hatched: 1 failed, 1 waiting" in svg and "<pattern" in svg and ">4<" in svg and "bits over others (bits)" in svg


def test_a_figure_by_layer_draws_every_view(tmp_path, monkeypatch):
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")
    run = make_run(tmp_path / "run", scopes=("describe", "$odd_scope$"), cell=some_nan)
    svg = figure(run, tmp_path / "x.svg", kind="layers").read_text(encoding="utf-8")
    for words in ("describe (3 prompts)", "odd_scope", "source layer ℓ", "share above controls", "6 of 30 readings"):
        assert words in re.sub(r"(<[^>]+>|\s)+", " ", svg)


def test_what_a_figure_cannot_be_of(tmp_path):
    run = make_run(tmp_path / "run", scopes=("describe", "identity"))
    with pytest.raises(InputError, match=r"several scopes.*describe, identity"):
        figure(run, tmp_path / "x.png")
    with pytest.raises(UnknownName, match=r"no scope 'descibe'.*Did you mean 'describe'"):
        figure(run, tmp_path / "x.png", scope="descibe")
    with pytest.raises(UnknownName, match="unknown metric"):
        figure(run, tmp_path / "x.png", kind="layers", metric="bits")
    with pytest.raises(UnknownName, match="unknown kind"):
        figure(run, tmp_path / "x.png", kind="maps")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="prompt 9"):
        figure(run, tmp_path / "x.png", scope="describe", prompt=9)
    assert not (tmp_path / "x.png").exists()


def test_the_interval_is_of_means_over_prompts():
    import numpy as np

    values = np.array([[1.0, np.nan, 2.0], [3.0, np.nan, 2.0], [5.0, 1.0, 2.0]])
    mean, low, high = interval(values)
    assert mean.tolist() == [3.0, 1.0, 2.0]
    assert 1.0 <= low[0] < 3.0 < high[0] <= 5.0 and low[2] == high[2] == 2.0
    assert np.isnan(interval(np.full((2, 1), np.nan))[0]).all()


# --------------------------------------------------------------------------------------------------------------- command line


@pytest.fixture
def cli(capsys):
    def run(*args: object):
        capsys.readouterr()
        return (app.run([str(arg) for arg in args]), *capsys.readouterr())

    return run


def test_report_on_the_command_line(tmp_path, cli):
    folder = tmp_path / "runs" / "2026-11-20_made-up_7f3c"
    make_run(folder)
    code, out, err = cli("report", "7f3c", "--runs", tmp_path / "runs")
    assert code == 0 and out.strip() == str(folder / "report.html") and (folder / "report.html").exists()
    assert "9 of 15 readings above their controls; layers to interpret: none" not in out and "9 of 15 readings" in err
    code, out, _ = cli("report", folder, "-o", tmp_path / "x.html", "--json")
    assert code == 0 and json.loads(out)["bytes"] == (tmp_path / "x.html").stat().st_size
    assert cli("report", "nothing", "--runs", tmp_path)[0] == 4
    assert cli("report", folder, "-o", folder / "run.json" / "x.html")[0] == 2


def test_figure_on_the_command_line(tmp_path, cli):
    make_run(tmp_path / "run")
    code, out, _ = cli("figure", tmp_path / "run", tmp_path / "x.svg", "--kind", "layers")
    assert code == 0 and out.strip() == str(tmp_path / "x.svg")
    assert cli("figure", tmp_path / "run", tmp_path / "x.gif")[0] == 2
    assert cli("figure", tmp_path / "run", tmp_path / "x.png", "--scope", "other")[0] == 2
