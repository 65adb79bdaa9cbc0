"""Superscopes: gains as maps, the choice of one without labels, and search counted against a null of the same size."""

from __future__ import annotations

import math
import zlib

import polars as pl
import pytest
import torch
from families import loaded
from oracle import Patch, error, full_logits, states

import patchscopes as ps
from patchscopes.core.errors import InputError

TEXT = "the cat sat on"
CELL = ["prompt", "position", "source_layer", "target", "target_layer"]


def small(alphas=(1.0, 4.0), **settings) -> ps.Patchscope:
    return ps.scopes.superscope(alphas, scope=ps.Patchscope("hello {x} is", layer=[1, 2], max_new_tokens=3, **settings))


@pytest.mark.parametrize("site", ["resid", "mlp_out", "mlp_in"])
def test_a_gain_on_what_is_patched(site: str) -> None:
    model = loaded("llama")
    readings = small()(ps.Source(model, TEXT, site=site, layer=2), controls=False, keep_logits=True)
    value = model.run(TEXT, read=f"{site}.2").at(f"{site}.2", position=-1)
    tokens = model.tokens("hello x is")
    assert readings.logits is not None and readings.table.height == 4
    for k, row in enumerate(readings.table.iter_rows(named=True)):
        alpha = {"scale(1)": 1.0, "scale(4)": 4.0}[row["map"]]
        patch = Patch(f"resid.{row['target_layer']}", tokens.position("x"), alpha * value)
        assert error(readings.logits[k], full_logits(model.hf, "llama", tokens.ids, patch)[-1]) < 1e-4


def test_the_preset_is_the_published_application() -> None:
    scope = ps.scopes.superscope()
    assert (scope.layer, scope.max_new_tokens, len(scope.map)) == (1, 10, 6)  # type: ignore[arg-type]
    assert scope.prompt == ps.scopes.describe().prompt


def test_matched_writes_are_a_gain_of_their_own() -> None:
    """replace_matched is α v with α = ‖u‖ / ‖v‖."""
    model = loaded("llama")
    source = ps.Source(model, TEXT, layer=3)
    matched = ps.Patchscope("hello {x} is", layer=1, write="replace_matched", max_new_tokens=1)(
        source, controls=False, keep_logits=True
    )
    tokens = model.tokens("hello x is")
    u = states(model.hf, "llama", torch.tensor([tokens.ids]))["resid.1"][0, tokens.position("x")]
    v = states(model.hf, "llama", torch.tensor([model.tokens(TEXT).ids]))["resid.3"][0, -1]
    gain = ps.Patchscope("hello {x} is", layer=1, map=ps.maps.Scale(float(u.norm() / v.norm())), max_new_tokens=1)
    same = gain(source, controls=False, keep_logits=True)
    assert matched.logits is not None and same.logits is not None and error(matched.logits, same.logits) < 1e-4
    assert matched.table["norm_ratio"].item() == pytest.approx(1, abs=1e-4)


def test_the_criterion_is_what_its_formula_says() -> None:
    model = loaded("llama")
    scope = small((1.0, 3.0, 9.0))
    table = ps.scopes.criterion(scope, ps.Source(model, [TEXT, "ab"], layer=[1, 3]), read=4)
    assert table.height == 2 * 2 * 2 * 3
    tokens = model.tokens("hello x is")
    for row in table.iter_rows(named=True):
        ids = torch.tensor([model.tokens(row["prompt_text"]).ids])
        v = states(model.hf, "llama", ids)[f"resid.{row['source_layer']}"][0, -1] * float(row["map"][6:-1])
        edit = ps.Edit(f"resid.{row['target_layer']}", "x", v)
        run = model.run("hello x is", read="resid.4", edits=[edit])
        r = run.at("resid.4", position=-1)
        assert row["self_similarity"] == pytest.approx(float(v @ r / v.norm() / r.norm()), abs=1e-4)
        patch = Patch(f"resid.{row['target_layer']}", tokens.position("x"), v)
        p = full_logits(model.hf, "llama", tokens.ids, patch)[-1].double().softmax(-1)
        assert row["entropy"] == pytest.approx(float(-(p * p.log2()).sum()), abs=1e-3)
    for _, some in table.group_by(CELL):
        s, h = some["self_similarity"], some["entropy"]
        want = (s - s.min()) / (s.max() - s.min()) - (h - h.min()) / (h.max() - h.min())  # type: ignore[operator]
        assert some["criterion"].to_list() == pytest.approx(want.to_list())


def test_choosing_by_evidence_counts_what_was_tried() -> None:
    readings = small((1.0, 2.0, 4.0))(ps.Source(loaded("llama"), [TEXT, "ab"], layer=[1, 3]))
    best = ps.scopes.chosen(readings)
    assert best.height == 2 * 2 * 2 and set(best["tried"]) == {3}
    bits = ("bits_over_nothing", "bits_over_random", "bits_over_others")
    for row in best.iter_rows(named=True):
        mine = readings.readings.filter(*(pl.col(name) == row[name] for name in CELL))
        assert row["bits"] == max(min(one[name] for name in bits) for one in mine.iter_rows(named=True))
        assert row["p_chosen"] == min(1, 3 * row["p_value"])
    bare = small()(ps.Source.of_vectors(loaded("llama"), torch.randn(2, 64), layer=1))
    with pytest.raises(InputError, match="no evidence"):
        ps.scopes.chosen(bare)


def test_the_null_of_a_search_is_as_large() -> None:
    readings = small((1.0, 2.0, 4.0))(ps.Source(loaded("llama"), [TEXT, "ab"], layer=3))
    found = ps.scopes.best_of(readings, lambda text: float(len(set(text))))
    assert set(found["draws"]) == {3} and found.height == 4
    for row in found.iter_rows(named=True):
        mine = readings.table.filter(*(pl.col(name) == row[name] for name in CELL))
        for kind in ("random", "other", "mean"):
            some = mine.filter(pl.col("control") == kind)["text"]
            assert len(some) == row["draws"] and row[f"best_{kind}"] == max(len(set(text)) for text in some)
        assert row["mean"] <= row["best"]


def test_on_a_random_model_a_search_finds_no_more_than_its_null() -> None:
    prompts = [f"{a}{b} {c}" for a in "abc" for b in "de" for c in "fgh"]
    readings = small((1.0, 2.0, 4.0, 8.0))(ps.Source(loaded("llama"), prompts, layer=3))
    hit = ps.scopes.best_of(readings, lambda text: float(zlib.crc32(text.encode()) % 4 == 0))  # knows nothing
    own, null, one = (float(hit[name].mean() or 0) for name in ("best", "best_other", "mean"))  # type: ignore[arg-type]
    assert one < own and abs(own - null) < 3 * math.sqrt(2 * 0.25 / hit.height)


def test_mistakes_are_told() -> None:
    with pytest.raises(InputError, match="alphas is empty"):
        ps.scopes.superscope(())
    with pytest.raises(InputError, match="layer is 5, but the scope has its own, same"):
        ps.scopes.superscope(scope=ps.Patchscope("hello {x} is"), layer=5)
    assert ps.scopes.superscope(layer=[1, 2]).layer == [1, 2]
    with pytest.raises(InputError, match="0 to 5"):
        ps.scopes.criterion(small(), ps.Source(loaded("llama"), TEXT, layer=1), read=9)
