"""The study of evidence: scores on tables made by hand, the bound, the null, and whole runs on the bundled model and on random weights."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import loaded

import patchscopes as ps
from patchscopes import PatchscopesError
from patchscopes.controls.evidence import bits_over, explained
from patchscopes.evaluate import evidence_scores as scores
from patchscopes.evaluate import evidence_study, privileged
from patchscopes.evaluate.evidence_scores import AGREEMENT, EXPLAINED, LOG_P, SCORES, Raw, Weighed
from patchscopes.evaluate.evidence_study import Settings
from patchscopes.evaluate.evidence_weighing import OWN, STRANGER, bench, log_p_of
from patchscopes.evaluate.frame import Asked, Result
from patchscopes.evaluate.pairs import Pair

PAIR = "atlas>atlas"
SMALL = Settings(pairs=(PAIR,), layers="3", tasks=("country.capital", "city.country"), tokens=6, draws=2)


def reading(
    entity: str, true: bool, value: float, *, pair: str = "a", text: str = "", prior: str | None = None, **own: float
) -> Weighed:
    """With `value` for every score but those that are given."""
    given = {name: own.get(name.replace(" ", "_"), value) for name in SCORES}
    return Weighed(pair, "capital", entity, 1, text or ("Paris" if true else "Rome"), ("Paris",), prior, true, value > 0, given)


# ----------------------------------------------------------------------------------------------------------------------- by hand


def test_the_classifier_by_hand() -> None:
    """explained sorts all but one pair of 2 × 3; agreement says nothing."""
    values = [(True, 0.9), (True, 0.5), (False, 0.6), (False, 0.1), (False, -0.2)]
    some = [reading(f"e{k}", true, v, agreement_of_draws=0.5) for k, (true, v) in enumerate(values)]
    found = scores.classified(some)
    assert found.n == 5 and found.true.value == 0.4
    assert found.auroc[EXPLAINED].value == pytest.approx(5 / 6)
    assert found.auroc[AGREEMENT].value == 0.5
    assert found.over[AGREEMENT].value == pytest.approx(5 / 6 - 1 / 2) and found.over[LOG_P].value == 0
    assert found.above.value == 0.8 and found.above_if_false.value == pytest.approx(2 / 3)
    assert [one.entity for one in scores.falsehoods(some)] == ["e2", "e3", "e4"]  # the most explained first


def test_readings_that_lack_a_score_are_left_out_of_all() -> None:
    whole, lacking = reading("a", True, 1.0), reading("b", True, 1.0, bits_over_text=math.nan)
    assert scores.complete([whole, lacking]) == [whole]


def test_pairs_stand_beside_all_together() -> None:
    some = [reading("x", True, 1.0, pair="a"), reading("x", False, 0.0, pair="b")]
    assert {name: len(one) for name, one in scores.by_pair(some).items()} == {scores.ALL: 2, "a": 1, "b": 1}
    assert list(scores.by_pair(some[:1])) == ["a"]


def test_attribution_by_hand() -> None:
    some = [
        reading("a", True, 2.0, text="Paris", prior="Rome"),  # told by the state, and so attributed
        reading("b", True, -1.0, text="Paris", prior="Rome"),  # told by the state, attributed to M2
        reading("c", False, -1.0, text="Rome", prior="Rome"),  # M2's own, and so attributed
        reading("d", False, 1.0, text="Oslo", prior="Rome"),  # nobody's
        reading("e", True, -1.0, text="Paris", prior="Paris"),  # they agree
        reading("f", True, -1.0, text="Paris"),
    ]
    found = scores.attributed(some)
    assert found is not None and found.in_conflict == 4
    assert (found.of_target.value, found.of_speaker.value) == (0.5, 0.25)
    assert found.right.value == pytest.approx(2 / 3)
    assert (found.right_if_target.value, found.right_if_speaker.value) == (0.5, 1.0)
    assert scores.attributed(some[4:]) is None


def test_a_null_by_hand() -> None:
    p = [k / 25 for k in range(1, 26)]
    found = scores.null("zero", p, [k == 0 for k in range(25)], 24, [f"e{k}" for k in range(25)])
    assert found.above.value == found.uniform.share.value == 0.04
    assert found.uniform.ks == pytest.approx(0) and found.uniform.chi2 == pytest.approx(0)
    low = scores.null("leaks", [0.04] * 25, [True] * 25, 24, [f"e{k}" for k in range(25)])
    assert low.above.value == 1 and low.uniform.ks_p < 0.001


def planted_confidence(entities: int = 200, seed: int = 0) -> list[Weighed]:
    """explained = p of being true, exactly."""
    rng = np.random.default_rng(seed)
    p = rng.uniform(0.02, 0.98, entities)
    return [reading(f"e{k}", bool(rng.random() < one), float(one), agreement_of_draws=1.0) for k, one in enumerate(p)]


def test_confidences_are_calibrated_on_what_they_have_not_seen() -> None:
    found = {one.name: one.figures for one in scores.confidences(planted_confidence())}
    assert found["explained, Platt"].ece < 2 * found["explained, Platt"].ece_floor
    assert found["explained, Platt"].brier.score < 0.25 < found["agreement as it is"].brier.score  # always sure
    assert found["agreement as it is"].ece == pytest.approx(1 - found["agreement as it is"].accuracy.value)
    assert scores.confidences([reading(f"e{k}", True, 1.0) for k in range(9)]) == []


# --------------------------------------------------------------------------------------------------------------------- estimator


def made_raw(rows: int = 30, others: int = 32, seed: int = 0) -> Raw:
    """True readings are 6 bits likelier under their own looks than under others; false ones are exchangeable with them."""
    rng = np.random.default_rng(seed)
    true = np.arange(rows) % 2 == 0
    base = rng.normal(-8, 0.5, (rows, 1))
    noise = lambda *shape: rng.normal(0, 0.3, shape)
    own = base + 6 * true[:, None] + noise(rows, 3)
    some, pool = base + noise(rows, others), base - 1 + noise(rows, others)
    stranger = base[:, 0] + noise(rows)
    entities = tuple(f"e{k}" for k in range(rows))
    return Raw(true, entities, own, some, pool, (some, some + 0, some + 0), stranger, some, pool)


def test_vectorised_bits_are_those_of_the_controls() -> None:
    import torch

    raw = made_raw(6)
    own = raw.own[:, 0]
    for k in range(6):
        nats = torch.tensor(raw.others[k] * math.log(2))
        assert own[k] - scores.log2_mean(raw.others)[k] == pytest.approx(bits_over(own[k] * math.log(2), nats))
        assert scores.explained_of(own, raw.others)[k] == pytest.approx(explained(own[k] * math.log(2), nats))
    assert scores.explained_of(np.array([0.0]), np.zeros((1, 3))).tolist() == [0.0]  # no surprise to account for


def test_infonce_is_bounded_and_leave_one_out_is_not() -> None:
    rows = scores.of_number(made_raw(), (2, 8, 32, 64))
    assert [one["n"] for one in rows] == [2, 8, 32]  # there are no 64
    for one in rows:
        assert one["infonce_if_true"] <= one["bound"] == math.log2(one["n"] + 1)
        assert one["leave_one_out_if_true"] == pytest.approx(6, abs=0.5) and one["auroc"] == 1.0
        b = one["leave_one_out"]
        assert one["infonce"] < b
    assert rows[0]["leave_one_out_if_true"] > rows[0]["bound"]  # 6 bits over two others
    assert rows[0]["spread"] > rows[1]["spread"] > rows[2]["spread"] > 0
    sd = float(np.std(scores.log2_mean(np.random.default_rng(1).normal(-8, 0.3, (4000, 2)))))  # of two others, drawn anew
    assert rows[0]["spread"] == pytest.approx(sd, rel=0.15)


def test_looks_average_their_noise_away() -> None:
    rows = scores.of_looks(made_raw(200))
    assert [one["looks"] for one in rows] == ["prefix 1 alone", "prefix 2 alone", "prefix 3 alone", "mean of 2", "mean of 3"]
    assert rows[0]["spread"] == pytest.approx(0.3 * math.sqrt(math.pi) / 2, rel=0.1)  # E of the sd of three
    assert rows[-1]["spread"] == pytest.approx(rows[0]["spread"] / math.sqrt(3))
    assert all(one["auroc_explained"].value == 1 for one in rows)


def test_others_of_other_matters_let_strangers_pass() -> None:
    """A pool that is less likely to say such a text makes any text of the relation look like the item's own."""
    same, pool = scores.of_kind(made_raw(200))
    assert same["false_alarms"].value < 0.12 < 0.5 < pool["false_alarms"].value
    assert pool["bits"] == pytest.approx(same["bits"] + 1, abs=0.2)


# --------------------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Asked, Result]:
    asked = Asked(n=8, quick=True, runs=tmp_path_factory.mktemp("evidence"))
    return asked, evidence_study.evaluate(asked, dataclasses.replace(SMALL, layers="0,3,8"))


def test_evidence_tells_true_readings_of_the_bundled_model(found: tuple[Asked, Result]) -> None:
    _, result = found
    own: Any = result.scores["classifier"]["atlas"]  # type: ignore[index]
    assert own["n"] == 2 * 8 * 3 and 0.2 < own["true"].value < 0.8
    assert own["auroc"][EXPLAINED].low > 0.7 and own["auroc"][EXPLAINED].value > 0.85
    nulls: Any = result.scores["null"]
    assert nulls[OWN]["above"].value > 0.3 > nulls[STRANGER]["above"].value
    assert set(nulls) == {OWN, STRANGER, "zero", "a random vector", "a random vector of the states' covariance"}
    numbers: Any = result.scores["estimator"]["others"]  # type: ignore[index]
    assert [one["n"] for one in numbers] == [2, 4, 8, 16, 24]
    assert all(one["infonce_if_true"] <= one["bound"] for one in numbers)
    assert {figure.name for figure in result.figures} >= {"auroc", "risk-coverage", "others", "null"}
    assert result.scores["attribution"] == {}  # the model speaks for itself
    json.dumps(result.to_json())


def test_the_figures_are_those_of_the_table(found: tuple[Asked, Result]) -> None:
    """AUROC by comparing every true reading with every false one, of the recorded tables themselves."""
    asked, result = found
    pair = Pair("atlas", "atlas")
    items = evidence_study._items(asked, SMALL, pair, []).items
    run, drawn = result.runs
    answers = {(i.relation, i.prompt): i.answers for i in items}
    key = ("part", "prompt_text", "source_layer")
    texts: dict[Any, list[str]] = {}
    for *at, text in drawn.table().select(*key, "text").iter_rows():
        texts.setdefault(tuple(at), []).append(text)
    rows = []
    for *at, text, share, logprob in run.table(control="none").select(*key, "text", "explained", "logprob").iter_rows():
        said = texts[tuple(at)]
        agree = sum(one.strip().casefold() == text.strip().casefold() for one in said) / len(said)
        rows.append((any(a.casefold() in text.casefold() for a in answers[at[0], at[1]]), share, logprob, agree))
    own: Any = result.scores["classifier"]["atlas"]["auroc"]  # type: ignore[index]
    for column, name in ((1, EXPLAINED), (2, "log p of the next token"), (3, AGREEMENT)):
        true, false = ([row[column] for row in rows if row[0] is which] for which in (True, False))
        by_hand = np.mean([(a > b) + 0.5 * (a == b) for a in true for b in false])
        assert own[name].value == pytest.approx(by_hand)


def test_asking_again_records_nothing(found: tuple[Asked, Result]) -> None:
    asked, result = found
    heard: list[str] = []
    again = dataclasses.replace(asked, listeners=[lambda event: heard.append(event["kind"])])
    settings = dataclasses.replace(SMALL, layers="0,3,8", bench=False)
    second = evidence_study.evaluate(again, settings)
    assert set(heard) == {"cached"} and second.to_json()["scores"]["classifier"] == result.to_json()["scores"]["classifier"]


def test_log_p_is_that_of_greedy_decoding() -> None:
    """Of a text of one token, the table's own logprob."""
    model = ps.load("atlas")
    asked = Asked(n=3)
    some = evidence_study._items(asked, dataclasses.replace(SMALL, tasks=("country.capital",)), Pair("atlas", "atlas"), [])
    by = evidence_study.Settings(tokens=1)
    scoped = evidence_study._scoped(
        asked, dataclasses.replace(SMALL, tokens=by.tokens), Pair("atlas", "atlas"), {"atlas": model}, ()
    )
    found = log_p_of(scoped, some.items)
    for item in some.items:
        source = ps.Source(model, item.prompt, position=item.at, layer=3)
        one = ps.scopes.extract(item.target, layer=1, max_new_tokens=1)(source, controls=False).table.row(0, named=True)
        text, log_p = found[item.prompt, item.at, 3]
        assert text == one["text"] and log_p == pytest.approx(one["logprob"], abs=1e-4)


def test_a_random_model_is_at_chance(tmp_path: Path) -> None:
    """Its texts name no fact, and what strangers say is not told from what the item says: ranks are uniform, few are "above"."""
    model = loaded("llama")
    asked = Asked(model="llama", models={"llama": model}, n=4, quick=True, runs=tmp_path)
    settings = dataclasses.replace(SMALL, pairs=("llama>llama",), tasks=("country.capital",), layers="2", tokens=3)
    result = evidence_study.evaluate(asked, settings)
    own: Any = result.scores["classifier"]["llama"]  # type: ignore[index]
    one = own["auroc"][EXPLAINED]
    assert own["true"].value == 0 and math.isnan(one.value)  # one class only: nothing can be told
    assert "nothing can be told" in result.claims[0] and result.scores["confidences"] == {}
    pair = Pair("llama", "llama")
    scoped = evidence_study._scoped(asked, settings, pair, {"llama": model}, ())
    some = privileged.items_for(dataclasses.replace(asked, n=48), privileged.Settings(tasks=settings.tasks), pair, []).items
    pretended, raw = bench(scoped, some, 30)
    for kind in ("zero", "a random vector", STRANGER):
        mine = [one for one in pretended if one.kind == kind]
        assert len(mine) >= 25
        null = scores.null(kind, [one.p for one in mine], [one.above for one in mine], 24, [one.entity for one in mine])
        assert null.uniform.ks_p > 0.01 and null.above.low <= 0.05
    assert raw is not None and not raw.true.any()


def test_two_models_that_disagree(tmp_path: Path) -> None:
    """atlas is read by its smaller sister, which knows the same: nothing to attribute but where it answers otherwise."""
    narrow = ps.load("atlas")
    asked = Asked(n=3, quick=True, runs=tmp_path, models={"atlas": narrow, "other": narrow})
    settings = dataclasses.replace(SMALL, pairs=("atlas>other",), bench=False)
    result = evidence_study.evaluate(asked, settings)
    assert list(result.scores["classifier"]) == ["other of atlas"]  # type: ignore[call-overload]
    assert [run.name for run in result.runs] == ["evidence", "evidence-draws", "attribute-known"]


def test_the_plan_is_what_is_recorded(found: tuple[Asked, Result]) -> None:
    asked, result = found
    names = [one.name for one in evidence_study.plan(asked, dataclasses.replace(SMALL, layers="0,3,8"))]
    assert names == [run.name for run in result.runs]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dataclasses.replace(SMALL, draws=1), "draws is 1; expected 2 or more"),
        (dataclasses.replace(SMALL, tokens=0), "tokens is 0; expected 1 or more"),
        (dataclasses.replace(SMALL, pairs=("atlas",)), "is no pair"),
    ],
)
def test_wrong_settings(settings: Settings, message: str, tmp_path: Path) -> None:
    with pytest.raises(PatchscopesError, match=message):
        evidence_study.plan(Asked(n=2, runs=tmp_path), settings)
