"""Lens pass@k: where items are read, what counts, and the figures against ranks worked out one by one."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import patchscopes as ps
from patchscopes import PatchscopesError
from patchscopes.evaluate import lens_pass, statistics
from patchscopes.evaluate.frame import Asked
from patchscopes.evaluate.lens_items import LensItem

SETTINGS = lens_pass.Settings(ks=(2, 10), lens="atlas")
RHYME = "The river ran beside the town,\nAnd then the sun went "


@pytest.fixture(scope="module")
def atlas() -> ps.Model:
    return ps.load("atlas")


def test_where_items_are_read(atlas: ps.Model) -> None:
    def token(prompt: str, target: str | None) -> str:
        one = lens_pass.read(atlas.tokens, "g", LensItem("n", prompt, ("Nepal",), target), Counter())
        assert one is not None
        return atlas.tokens(one.text).strings[one.at]

    assert token("The capital of Japan is ", "Tokyo") == " is"  # not the lone space behind it
    assert token("The capital of Japan", None) == " Japan"
    assert "\\n" in repr(token(RHYME, None)) or token(RHYME, None) == "⏎"
    assert token(RHYME, "down") == " went"  # a target says where


def test_what_counts_as_said(atlas: ps.Model) -> None:
    why: Counter[str] = Counter()
    given = LensItem("n", "A word about Japan", ("Nepal", "Japan", "antidisestablishment", "Nepal"), "x")
    one = lens_pass.read(atlas.tokens, "g", given, why)
    assert one is not None and one.words == ("Nepal",)
    assert {atlas.decode([k]).strip() for k in one.ids[0]} == {"Nepal"}
    assert lens_pass.read(atlas.tokens, "g", LensItem("n", "Japan", ("Japan",), None), why) is None
    assert lens_pass.read(atlas.tokens, "g", LensItem("n", "Japan " * 300, ("Nepal",), None), why) is None
    assert {text.rpartition(": ")[2]: n for text, n in why.items()} == {
        "their prompt says them": 2,
        "they are several tokens of the model": 1,
        "no intermediate remains": 1,
        "the model does not read their prompt": 1,
    }


def test_the_figures_are_those_of_ranks_by_hand(atlas: ps.Model, tmp_path: Path) -> None:
    asked = Asked(n=14, runs=tmp_path)
    found = lens_pass.evaluate(asked, SETTINGS)
    scopes: Any = found.scores["scopes"]
    assert set(scopes) == {"logit lens", "tuned lens"} and scopes["logit lens"]["layers"] == list(range(8))
    items, _ = lens_pass._items(asked)
    ranks = np.zeros((14, 14))  # of the intermediate of item j in the readings of item i, the best of all layers
    for i, one in enumerate(items):
        states = atlas.run(one.text, read=["resid.*"])
        for j, other in enumerate(items):
            best = []
            for layer in range(8):
                logits = atlas.unembed(states[f"resid.{layer}"])[0, one.at]
                best += [int((logits > logits[token]).sum()) + 1 for ids in other.ids for token in ids]
            ranks[i, j] = min(best)
    words = [one.words for one in items]
    partner = [k for k in statistics.strangers([0] * 14, words, words, 0) if k is not None]
    assert len(partner) == 14
    for k in SETTINGS.ks:
        mine = scopes["logit lens"][f"pass@{k}"]
        assert mine["any_layer"].value == pytest.approx((ranks.diagonal() <= k).mean())
        null = ranks[range(14), partner] <= k
        assert mine["another_items"].value == pytest.approx(null.mean())
        assert mine["over_another_items"].value == pytest.approx((ranks.diagonal() <= k).mean() - null.mean())
        assert mine["any_layer"].value >= max(one.value for one in mine["by_layer"].values())
    assert scopes["logit lens"]["pass@10"]["over_another_items"].low > 0  # the bridge is there before the answer
    assert len({one.words for one in items}) == scopes["logit lens"]["pass@2"]["any_layer"].clusters


def test_files_weigh_alike_and_shared_intermediates_are_no_null(tmp_path: Path) -> None:
    def item(prompt: str, *words: str) -> dict[str, Any]:
        return {"name": prompt, "prompt": prompt, "intermediates": list(words)}

    (tmp_path / "data").mkdir()
    one = [item("The capital of France", "Paris", "Europe"), item("The capital of Japan", "Tokyo", "Europe"), {"prompt": 1}]
    (tmp_path / "data" / "a.json").write_text(json.dumps({"items": one}))
    (tmp_path / "data" / "b.json").write_text(json.dumps({"items": [item(f"We met {x}", "Nepal") for x in ("Ann", "Bo", "Cy")]}))
    asked = Asked(data=tmp_path / "data", runs=tmp_path / "runs")
    found = lens_pass.evaluate(asked, lens_pass.Settings(ks=(600,), layers="0:4"))
    mine: Any = found.scores["scopes"]["logit lens"]["pass@600"]  # type: ignore[index]
    assert mine["any_layer"].n == 5 and found.scores["items"] == 5
    assert mine["another_items"].n == 2  # all of b have the same; of a what is not shared
    assert any("1 of 3 items of a.json" in caveat for caveat in found.caveats)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (lens_pass.Settings(ks=()), "ks is"),
        (lens_pass.Settings(ks=(0,)), "numbers of 1 or more"),
        (lens_pass.Settings(scopes=("lens",)), "unknown scope 'lens'"),
        (lens_pass.Settings(jacobian="nowhere.pt"), "no file 'nowhere.pt'"),
    ],
)
def test_wrong_settings(settings: lens_pass.Settings, message: str, tmp_path: Path) -> None:
    with pytest.raises(PatchscopesError, match=message):
        lens_pass.plan(Asked(n=2, runs=tmp_path), settings)


def test_data_without_items(tmp_path: Path) -> None:
    with pytest.raises(PatchscopesError, match="expected lens items"):
        lens_pass.plan(Asked(data=tmp_path / "nothing.json"), lens_pass.Settings())
    (tmp_path / "a.json").write_text('{"items": [{"prompt": "a b", "intermediates": []}]}')
    with pytest.raises(PatchscopesError, match=r"none of 1 items can be scored \(1 items were left out: no intermediate remains"):
        lens_pass.plan(Asked(data=tmp_path / "a.json"), lens_pass.Settings())
