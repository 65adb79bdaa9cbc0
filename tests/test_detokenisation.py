"""Detokenisation: forms of words are exact, figures are their definitions, and readings are those of a plain patched run."""

from __future__ import annotations

import itertools
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

import patchscopes as ps
from patchscopes import PatchscopesError
from patchscopes.evaluate import detokenisation
from patchscopes.evaluate.detokenisation import ALONE, OWN, SCOPES, WHOLE, Hits, Settings, figures, first_layers, hits_of
from patchscopes.evaluate.frame import Asked
from patchscopes.evaluate.split_words import cuts, form_of, ids_behind
from patchscopes.evaluate.statistics import HeldOut

SMALL = Settings(kinds=("split",), pieces=2, layers="0:4", tokens=4)


@pytest.fixture(scope="module")
def atlas() -> ps.Model:
    return ps.load("atlas")


# ----------------------------------------------------------------------------------------------------------------------------- words


def test_cuts_are_all_there_are(atlas: ps.Model) -> None:
    tokenizer = atlas.tokenizer
    vocab = {tokenizer.decode([i]): i for i in range(len(tokenizer)) if i not in tokenizer.all_special_ids}
    for word in (" France", " Aristotle", " Japan"):
        (token,) = tokenizer(word, add_special_tokens=False)["input_ids"]
        by_hand = set()
        for n in (1, 2):
            for places in itertools.combinations(range(2, len(word)), n):
                texts = [word[a:b] for a, b in itertools.pairwise((0, *places, len(word)))]
                by_hand |= {tuple(vocab[text] for text in texts)} if all(text in vocab for text in texts) else set()
        found = cuts(tokenizer, token, 3)
        assert set(found) == by_hand and len(found) == len(by_hand) > 1
    assert not any(tokenizer.decode(ids[:1]).strip() == "" for ids in cuts(tokenizer, token, 5))


def test_forms_of_words(atlas: ps.Model) -> None:
    tokenizer, behind = atlas.tokenizer, "They painted"
    split = form_of(tokenizer, behind, "Aristotle", "split", Random(1))
    assert split is not None and split.whole is not None and 2 <= len(split.ids) <= 5
    assert tokenizer.decode(list(split.ids)) == tokenizer.decode([split.whole]) == " Aristotle"
    assert split.prompt == (*tokenizer(behind)["input_ids"], *split.ids) and split.alone[-1] == split.prompt[-1]
    assert len(split.alone) == len(split.before) + 1
    typo = form_of(tokenizer, behind, "Aristotle", "typo", Random(1))
    assert typo is not None and len(typo.ids) > 1
    text = tokenizer.decode(list(typo.ids)).strip()
    assert text != "Aristotle" and sorted(text) == sorted("Aristotle") and (text[0], text[-1]) == ("A", "e")
    natural = form_of(tokenizer, behind, "Marie Curie", "natural", Random(1))
    assert natural is not None and natural.whole is None and natural.ids == ids_behind(tokenizer, behind, "Marie Curie")
    assert form_of(tokenizer, behind, "Marie Curie", "split", Random(1)) is None
    assert form_of(tokenizer, behind, "France", "natural", Random(1)) is None
    assert form_of(tokenizer, behind, "tin", "split", Random(1)) is None  # too short
    sizes = {len(f.ids) for seed in range(40) if (f := form_of(tokenizer, behind, "Aristotle", "split", Random(seed)))}
    assert sizes == {2, 3, 4, 5}


def test_a_word_that_shares_a_token_with_what_is_before_has_no_form() -> None:
    class Joins:
        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [len(text)]}

    assert ids_behind(Joins(), "a", "b") is None


# ----------------------------------------------------------------------------------------------------------------------------- scores


def test_figures_are_their_definitions() -> None:
    cells = (("identity", 0), ("identity", 1), ("logit lens", 0))
    own = np.array([[0, 1, 0], [0, 1, 0], [1, 1, 0], [0, 0, 1]], bool)
    alone = np.array([[0, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 0]], bool)
    hits = Hits(("a", "b", "c", "d"), cells, own, alone, np.ones((4, 3), bool))
    found = figures(hits, HeldOut(1, np.array([0]), np.array([1, 2, 3])), {"other": {"b": True, "c": False}})
    assert (found["scope"], found["layer"], found["layers"]) == ("identity", 1, [0, 1])
    assert found["held_out"].value == pytest.approx(2 / 3) and found["last_token_alone"].value == pytest.approx(1 / 3)
    assert found["own_less_alone"].value == pytest.approx(1 / 3) and found["one_token"].value == 1
    assert found["any_layer"].value == 3 / 4 and found["any_layer_last_token_alone"].value == 2 / 4
    assert found["per_layer"].value == pytest.approx(4 / 8)
    assert found["p"] == 1.0 and found["other"].value == 0.5 and "random" not in found  # one discordant pair proves nothing
    assert found["first_layer"] == {"0": 0, "1": 2}  # a and c; b is said from its last token alone
    assert first_layers(np.array([[0, 1, 1], [1, 0, 1], [0, 0, 0]], bool), [2, 4, 6]) == {"2": 1, "4": 1, "6": 0}


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return detokenisation.evaluate(Asked(n=8, runs=tmp_path_factory.mktemp("split")), SMALL)


def test_readings_are_those_of_a_patched_run(atlas: ps.Model, split: Any) -> None:
    """Logit lens by hand; the identity prompt by writing the state into one plain run after the other."""
    rows = split.runs[0].table(control="none").filter(prompt=0, source_layer=2).select("written", "word", "scope", "text")
    word = rows["word"][0]
    behind = detokenisation.MENTIONS[detokenisation.seed_of(word) % 3]
    form = form_of(atlas.tokenizer, behind, word, "split", Random(f"0 {word}"), 2)
    assert form is not None and form.whole is not None
    target = atlas.tokens(SCOPES["identity"]["prompt"].replace("{x}", "x"))
    at = target.find("x").last
    checked = 0
    for written, ids in ((OWN, form.prompt), (ALONE, form.alone), (WHOLE, (*form.before, form.whole))):
        h = atlas.run(atlas.tokens(list(ids)), read="resid.2")["resid.2"][0, -1]
        said: list[int] = []
        for _ in range(4):
            run = atlas.run(atlas.tokens([*target.ids, *said]), edits=[ps.Edit("resid.2", at, h)])
            said.append(int(run.logits[0, -1].argmax()))
        want = {
            "identity": atlas.decode(said).partition("\n")[0],
            "logit lens": atlas.decode([int(atlas.unembed(h[None]).argmax())]),
        }
        for scope, text in want.items():
            some = rows.filter(written=written, word=word, scope=scope)["text"].to_list()
            assert [one.strip() for one in some] == [text.strip()]
            checked += 1
    assert checked == 6


def test_what_the_bundled_model_makes_of_words_in_pieces(split: Any) -> None:
    kinds: Any = split.scores["kinds"]
    one = kinds["split"]
    assert one["one_token"].value > 0.9 and max(one[name].value for name in ("other", "random", "nothing")) == 0
    assert 0 <= one["per_layer"].value <= one["any_layer"].value <= 1
    assert split.scores["words"] == {"split": 8} and len(split.tables[0].rows) == 1
    hits = hits_of(split.runs[0], [])
    assert hits.words == ()
    assert [figure.name for figure in split.figures] == ["by-layer-split", "held-out"]
    assert "from the last token alone" in split.claims[0]


def test_random_weights_say_no_word(tmp_path: Path) -> None:
    model = ps.load("atlas")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.hf.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.05)
    asked = Asked(n=8, runs=tmp_path, models={"atlas": ps.load((model.hf, model.tokenizer))})
    found: Any = detokenisation.evaluate(
        asked, Settings(kinds=("split", "natural"), scopes=("identity",), layers="1:3", tokens=3)
    )
    assert all(one["any_layer"].value == 0 and one["p"] == 1 for one in found.scores["kinds"].values())


def test_wrong_words_and_settings(tmp_path: Path) -> None:
    def refused(match: str, settings: Settings = SMALL, **asked: Any) -> None:
        with pytest.raises(PatchscopesError, match=match):
            detokenisation.evaluate(Asked(runs=tmp_path, **asked), settings)

    refused("unknown kind 'torn'", Settings(kinds=("torn",)))  # type: ignore[arg-type]
    refused("unknown scope 'x'", Settings(scopes=("x",)), n=2)
    refused("at least one kind", Settings(pieces=1))
    refused("the logit lens says one", Settings(kinds=("natural",), scopes=("logit lens",)), n=2)
    refused("no file .*words, one a line", data=tmp_path / "none.txt")
    (tmp_path / "a.txt").write_text("tin\n\nto\ntin\n")
    refused("there is no word to read", data=tmp_path / "a.txt")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    refused("not UTF-8", data=tmp_path / "a.txt")
    refused("cannot be split into two halves", n=1)
    (tmp_path / "a.txt").write_text("Japan\nFrance\nKenya\nPeru\ntin\n")
    found = detokenisation.evaluate(
        Asked(runs=tmp_path, data=tmp_path / "a.txt"), Settings(("split",), ("logit lens",), layers="0")
    )
    assert any(note.startswith("1 of 5 words have no form of the kind 'split'") for note in found.caveats)
    assert found.scores["words"] == {"split": 4}  # type: ignore[comparison-overlap]
