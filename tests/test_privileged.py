"""The privileged-information test: bits about answers against full passes, its scores on hand-made readings, and the whole on atlas."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from families import loaded
from oracle import Patch, states, text_log_p

from patchscopes.core.errors import InputError
from patchscopes.evaluate import privileged
from patchscopes.evaluate.answer_bits import AnswerBits, answer_bits, strangers_of
from patchscopes.evaluate.data import Item
from patchscopes.evaluate.frame import Asked
from patchscopes.evaluate.pairs import PAIRS, Pair, belief_of, pairs_of
from patchscopes.evaluate.privileged_page import best, bits_text, name_of
from patchscopes.evaluate.privileged_scores import Baselines, PairScores, Seen, adjusted, scores_of

ANSWERS = ("tea", "rice", "figs", "corn")


def item(k: int, relation: str = "food") -> Item:
    return Item(relation, f"name{k}", (ANSWERS[k % 4],), f"we met name{k}", f"name{k}#1", "food of {x} is", f"name{k}")


class TestAnswerBits:
    """log2 p of the answer by full passes with one hook."""

    ITEMS = tuple(
        Item("r", who, (what,), f"the {who}", f"{who}#1", "hello {x} is", who)
        for who, what in (("ab", "cd"), ("ba", "dc"), ("bb", "cc"))
    )

    def test_every_number(self) -> None:
        model = loaded("llama")
        found = answer_bits(model, model, self.ITEMS, [1, 3], 2, stop=(".",))
        target = model.tokens("hello x is")
        for k, one in enumerate(self.ITEMS):
            text = model.tokenizer(f" {one.answers[0]}.", add_special_tokens=False)["input_ids"]

            def bits(ids: tuple[int, ...], patch: Patch | None, text: list[int] = text) -> float:
                return float(text_log_p(model.hf, "llama", ids, patch, text).double().sum()) / math.log(2)

            assert found.nothing[k] == pytest.approx(bits(target.ids, None), abs=1e-3)
            assert found.named[k] == pytest.approx(bits(model.tokens(f"hello {one.subject} is").ids, None), abs=1e-3)
            assert found.source[k] == pytest.approx(bits(model.tokens(f"hello the {one.subject} is").ids, None), abs=1e-3)
            for column, layer in enumerate((1, 3)):
                each = []
                for other in self.ITEMS:
                    h = states(model.hf, "llama", model.tokens(other.prompt).tensor)[f"resid.{layer}"][0, -1]
                    each.append(bits(target.ids, Patch("resid.2", target.position("x"), h)))
                own, others = each[k], [one for j, one in enumerate(each) if j != k]
                assert found.own[k, column] == pytest.approx(own, abs=1e-3)
                assert found.others[k, column] == pytest.approx(math.log2(sum(2**one for one in others) / 2), abs=1e-3)
        assert found.over("nothing")[:, 1] == pytest.approx(found.own[:, 1] - found.nothing)
        assert found.over("others") == pytest.approx(found.own - found.others)

    def test_strangers_have_another_answer_and_are_the_same_for_the_same_seed(self) -> None:
        items = [item(k) for k in range(9)]
        found = strangers_of(items, 3, 5)
        assert found == strangers_of(items, 3, 5) and found != strangers_of(items, 3, 6)
        for k, others in enumerate(found):
            assert len(others) == 3 and all(items[j].answers != items[k].answers for j in others)
        assert strangers_of([item(0), item(4)], 3, 0) == [[], []]  # both drink tea


def pair(said: np.ndarray, gains: dict[str, float], priors: list[str | None], named: list[str]) -> PairScores:
    """Scores of hand-made readings: said[item, layer], and bits that are the same everywhere but for a little noise."""
    n, layers = said.shape
    items = tuple(item(k) for k in range(n))
    noise = np.random.default_rng(0).normal(0, 0.2, (n, layers))
    zeros = np.zeros(n)
    own = noise
    bits = AnswerBits(
        items, tuple(range(layers)), own, own * 0 - gains["others"], zeros - gains["nothing"], zeros - gains["named"], zeros
    )
    evidence = {
        name: np.where(np.arange(n)[:, None] % 2 == 0, 1.0, -1.0) * np.ones((n, layers))
        for name in ("bits_over_nothing", "bits_over_random", "bits_over_others", "bits_over_text", "explained")
    }
    texts = {"none": said, "nothing": np.full(said.shape, " x", object)}
    seen = Seen(items, tuple(range(layers)), texts, evidence, np.ones((n, layers)))
    base = Baselines(tuple(named), bits)
    return scores_of("one", "other", seen, base, priors, {a: (a,) for a in ANSWERS}, seed=0)


def all_say(text: str, n: int = 12) -> np.ndarray:
    return np.array([[text]] * n, object)


class TestScores:
    def test_whose_facts_are_told(self) -> None:
        """Layer 0 gives each item's own answer, layer 1 what the speaker believes."""
        n = 12
        priors = [ANSWERS[(k + 1) % 4] for k in range(n)]
        said = np.array([[f" {item(k).answers[0]}", f" {priors[k]}"] for k in range(n)], object)
        found = pair(said, {"nothing": 0, "others": 0, "named": 0}, list(priors), priors)
        assert [one.target.value for one in found.layers] == [1, 0] and [one.prior.value for one in found.layers] == [0, 1]
        assert found.named.value == 0 and found.conflicts == n
        assert [one.over_text.difference.value for one in found.layers] == [1, 0]
        assert found.layers[0].over_text.p_exact == pytest.approx(2 / 2**n)  # 12 of 12 discordant pairs one way
        assert found.best is not None and found.best.per_draw.value == 0.5 and found.best.any_of.value == 1
        assert found.layers[0].permuted.p < 0.01 and found.layers[1].stated.hallucinated.value == 1
        # bits_over_text is above 0 for every other item: right where it says M1's fact there, or M2's elsewhere
        assert found.attributed.value == 0.5
        assert best(found).layer == 0 and name_of(found) == "other of one"

    def test_one_model_cannot_be_in_conflict_with_itself(self) -> None:
        found = pair(all_say(" tea"), {"nothing": 0, "others": 0, "named": 0}, [None] * 12, ["tea"] * 12)
        assert found.conflicts == 0 and found.layers[0].target.n == 0 and math.isnan(found.attributed.value)

    def test_a_constant_answer_is_seen_through(self) -> None:
        """Right for a quarter of the items, as by chance; the permutation test says so."""
        found = pair(all_say(" tea"), {"nothing": 0, "others": 0, "named": 0}, [None] * 12, ["figs"] * 12)
        one = found.layers[0]
        assert one.over_text.first.value == 0.25 and one.permuted.p == 1 and one.generic.most_common_share.value == 1

    @pytest.mark.parametrize(
        ("gains", "told"),
        [
            ({"nothing": 2, "others": 2, "named": 2}, "more than the text"),
            ({"nothing": 2, "others": 2, "named": -1}, "of its source"),
            ({"nothing": 2, "others": 0, "named": 2}, "nothing"),  # any state would have done it
            ({"nothing": 0, "others": 2, "named": 2}, "nothing"),
            ({"nothing": -2, "others": -2, "named": -2}, "nothing"),
        ],
    )
    def test_what_may_be_said_of_a_layer(self, gains: dict[str, float], told: str) -> None:
        found = pair(all_say(" tea"), gains, [None] * 12, [""] * 12)
        (after,) = adjusted([found])
        assert after.layers[0].told == told

    def test_what_could_not_be_compared_is_no_nothing(self) -> None:
        """No other entity has another answer: the layer is neither cleared nor condemned, and is no test that others pay for."""
        alone = pair(all_say(" tea"), {"nothing": 2, "others": math.nan, "named": 2}, [None] * 12, [""] * 12)
        well = pair(all_say(" tea"), {"nothing": 2, "others": 2, "named": 2}, [None] * 12, [""] * 12)
        first, second = adjusted([alone, well])
        assert first.layers[0].told == "not compared" and second.layers[0].told == "more than the text"
        assert second.layers[0].adjusted["others"] == well.layers[0].p["others"]

    def test_many_layers_are_paid_for(self) -> None:
        """A gain that would pass alone (6 entities, all one way: p = 1/32) does not among 40 layers."""
        alone = pair(all_say(" tea", 6), {"nothing": 2, "others": 2, "named": 2}, [None] * 6, [""] * 6)
        (after,) = adjusted([alone])
        assert alone.layers[0].p["named"] == pytest.approx(2 / 2**6) and after.layers[0].told == "more than the text"
        many = pair(np.repeat(all_say(" tea", 6), 40, axis=1), {"nothing": 2, "others": 2, "named": 2}, [None] * 6, [""] * 6)
        (after,) = adjusted([many])
        assert {one.told for one in after.layers} == {"nothing"}


class TestPairs:
    def test_by_name(self) -> None:
        assert pairs_of(Asked(), ("a > b", "a>b", "b>a")) == [Pair("a", "b"), Pair("b", "a")]
        assert len(pairs_of(Asked(), None)) == len(PAIRS)
        assert pairs_of(Asked(model="my/model", data=Path("x")), None) == [Pair("my/model", "my/model")]
        assert [pair.name for pair in pairs_of(Asked(), ("a>a", "a>b"))] == ["a", "b of a"]

    @pytest.mark.parametrize("text", ["atlas", "atlas>", ">atlas", "a>b>c"])
    def test_what_is_no_pair(self, text: str) -> None:
        with pytest.raises(InputError, match="is no pair; expected M1>M2"):
            pairs_of(Asked(), (text,))

    def test_none(self) -> None:
        with pytest.raises(InputError, match="pairs is empty"):
            pairs_of(Asked(), ())

    def test_how_the_model_is_loaded_does_not_change_who_is_asked(self) -> None:
        assert len(pairs_of(Asked(model={"name": "atlas", "dtype": "float32"}), None)) == len(PAIRS)

    @pytest.mark.parametrize(
        ("text", "belief"),
        [
            (" Paris, and the city is known for", "Paris"),  # the relation has it
            (" New York is", "New York"),  # and not York, which begins later
            (" the north.\nMore", "the north"),
            (" nothing that anybody knows, or", "nothing that anybody knows"),
            ("", ""),
        ],
    )
    def test_what_a_model_believes(self, text: str, belief: str) -> None:
        assert belief_of(text, (".",), ("York", "New York", "Paris")) == belief

    def test_labels_are_of_data(self) -> None:
        with pytest.raises(InputError, match="do not say what a model knows"):
            privileged.items_for(Asked(), privileged.Settings(known="labels"), Pair("atlas", "atlas"), [])

    def test_an_unknown_relation(self) -> None:
        with pytest.raises(InputError, match="have no relation nonsense"):
            privileged.items_for(Asked(), privileged.Settings(tasks=("nonsense",)), Pair("atlas", "atlas"), [])


def test_bits_in_words() -> None:
    from patchscopes.evaluate.statistics import Estimate

    assert bits_text(Estimate(3.14, 1.96, 4.4, 9, 9)) == "+3.1 bits, 95 % interval +2.0 to +4.4"
    assert bits_text(Estimate(3.14, math.nan, math.nan, 9, 1)) == "+3.1 bits, interval unknown"


@pytest.mark.slow
def test_atlas_tells_no_more_than_its_text(tmp_path: Path) -> None:
    """M1 = M2: the state is read, and asking in words does as well. Random states say nothing."""
    settings = privileged.Settings(
        pairs=("atlas>atlas",), layers="0,3", tasks=("country.capital", "city.country"), tokens=6, faithfulness=False
    )
    asked = Asked(n=8, runs=tmp_path)
    found = privileged.evaluate(asked, settings)
    scores = found.scores["pairs"]["atlas of itself"]
    layers = scores["layers"]
    assert scores["named"].value == 1 and layers["3"]["said"].value > 0.9
    assert layers["3"]["told"] == "of its source" and layers["0"]["told"] == "nothing"
    for kind in ("zero", "random", "random_covariance", "other", "nothing"):
        assert layers["3"]["controls"][kind].value < 0.3
    assert layers["3"]["inverted"].value > 0.8 and layers["3"]["permutation_p"] < 0.01
    assert any("no more than the text" in claim for claim in found.claims)
    again = privileged.evaluate(asked, settings)
    assert again.claims == found.claims and [run.id for run in again.runs] == [run.id for run in found.runs]
    assert found.to_json()["scores"]["pairs"]


@pytest.mark.slow
def test_a_model_of_random_weights_tells_nothing(tmp_path: Path) -> None:
    """Every score at chance, whatever it is compared with; any of N rises with N, and so does its null."""
    import torch

    import patchscopes as ps
    from patchscopes.controls import random_blocks

    torch.manual_seed(0)
    blank = random_blocks(ps.load("atlas"), seed=3)
    settings = privileged.Settings(pairs=("atlas>atlas",), tasks=("country.capital",), known="all", tokens=4, faithfulness=False)
    found = privileged.evaluate(Asked(n=12, runs=tmp_path, models={"atlas": blank}), settings)
    scores = found.scores["pairs"]["atlas of itself"]
    assert {layer["told"] for layer in scores["layers"].values()} == {"nothing"}
    assert scores["any_layer"].value <= 0.3 and scores["any_layer_p"] > 0.05
    assert all(layer["permutation_p"] > 0.01 for layer in scores["layers"].values())
