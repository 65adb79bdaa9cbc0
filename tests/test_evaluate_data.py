"""Readers of the public formats: on small files written here, and on the published ones where they are."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from patchscopes import PatchscopesError
from patchscopes.evaluate import attribute_tsv, lre, planted, popqa
from patchscopes.evaluate.data import items_of, sampled
from patchscopes.evaluate.lens_items import lens_items
from patchscopes.evaluate.scoring import echo_free

# of the paper: source prompts and classes of its 19 tasks
PAPER = {
    "fruit_inside_color": (39, 3),
    "fruit_outside_color": (56, 6),
    "object_superclass": (173, 8),
    "substance_phase": (182, 3),
    "task_done_by_person": (33, 10),
    "task_done_by_tool": (54, 12),
    "work_location": (19, 4),
    "company_ceo": (50, 12),
    "country_capital_city": (94, 21),
    "country_currency": (83, 14),
    "country_largest_city": (91, 21),
    "food_from_country": (27, 10),
    "person_father": (27, 7),
    "person_plays_position_in_sport": (383, 7),
    "person_plays_pro_sport": (131, 5),
    "product_by_company": (219, 11),
    "star_constellation": (56, 10),
    "superhero_archnemesis": (28, 7),
    "superhero_person": (45, 12),
}


def tsv(path: Path, rows: list[dict[str, str]]) -> Path:
    names = ["sample_id", "prompt_target", "object", "subject", "is_correct_baseline", "prompt_source", "source_cropped_toks"]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return path


ROW = {
    "sample_id": "0",
    "prompt_target": "The capital city of x",
    "object": "Paris",
    "subject": "France",
    "is_correct_baseline": "True",
    "prompt_source": "from France to France again",
    "source_cropped_toks": "['from', ' France', ' to', ' France']",
}


def test_attribute_tsv(tmp_path: Path) -> None:
    rows = [
        ROW,
        {**ROW, "prompt_source": "two\nlines of France"},
        {**ROW, "prompt_source": "", "source_cropped_toks": ""},
        {**ROW, "source_cropped_toks": "['from', ' Fra']"},
        {**ROW, "source_cropped_toks": "not a list"},
        {**ROW, "is_correct_baseline": "maybe"},
    ]
    found = items_of(tsv(tmp_path / "country_capital_city.tsv", rows))
    (item,) = found.items
    assert (item.target, item.at, item.answers, item.known) == ("The capital city of {x}", "France#2", ("Paris",), True)
    assert item.relation == "country_capital_city" and item.prompt[: item.prompt.rindex("France")] == "from France to "
    assert [note.split(" ")[0] for note in found.notes] == ["2", "2", "1"] and "corrupt" in found.notes[0]


def test_a_tsv_without_a_column_says_so(tmp_path: Path) -> None:
    path = tmp_path / "x.tsv"
    path.write_text("prompt_target\tprompt_source\na\tb\n")
    with pytest.raises(PatchscopesError, match="no column sample_id, object"):
        items_of(path)


def test_lre(tmp_path: Path) -> None:
    document = {
        "name": "country capital",
        "prompt_templates": ["The capital of {} is"],
        "samples": [{"subject": "France", "object": "Paris"}, {"subject": "Peru"}, 7, {"subject": "Chad", "object": " "}],
    }
    (tmp_path / "capital.json").write_text(json.dumps(document))
    (tmp_path / "other.json").write_text("{}")
    found = items_of(tmp_path)
    (item,) = found.items
    assert (item.relation, item.target, item.subject, item.known) == ("capital", "The capital of {x} is", "France", None)
    assert item.prompt.count("France") == 1 and item.at == "France#1"
    assert found.notes[0].startswith("3 of 4")
    assert not lre.is_one(tmp_path / "other.json")


def test_popqa(tmp_path: Path) -> None:
    names = ["subj", "prop", "obj", "question", "possible_answers", "s_pop"]
    path = tmp_path / "popqa.tsv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(names)
        answers = '["politician", "political leader"]'
        writer.writerow(["George Rankin", "occupation", "politician", "What is George Rankin's occupation?", answers, "142"])
        writer.writerow(["X", "occupation", "y", "What is it?", "[]", "1"])
        writer.writerow(["X", "occupation", "y", "What is X?", "not JSON", "1"])
    found = items_of(path)
    (item,) = found.items
    assert item.target == "Question: What is {x}'s occupation? Answer:"
    assert item.answers == ("politician", "political leader") and len(found.notes) == 2
    assert popqa.rows(path)[0][0].popularity == 142


def test_lens_items(tmp_path: Path) -> None:
    path = tmp_path / "lens.json"
    path.write_text(json.dumps({"items": [{"name": "a", "prompt": "p", "intermediates": ["b"]}, {"prompt": ""}, 3]}))
    found, corrupt = lens_items(path)
    assert [(i.name, i.prompt, i.intermediates, i.target) for i in found] == [("a", "p", ("b",), None)] and corrupt == 2
    path.write_text("[]")
    with pytest.raises(PatchscopesError, match="no lens items"):
        lens_items(path)


def test_data_that_is_not_there_or_unknown(tmp_path: Path) -> None:
    with pytest.raises(PatchscopesError, match="no file or folder"):
        items_of(tmp_path / "nothing")
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(PatchscopesError, match="no data that is known here"):
        items_of(tmp_path)


def test_planted_items_stand_in_their_sentences() -> None:
    found = planted.items()
    assert len(found.items) == 5926 and len(found.relations) == 35
    for item in found.items[::97]:
        name, _, number = item.at.rpartition("#")
        assert name == item.subject and item.prompt.count(item.subject) >= int(number)
        assert item.target.startswith("The ") and item.target.count("{x}") == 1
    germany = next(e for e in planted.entities() if e.name == "Germany")
    assert "Berlin" in germany.facts and any("Berlin" in phrase for phrase in germany.descriptions)
    assert "Berlin" in echo_free(germany.facts, "Germany")


def test_a_sample_keeps_clusters_whole_and_hangs_on_the_seed() -> None:
    items = planted.items().items
    some = sampled(items, 5, 0)
    assert sampled(items, 5, 0) == some != sampled(items, 5, 1)
    assert {sum(i.relation == r for i in some) for r in {i.relation for i in some}} == {5}
    assert sampled(items, None, 0) == list(items)


@pytest.mark.shared
def test_the_papers_counts_come_out_exactly(shared: Path) -> None:
    rows = {file.stem: attribute_tsv.rows(file) for file in (shared / "data" / "patchscopes_tsv").rglob("*.tsv")}
    assert sum(len(some) for some, _ in rows.values()) == 16_047 and not any(corrupt for _, corrupt in rows.values())
    assert sum(row.usable for some, _ in rows.values() for row in some) == 14_213
    assert sum(row.correct for some, _ in rows.values() for row in some) == 2_168
    counts = {name: attribute_tsv.paper_prompts(some) for name, (some, _) in rows.items()}
    assert {name: counts[name] for name in PAPER} == PAPER
    assert sum(counts[name][0] for name in attribute_tsv.TASKS) == 1_453
    found = items_of(shared / "data" / "patchscopes_tsv")
    assert len(found.items) == 14_107  # usable, less 106 whose tokens end elsewhere
    assert all(item.prompt.count(item.subject) >= int(item.at.rpartition("#")[2]) for item in found.items)


@pytest.mark.shared
def test_lre_and_lens_items_are_read_whole(shared: Path) -> None:
    found = items_of(shared / "data" / "lre_relations")
    assert (len(found.items), len(found.relations), found.notes) == (11_089, 47, ())
    folder = shared / "data" / "jacobian_lens_eval" / "evaluations"
    counts = {file.stem.removeprefix("lens-eval-"): len(lens_items(file)[0]) for file in folder.glob("*.json")}
    assert counts == {"association": 102, "multihop": 93, "multilingual": 107, "order-ops": 55, "poetry": 98, "typo": 96}
