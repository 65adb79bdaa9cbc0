"""Questions of two hops: their readers, filters and classification; back-patching and self-correction scored on tables worked by hand."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from patchscopes.core.errors import InputError, NotAvailableError
from patchscopes.evaluate import back_patching, hop_stages, multihop, tries
from patchscopes.evaluate.frame import Asked, Lines, settings_of
from patchscopes.evaluate.hops import COLUMNS, Outcome, Question, bare, classify, filtered, funnel, questions_of, right, strangers
from patchscopes.organisms.atlas.facts import world
from patchscopes.runs import sweep

NEPAL = Question("Mount Everest", ("Nepal",), ("Kathmandu", "Katmandu"), "the country of {}", "The capital of {}")
PERU = Question("Machu Picchu", ("Peru",), ("Lima",), "the country of {}", "The capital of {}")


# ------------------------------------------------------------------------------------------------------------------------- questions


def test_what_is_asked() -> None:
    assert NEPAL.text == "The capital of the country of Mount Everest is"
    assert (NEPAL.phrase, NEPAL.second) == ("the country of Mount Everest", "The capital of")
    assert NEPAL.prompts == {
        "first_hop": "The country of Mount Everest is",
        "second_hop": "The capital of Nepal is",
        "composition": NEPAL.text,
        "entity_shortcut": "The capital of Mount Everest is",
        "relation_shortcut": "The capital of the country is",
    }
    assert (NEPAL.answers("first_hop"), NEPAL.answers("composition")) == (("Nepal",), ("Kathmandu", "Katmandu"))
    assert Question("a", ("b",), ("c",), "the spouse of {}", "{} has a father named").second is None
    assert not NEPAL.gives_away and Question("Lima's wall", ("Peru",), ("Lima",), "{}", "{}").gives_away


def test_a_relation_without_its_entity_is_well_formed() -> None:
    given = (
        "the country of {}",
        "the company that produced {}",
        "the work that features {}",
        "the chief executive officer of {}",
    )
    assert [bare(one) for one in given] == ["the country", "the company", "the work", "the chief executive officer"]


def test_those_of_atlas_are_all_that_training_held_out() -> None:
    found = questions_of(None)
    assert len(found.items) == sum(hop.held_out for hop in world().two_hops) > 2000
    assert found.stop == (".",) and not found.notes


def row(**other: str) -> dict[str, str]:
    whole = dict.fromkeys(COLUMNS, "")
    whole |= {
        "e1_label": "Inception",
        "e2_label": "Nolan",
        "e3_label": "Emma",
        "e2_aliases": "['C. Nolan', 'N']",
        "e3_aliases": "[]",
    }
    return {**whole, "r1_template": "the director of {}", "r2_template": "the spouse of {}", **other}


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(itertools.chain(*rows))), restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_the_public_csv_is_read_and_corrupt_rows_are_counted(tmp_path: Path) -> None:
    good = row(source_prompt="the spouse of the director of Inception is")
    rows = [good, good, row(e3_label=""), row(e2_aliases="['a"), row(e3_aliases="3"), row(r1_template="the director")]
    rows += [row(source_prompt="the spouse of Inception is"), row(e3_aliases="[" * 500)]
    found = questions_of(write(tmp_path / "two_hop.csv", rows))
    assert found.items == (Question("Inception", ("Nolan", "C. Nolan"), ("Emma",), "the director of {}", "the spouse of {}"),)
    assert found.items[0].prompts["first_hop"] == "the director of Inception is"
    told = " ".join(found.notes)
    for what in (
        "1 of 8 rows",
        "a cell is missing",
        "3 of 8 rows",
        "aliases are no list",
        "not exactly one {}",
        "not that of its templates",
    ):
        assert what in told, what


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotAvailableError, match="no file"):
        questions_of(tmp_path / "none.csv")
    with pytest.raises(InputError, match="no column e2_aliases"):
        questions_of(write(tmp_path / "a.csv", [{k: v for k, v in row().items() if k != "e2_aliases"}]))
    with pytest.raises(InputError, match="no row that can be used"):
        questions_of(write(tmp_path / "b.csv", [row(e1_label="")]))
    apart = {
        "subject": "Ann",
        "bridge": "India",
        "answers": ["Mumbai"],
        "prompt1": "Ann was born in",
        "prompt2": "The capital of India is",
    }
    (tmp_path / "d.jsonl").write_text(json.dumps(apart) + "\n")
    with pytest.raises(
        InputError, match=r"d\.jsonl asks its two hops apart .*how they are put together; expected a CSV .*r1_template a noun"
    ):
        questions_of(tmp_path / "d.jsonl")
    (tmp_path / "e.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(InputError, match=r"e\.jsonl holds JSON; expected a CSV"):
        questions_of(tmp_path / "e.jsonl")
    (tmp_path / "c.csv").write_bytes(b"\xff\xfe\x00e1")
    with pytest.raises(InputError):
        questions_of(tmp_path / "c.csv")


# --------------------------------------------------------------------------------------------------------------------------- scoring


def test_right_by_the_papers_test_and_by_words() -> None:
    assert right(" LIMAnea", ("Lima",)) and not right(" LIMAnea", ("Lima",), "words")
    assert right("it is Lima.", ("Lima",), "words") and not right("", ("Lima",)) and not right(None, ("Lima",))
    assert not right("a", ("a",))  # of one letter


def test_filters_on_planted_answers() -> None:
    texts = {
        NEPAL.prompts[what]: text
        for what, text in zip(NEPAL.prompts, (" Nepal", " Kathmandu", " Lima", " Himalaya", " Oslo"), strict=True)
    }
    texts |= {PERU.prompts["first_hop"]: " Peru", PERU.prompts["second_hop"]: " Lima", PERU.text: " Lima"}
    texts |= {PERU.prompts["entity_shortcut"]: " Lima"}
    unknown = Question("Atlantis", ("Greece",), ("Athens",), "the country of {}", "The capital of {}")
    outcomes = filtered([NEPAL, PERU, unknown], texts, "words")
    assert [(one.knows, one.shortcut, one.studied, one.passed["composition"]) for one in outcomes] == [
        (True, False, True, False),
        (True, True, False, True),
        (False, False, False, None),
    ]
    counts = [n for _, n in funnel(outcomes)]
    assert counts == [3, 2, 2, 1, 1, 1, 0, 1]


@pytest.mark.parametrize(
    ("text", "which"),
    [
        (": Mount Everest is a mountain", "e1"),
        (": Nepal is a country", "e2"),
        ("x: nepal, a country", "e2"),
        (": a city: Katmandu", "e3"),
        (": Kathmandu.", "e3"),
        (" Nepal: Kathmandu is its capital", "e2"),
        ("Nepal is a country", "other"),
        (": Nepalese cook", "other"),
        ("", "other"),
    ],
)
def test_descriptions_are_classified(text: str, which: str) -> None:
    assert classify(text, NEPAL) == which


def patched(said: dict[tuple[str, int, int], str], kind: str, where: str = "last") -> list[dict]:
    return [
        {
            "part": where,
            "prompt_text": question.text,
            "control": kind,
            "source_layer": a,
            "target_layer": b,
            "text": said.get((question.e1, a, b), ""),
        }
        for question in (NEPAL, PERU)
        for a, b in itertools.product((1, 2, 3), repeat=2)
    ]


def test_back_patching_is_scored_by_hand() -> None:
    own = {("Mount Everest", 3, 1): " Kathmandu", ("Mount Everest", 2, 1): "Katmandu", ("Machu Picchu", 1, 2): " Lima"}
    table = pl.DataFrame(
        patched(own, "none")
        + patched({("Machu Picchu", 3, 2): "in Lima"}, "other")
        + patched({}, "random")
        + patched(own, "none", "bridge")
    )
    hits = tries.hits_of(table, (NEPAL, PERU), "last", "paper")
    assert "other" not in hits.hits  # a control of the viewing, which may be a prompt of the pool
    strange = pl.DataFrame(patched({("Machu Picchu", 3, 2): "in Kathmandu"}, "none", "last 0"))
    hits = tries.beside(hits, strange, [("last 0", PERU.text), ("last 0", NEPAL.text)], (NEPAL, PERU), "paper")
    assert hits.pairs == tuple(itertools.product((1, 2, 3), repeat=2))
    assert hits.hits["none"].sum() == 3 and hits.hits["random"].sum() == 0
    scores = back_patching.figures(hits, ["Nepal", "Peru"])
    assert scores["n_tries"] == 3
    assert scores["any_of_N none"].value == 0.5 and scores["per_try none"].value == pytest.approx(2 / 6)
    assert (
        scores["any_of_N other"].value == 0.5 and scores["any_of_N random"].value == 0 and scores["any_of_N forward"].value == 0.5
    )
    assert scores["p"] == 1.0 and scores["over_other"].value == 0 and scores["compared"] == 2
    assert "does no better than another's" in back_patching.claim("last", scores)


def test_a_stranger_is_another_question_with_another_bridge_and_answer() -> None:
    def asks(e1: str, e2: str, e3: str, r2: str = "The capital of {}") -> Question:
        return Question(e1, (e2,), (e3,), "the country of {}", r2)

    everest, annapurna, machu = asks("Everest", "Nepal", "Kathmandu"), asks("Annapurna", "Nepal", "Kathmandu"), PERU
    moved, money = asks("Nebo", "Nepalia", "Oslo"), asks("Etna", "Italy", "lira", "The currency of {}")
    home = asks("Kathmandu valley", "Asia", "none")
    some = [everest, annapurna, machu, moved, money, home]
    found = strangers(some)
    assert set(found[:2]) <= {machu} and found[4] is None and found[2] in {everest, annapurna, moved, home}
    assert strangers(some[::-1]) == found[::-1]  # who it is hangs on no order
    assert strangers(some, read=[True, True, False, True, True, True])[:3] == [None, None, None]


def test_questions_without_a_stranger_are_left_out_of_its_figures_and_told() -> None:
    own = tries.Hits(((1, 1), (2, 1)), {"none": np.array([[True, False]] * 4), "random": np.zeros((4, 2), bool)})
    table = pl.DataFrame(patched({("Machu Picchu", 2, 1): "Kathmandu"}, "none", "there"))
    tried = [("there", PERU.text), None, ("gone", PERU.text), None]
    found = tries.beside(own, table, tried, [NEPAL] * 4, "paper")
    assert found.compared is not None and found.compared.tolist() == [
        True,
        False,
        False,
        False,
    ]  # one that could not be read is none
    scores = tries.figures(found, np.ones(2, bool), ["a", "b", "c", "d"])
    assert (scores["any_of_N other"].value, scores["any_of_N other"].n, scores["compared"]) == (1.0, 1, 1)
    assert scores["over_other"].value == 0 and scores["any_of_N none"].n == 4
    (note,) = tries.alone({"bridge": found, "last": found, "whole": own})
    assert note.startswith("bridge, last: for 3 of 4 questions no other question")
    assert "any_of_N other" not in tries.figures(
        tries.beside(own, table, [None] * 4, [NEPAL] * 4, "paper"), np.ones(2, bool), "abcd"
    )


def test_a_strangers_state_goes_where_the_own_one_does(tmp_path: Path) -> None:
    """With the question itself for a stranger the readings are its own ones."""
    asked, some = Asked(runs=tmp_path), list(questions_of(None).items[:2])
    back = back_patching.Settings(tokens=2)
    hop = multihop.Settings(tokens=2, layers="3,6", target_layers="2,5")
    own, other = (
        sweep(one, runs=tmp_path)
        for one in (back_patching._patching(asked, back, some, ()), back_patching._others(asked, back, some, some, ()))
    )
    for where in back.positions:
        said = tries._said(own.table(), {(where, one.text) for one in some})["none"]
        strange = tries._said(other.table(), {(f"{where} {k}", one.text) for k, one in enumerate(some)})["none"]
        assert len(said) == 2 * 64 and sorted(said.values()) == sorted(strange.values())
        for (part, text, a, b), words in strange.items():
            assert some[int(part.split()[1])].text == text and said[where, text, a, b] == words
    own, other = (
        sweep(one, runs=tmp_path)
        for one in (multihop._patching(asked, hop, some, (), controls=False), multihop._others(asked, hop, some, some, ()))
    )
    for form in hop.forms:
        for k, one in enumerate(some):
            text = multihop._source(form, one)[0]
            said = tries._said(own.table(), {(multihop._part(form, one), text)})["none"]
            strange = tries._said(other.table(), {(multihop._others_part(form, one, k), text)})["none"]
            assert len(said) == 4 and list(said.values()) == list(strange.values())


def test_the_papers_figure_of_self_correction() -> None:
    """Of all questions whose hops are known; beside it how many are answered as they are."""
    sample = [Outcome(one, {"composition": answered}) for one, answered in ((NEPAL, False), (PERU, True))]
    found = multihop.papers(np.array([True, True]), sample)
    assert (found["paper"].value, found["paper vanilla"].value) == (1.0, 0.5)


@pytest.mark.parametrize(
    ("better", "said"), [("none", "does better than another's"), ("other", "Another question's state does better")]
)
def test_the_direction_is_stated_either_way(better: str, said: str) -> None:
    n = 12
    hits = {kind: np.zeros((n, 2), bool) for kind in ("none", "other", "random")}
    hits[better][:, 1] = True
    scores = back_patching.figures(tries.Hits(((1, 2), (2, 1)), hits), [f"c{k}" for k in range(n)])
    assert scores["p"] == pytest.approx(2 / 2**n)
    assert said in back_patching.claim("bridge", scores)
    assert scores["pair"] == (2, 1) and scores[f"held_out {better}"].value == 1


# --------------------------------------------------------------------------------------------------------------------------- whole


def test_back_patching_on_atlas_is_recorded_and_instant_again(tmp_path: Path) -> None:
    asked = Asked(n=90, quick=True, runs=tmp_path)
    settings = back_patching.Settings(positions=("last",), most=3, tokens=4)
    result = back_patching.evaluate(asked, settings)
    assert result.scores["questions"] == 3
    assert result.runs[1].cells == 3 * 64 * 5
    found = result.scores["places"]["last"]
    assert {"any_of_N none", "any_of_N other", "any_of_N random", "any_of_N forward"} <= set(found)
    strange = result.runs[2].table(status="ok")
    assert set(strange["control"]) == {"none"} and strange.height == found["compared"] * 64
    assert set(strange["prompt_text"]) <= set(result.runs[1].table()["prompt_text"])  # other questions, none of the pool
    assert found["any_of_N other"].n == found["compared"] and found["any_of_N none"].n == 3
    assert (found["compared"] < 3) == any("no other question" in one for one in result.caveats)
    assert "tokens = 4 instead of 10" in result.deviations
    json.dumps(result.to_json())
    again = back_patching.evaluate(asked, settings)
    assert [run.id for run in again.runs] == [run.id for run in result.runs]
    assert [one.name for one in back_patching.plan(asked, settings)] == ["two-hop-asked", "back-patching", "back-patching-others"]


def test_self_correction_is_scored_by_hand() -> None:
    pairs = ((1, 1), (2, 1))
    own = np.array([[True, False], [False, False]])
    other = np.zeros_like(own)
    scores = multihop.figures(tries.Hits(pairs, {"none": own, "other": other, "random": other}), [NEPAL, PERU])
    assert scores["n_tries"] == 2 and scores["any_of_N none"].value == 0.5 and scores["per_try none"].value == 0.25
    assert scores["any_of_N other"].value == 0 and scores["p"] == 1.0
    assert "no difference shown" in multihop.claim("phrases", scores)
    kept = multihop.kept(tries.Hits(((2, 1),), {"none": own[:, :1]}), [NEPAL, PERU])
    assert kept["kept none"].value == 0.5
    scores |= {"pair": (2, 1), "held_out none": kept["kept none"], "held_out other": kept["kept none"]} | kept
    assert "One pair, 2 into 1" in multihop.claim("slot", scores)


def test_the_forms_of_self_correction() -> None:
    assert multihop._source("phrases", NEPAL) == (NEPAL.phrase, {"prompt": "The capital of", "at": -1})
    assert multihop._source("slot", NEPAL) == (NEPAL.phrase, {"prompt": "The capital of {x} is"})
    query = ("The capital of the country of Mount Everest", {"preset": "back-patch", "at": "The capital of#1"})
    assert multihop._source("query", NEPAL) == query


def test_self_correction_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    from patchscopes.cli import main

    sets = ("--set", "most=2", "--set", "tokens=3", "--set", "forms=slot,query", "--set", "target_layers=1:4")
    args = ["patchscopes", "evaluate", "multihop", "--quick", "--n", "60", "--json", "--runs", str(tmp_path), *sets]
    monkeypatch.setattr("sys.argv", args)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code in (0, None)
    found = json.loads(capsys.readouterr().out)
    assert set(found["scores"]["forms"]) == {"slot", "query"} and found["scores"]["failed"] == 2
    assert Path(found["page"]).exists()
    for own in found["scores"]["forms"].values():
        assert own["paper"]["n"] == own["paper vanilla"]["n"] == 2
    assert [row[0] for table in found["tables"] if table["name"] == "The paper's figure" for row in table["rows"]] == [
        "slot",
        "query",
    ]
    names = [run["name"] for run in found["runs"]]
    assert names[:2] == ["two-hop-asked", "multihop"] and set(names) <= {
        *names[:2],
        "multihop-others",
        "multihop-kept",
        "multihop-kept-others",
        "multihop-answered",
    }


@pytest.mark.parametrize(
    ("name", "setting", "told"),
    [
        ("back-patching", "positions=foo", "unknown positions foo; expected some of bridge, last"),
        ("back-patching", "positions=", "the setting positions is empty"),
        ("back-patching", "most=0", "the setting most is 0; expected 1 or more"),
        ("multihop", "forms=slot,foo", "unknown forms foo; expected some of phrases, slot, query"),
        ("multihop", "tokens=0", "the setting tokens is 0"),
        ("hop-stages", "window=-1", "the setting window is -1; expected 0 or more"),
        ("hop-stages", "most=-2", "the setting most is -2"),
        ("hop-stages", "describe=a place", "expected {x} where the state goes"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_planned(
    name: str, setting: str, told: str, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    from patchscopes.cli import main

    monkeypatch.setattr("sys.argv", ["patchscopes", "evaluate", name, "--quick", "--dry-run", "--set", setting])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert told in " ".join(said.err.split()) and not said.out


# --------------------------------------------------------------------------------------------------------------------------- stages


def test_windows_end_with_the_blocks() -> None:
    assert hop_stages.windows(6, 1) == [(0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 5)]
    assert set(hop_stages.windows(4, 9)) == {(0, 3)}


@pytest.mark.parametrize("behind", [2, 3])
def test_a_knockout_of_a_window_equals_a_full_pass_with_masks(behind: int, tmp_path: Path) -> None:
    import torch
    from families import blocks_of, loaded
    from oracle import error

    import patchscopes as ps
    from patchscopes.core.edits import load_edits

    model, text = loaded("llama"), "the cat sat on"
    ids = model.tokens(text).ids
    n = len(ids)
    source = ps.Source(model, text, layer=0)
    scopes = hop_stages.knock_outs(model.n_layers, 1, 1, tmp_path, behind)
    assert [scope["name"] for scope in scopes] == ["-1", *map(str, range(model.n_layers))]
    seen = []
    for scope in scopes:
        edits = load_edits(scope["edits"]) if "edits" in scope else ()
        one = ps.Patchscope(None, layer=0, max_new_tokens=1, edits=edits)(source, controls=False, keep_logits=True)
        window = range(0)
        if edits:
            first, last = hop_stages.windows(model.n_layers, 1)[int(scope["name"])]
            window = range(first, last + 1)
        hidden = torch.full((n, n), torch.finfo(torch.float32).min).triu(1)
        hidden[-1, -behind] = torch.finfo(torch.float32).min

        def hide(_module, args, kwargs, hidden=hidden):
            return args, {**kwargs, "attention_mask": hidden[None, None]}

        handles = [blocks_of(model.hf, "llama")[b].register_forward_pre_hook(hide, with_kwargs=True) for b in window]
        with torch.no_grad():
            want = model.hf(torch.tensor([ids]), use_cache=False).logits[0, -1]
        for handle in handles:
            handle.remove()
        assert one.logits is not None and error(one.logits[0], want) < 1e-4
        seen.append(one.logits[0])
    assert not torch.allclose(seen[0], seen[2])  # hiding an attended token changes something
    future = ps.edits.knock_out("*", 1, -1)
    later = ps.Patchscope(None, layer=0, max_new_tokens=1, edits=future)(source, controls=False, keep_logits=True)
    assert later.logits is not None and error(later.logits[0], seen[0]) < 1e-5  # what comes later is not attended to anyway


def stage_rows() -> list[dict]:
    def one(part, whose, layer, text, scope="describe", token="", number=0):
        asked = PERU if whose == "other" else NEPAL
        head = {"prompt_text": asked.text, "part": part, "control": "none", "scope": scope, "source_layer": layer}
        return {**head, "text": text, "next_token": token, "next_token_id": number}

    return [
        one("bridge", "none", 2, ": mountain"),
        one("bridge", "none", 3, ": mountain in Nepal"),
        one("bridge", "none", 5, ": Nepal is a country"),
        one("bridge", "other", 4, "in Nepal"),
        one("last", "none", 6, ": Nepal"),
        one("last", "none", 7, ": Kathmandu is a city"),
        one("knock-out -2", "none", 0, " Kathmandu", "-1", " Kath", 9),
        one("knock-out -2", "none", 0, " Katmandu", "0", " Kat", 8),  # right as well: not broken
        one("knock-out -2", "none", 0, " Lima", "1", " Lima", 7),
        one("attn_out", "none", 3, "", token=" Nep"),
        one("attn_out", "none", 1, "", token=" K"),
        one("mlp_out", "none", 2, "", number=4),
        one("mlp_out", "none", 5, "", number=9),
    ]


def test_stages_are_found_by_hand() -> None:
    table = pl.DataFrame(stage_rows())
    found = hop_stages.stages(table, NEPAL, "named", PERU)
    assert found.broken == (1,)
    assert found.layers == {"first_hop": 3, "propagation": (2 + 4 + 6) / 3, "second_hop": 7, "extraction": 6}
    assert found.null == {"e2 at bridge": (4,), "e2 at last": (), "e3 at last": ()}
    paper = hop_stages.stages(table, NEPAL, "paper")
    assert paper.layers["first_hop"] == 5 and paper.named["e2 at bridge"] == (5,)
    nothing = hop_stages.stages(table.clear(), NEPAL, "named")
    assert set(nothing.layers.values()) == {None}
    scores = hop_stages.summary([found, nothing], [NEPAL, PERU])
    assert scores["first_hop layer"] == 3 and scores["first_hop seen"].value == 0.5
    null = scores["first_hop seen, another question's state"]
    assert (null.value, null.n) == (1.0, 1)  # of the one that has a stranger
    told = hop_stages.result({"failed": [PERU]}, {"failed": [nothing]}, (("asked", 1),), 0)
    assert (
        "under another's state" not in " ".join(told.claims)
        and isinstance(told.figures[0], Lines)
        and len(told.figures[0].lines) == 3
    )


def test_t1_is_hidden_wherever_it_stands(tmp_path: Path) -> None:
    """Not only where it is the token before the last; and not where it is part of the last one."""
    from patchscopes.core.edits import load_edits

    class Words:
        def tokens(self, text: str) -> Any:
            return Pieces(text)

    class Pieces(list):
        def __init__(self, text: str):
            last = {"Nepal": [" i", "s"], "Peru": [" is"]}.get(text.split()[-2], [])
            super().__init__([*text.removesuffix(" is").split(), *last])

        def position(self, piece: str) -> int:
            return max(k for k, word in enumerate(self) if word == piece.split()[-1])

    some = [Question("a", ("b",), ("c",), f"the {place} of x in {place}", "The r of {}") for place in ("Nepal", "Peru", "Chad")]
    found = hop_stages.from_the_end(Words(), some)  # type: ignore[arg-type]
    assert found == {3: [some[0].text], 2: [some[1].text]}
    for back in (2, 3):
        paths = [one["edits"] for one in hop_stages.knock_outs(2, 0, 1, tmp_path, back) if "edits" in one]
        assert {edit.keys for path in paths for edit in load_edits(path)} == {-back}


def test_the_phrase_is_the_last_thing_before_is(tmp_path: Path) -> None:
    """What does not end so is counted, in both experiments that need it."""
    rows = [row(), row(e1_label="Tenet", r2_template="{} has a spouse who")]
    data = write(tmp_path / "two_hop.csv", rows)
    for module in (multihop, hop_stages):
        questions, notes, _ = module._questions(Asked(data=data))
        assert len(questions) == 1 and any(one.startswith("1 questions were left out") for one in notes)
    write(data, rows[1:])
    for module in (multihop, hop_stages):
        with pytest.raises(InputError, match="no question whose second relation ends in its slot"):
            module._questions(Asked(data=data))


def test_a_form_keeps_the_questions_whose_part_is_there() -> None:
    other = Question("Machu Picchu", ("Peru",), ("sol",), "the country of {}", "The currency of {}")
    head = {"prompt_text": other.phrase, "part": "slot: The currency of", "control": "none", "source_layer": 1}
    table = pl.DataFrame([{**head, "target_layer": 1, "text": "the sol"}])
    found = multihop._hits(table, ("phrases", "slot"), [NEPAL, other], "paper")
    assert list(found) == ["slot"] and found["slot"].hits["none"].tolist() == [[False], [True]]


def test_draws_of_descriptions() -> None:
    asked = Asked(quick=True)
    settings = hop_stages.Settings(draws=3, temperature=1.0, most=1)
    plan = hop_stages.plan(asked, settings)[1]
    assert {part.name: part.draws for part in plan.split() if part.draws > 1} == {"bridge": 3, "last": 3}
    with pytest.raises(InputError, match="3 draws at temperature 0"):
        hop_stages.Settings(draws=3)
    _, told = settings_of(hop_stages.Settings(), asked)
    assert {"test = 'named' instead of 'paper'", "draws = 1 instead of 3"} <= set(told)
    _, told = settings_of(hop_stages.Settings(test="paper", draws=3, temperature=1.0), asked)
    assert not told


def test_a_token_begins_a_name() -> None:
    assert (
        hop_stages.begins(" Nep", ("Nepal",))
        and not hop_stages.begins(" N", ("Nepal",))
        and not hop_stages.begins("", ("Nepal",))
    )


def test_stages_of_atlas(tmp_path: Path) -> None:
    asked = Asked(n=90, quick=True, runs=tmp_path)
    result = hop_stages.evaluate(asked, hop_stages.Settings(most=2, tokens=4, draws=2, temperature=1.0))
    assert set(result.scores["groups"]) == {"answered", "failed"} and len(result.runs) == 2
    assert result.runs[1].counts["failed"] == 0
    json.dumps(result.to_json())
