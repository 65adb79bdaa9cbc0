"""Readings: the table, its grids, files and provenance, and what a reader is shown of them."""

from __future__ import annotations

import importlib.metadata
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from families import VOCAB, loaded
from rich.console import Console

import patchscopes as ps
from patchscopes.core.errors import InputError, NotAvailableError, UnknownName
from patchscopes.scopes.readings import KEYS, SCHEMA, UNITS
from patchscopes.scopes.show import SHOWN, WORDS

PROMPTS = ("ab cd", "the cat")
LAYERS = [0, 2, 5]
CONTRACT = (
    *("prompt", "position", "token", "source_layer", "target_layer", "map", "control", "draw", "text"),
    *("next_token", "next_token_id", "logprob", "norm_ratio"),
    *("bits_over_nothing", "bits_over_random", "bits_over_others", "bits_over_text", "p_value", "verdict"),
)
CONTROLS = ("nothing", "random", "other", "mean", "text")
EVIDENCE = ("bits_over_nothing", "bits_over_random", "bits_over_others", "bits_over_text", "p_value")


@pytest.fixture(scope="module")
def readings() -> ps.Readings:
    """Two prompts, two positions, three layers, with controls and logits. Frozen: shared by the tests."""
    source = ps.Source(loaded("llama"), PROMPTS, position=[1, -1], layer=LAYERS)
    return ps.Patchscope("hello {x} is", max_new_tokens=4, seed=11, name="mine")(source, keep_logits=True)


@pytest.fixture(scope="module")
def square() -> ps.Readings:
    """Every source layer at every target layer, without controls."""
    source = ps.Source(loaded("llama"), PROMPTS, layer=[4, 1])
    return ps.Patchscope("hello {x} is", layer=[3, 0], max_new_tokens=1)(source, controls=False)


def saying(readings: ps.Readings, **columns: Any) -> ps.Readings:
    """The same readings, as if the model had said something else. columns: (control, value) of a column."""
    changes = [
        pl.when(pl.col("control") == control).then(pl.lit(value)).otherwise(pl.col(name)).alias(name)
        for name, (control, value) in columns.items()
    ]
    return ps.Readings(readings.table.with_columns(changes), readings.provenance)


def numbered(readings: ps.Readings) -> ps.Readings:
    """The same readings, as if the model had said "reading 0", "reading 1", …"""
    numbers = pl.format("reading {}", pl.int_range(pl.len()))
    texts = pl.when(pl.col("control") == "none").then(numbers).otherwise(pl.col("text")).alias("text")
    return ps.Readings(readings.table.with_columns(texts), readings.provenance)


class TestTable:
    def test_its_schema(self, readings: ps.Readings, square: ps.Readings) -> None:
        for some in (readings, square):
            assert some.table.schema == SCHEMA and some.table.columns == list(SCHEMA)
        assert set(CONTRACT) <= set(SCHEMA) and set(KEYS) <= set(SCHEMA) and set(UNITS) <= set(SCHEMA)

    def test_a_row_a_cell_and_control(self, readings: ps.Readings) -> None:
        assert readings.table.height == 2 * 2 * 3 * (1 + len(CONTROLS))
        assert set(readings.table["control"]) == {"none", *CONTROLS}
        for _, rows in readings.table.group_by("control"):
            assert not rows.select(KEYS).is_duplicated().any() and rows.height == 12
        assert readings.readings.equals(readings.table.filter(pl.col("control") == "none"))

    def test_what_it_says_of_a_cell(self, readings: ps.Readings) -> None:
        model = loaded("llama")
        assert readings.logits is not None and readings.logits.shape == (readings.table.height, VOCAB)
        for row, logits in zip(readings.table.iter_rows(named=True), readings.logits, strict=True):
            tokens = model.tokens(PROMPTS[row["prompt"]])
            assert row["prompt_text"] == PROMPTS[row["prompt"]]
            assert row["position"] in (1, len(tokens) - 1) and row["token"] == tokens.strings[row["position"]]
            assert row["source_layer"] == row["target_layer"] in LAYERS
            assert (row["target"], row["map"], row["draw"]) == (0, "identity", 0)
            assert row["next_token_id"] == int(logits.argmax()) and row["next_token"] == model.show(row["next_token_id"])
            assert row["logprob"] == pytest.approx(float(logits.log_softmax(-1).max()), abs=1e-5)
            assert row["surprisal"] > 0 and row["norm_ratio"] > 0 and len(row["text"]) >= row["n_tokens"] - 1

    def test_only_readings_have_evidence(self, readings: ps.Readings, square: ps.Readings) -> None:
        own, controls = readings.readings, readings.table.filter(pl.col("control") != "none")
        for name in EVIDENCE:
            assert own[name].null_count() == 0 and not own[name].is_nan().any()
            assert controls[name].null_count() == controls.height and square.table[name].null_count() == square.table.height
        assert set(own["verdict"]) <= {"above", "same"} and set(square.table["verdict"]) == {"not run"}
        assert controls["verdict"].null_count() == controls.height
        assert all(0 < p <= 1 for p in own["p_value"])


class TestGrid:
    def test_layers_and_positions(self, readings: ps.Readings) -> None:
        grid = readings.grid("logprob", prompt=1)
        assert grid.rows == ("0", "2", "5") and grid.columns == ("1: t", "7: t")
        assert (grid.row_name, grid.column_name, grid.metric, grid.units) == ("source layer ℓ", "position", "logprob", "nats")
        assert grid.values.shape == (3, 2)
        for row in readings.readings.filter(pl.col("prompt") == 1).iter_rows(named=True):
            at = LAYERS.index(row["source_layer"]), (1, 7).index(row["position"])
            assert grid.values[at] == row["logprob"] and grid.texts[at[0]][at[1]] == row["text"]

    def test_layers_and_layers(self, square: ps.Readings) -> None:
        grid = square.grid()
        assert grid.rows == ("1", "4") and grid.columns == ("0", "3")  # sorted, whatever the order asked for
        assert (grid.column_name, grid.metric, grid.units) == ("target layer ℓ*", "surprisal", "bits")
        for row in square.readings.filter(pl.col("prompt") == 0).iter_rows(named=True):
            assert grid.values[(1, 4).index(row["source_layer"]), (0, 3).index(row["target_layer"])] == row["surprisal"]

    def test_one_target_layer_is_no_axis(self) -> None:
        source = ps.Source(loaded("llama"), PROMPTS[0], position=[0, 2], layer=[1, 3])
        grid = ps.Patchscope("{x} is", layer=-1, max_new_tokens=1)(source, controls=False).grid()
        assert grid.column_name == "position" and grid.columns == ("0: <s>", "2: b")

    def test_nan_where_there_is_no_cell_or_no_number(self, readings: ps.Readings, square: ps.Readings) -> None:
        gap = ps.Readings(square.table.filter((pl.col("source_layer") == 1) | (pl.col("target_layer") == 3)), {})
        assert np.isnan(gap.grid().values).tolist() == [[False, False], [True, False]] and gap.grid().texts[1][0] == ""
        assert np.isnan(square.grid("p_value").values).all() and square.grid("p_value").units == "probability"
        assert not np.isnan(readings.grid("bits_over_text").values).any()

    def test_choices(self) -> None:
        maps = [ps.maps.Identity(), ps.maps.Scale(2.0)]
        source = ps.Source(loaded("llama"), PROMPTS[0], position=[1, 2], layer=[1, 3])
        many = ps.Patchscope(["{x} is", "to {x}"], layer=[0, 2], map=maps, max_new_tokens=1)(source, controls=False)
        for choice in ({}, {"position": 1}, {"map": "identity"}):
            with pytest.raises(InputError, match="several readings fall into one cell of this grid; choose one position"):
                many.grid(**choice)  # type: ignore[arg-type]
        grids = [many.grid(position=p, map=m, target=t).values for p in (1, 2) for m in ("identity", "scale(2)") for t in (0, 1)]
        assert all(grid.shape == (2, 2) for grid in grids) and len({grid.tobytes() for grid in grids}) > 1

    def test_one_cell_twice(self, square: ps.Readings) -> None:
        with pytest.raises(InputError, match="several readings fall into one cell"):
            ps.Readings(pl.concat([square.table, square.table.head(1)]), {}).grid()

    @pytest.mark.parametrize("choice", [{"prompt": 2}, {"target": 1}, {"position": 3}, {"map": "scale(2)"}, {"draw": 1}])
    def test_nothing_there(self, readings: ps.Readings, choice: dict[str, Any]) -> None:
        ((name, value),) = choice.items()
        with pytest.raises(InputError, match=rf"no reading has .*{name} {re.escape(str(value))}"):
            readings.grid(**choice)

    @pytest.mark.parametrize("metric", ["surprise", "text", "verdict", ""])
    def test_an_unknown_metric(self, readings: ps.Readings, metric: str) -> None:
        with pytest.raises(
            UnknownName, match=rf"unknown metric '{metric}'\. (Did you mean 'surprisal'|Did you mean 'bits_over_text'|Known: )"
        ):
            readings.grid(metric)


class TestFiles:
    def test_saving_and_loading_is_the_identity(self, readings: ps.Readings, tmp_path: Path) -> None:
        folder = readings.save(tmp_path / "a" / "b")
        assert sorted(file.name for file in folder.iterdir()) == ["logits.safetensors", "readings.json", "readings.parquet"]
        again = ps.Readings.load(str(folder))
        assert again.table.equals(readings.table, null_equal=True) and again.table.schema == readings.table.schema
        assert again.provenance == readings.provenance
        assert again.logits is not None and readings.logits is not None and torch.equal(again.logits, readings.logits)
        assert str(again) == str(readings)

    def test_nan_stays_nan_and_null_stays_null(self, readings: ps.Readings, tmp_path: Path) -> None:
        values = [math.nan, None, math.inf, 1.5, *[0.0] * (readings.table.height - 4)]
        table = readings.table.with_columns(pl.Series("p_value", values, dtype=pl.Float64))
        again = ps.Readings.load(ps.Readings(table, {}).save(tmp_path)).table["p_value"].to_list()
        assert math.isnan(again[0]) and again[1:4] == [None, math.inf, 1.5]

    def test_any_text_comes_back(self, readings: ps.Readings, tmp_path: Path) -> None:
        text = 'a\x00\x1b[31m\n"é日👩\u200d👧\u2028\ufffd\\'
        said = saying(readings, text=("none", text))
        again = ps.Readings.load(ps.Readings(said.table, {"note": text}).save(tmp_path))
        assert set(again.readings["text"]) == {text} and again.provenance == {"note": text}

    def test_without_logits(self, square: ps.Readings, tmp_path: Path) -> None:
        assert ps.Readings.load(square.save(tmp_path)).logits is None

    def test_a_folder_that_held_others_holds_these(self, readings: ps.Readings, square: ps.Readings, tmp_path: Path) -> None:
        """Logits of the readings that were there before belong to no row of these."""
        readings.save(tmp_path)
        again = ps.Readings.load(square.save(tmp_path))
        assert again.table.equals(square.table) and again.logits is None

    def test_nothing_there(self, tmp_path: Path) -> None:
        for folder in (tmp_path, tmp_path / "nothing"):
            with pytest.raises(
                NotAvailableError, match=f"no readings in '{re.escape(str(folder))}': expected readings.parquet and readings.json"
            ):
                ps.Readings.load(folder)

    def test_half_of_it(self, square: ps.Readings, tmp_path: Path) -> None:
        (square.save(tmp_path) / "readings.json").unlink()
        with pytest.raises(NotAvailableError, match="no readings in"):
            ps.Readings.load(tmp_path)

    @pytest.mark.parametrize("version", [2, None, "1"])
    def test_another_format(self, square: ps.Readings, tmp_path: Path, version: Any) -> None:
        file = square.save(tmp_path) / "readings.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "format": version}))
        with pytest.raises(NotAvailableError, match=rf"holds readings of format {version}; this version reads format 1"):
            ps.Readings.load(tmp_path)


class TestProvenance:
    def test_it_names_all_that_the_table_depends_on(self, readings: ps.Readings) -> None:
        said, model = readings.provenance, loaded("llama")
        assert json.loads(json.dumps(said)) == said
        assert said["source_model"] == model.provenance() and said["target_model"] is None
        assert said["source_model"]["weight_hash"].startswith("sha256:")
        assert said["source_model"]["versions"]["torch"] == importlib.metadata.version("torch")
        assert said["sources"] == [
            {"text": text, "ids": list(model.tokens(text).ids), "position": position, "site": "resid"}
            for text in PROMPTS
            for position in (1, len(text))
        ]
        assert said["source_layers"] == LAYERS
        assert said["scope"] == {
            "name": "mine",
            "targets": [{"text": "hello x is", "ids": list(model.tokens("hello x is").ids), "position": 7}],
            "layer": "same",
            "map": ["identity"],
            "max_new_tokens": 4,
            "stop": [],
            "site": "resid",
            "write": "replace",
            "spread": "here",
            "carry": "one",
            "edits": [],
            "temperature": 0.0,
            "guidance": 0.0,
            "draws": 1,
            "seed": 11,
        }
        assert said["controls"]["second_looks"][0] == "Here is some text.\n"
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", said["time"])

    def test_without_controls(self, square: ps.Readings) -> None:
        assert square.provenance["controls"] is None and square.provenance["scope"]["layer"] == [3, 0]

    @pytest.mark.parametrize("layers", [range(0, 4, 2), (0, 2), [0, 2]])
    def test_layers_of_any_kind_can_be_saved(self, tmp_path: Path, layers: Any) -> None:
        found = ps.Patchscope("{x} is", layer=layers, max_new_tokens=1)(
            ps.Source(loaded("llama"), "ab", layer=layers), controls=False
        )
        said = ps.Readings.load(found.save(tmp_path)).provenance
        assert said["scope"]["layer"] == said["source_layers"] == [0, 2]

    def test_bare_vectors(self, tmp_path: Path) -> None:
        source = ps.Source.of_vectors(loaded("llama"), torch.ones(2, 64), layer=2, labels=["a", "b"])
        found = ps.Patchscope("{x} is", max_new_tokens=1)(source)
        again = ps.Readings.load(found.save(tmp_path))
        assert [place["ids"] for place in again.provenance["sources"]] == [None, None]
        assert again.readings["surprisal"].null_count() == 2


def terminal(readings: ps.Readings, *, width: int = 150, colours: bool = False) -> str:
    file = io.StringIO()
    Console(
        file=file, width=width, color_system="truecolor" if colours else None, force_terminal=colours, legacy_windows=False
    ).print(readings)
    return file.getvalue()


class Page(HTMLParser):
    """What a browser makes of HTML: the tags, and the text of every cell of the body."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[str] = []
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        assert not attrs, "the table has no attributes; a text might have"
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


class TestShown:
    def test_every_reading_with_its_verdict_and_every_control(self, readings: ps.Readings) -> None:
        said = readings
        for kind in CONTROLS:
            said = saying(said, text=(kind, f"said under {kind}"))
        said = numbered(said)
        texts, verdicts = said.readings["text"].to_list(), said.readings["verdict"].to_list()
        assert len(set(texts)) == 12
        shown, page = str(said), Page(said._repr_html_())
        lines = [line for line in shown.splitlines() if "reading " in line]
        for line, cells, text, verdict in zip(lines, page.rows[1:], texts, verdicts, strict=True):
            assert re.search(rf"│ {text} +│", line) and re.search(rf"│ {verdict} +│$", line)
            assert text in cells and cells[-1] == verdict
        for words in (shown, page.text):
            for kind, name in zip(
                CONTROLS,
                ("nothing patched in", "a random vector", "another source", "the mean vector", "the words alone"),
                strict=True,
            ):
                assert f"{name}: said under {kind}" in words
            assert "mine: hello x is" in words

    def test_the_numbers_are_the_tables(self, readings: ps.Readings) -> None:
        head, *rows = Page(readings._repr_html_()).rows
        assert head[-8:] == ["says", "surprisal", "nothing", "random", "others", "text", "p", "verdict"]
        for row, cells in zip(readings.readings.iter_rows(named=True), rows, strict=True):
            assert (
                cells[head.index("ℓ")] == str(row["source_layer"]) and cells[head.index("surprisal")] == f"{row['surprisal']:.1f}"
            )
            assert (
                cells[head.index("others")] == f"{row['bits_over_others']:+.1f}"
                and cells[head.index("p")] == f"{row['p_value']:.2f}"
            )

    def test_what_is_the_same_everywhere_is_left_out(self, readings: ps.Readings, square: ps.Readings) -> None:
        head = Page(readings._repr_html_()).rows[0]
        assert {"prompt", "token", "ℓ"} <= set(head) and not {"T", "ℓ*", "map", "draw"} & set(head)
        head = Page(square._repr_html_()).rows[0]
        assert head == ["prompt", "token", "ℓ", "ℓ*", "says", "surprisal", "verdict"] and "controls: not run" in str(square)
        alone = ps.Patchscope("{x}", max_new_tokens=1)(ps.Source(loaded("llama"), "ab", layer=1), controls=False)
        assert Page(alone._repr_html_()).rows[0] == ["ℓ", "says", "surprisal", "verdict"]

    def test_readings_can_be_told_apart(self) -> None:
        """The same token twice in a prompt: two rows that must not look alike but for what they say."""
        source = ps.Source(loaded("llama"), "a a", position=[1, 3], layer=1)
        found = ps.Patchscope("{x} is", max_new_tokens=1)(source, controls=False)
        rows = [cells[:-3] for cells in Page(found._repr_html_()).rows[1:]]
        assert rows[0] != rows[1]

    @pytest.mark.parametrize(
        "text", ["<script>alert(1)</script>", "</td><td>", "&lt;b&gt;", "<!--", '"><img src=x onerror=alert(1)>', "</table><p>"]
    )
    def test_html_is_escaped(self, readings: ps.Readings, text: str) -> None:
        said = saying(
            saying(readings, text=("none", text)), text=("random", text), token=("none", text), prompt_text=("none", text)
        )
        said = ps.Readings(said.table, {"scope": {"name": text, "targets": [{"text": text}]}})
        page = Page(said._repr_html_())
        assert set(page.tags) == {"table", "caption", "thead", "tbody", "tr", "th", "td", "p", "br"}
        assert all(text in cells for cells in page.rows[1:]) and len({len(cells) for cells in page.rows}) == 1
        assert f"a random vector: {text}" in page.text and f"{text}: {text}" in page.text

    @pytest.mark.parametrize("text", ["[bold]", "[red]x[/red]", "[/]", "[link=http://a.b]c", "\\[x]", ":smile:", "[[1, 2]]"])
    def test_markup_in_what_a_model_says_is_text(self, readings: ps.Readings, text: str) -> None:
        said = saying(saying(readings, text=("none", text)), text=("other", text))
        said = ps.Readings(said.table, {"scope": {"name": text, "targets": [{"text": text}]}})
        shown = terminal(said)
        assert shown.count(text) == 12 + 1 + 2 and f"another source: {text}" in shown and f"{text}: {text}" in shown

    def test_what_a_model_says_moves_no_cursor(self, readings: ps.Readings) -> None:
        shown = terminal(saying(readings, text=("none", "\x1b[2J\x1b]0;owned\x07a\rb\nc")))
        assert "\x1b" not in shown and "\x07" not in shown and "\r" not in shown
        assert shown.count("\\x1b[2J\\x1b]0;owned\\x07a␍b↵c") == 12

    def test_long_texts_are_cut_and_empty_ones_said(self, readings: ps.Readings) -> None:
        shown = terminal(saying(readings, text=("none", "y" * 300)), width=250)
        assert "y" * (WORDS - 1) + "…" in shown and "y" * WORDS not in shown
        assert str(saying(readings, text=("none", ""))).count("(nothing)") >= 12

    def test_missing_numbers_are_left_blank(self, readings: ps.Readings) -> None:
        for missing in (None, math.nan):
            said = saying(readings, **{name: ("none", missing) for name in (*EVIDENCE, "surprisal")})  # type: ignore[arg-type]
            for cells in Page(said._repr_html_()).rows[1:]:
                assert cells[-7:-1] == [""] * 6, missing

    def test_of_very_many_the_first_are_shown_and_it_says_so(self, square: ps.Readings) -> None:
        table = pl.concat([square.table] * 30)
        assert table.height > SHOWN
        page = Page(ps.Readings(table, square.provenance)._repr_html_())
        assert len(page.rows) == 1 + SHOWN and f"the first {SHOWN} of {table.height} readings; all are in .table" in page.text

    @pytest.mark.parametrize("width", [60, 80])
    def test_a_narrow_terminal_loses_no_reading_and_no_verdict(self, readings: ps.Readings, width: int) -> None:
        """80 columns is what a pipe has: a number may go, a verdict broken in two or a column of nothing may not."""
        said = numbered(readings)
        shown = terminal(said, width=width)
        assert max(map(len, shown.splitlines())) <= width
        for row in said.readings.iter_rows(named=True):
            assert re.search(rf"(^| ){row['text']} .* {row['verdict']}\s*$", shown, re.M), row["text"]

    def test_verdicts_are_coloured(self, readings: ps.Readings) -> None:
        verdicts = [("above", "same", "not run")[k // 6 % 3] for k in range(readings.table.height)]  # a reading has five controls
        table = readings.table.with_columns(pl.Series("verdict", verdicts))
        shown = terminal(ps.Readings(table, readings.provenance), colours=True)
        assert {"\x1b[1;32mabove", "\x1b[2msame", "\x1b[33mnot run"} <= set(
            re.findall(r"\x1b\[[\d;]+m(?:above|same|not run)", shown)
        )

    def test_str_repr_and_html_are_the_same_table(self, square: ps.Readings) -> None:
        assert repr(square) == str(square) == terminal(square)
        for cells in Page(square._repr_html_()).rows[1:]:
            assert any(all(cell in line for cell in cells) for line in str(square).splitlines())
