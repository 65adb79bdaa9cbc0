"""Prompts from files of every kind, whole and broken, and the labels that come with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from patchscopes.core.errors import InputError
from patchscopes.experiment.prompts import Prompted, content, read_prompts
from patchscopes.experiment.spec import Experiment

ROWS = [
    {"prompt": "We met in Zürich, twice", "where": "Zürich", "country": "Schweiz", "n": 1, "w": 0.5, "ok": True},
    {"prompt": '東京 said "no"\nand left', "where": 1, "country": None, "n": 2, "w": 1.5, "ok": False},
    {"prompt": "1984", "where": None, "country": "Oceania", "n": None, "w": -2.0, "ok": True},
]
LABELS = ["country", "n", "w", "ok"]


def write(folder: Path, kind: str) -> Path:
    """The rows as a file, or a folder, of this kind."""
    table = pl.DataFrame([{**row, "where": None if row["where"] is None else str(row["where"])} for row in ROWS])
    path = folder / f"мои prompts.{kind}"
    if kind == "csv":
        table.write_csv(path)
    elif kind == "tsv":
        table.write_csv(path, separator="\t")
    elif kind in ("jsonl", "ndjson"):
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n\n", encoding="utf-8")
    elif kind == "parquet":
        table.write_parquet(path)
    else:
        write_dataset(path, [table[:2], table[2:]])
    return path


def write_dataset(folder: Path, tables: list[pl.DataFrame]) -> None:
    """As save_to_disk of datasets 5.2 writes it."""
    folder.mkdir(parents=True)
    names = [f"data-{k:05}-of-{len(tables):05}.arrow" for k in range(len(tables))]
    for name, table in zip(names, tables, strict=True):
        table.write_ipc_stream(folder / name)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names], "_split": None}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}))


def read(path: Path, at: Any = -1, **keys: Any) -> list[Prompted]:
    return read_prompts(Experiment(prompts={"file": path, **keys}, at=at))


def wrong(path: Path, **keys: Any) -> str:
    with pytest.raises(InputError) as caught:
        read(path, **keys)
    return str(caught.value)


KINDS = ("csv", "tsv", "jsonl", "ndjson", "parquet", "dataset")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_prompts(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind)
    found = read(path, at_column="where", labels=LABELS)
    assert [p.text for p in found] == [row["prompt"] for row in ROWS]
    assert [p.at for p in found] == ["Zürich", 1, -1]
    assert [dict(p.labels) for p in found] == [{label: row[label] for label in LABELS} for row in ROWS]
    assert [type(found[0].labels[label]) for label in LABELS] == [str, int, float, bool]
    assert [p.origin for p in found] == [f"{path.name} row {k}" for k in (1, 2, 3)]
    assert all(p.ids is None and not p.chat for p in found)


def test_an_at_of_the_experiment_holds_where_a_row_has_none(tmp_path: Path) -> None:
    assert [p.at for p in read(write(tmp_path, "csv"), at="all", at_column="where")] == ["Zürich", 1, "all"]
    assert [p.at for p in read(write(tmp_path, "csv"), at=[0, 2])] == [(0, 2)] * 3


def test_indices_that_became_floats_are_indices_again(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pl.DataFrame({"prompt": ["a", "b", "c"], "where": [2.0, None, float("nan")]}).write_parquet(path)
    assert [p.at for p in read(path, at_column="where")] == [2, -1, -1]
    pl.DataFrame({"prompt": ["a"], "where": [1.5]}).write_parquet(path)
    assert "row 1, column 'where'" in wrong(path, at_column="where")


def test_a_row_may_name_several_positions(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a b", "where": ["a", "-1"]}')
    assert read(path, at_column="where")[0].at == ("a", -1)


def test_numbers_in_csv_that_would_not_come_back_stay_texts(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,zip,big,mixed,f,e,b\n7,007,123456789012345678901,1,1.50,,True\n8,010,1,a,2,,false\n")
    labels = [dict(p.labels) for p in read(path, labels=["zip", "big", "mixed", "f", "e", "b"])]
    first = {"zip": "007", "big": 1.2345678901234568e20, "mixed": "1", "f": 1.5, "e": None, "b": True}
    assert labels[0] == first and labels[1]["b"] is False and labels[1]["f"] == 2.0
    assert [p.text for p in read(path)] == ["7", "8"], "prompts stay texts"


def test_the_first_rows_and_drawn_ones(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt\n" + "\n".join(f"p{k}" for k in range(50)))

    def drawn(seed: int, **keys: Any) -> list[str | None]:
        return [p.text for p in read_prompts(Experiment(prompts={"file": path, **keys}, seed=seed))]

    assert drawn(0, limit=3) == ["p0", "p1", "p2"]
    some = drawn(0, sample=5)
    assert len(set(some)) == 5 and some == sorted(some, key=lambda p: int((p or "")[1:])) and some != drawn(0, limit=5)
    assert some == drawn(0, sample=5) != drawn(1, sample=5)
    assert drawn(0, sample=99) == drawn(0)
    assert read(path, sample=1)[0].origin == f"a.csv row {int((read(path, sample=1)[0].text or '')[1:]) + 1}"


def test_a_chat_template_is_asked_for_by_prompt_or_file(tmp_path: Path) -> None:
    assert all(p.chat for p in read(write(tmp_path, "csv"), chat=True))
    inline = Experiment(prompts=["a", {"text": "b", "chat": True}, {"ids": [3], "at": 0, "labels": {"k": None}}])
    assert [(p.text, p.ids, p.chat, p.at, p.origin) for p in read_prompts(inline)] == [
        ("a", None, False, -1, "prompts[0]"),
        ("b", None, True, -1, "prompts[1]"),
        (None, (3,), False, 0, "prompts[2]"),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_column_that_is_not_there_names_those_that_are(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind)
    for key, column, meant in (("column", "promt", "prompt"), ("at_column", "were", "where"), ("labels", "contry", "country")):
        message = wrong(path, **{key: column})
        assert f"no column {column!r} ({key})" in message and f"Did you mean {meant!r}" in message and "'w', 'ok'" in message


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_text_are_named(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.ROWS", [ROWS[0], {**ROWS[1], "prompt": "  "}, {**ROWS[2], "prompt": None}])
    message = wrong(write(tmp_path, kind))
    assert "2 rows of" in message and "row 2 has empty text in the column 'prompt'" in message and "row 3 has nothing" in message


def test_many_bad_rows_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": k}) for k in range(20)))
    message = wrong(path)
    assert "20 rows of" in message and "row 5 has no text" in message and "row 6" not in message and "and 15 more" in message


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.csv", b"", "is empty"),
        ("a.csv", b"prompt\n", "no rows"),
        ("a.csv", b"prompt,b\n1,2\n1,2,3\n", "could not be read as CSV"),
        ("a.csv", b"prompt\n\xff\xfe\x00\n", "could not be read as CSV"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "in line 2"),
        ("a.jsonl", b'{"prompt": "a"}\n[1]\n', "holds a list in line 2"),
        ("a.jsonl", b"\n\n", "no column 'prompt'"),
        ("a.jsonl", b'{"prompt": "\xff"}', "not UTF-8"),
        ("a.parquet", b"PAR1 but no more than that", "could not be read as Parquet"),
        ("a.parquet", b"", "is empty"),
        ("a.xlsx", b"PK", "the suffix '.xlsx'"),
        ("a", b"prompt", "the suffix ''"),
    ],
)
def test_broken_files_are_told(tmp_path: Path, name: str, data: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(data)
    message = wrong(tmp_path / name)
    assert words in message and name in message


def test_files_that_are_not_there_are_told(tmp_path: Path) -> None:
    assert "there is no file" in wrong(tmp_path / "none.csv")
    assert "has no split 'train'" in wrong(write(tmp_path, "csv"), split="train")
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "k": {"x": 1}}')
    assert "row 1, column 'k': a dict cannot be a label" in wrong(path, labels="k")


def test_splits_of_a_dataset(tmp_path: Path) -> None:
    for split, texts in (("train", ["a", "b"]), ("test", ["c"])):
        write_dataset(tmp_path / "many" / split, [pl.DataFrame({"prompt": texts})])
    (tmp_path / "many" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert [p.text for p in read(tmp_path / "many", split="test")] == ["c"]
    assert "'train', 'test'" in wrong(tmp_path / "many")
    assert "no split 'tran'" in wrong(tmp_path / "many", split="tran") and "'train'" in wrong(tmp_path / "many", split="tran")
    write_dataset(tmp_path / "one" / "train", [pl.DataFrame({"prompt": ["x"]})])
    (tmp_path / "one" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert [p.text for p in read(tmp_path / "one")] == ["x"], "the only split needs no name"
    write_dataset(tmp_path / "plain", [pl.DataFrame({"prompt": ["y"]})])
    assert "without splits" in wrong(tmp_path / "plain", split="train")


def test_broken_datasets_are_told(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    assert "is no dataset" in wrong(tmp_path / "none")
    cases = {
        "torn": ("data-00000-of-00001.arrow", b"no arrow", "Arrow stream"),
        "state": ("state.json", b"{", "could not be read"),
        "listing": ("state.json", b'{"_data_files": 3}', "lists no data files"),
        "empty": ("state.json", b'{"_data_files": []}', "has no rows"),
        "outside": ("state.json", b'{"_data_files": [{"filename": "../secret.arrow"}]}', "is not in it"),
        "lacking": ("state.json", b'{"_data_files": [{"filename": "other.arrow"}]}', "lacks its file 'other.arrow'"),
        "reordered": ("state.json", b'{"_data_files": [{"filename": "a"}], "_indices_data_files": [{}]}', "flatten_indices"),
    }
    for name, (file, data, words) in cases.items():
        write_dataset(tmp_path / name, [pl.DataFrame({"prompt": ["y"]})])
        (tmp_path / name / file).write_bytes(data)
        assert words in wrong(tmp_path / name), name
    (tmp_path / "dict").mkdir()
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert "lacks its file 'state.json'" in wrong(tmp_path / "dict")


def test_the_content_of_a_dataset_is_that_of_its_tables(tmp_path: Path) -> None:
    for name, text in (("a", "x"), ("b", "x"), ("c", "y")):
        write_dataset(tmp_path / name, [pl.DataFrame({"prompt": [text]})])
    (tmp_path / "b" / "dataset_info.json").write_text("another description")
    (tmp_path / "b" / "cache-1.arrow").write_bytes(b"left behind")
    assert content(tmp_path / "a") == content(tmp_path / "b") != content(tmp_path / "c")
