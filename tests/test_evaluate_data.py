"""Readers of the public formats: on small files written here, and on the published ones where they are."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from patchscopes import PatchscopesError
from patchscopes.evaluate import attribute_tsv, entity, lre, planted, popqa
from patchscopes.evaluate.data import items_of, sampled
from patchscopes.evaluate.lens_items import lens_items
from patchscopes.evaluate.scoring import echo_free
from patchscopes.evaluate.statistics import in_first_half

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
    path = tsv(tmp_path / "country_capital_city.tsv", rows)
    with path.open("a", encoding="utf-8") as file:
        file.write("garbage\n" + "\t".join([*ROW.values(), "a cell too many"]) + "\n")
    found = items_of(path)
    (item,) = found.items
    assert (item.target, item.at, item.answers, item.known) == ("The capital city of {x}", "France#2", ("Paris",), True)
    assert item.relation == "country_capital_city" and item.prompt[: item.prompt.rindex("France")] == "from France to "
    assert [note.split(" ")[0] for note in found.notes] == ["4", "2", "1"] and "corrupt" in found.notes[0]


def test_a_subject_of_several_samples_is_one_entity(tmp_path: Path) -> None:
    again = {**ROW, "sample_id": "7", "prompt_source": "France is old", "source_cropped_toks": "['France']"}
    tsv(tmp_path / "capital.tsv", [ROW, again])
    tsv(tmp_path / "currency.tsv", [{**ROW, "sample_id": "0", "object": "franc", "prompt_target": "The currency of x"}])
    items = items_of(tmp_path).items
    assert len(items) == 3 and {item.cluster for item in items} == {"France"}
    # a cluster is drawn as a whole, and all of it is on one side of a split
    assert len(sampled([item for item in items if item.relation == "capital"], 1, 0)) == 1
    assert len({in_first_half(item.cluster) for item in items}) == 1


@pytest.mark.parametrize("name", ["x.tsv", "popqa.csv"])
def test_a_table_that_is_not_utf_8_says_so(name: str, tmp_path: Path) -> None:
    columns = attribute_tsv.COLUMNS if name == "x.tsv" else popqa.COLUMNS
    (tmp_path / name).write_bytes(("\t" if name == "x.tsv" else ",").join(columns).encode() + b"\n\xff\xfe\n")
    with pytest.raises(PatchscopesError, match=rf"{name} could not be read as a table.*UTF-8"):
        items_of(tmp_path / name)


def test_a_tsv_without_a_column_says_so(tmp_path: Path) -> None:
    path = tmp_path / "x.tsv"
    path.write_text("prompt_target\tprompt_source\na\tb\n")
    with pytest.raises(PatchscopesError, match="no column object, subject"):
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
    for name, value in (("samples", 5), ("prompt_templates", "The capital of {} is")):
        (tmp_path / "capital.json").write_text(json.dumps({**document, name: value}))
        with pytest.raises(PatchscopesError, match=rf"capital\.json has {name} = .*expected a list"):
            items_of(tmp_path)


def test_popqa(tmp_path: Path) -> None:
    names = ["subj", "prop", "obj", "question", "possible_answers", "s_pop", "s_wiki_title"]
    path = tmp_path / "popqa.tsv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(names)
        answers = '["politician", "political leader"]'
        writer.writerow(["George Rankin", "occupation", "politician", "What is George Rankin's occupation?", answers, "142", ""])
        writer.writerow(["X", "occupation", "y", "What is it?", "[]", "1", "X"])
        for bad in ("not JSON", '"politician"', '{"politician": 1}', '["a", 1]', "7"):
            writer.writerow(["X", "occupation", "y", "What is X?", bad, "1", "X"])
        for bad in ("inf", "nan", "many"):
            writer.writerow(["X", "occupation", "y", "What is X?", "[]", bad, "X"])
        writer.writerow(["X", "occupation"])
    found = items_of(path)
    assert found.notes[0].startswith("9 of 11 rows") and "corrupt" in found.notes[0]
    (item,) = found.items
    assert item.target == "Question: What is {x}'s occupation? Answer:"
    assert item.answers == ("politician", "political leader") and len(found.notes) == 2
    assert popqa.rows(path)[0][0].popularity == 142


def test_entities_of_one_name_are_told_apart(tmp_path: Path) -> None:
    rows = [
        ("John Smith", "occupation", job, title, 10 * k) for k, (job, title) in enumerate((("poet", "John Smith"), ("king", "J")))
    ]
    rows += [("Ann Lee", "occupation", "baker", "Ann Lee", 5), ("John Smith", "birthplace", "Rome", "J", 10)]
    path = tmp_path / "popqa.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(popqa.COLUMNS)
        for name, what, answer, title, popularity in rows:
            writer.writerow([name, what, answer, f"What is {name}'s {what}?", "[]", popularity, title])
    found = entity.of_popqa(path, [])
    assert {one.key: one.facts for one in found} == {"John Smith": ("poet",), "John Smith (J)": ("king", "Rome")}
    assert [prompt["labels"]["entity"] for prompt in entity.prompts_of(found, "name")] == ["John Smith", "John Smith (J)"]
    assert {prompt["text"] for prompt in entity.prompts_of(found, "name")} == {"John Smith"}


def test_lens_items(tmp_path: Path) -> None:
    path = tmp_path / "lens.json"
    bad = [{"prompt": "p", "intermediates": "letters"}, {"prompt": "p", "intermediates": [1]}, {"prompt": "p", "target": 8}]
    path.write_text(json.dumps({"items": [{"name": "a", "prompt": "p", "intermediates": ["b"]}, {"prompt": ""}, 3, *bad]}))
    found, corrupt = lens_items(path)
    assert [(i.name, i.prompt, i.intermediates, i.target) for i in found] == [("a", "p", ("b",), None)] and corrupt == 5
    for text in ("[]", '{"items": {"a": 1}}'):
        path.write_text(text)
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
