"""What is wrong with the data of an experiment is counted and told on its page, and the rest is scored."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from patchscopes import PatchscopesError
from patchscopes.evaluate import attribute, entity, next_token, token_erasure
from patchscopes.evaluate.frame import Asked

NAMES = ("sample_id", "prompt_target", "object", "subject", "is_correct_baseline", "prompt_source", "source_cropped_toks")
CAPITALS = {"France": "Paris", "Japan": "Tokyo", "Kenya": "Nairobi", "Peru": "Lima", "Norway": "Oslo", "Italy": "Rome"}
SETTINGS = attribute.Settings(known="all", probe=0, tokens=4, layers="3:5", target_layers="1:3")


def row(k: int, subject: str, answer: str, **changed: str) -> dict[str, str]:
    text, cropped = f"They painted {subject} on the old door", f"['They', ' painted', ' {subject}']"
    values = (str(k), "The capital of x", answer, subject, "True", text, cropped)
    return {**dict(zip(NAMES, values, strict=True)), **changed}


def write(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, NAMES, delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)


def test_bad_rows_are_counted_and_the_rest_is_scored(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    good = [row(k, *pair) for k, pair in enumerate(CAPITALS.items())]
    bad = [
        row(10, "Chad", "N'Djamena", is_correct_baseline="perhaps"),
        row(11, "Spain", "Madrid", source_cropped_toks="['They', ' painted', ' Portugal']"),  # its tokens are not there
        row(12, "Greece", "Athens", prompt_source=""),
    ]
    write(tmp_path / "data" / "country_capital_city.tsv", good + bad)
    write(tmp_path / "data" / "company_ceo.tsv", [row(0, "Fiat", "Turin"), row(1, "Siemens", "Munich")])
    found = attribute.evaluate(Asked(data=tmp_path / "data", runs=tmp_path / "runs"), SETTINGS)
    assert found.scores["any_of_all"].n == len(CAPITALS)  # type: ignore[union-attr]
    told = "\n".join(found.caveats)
    assert "corrupt" in told and "Left out, with fewer than 4 items: company_ceo." in told
    assert {row[0] for row in found.tables[0].rows} == {"country_capital_city"}


def test_nothing_left_to_score_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "company_ceo.tsv", [row(0, "Fiat", "Turin"), row(1, "Siemens", "Munich")])
    with pytest.raises(PatchscopesError, match=r"4 items or more .*company_ceo \(2\)"):
        attribute.evaluate(Asked(data=tmp_path / "company_ceo.tsv", runs=tmp_path), SETTINGS)
    with pytest.raises(PatchscopesError, match="is no PopQA file"):
        entity.evaluate(Asked(data=tmp_path / "company_ceo.tsv", runs=tmp_path))
    (tmp_path / "texts.txt").write_text("\n   \n")
    with pytest.raises(PatchscopesError, match="no text to read"):
        next_token.evaluate(Asked(data=tmp_path / "texts.txt", runs=tmp_path))
    (tmp_path / "texts.jsonl").write_text('{"text": "one"}\n{"text": \n')
    with pytest.raises(PatchscopesError, match=r"texts\.jsonl.* line 2"):
        next_token.evaluate(Asked(data=tmp_path / "texts.jsonl", runs=tmp_path))
    (tmp_path / "texts.jsonl").write_text("[1]\n")
    with pytest.raises(PatchscopesError, match="holds a list; expected an object"):
        next_token.evaluate(Asked(data=tmp_path / "texts.jsonl", runs=tmp_path))
    (tmp_path / "texts.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PatchscopesError, match="not UTF-8"):
        next_token.evaluate(Asked(data=tmp_path / "texts.txt", runs=tmp_path))


def test_texts_that_the_model_does_not_read_are_counted(tmp_path: Path) -> None:
    few = [f"The capital of {x} is {y}, a city on a river." for x, y in CAPITALS.items()]
    long = "antidisestablishmentarianism " * 60  # few words, more tokens than atlas reads
    wordy, endless = "a " * 250, "x" * 2000
    (tmp_path / "texts.txt").write_text("\n".join([*few, long, wordy, endless]))
    asked = Asked(data=tmp_path / "texts.txt", runs=tmp_path / "runs")
    found = next_token.evaluate(asked, next_token.Settings(scopes=("logit lens",)))
    told = "\n".join(found.caveats)
    assert found.scores["texts"] == len(few)
    assert "1 of 7 texts that were drawn were left out: the prompt has" in told and "2 of 9 texts were left out" in told
    (tmp_path / "texts.txt").write_text("\n".join([*(f"{text} Xanthippe wrote about zygotes." for text in few), long]))
    assert any("1 of 7 texts" in note for note in token_erasure._documents(asked, token_erasure.Settings())[1])
    (tmp_path / "texts.txt").write_text(long)
    with pytest.raises(PatchscopesError, match=r"no text to read \(1 of 1 .*at most 256.*expected one a line"):
        next_token.evaluate(asked)


def test_texts_without_text_are_counted(tmp_path: Path) -> None:
    notes: list[str] = []
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"prompt": "two"}\n{"txt": "three"}\n{"text": 4}\n')
    assert next_token.texts(tmp_path / "a.jsonl", notes) == ["one", "two"]
    (tmp_path / "b.json").write_text(json.dumps({"items": [{"prompt": "one"}, {"prompt": 2}, 3]}))
    assert next_token.texts(tmp_path / "b.json", notes) == ["one"]
    assert [note[:6] for note in notes] == ["2 of 4", "2 of 3"]
