"""Measures of faithfulness: against slow oracles on tiny models in float64, on hand-worked numbers, at chance where nothing is known, and
on the bundled model, where the truth is."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import polars as pl
import pytest
import torch
from families import loaded, randomised, tiny, tiny_tokenizer
from oracle import Patch, full_logits, states, text_log_p

import patchscopes as ps
from patchscopes.core.errors import InputError, PositionError, VectorError
from patchscopes.measures.dose import kendall
from patchscopes.measures.swap import agreement_of
from patchscopes.scopes import written

TEXTS = ["the cat sat", "a dog ran", "my owl flew", "our fox hid", "one bee hums"]
SCOPE = ps.Patchscope("say {x} is", layer=2, max_new_tokens=3)


@pytest.fixture(scope="module")
def model() -> ps.Model:
    return ps.load((tiny("llama", dtype=torch.float64), tiny_tokenizer()))


def sources(model: ps.Model, texts: list[str] = TEXTS, at: int = -1, layer: int = 2) -> list[ps.Source]:
    return [ps.Source(model, text, at, layer=layer) for text in texts]


def state(model: ps.Model, text: str, layer: int = 2, at: int = -1) -> torch.Tensor:
    return states(model.hf, "llama", torch.tensor([model.tokens(text).ids]))[f"resid.{layer}"][0, at]


def said(model: ps.Model, ids: tuple[int, ...], patch: Patch, n: int) -> str:
    tokens: list[int] = []
    for _ in range(n):
        tokens.append(int(full_logits(model.hf, "llama", [*ids, *tokens], patch)[-1].argmax()))
    return model.decode(tokens)


# ------------------------------------------------------------------------------------------------------------------------- dose


def test_doses_equal_a_hooked_pass(model: ps.Model) -> None:
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(5, model.d_model, generator=generator, dtype=torch.float64)
    found = ps.measures.dose_response(sources(model), SCOPE, v, ["ab"] * 5, instead_of=["c"] * 5, doses=(0, 0.5, 2), draws=1)
    target = model.tokens("say x is")
    at = target.position("x")
    for k, dose in itertools.product(range(5), (0.0, 0.5, 2.0)):
        row = found.table.filter(pl.col("place") == k, pl.col("direction") == "v", pl.col("dose") == dose).row(0, named=True)
        patch = Patch("resid.2", at, state(model, TEXTS[k]) + dose * v[k])
        first, other = (
            float(text_log_p(model.hf, "llama", target.ids, patch, written.follow(model, target, text)).sum())
            for text in ("ab", "c")
        )
        assert row["log_p"] == pytest.approx(first, abs=1e-5) and row["odds"] == pytest.approx(first - other, abs=1e-5)
        assert row["text"] == said(model, target.ids, patch, 3)
    plain = SCOPE(sources(model), controls=False).table["text"].to_list()
    none = found.table.filter(pl.col("dose") == 0)
    assert none.filter(pl.col("direction") == "v")["text"].to_list() == plain
    assert none["log_p"].to_list() == [
        x for x in none.filter(pl.col("draw") == 0, pl.col("direction") == "v")["log_p"] for _ in "vr"
    ]
    longer = found.table.filter(pl.col("dose") == 2, pl.col("direction") == "random")["log_p"]
    assert longer.to_list() != none.filter(pl.col("direction") == "random")["log_p"].to_list()


def test_one_direction_serves_all_places(model: ps.Model) -> None:
    v = torch.ones(model.d_model, dtype=torch.float64)
    one = ps.measures.dose_response(sources(model), SCOPE, v, ["a"] * 5, doses=(0, 1), draws=0)
    each = ps.measures.dose_response(sources(model), SCOPE, v.expand(5, -1), ["a"] * 5, doses=(0, 1), draws=0)
    assert (
        one.table.equals(each.table)
        and one.places["p_value"].to_list() == [None] * 5
        and one.places["half"].to_list() == [None] * 5
    )


def test_order_by_hand() -> None:
    """Of the orders of three things one is sorted, two have one pair apart."""
    assert kendall([1.0, 2.0, 3.0]) == (1.0, pytest.approx(1 / 6))
    assert kendall([1.0, 3.0, 2.0]) == (pytest.approx(1 / 3), pytest.approx(3 / 6))
    assert kendall([3.0, 2.0, 1.0]) == (-1.0, 1.0)
    assert kendall([1.0, 1.0]) == (0.0, 1.0)
    orders = list(itertools.permutations(range(6)))
    curve = (0, 2, 1, 3, 5, 4)
    tau = {o: sum(1 if o[j] > o[i] else -1 for i in range(6) for j in range(i + 1, 6)) / 15 for o in orders}
    assert kendall(curve) == (
        pytest.approx(tau[curve]),
        pytest.approx(sum(x >= tau[curve] - 1e-9 for x in tau.values()) / len(orders)),
    )


def test_area_and_half_by_hand() -> None:
    rows = [("v", 0, 0.0, -5.0, -2.0), ("v", 0, 1.0, -3.0, -1.0), ("v", 0, 2.0, -1.0, 3.0)]
    rows += [("random", i, dose, -5.0 + i * dose, 0.0) for i in range(4) for dose in (0.0, 1.0, 2.0)]  # areas 0, 1.5, 3, 4.5
    names = ("direction", "draw", "dose", "log_p", "odds")
    table = pl.DataFrame([{"place": 0, **dict(zip(names, row, strict=True)), "text": "", "says": row[2] > 0} for row in rows])
    dose = ps.measures.Dose(table)
    assert dose.places.row(0, named=True) == {
        "place": 0,
        "tau": 1.0,
        "tau_p": pytest.approx(1 / 6),
        "area": 3.0,  # (2 + 4) / 2
        "p_value": 3 / 5,  # of four random directions two have as much
        "half": 1.25,  # odds −1 at 1, 3 at 2
    }
    assert dose.curve.filter(pl.col("direction") == "random")["log_p"].to_list() == [-5.0, -3.5, -2.0]


# ------------------------------------------------------------------------------------------------------------------------- swap


def test_a_swap_equals_a_hooked_pass(model: ps.Model) -> None:
    question, at = " is it", 5
    answers = [" ab", " c", " d", " ab", " c"]
    source = sources(model, at=at)
    found = ps.measures.causal_swap(source, SCOPE, answers, question, [(0, 1), (3, 4)])
    h = torch.stack([state(model, text, at=at) for text in TEXTS])
    edited = {(0, "state"): h[1], (3, "state"): h[4], (0, "direction"): h[0] + h[4] - h[3], (3, "direction"): h[3] + h[1] - h[0]}
    target = model.tokens("say x is")
    for (k, edit), value in edited.items():
        row = found.table.filter(pl.col("place") == k, pl.col("edit") == edit).row(0, named=True)
        old, new = answers[k], answers[row["partner"]]
        whole = model.tokens(TEXTS[k] + question)
        for name, prompt, where in (("behaviour", whole, at), ("description", target, target.position("x"))):
            patch = Patch("resid.2", where, value)
            y = [
                float(text_log_p(model.hf, "llama", prompt.ids, patch, written.follow(model, prompt, text)).sum())
                for text in (new, old)
            ]
            assert row[f"{name}_odds"] == pytest.approx(y[0] - y[1], abs=1e-5)
            assert row[name] == said(model, prompt.ids, patch, 3)


def test_a_swap_with_itself_is_none(model: ps.Model) -> None:
    found = ps.measures.causal_swap(sources(model, at=4), SCOPE, ["a", "b", "c", "d", "e"], " is it", [(2, 2)]).table
    plain, state = (found.filter(pl.col("edit") == edit).drop("edit") for edit in ("none", "state"))
    assert plain.equals(state) and plain["behaviour_odds"].item() == 0
    assert set(found["edit"]) == {"none", "state", "random state"}  # no other class, so no direction


def test_random_edits_are_as_long(model: ps.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    scope = written.OneEach.scope
    monkeypatch.setattr(written.OneEach, "scope", lambda self, k, h: (seen.append(h), scope(self, k, h))[1])
    answers = [" ab", " c", " d", " ab", " c"]
    others = torch.randn(2, model.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = ps.measures.causal_swap(sources(model), SCOPE, answers, " so", [(0, 1)], others=others).table
    by = dict(zip(found["edit"], seen, strict=True))
    moved = {edit: by[edit] - by["none"] for edit in by}
    for edit, like in (("random state", "state"), ("random direction", "direction"), ("other direction", "direction")):
        assert float(moved[edit].norm()) == pytest.approx(float(moved[like].norm()), rel=1e-9)
    assert float(torch.cosine_similarity(moved["other direction"], others[0], dim=0)) == pytest.approx(1)
    assert abs(float(torch.cosine_similarity(moved["random direction"], moved["direction"], dim=0))) < 0.5


def test_other_places_of_an_entity_are_no_other_entities() -> None:
    h = torch.arange(12.0).reshape(6, 2)
    labels = ["a", "b", "a", "b", "a", "c"]
    pairs = [(0, 1), (0, 5), (0, 2)]
    each = ps.measures.class_directions(h, labels, pairs, entities=range(6))
    assert torch.equal(each[0], h[3] - (h[2] + h[4]) / 2) and each[1] is None and each[2] is None  # type: ignore[arg-type]
    (same,) = ps.measures.class_directions(h, labels, [(0, 1)], entities=["x", "y", "x", "z", "v", "w"])
    assert torch.equal(same, h[3] - h[4])  # type: ignore[arg-type]


def test_agreement_by_hand() -> None:
    """3 both, 1 behaviour only, 1 description only, 3 neither: φ = 8/16, κ = (6/8 − 1/2) / (1/2)."""
    first = [True] * 4 + [False] * 4
    second = [True] * 3 + [False] + [True] + [False] * 3
    one = agreement_of(first, second, [0] * 8)
    assert (one.both, one.behaviour_only, one.description_only, one.neither) == (3, 1, 1, 3)
    assert (one.phi, one.kappa) == (0.5, 0.5) and one.p_value == pytest.approx(17 / 70)  # C(4,3)·4 + 1 of C(8,4)
    # in strata in which one of both is always the same nothing can be told
    strata = agreement_of(first, first, [0] * 4 + [1] * 4)
    assert strata.phi == 1 and strata.p_value == 1
    orders = [
        sum(x and y for x, y in zip(first, [*a, *b], strict=True))
        for a in set(itertools.permutations(second[:5]))
        for b in set(itertools.permutations(second[5:]))
    ]
    assert agreement_of(first, second, [0] * 5 + [1] * 3).p_value == pytest.approx(sum(k >= 3 for k in orders) / len(orders))


# --------------------------------------------------------------------------------------------------------------- reconstruction


def test_similarity_equals_that_of_single_passes(model: ps.Model) -> None:
    sentences = ("see {x}", "I know {x}")
    found = ps.measures.reconstruction(sources(model), SCOPE, sentences=sentences, words=["cat", "dog", "owl", "fox", "dog"])
    texts = SCOPE(sources(model), controls=False).table["text"].to_list()
    assert found.table["text"].to_list() == texts
    h = torch.stack([state(model, text) for text in TEXTS])
    for rebuilt, what in ((found.reading, texts), (found.words, found.table["words"].to_list())):
        r = torch.stack([torch.stack([state(model, s.replace("{x}", t.strip())) for s in sentences]).mean(0) for t in what])
        want = torch.cosine_similarity((h - h.mean(0))[:, None], (r - r.mean(0))[None], dim=-1)
        assert torch.allclose(rebuilt.similarity, want, atol=1e-6)
        own = want.diagonal()
        rank = [float((want[k] > own[k] + 1e-9).sum() + (1 + (want[k] - own[k]).abs().le(1e-9).sum()) / 2) for k in range(5)]
        assert rebuilt.rank == pytest.approx(sum(rank) / 5)
        bits = (want / 0.1).softmax(1).diagonal().log2().mean() + torch.tensor(5.0).log2()
        assert rebuilt.bits == pytest.approx(float(bits), abs=1e-6)


def test_texts_without_words_are_left_out(model: ps.Model) -> None:
    found = ps.measures.reconstruction(sources(model), SCOPE, words=["cat", " ", "owl", "fox", "bee"], sentences=("see {x}",))
    assert found.words.n == 4 and bool(found.words.similarity[:, 1].isnan().all())
    none = ps.measures.reconstruction(sources(model), SCOPE, words=["", " ", "", "fox", "bee"], sentences=("see {x}",))
    assert none.words.n == 2 and none.words.bits != none.words.bits


# ------------------------------------------------------------------------------------------------------------------- prediction


def test_predictions_are_held_against_the_models_own_answers(model: ps.Model) -> None:
    asked = [f"what of {text}? " for text in TEXTS]
    entities = ["a", "a", "b", "c", "c"]
    found = ps.measures.prediction(sources(model), SCOPE, asked, question=" so", entities=entities)
    answers = [model.generate(prompt, max_new_tokens=3)[0].text for prompt in asked]
    for k in range(5):
        rows = {row["kind"]: row for row in found.table.filter(pl.col("place") == k).iter_rows(named=True)}
        assert {row["answer"] for row in rows.values()} == {answers[k]}
        assert rows["asked"]["text"] == model.generate(TEXTS[k] + " so", max_new_tokens=3)[0].text
        others = [answers[j] for j in range(5) if entities[j] != entities[k]]
        assert others.count(rows["majority"]["text"]) == max(others.count(one) for one in others)
        row, prompt = rows["reading"], model.tokens(asked[k])
        ids = written.follow(model, prompt, row["text"])
        assert row["log_p"] == pytest.approx(float(text_log_p(model.hf, "llama", prompt.ids, None, ids).sum()), abs=1e-5)
        assert row["first"] == (ids[0] == int(full_logits(model.hf, "llama", prompt.ids)[-1].argmax()))
    readings = found.table.filter(pl.col("kind") == "reading")["text"].to_list()
    shuffled = found.table.filter(pl.col("kind") == "shuffled")["text"].to_list()
    assert shuffled == [readings[k] for k in (2, 2, 3, 0, 0)]
    paired = found.paired("asked", "majority")
    assert paired.clusters == tuple(entities) and len(paired.first) == len(paired.second) == 5


def test_a_model_foretells_itself(model: ps.Model) -> None:
    """Asked with the very prompts of the source, `asked` is the answer itself, at every measure."""
    found = ps.measures.prediction(sources(model), SCOPE, [text + " so" for text in TEXTS], question=" so").rates
    own = found.filter(pl.col("kind") == "asked").row(0, named=True)
    assert own["first"] == 1 and own["says"] == 1


# ------------------------------------------------------------------------------------------------------------ where nothing is known


def test_a_random_model_is_at_chance() -> None:
    """Its readings follow no described fact: answers are dealt out by chance."""
    model = loaded("llama")
    texts = [f"{a}{b} {c}" for a in "abcd" for b in "efg" for c in "hi"]
    answers = [" xyz"[k % 2 * 2 :][:2] for k in range(24)]
    some = sources(model, texts, layer=3)
    swap = ps.measures.causal_swap(some, SCOPE, answers, " is", [(k, k + 1) for k in range(0, 22, 2)])
    assert swap.rates.is_empty() and swap.agreement().both == 0  # nothing was known before
    h = torch.stack([state(model, text, 3) for text in texts])
    dose = ps.measures.dose_response(
        some, SCOPE, torch.randn(h.shape, generator=torch.Generator().manual_seed(2)), answers, draws=9
    )
    p = dose.places["p_value"].to_list()
    assert 0.3 < sum(p) / len(p) < 0.8 and sum(one <= 0.1 for one in p) <= 7  # 2.4 of 24 are expected
    rebuilt = ps.measures.reconstruction(some, SCOPE, words=[texts[(k * 7 + 5) % 24] for k in range(24)], seed=1).words
    assert rebuilt.p_value > 0.05 and rebuilt.bits < 1 and rebuilt.rank > 6


# ---------------------------------------------------------------------------------------------------------------------- bad input


def test_what_cannot_be_measured_is_told(model: ps.Model) -> None:
    some = sources(model)
    v = torch.ones(model.d_model, dtype=torch.float64)
    for wrong in (
        lambda: ps.measures.dose_response(ps.Source(model, TEXTS, layer=[1, 2]), SCOPE, v, ["a"] * 10),
        lambda: ps.measures.dose_response(some, replace(SCOPE, temperature=1.0), v, ["a"] * 5),
        lambda: ps.measures.dose_response(some, SCOPE, v, ["a"] * 4),
        lambda: ps.measures.dose_response(some, SCOPE, v, ["a"] * 5, doses=(1, 1)),
        lambda: ps.measures.dose_response(some, SCOPE, v, [""] * 5),
        lambda: ps.measures.causal_swap(some, SCOPE, ["a"] * 5, " is", [(0, 5)]),
        lambda: ps.measures.causal_swap(some, SCOPE, ["a"] * 4, " is", [(0, 1)]),
        lambda: ps.measures.causal_swap(ps.Source.of_vectors(model, v, layer=2), SCOPE, ["a"], " is", [(0, 0)]),
        lambda: ps.measures.reconstruction(some, SCOPE, sentences=("{x} is",)),
        lambda: ps.measures.reconstruction(some[:2], SCOPE),
        lambda: ps.measures.prediction(some, SCOPE, ["a"]),
        lambda: ps.measures.prediction(some, SCOPE, TEXTS).paired("reading", "asked"),
        lambda: ps.measures.Swap(pl.DataFrame()).agreement("everything"),
    ):
        with pytest.raises(InputError):
            wrong()
    with pytest.raises(VectorError, match="shape"):
        ps.measures.dose_response(some, SCOPE, v[:3], ["a"] * 5)


# ---------------------------------------------------------------------------------------------------------- what the bundled model knows


@pytest.fixture(scope="module")
def languages() -> tuple[ps.Model, list[str], list[str], list[ps.Source], ps.Patchscope]:
    from patchscopes.organisms.atlas.facts import world

    atlas = ps.load("atlas")
    facts = [fact for fact in world().facts if fact.relation.key == "country.language"]
    some = [fact for fact in facts if fact.object in ("English", "Arabic", "Spanish", "French")][:40]
    source = [ps.Source(atlas, f"We talked about {f.entity} until late at night", f.entity, layer=3) for f in some]
    scope = ps.Patchscope("The language of {x} is", layer=2, max_new_tokens=4, stop=["."])
    return atlas, [f.entity for f in some], [f" {f.object}" for f in some], source, scope


def test_behaviour_and_description_change_together(languages: tuple) -> None:
    _, _, answers, source, scope = languages
    pairs = [(k, next(j for j in range(k + 1, 80) if answers[j % 40] != answers[k]) % 40) for k in range(12)]
    found = ps.measures.causal_swap(source, scope, answers, ". The language is", pairs)
    rates = {row["edit"]: row for row in found.rates.iter_rows(named=True)}
    for edit in ("state", "direction"):
        assert rates[edit]["behaviour_new"] >= 0.6 and rates[edit]["description_new"] >= 0.8
    for edit in ("none", "random direction"):
        assert rates[edit]["behaviour_new"] <= 0.1 and rates[edit]["description_new"] <= 0.1
    every = found.agreement()
    assert every.phi > 0.7 and every.neither > 0 and every.both > 0


def test_readings_follow_the_dose(languages: tuple) -> None:
    atlas, names, answers, source, scope = languages
    h = torch.stack(
        [
            atlas.run(one.prompt, read="resid.3")["resid.3"][0, atlas.tokens(one.prompt).position(name)]
            for one, name in zip(source, names, strict=True)
        ]
    )
    pairs = [(k, next(j for j in range(40) if answers[j] != answers[k])) for k in range(6)]
    found = ps.measures.dose_response(
        [source[a] for a, _ in pairs],
        scope,
        torch.stack([h[b] - h[a] for a, b in pairs]),
        [answers[b] for _, b in pairs],
        instead_of=[answers[a] for a, _ in pairs],
        draws=9,
        doses=(0, 0.25, 0.5, 0.75, 1),
    )
    places = found.places
    assert places["tau"].min() == 1 and places["tau_p"].max() == pytest.approx(1 / 120) and places["p_value"].max() == 0.1  # type: ignore[arg-type]
    assert all(0.1 < half < 0.9 for half in places["half"])
    last = {row["direction"]: row for row in found.curve.filter(pl.col("dose") == 1).iter_rows(named=True)}
    assert last["v"]["says"] == 1 and last["random"]["says"] <= 0.1


def test_readings_bring_back_states_and_foretell_answers(languages: tuple) -> None:
    _, names, _, source, scope = languages
    rebuilt = ps.measures.reconstruction(source[:20], scope, words=names[:20])
    assert rebuilt.reading.p_value <= 0.005 and 0 < rebuilt.reading.bits < rebuilt.words.bits and rebuilt.words.first > 0.8
    asked = [f"As for {name}, the language is" for name in names[:20]]
    found = ps.measures.prediction(source[:20], scope, asked, question=". The language is", entities=names[:20])
    rates = {row["kind"]: row for row in found.rates.iter_rows(named=True)}
    assert rates["reading"]["says"] >= 0.8 and rates["reading"]["first"] >= 0.8
    for kind in ("nothing", "shuffled", "random"):
        assert rates[kind]["says"] < rates["reading"]["says"] - 0.2 and rates[kind]["log_p"] < rates["reading"]["log_p"]


def test_text_behind_a_prompt_must_not_change_its_tokens() -> None:
    atlas = ps.load("atlas")
    one = written.one_each(SCOPE, ps.Source(atlas, "We talked about Franc", layer=2))
    with pytest.raises(PositionError, match="begin the text with a space"):
        one.source(0, "e is", None)


# ------------------------------------------------------------------------------------------------------------------ all on one page


def test_the_page_of_atlas() -> None:
    from patchscopes.evaluate import planted
    from patchscopes.evaluate.data import sampled
    from patchscopes.evaluate.faithfulness import faithfulness

    facts = [item for item in planted.items().items if item.relation in ("country.language", "animal.class")]
    some, pool = sampled(facts, 4, 0), sampled(facts, 24, 0)
    found = faithfulness(ps.load("atlas"), some, (3, 2), pool=pool, doses=(0, 0.5, 1), draws=3)
    swap, agreement, rebuilt, told = found.tables
    assert {row[0]: row[2] for row in swap.rows}["state"] >= 0.75 and swap.rows[0][2] == 0
    everything = agreement.rows[-1]
    assert everything[0] == "all" and sum(everything[1:5]) == sum(row[1] for row in swap.rows[1:]) and everything[5] > 0.6
    assert [row[0] for row in rebuilt.rows] == ["country.language", "animal.class"] and all(
        row[6] > row[2] for row in rebuilt.rows
    )
    assert told.rows[0][:3] == ("the state", 8, 1.0) and told.rows[0][-1] is None
    own, random = found.figures[0].lines
    assert own.y[0] == 0 and own.y[-1] == 1 and max(random.y) < 0.2 and random.dashed
    assert found.scores["dose"]["above_all_random"] == 1 and found.scores["dose"]["by_chance"] == 0.25
    assert len(found.claims) == 6
    with pytest.raises(InputError, match="three items"):
        faithfulness(ps.load("atlas"), some[:2], (3, 2))


def test_questions_behind_a_mention() -> None:
    from patchscopes.evaluate.data import Item
    from patchscopes.evaluate.faithfulness import follow_up, in_other_words

    def item(target: str) -> Item:
        return Item("r", "Peru", ("Lima",), "Peru", "Peru", target, "Peru")

    assert follow_up(item("The capital of {x} is")) == ". The capital is"
    assert follow_up(item("{x}'s capital is")) == ". Its capital is"
    assert follow_up(item("{x} lies in")) is None
    assert in_other_words(item("The capital of {x} is")) == "I am sure that the capital of Peru is"
    assert in_other_words(item("{x} lies in")) == "I am sure that Peru lies in"


def test_the_page_of_a_random_model() -> None:
    """It knows nothing, so no pair counts and nothing is foretold; and the page says so instead of failing."""
    from patchscopes.evaluate import planted
    from patchscopes.evaluate.data import sampled
    from patchscopes.evaluate.faithfulness import faithfulness

    atlas = ps.load("atlas")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        random = ps.load((randomised(copy.deepcopy(atlas.hf)), atlas.tokenizer))
    facts = [item for item in planted.items().items if item.relation == "country.language"]
    found = faithfulness(random, sampled(facts, 6, 0), (3, 2), doses=(0, 1), draws=3)
    assert found.tables[0].rows == () and found.scores["agreement"][-1]["both"] == 0
    assert found.scores["prediction"]["reading"]["value"] == 0 and len(found.claims) == 4, found.claims
    assert "nan" not in " ".join(found.claims)
