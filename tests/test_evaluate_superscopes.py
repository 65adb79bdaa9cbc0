"""The experiment on amplification: tries counted by hand, as many of every way and null, and what is known of atlas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

import patchscopes as ps
from patchscopes.core.errors import InputError, UnknownName
from patchscopes.evaluate import amplified, attribute, entity, superscopes
from patchscopes.evaluate.amplified import NULLS, WAYS, Chosen, Part, Said, Tried
from patchscopes.evaluate.frame import Asked, chosen_settings
from patchscopes.evaluate.planted import Entity
from patchscopes.views.evaluation import page

EVEREST = Entity("landmark", "Mount Everest", ("Nepal", "mountain"), ())
PICCHU = Entity("landmark", "Machu Picchu", ("Peru", "ruin"), ())
SMALL = superscopes.Settings(alphas=(9.0, 15.0), weights=(0.5, 1.5), sites=("mlp_in",), blocks=(2,))


# -------------------------------------------------------------------------------------------------------------------------- by hand


def row(part: str, entity: str, text: str | None, **more: Any) -> dict[str, Any]:
    found = {"part": part, "map": "identity", "draw": 0, "entity": entity, "text": text, "norm_ratio": 0.5, "control": "none"}
    bits = dict.fromkeys(("bits_over_nothing", "bits_over_random", "bits_over_others"), None)
    return {**found, **bits, "verdict": None, **more}


def table(*rows: dict[str, Any]) -> pl.DataFrame:
    kinds = dict.fromkeys(("bits_over_nothing", "bits_over_random", "bits_over_others"), pl.Float64)
    return pl.DataFrame(list(rows), schema_overrides={**kinds, "verdict": pl.String})


PARTS = [Part("resid", 2, "plain"), Part("resid", 2, "amplified"), Part("resid", 2, "guided", 0), Part("resid", 2, "guided", 1)]


def test_every_try_finds_its_place() -> None:
    assert [part.name for part in PARTS] == ["resid.2 plain", "resid.2 amplified", "resid.2 guided 0", "resid.2 guided 1"]
    rows = [row("resid.2 plain", "Mount Everest", "a mountain", draw=1), row("resid.2 plain", "Mount Everest", None)]
    rows += [row("resid.2 amplified", "Mount Everest", "in Nepal", map="scale(15)", norm_ratio=None)]
    rows += [row("resid.2 guided 1", "Mount Everest", "Nepalese", norm_ratio=2.0)]
    said = amplified.said_by(table(*rows), PARTS, [EVEREST, PICCHU], (9.0, 15.0), (1, 2))
    assert said.entities == (EVEREST,)  # the other one was skipped
    hits = {way: said.hits(("resid", way)).tolist() for way in ("plain", "amplified", "guided")}
    none = [False, False]
    assert hits == {"plain": [[none, [False, True]]], "amplified": [[none, [False, True]]], "guided": [[none, none]]}
    assert said.ratios["resid", "guided"][0, 1, 1] == 2.0 and np.isnan(said.ratios["resid", "amplified"]).all()


def test_evidence_is_the_least_of_three_kinds_and_controls_stand_apart() -> None:
    bits = {"bits_over_nothing": 3.0, "bits_over_random": 1.0, "bits_over_others": 2.0}
    rows = [row("resid.2 amplified", "Mount Everest", "in Nepal", map="scale(9)", verdict="above", **bits)]
    rows += [row("resid.2 amplified", "Mount Everest", "a mountain", map="scale(15)", bits_over_others=float("nan"))]
    rows += [row("resid.2 amplified", "Mount Everest", "Peru", map="scale(15)", control=kind) for kind in ("random", "nothing")]
    found = amplified.tried_by(table(*rows), PARTS, [EVEREST], (9.0, 15.0), {"resid": np.array([[0.0, 1.0]])})
    one = found["resid", "amplified"]
    assert set(found) == {("resid", way) for way in WAYS}
    assert one.bits.tolist() == [[1.0, -np.inf]]
    assert one.above.tolist() == [[True, False]] and one.criterion is not None
    assert {kind: texts.tolist() for kind, texts in one.texts.items()} == {
        "none": [["in Nepal", "a mountain"]],
        "other": [["", ""]],
        "random": [["", "Peru"]],
        "mean": [["", ""]],
    }


def several(n: int) -> list[Entity]:
    return [Entity("kind", f"the {k}", (f"fact{k}",), ()) for k in range(n)]


def tried(entities: list[Entity], share: float, tries: int = 3, **more: Any) -> Tried:
    """The first `share` of the entities true in every try; controls never."""
    n = round(share * len(entities))
    own = [[e.facts[0] if k < n else "nothing"] * tries for k, e in enumerate(entities)]
    shape = (len(entities), tries)
    texts = {"none": np.array(own, object), **{kind: np.full(shape, "", object) for kind in ("other", "random", "mean")}}
    return Tried(texts, more.get("bits", np.zeros(shape)), np.zeros(shape, bool), np.ones(shape), more.get("criterion"))


def test_another_of_its_kind_is_searched_as_widely() -> None:
    """Held against the row's own facts, at the row's own block, whichever half it is of."""
    entities = [EVEREST, PICCHU, Entity("animal", "polar bear", ("ice",), ())]
    texts = np.full((3, 2, 3), "no", object)
    texts[1, 1, 2], texts[1, 0], texts[0, 1] = "a mountain", "Nepal", "in Peru"
    one = Said(tuple(entities), {("resid", "plain"): texts}, {})
    hits, rows = amplified.kin_of(one, ("resid", "plain"), Chosen(4, 1, None, (0, 2)))
    assert rows == [0] and hits.tolist() == [[False, False, True]]  # the bear has no other of its kind


@pytest.mark.parametrize(("gain", "plain", "word"), [(1.0, 0.0, "better than"), (0.0, 1.0, "worse than"), (0.5, 0.5, "not told")])
def test_figures_and_claims_point_where_the_texts_do(gain: float, plain: float, word: str) -> None:
    entities = several(12)
    base = tried(entities, plain)
    kin = (np.zeros((12, 3), bool), list(range(12)))
    own = amplified.figures(tried(entities, gain, criterion=np.zeros((12, 3))), base, kin, 1, entities)
    assert (own["per_try none"].value, own["any_of_N none"].value, own["held_out"].value) == (gain, gain, gain)
    assert own["per_try over plain"].value == own["any_of_N over plain"].value == gain - plain
    assert own["p"] == (1.0 if gain == plain else pytest.approx(2 / 2**12))
    assert all(own[f"any_of_N {kind}"].value == 0 for kind in NULLS)  # facts are of one entity each
    assert own["p_kin"] == pytest.approx(min(1, 2 / 2 ** (12 * gain)))
    scores = {
        "plain": amplified.figures(base, base, kin, None, entities),
        **dict.fromkeys(("amplified", "matched", "guided"), own),
    }
    own["setting"] = "α = 9"
    claims = amplified._claims("resid", scores, 3)
    assert f"Amplified is {word}" in claims[0] and "Norm matched" in claims[0] and "some one of 3 draws at α = 1" in claims[1]
    assert "α = 9" in claims[2] and "p" not in scores["plain"]


def test_what_is_chosen_without_labels() -> None:
    entities = several(2)
    texts = {kind: np.array([["no", "no", "no"], ["no", "no", "no"]], object) for kind in ("none", "other", "random", "mean")}
    texts["none"][0, 2], texts["none"][1, 0] = "fact0", "fact1"
    bits = np.array([[0.0, -np.inf, 1.0], [0.0, 2.0, 1.0]])  # right of the first, wrong of the second
    one = Tried(texts, bits, bits > 0, np.ones((2, 3)), np.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]))
    own = amplified.figures(one, one, (np.zeros((1, 3), bool), [1]), 0, entities)
    assert (own["by_evidence"].value, own["by_criterion"].value, own["held_out"].value) == (0.5, 1.0, 0.5)
    assert own["per_try none"].value == pytest.approx(1 / 3) and own["above_controls"].value == pytest.approx(0.5)
    assert own["evidence_over_any"].value == pytest.approx(1 / 6) and own["criterion_over_any"].value == pytest.approx(2 / 3)
    assert own["evidence_over_held_out"].value == 0 and own["criterion_over_held_out"].value == 0.5
    assert own["any_of_N kin"].n == 1 and own["p_kin"] == 1.0 and "p" not in own  # it is the plain way itself


def said(hits: dict[str, np.ndarray], entities: list[Entity]) -> Said:
    texts = {
        ("resid", way): np.array(
            [[[e.facts[0] if x else "no" for x in some] for some in one] for e, one in zip(entities, of, strict=True)], object
        )
        for way, of in hits.items()
    }
    return Said(tuple(entities), texts, {key: np.ones(of.shape) for key, of in texts.items()})


def test_block_and_gain_are_chosen_on_one_half() -> None:
    entities = several(40)
    hits = {way: np.zeros((40, 3, 2), bool) for way in WAYS}
    for k, way in enumerate(WAYS):
        hits[way][:, k % 3, 1] = True
    found = amplified.choose(said(hits, entities), (4, 5, 6))
    assert [(one.block, one.column, one.best) for one in found.values()] == [(4, 0, None), (5, 1, 1), (6, 2, None), (4, 0, 1)]
    halves = {one.scores for one in found.values()}
    assert len(halves) == 1 and 0 < len(halves.pop()) < 40
    with pytest.raises(InputError, match="two halves"):
        amplified.choose(said({"plain": np.zeros((1, 3, 2), bool)}, several(1)), (4, 5, 6))


def test_the_published_comparison_finds_an_effect_in_noise_and_the_fair_one_none() -> None:
    rng = np.random.default_rng(0)
    entities = several(300)
    found = amplified.papers(said({way: rng.random((300, 7, 5)) < 0.2 for way in ("plain", "amplified")}, entities), "resid")
    best, one, fair = (found[name] for name in ("best of N amplified", "one plain draw", "best of N plain"))
    assert best.value == pytest.approx(1 - 0.8**5, abs=0.03) and one.value == pytest.approx(0.2, abs=0.03)
    assert best.low > one.high and abs(best.value - fair.value) < 0.03


def test_an_echo_counts_in_the_published_comparison_alone() -> None:
    texts = {("resid", way): np.array([[["Mount Everest"]]], object) for way in ("plain", "amplified")}
    one = Said((EVEREST,), texts, {})
    assert amplified.papers(one, "resid")["one plain draw"].value == 1 and not one.hits(("resid", "plain")).any()


# ------------------------------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weights": (1.0,)}, "5 alphas and 1 weights"),
        ({"temperature": 0.0}, "one and the same"),
        ({"alphas": ()}, "one of them is empty"),
        ({"alphas": (1.0, 3.0), "weights": (1.0, 2.0)}, "the plain Patchscope"),
        ({"alphas": (3.0, 3.0), "weights": (1.0, 2.0)}, "each of them once"),
        ({"alphas": (3.0, float("inf")), "weights": (1.0, 2.0)}, "not all finite"),
        ({"blocks": (-1,)}, "the first block being 0"),
    ],
)
def test_what_cannot_be_compared_is_refused(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    for ask in (superscopes.plan, superscopes.evaluate):
        with pytest.raises(InputError, match=message):
            ask(Asked(runs=tmp_path), superscopes.Settings(**given))
    assert not list(tmp_path.iterdir())


def test_an_unknown_site_is_told(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="mlp_out"):
        superscopes.evaluate(Asked(runs=tmp_path), superscopes.Settings(sites=("mlp_outs",)))


def test_numbers_of_settings_are_numbers() -> None:
    found = chosen_settings(superscopes.Settings, {"alphas": "2, 4.5", "weights": "1,2", "blocks": "0,1", "read": "none"})
    assert (found.alphas, found.weights, found.blocks, found.read) == ((2.0, 4.5), (1.0, 2.0), (0, 1), None)
    with pytest.raises(InputError, match="a whole number"):
        chosen_settings(superscopes.Settings, {"blocks": "1,two"})


def test_every_way_has_as_many_tries_at_the_same_places() -> None:
    grid, control = superscopes.plan(Asked(n=2), superscopes.Settings(blocks=(1, 4)))
    assert len(grid.parts) == 3 * 2 * (3 + 5) and len(control.parts) == 3 * (3 + 5)
    places = {(part.site, part.layers, part.scope[0].layer) for part in grid.parts if part.scope is not None}
    assert places == {(site, (b + (site == "resid"),), b + 1) for site in amplified.SITES for b in (1, 4)}
    for part in grid.parts:
        (scope,) = part.scope or ()
        tries = (scope.draws or 1) * len(scope.map or (1,)) * (5 if scope.guidance is not None else 1)
        assert tries == 5
    assert len({part.seed for part in grid.parts if "guided" in part.name}) == 5  # draws of their own
    first = superscopes.plan(Asked(n=2), superscopes.Settings(blocks=(1, 4), written="first"))[0]
    assert {part.scope[0].layer for part in first.parts if part.scope is not None} == {1}
    assert all(" " in prompt.labels["entity"] for prompt in grid.prompts or ())  # type: ignore[union-attr, operator]


def test_the_criterion_is_that_of_each_entity_alone() -> None:
    asked, settings = Asked(n=1), superscopes.Settings(alphas=(3.0, 15.0), weights=(1.0, 2.0), sites=("mlp_in", "resid"))
    entities, _ = superscopes._entities(asked)
    chosen = {(site, "amplified"): Chosen(2, 1, 0, (0,)) for site in settings.sites}
    together = superscopes._criteria(asked, settings, entities, chosen)
    for k in (0, len(entities) - 1):
        alone = superscopes._criteria(asked, settings, [entities[k]], chosen)
        assert all(np.allclose(alone[site][0], together[site][k], atol=1e-4) for site in settings.sites)


# --------------------------------------------------------------------------------------------------------------------------- whole


def test_amplified_inputs_of_mlps_say_more_that_is_true(tmp_path: Path) -> None:
    """On atlas what block 2's MLP reads is a fiftieth as long as the stream: unread at α = 1, read at 15."""
    asked = Asked(n=3, runs=tmp_path)
    found = superscopes.evaluate(asked, SMALL)
    scores: Any = found.scores["sites"]
    own, plain = scores["mlp_in"]["amplified"], scores["mlp_in"]["plain"]
    assert own["per_try over plain"].low > 0.2 and own["p"] < 0.05 and own["norm_ratio"] > 5 * plain["norm_ratio"]
    assert scores["mlp_in"]["matched"]["norm_ratio"] == pytest.approx(1, abs=0.01)
    assert (
        own["setting"] == "α = 15"
        and max(own[f"any_of_N {kind}"].value for kind in ("other", "random")) < own["any_of_N none"].value
    )
    assert {"by_evidence", "by_criterion", "held_out"} <= set(own) and found.scores["tries"] == 2
    tables = {run.name: run.table(status="ok") for run in found.runs}
    controls = tables["superscopes-controls"].filter(pl.col("part").str.contains("amplified"))
    counts = dict(controls.group_by("control").len().iter_rows())
    assert counts["none"] == counts["random"] == counts["other"] == counts["mean"] == 2 * found.scores["scored_on"]
    assert found.to_json()["scores"] == superscopes.evaluate(asked, SMALL).to_json()["scores"]
    assert [one.name for one in superscopes.plan(asked, SMALL)] == [run.name for run in found.runs]
    assert any("one try states a true fact" in claim for claim in found.claims) and "<svg" in page(found)
    assert any("alphas = (9.0, 15.0)" in text for text in found.deviations) and json.dumps(found.to_json())


def test_random_weights_say_nothing_true_at_any_gain(tmp_path: Path) -> None:
    model = ps.load("atlas")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.hf.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.05)
    model = ps.load((model.hf, model.tokenizer))
    asked = Asked(n=2, runs=tmp_path, models={"atlas": model})
    scores: Any = superscopes.evaluate(asked, SMALL).scores["sites"]
    for own in scores["mlp_in"].values():
        assert own["any_of_N none"].value < 0.2 and own["p_kin"] > 0.05


# ------------------------------------------------------------------------------------------------------ what a placeholder leaves behind


def test_descriptions_without_the_placeholder_are_compared_with_those_with_it(tmp_path: Path) -> None:
    settings = entity.Settings(tokens=12, layers="1:5:3", spread="below")
    found = entity.evaluate(Asked(n=3, runs=tmp_path), settings)
    scores: Any = found.scores
    assert [run.name for run in found.runs] == ["entity", "entity", "entity-controls"]
    assert [one.name for one in entity.plan(Asked(n=3), settings)] == [run.name for run in found.runs]
    assert scores["per_draw_over_spread_here"].value == pytest.approx(
        scores["per_draw"].value - scores["per_draw_spread_here"].value
    )
    assert any("spread = 'below'" in text for text in found.deviations) and "ℓ* alone" in found.claims[-1]
    rows = {row[0]: row[1:] for row in found.tables[-1].rows}
    assert set(rows) == {"1", "4"} and all(rows[k][2].value == pytest.approx(rows[k][0].value - rows[k][1].value) for k in rows)
    plain = entity.evaluate(Asked(n=3, runs=tmp_path), entity.Settings(tokens=12, layers="1:5:3"))
    assert plain.runs[0].id == found.runs[1].id and "over_spread_here" not in plain.scores  # what was run is not run again
    assert plain.scores["held_out_layer"] == scores["spread_here"]


def test_late_layers_are_read_out_where_nothing_of_the_placeholder_is_left(tmp_path: Path) -> None:
    settings = attribute.Settings(
        probe=0, tokens=6, layers="4", target_layers="2,6", tasks=("country.capital",), known="all", spread="below"
    )
    found = attribute.evaluate(Asked(n=8, runs=tmp_path), settings)
    scores: Any = found.scores
    (spread,) = [one for one in found.tables if one.name == "spread"]
    late = {row[0]: row[1:] for row in spread.rows}["6"]
    assert late[0].value > 0.7 and late[1].value < 0.3 and late[2].low > 0.3
    assert scores["per_draw_over_spread_here"].value > 0.2
    assert sorted(run.name for run in found.runs) == sorted(one.name for one in attribute.plan(Asked(n=8), settings))
