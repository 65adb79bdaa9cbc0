"""Token erasure: the probe in closed form, scores and segments of planted tables, planted states that forget, and the experiment."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import patchscopes as ps
from patchscopes import PatchscopesError
from patchscopes.evaluate import token_erasure
from patchscopes.evaluate.frame import Asked
from patchscopes.evaluate.token_erasure import (
    Document,
    Settings,
    at_ends,
    chosen_late,
    drops,
    higher_than_chance,
    segments,
    span_score,
    units_of,
)
from patchscopes.evaluate.token_probe import probability_of

NAN = float("nan")


def test_the_probe_is_the_posterior_of_gaussians() -> None:
    """Known means and one known covariance: with many rows the probe's probability is Bayes' rule."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    mean, root = 1.5 * draw(3, 4), torch.eye(4, dtype=torch.float64) + 0.3 * draw(4, 4)
    share, n = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), 30_000
    y = torch.multinomial(share, n, replacement=True, generator=generator)
    x = mean[y] + draw(n, 4) @ root.T
    z, asked = mean[[0, 1, 2, 0]] + draw(4, 4) @ root.T, [7, 8, 9, 8]
    found = probability_of(x, [7 + int(k) for k in y], z, asked, shrink=0.0)
    inverse = torch.linalg.inv(root @ root.T)
    log_p = torch.stack([-0.5 * ((z - m) @ inverse * (z - m)).sum(1) + s.log() for m, s in zip(mean, share, strict=True)], 1)
    want = log_p.softmax(1)[range(4), [k - 7 for k in asked]]
    assert float((found - want).abs().max()) < 0.03
    assert math.isnan(float(probability_of(x, [7] * n, z[:1], [5])[0]))  # a token that never stood there
    exact = probability_of(
        mean.repeat(2, 1), [0, 1, 2] * 2, mean, [0, 1, 2]
    )  # no spread within tokens: the shrinkage holds it up
    assert float(exact.min()) > 0.99


def test_scores_and_segments_of_a_planted_table() -> None:
    drop = np.zeros((7, 3))
    drop[4, 0] = 0.9  # the last token of 2…4 is lost,
    drop[3, 1], drop[4, 1], drop[4, 2] = 0.8, 0.7, 0.6  # what it is made of too,
    drop[2, 1], drop[2, 2], drop[3, 2] = 0.1, -0.2, 0.3  # and some of what came before
    want = (0.9 + 0.8 + 0.7 + 0.6 - 0.1 + 0.2 - 0.3) / 7
    assert span_score(drop, 2, 4) == pytest.approx(want)
    assert segments(drop, 3) == [((2, 4), pytest.approx(want))]
    assert span_score(drop, 3, 4) == pytest.approx((0.9 + 0.7 - 0.8 - 0.3 - 0.6) / 5)  # below 0: no segment
    assert (3, 4) not in [span for span, _ in segments(drop, 2)]
    assert span_score(np.array([[NAN, NAN, NAN], [0.5, NAN, NAN]]), 0, 1) == 0.5
    assert math.isnan(span_score(np.full((2, 3), NAN), 0, 1)) and segments(np.full((3, 3), NAN), 3) == []
    assert all(a >= 3 for (a, _), _ in segments(drop, 3, start=3))


def test_units_are_words_and_names_of_several_tokens() -> None:
    tokens = ps.load("atlas").tokens("We talked about Marie Curie and France")
    found = units_of(tokens, ["Marie Curie", "France"])
    texts = {tokens.text[tokens.offsets[a][0] : tokens.offsets[b][1]].strip(): what for (a, b), what in found.items()}
    assert texts["Marie Curie"] == "Marie Curie" and "France" not in texts
    assert all(text == what for text, what in texts.items()) and all(b > a for a, b in found)
    assert "Marie Curie" not in units_of(tokens).values()  # two words
    assert units_of(tokens, ["Marie Curie"], longest=1) == {}


def planted() -> tuple[list[Document], dict[int, list[np.ndarray]]]:
    """Units at 1…2 of every text; from layer 1 to 3 they lose everything, other places nothing."""
    documents = [Document(f"text {k}", (1, 2, 3, 4, 5, 6), 0, {(1, 2): f"word {k}"}) for k in range(12)]
    tables = {}
    for layer, left in ((1, 1.0), (2, 0.5), (3, 0.0)):
        table = np.ones((6, 3))
        table[0, 1:], table[1, 2] = NAN, NAN
        table[2, :2] = left
        tables[layer] = [table.copy() for _ in documents]
    return documents, tables


def test_what_is_planted_is_found() -> None:
    documents, p = planted()
    assert chosen_late(p, documents, 1) == 3
    drop = drops(p, 1, 3)
    inside, outside = at_ends(drop, documents, 1)
    assert [value for value, _ in inside] == [1.0] * 12 and {value for value, _ in outside} == {0.0}
    assert at_ends(drop, documents, 2)[0] == []  # nothing of a unit of two tokens stands two back
    ranked = higher_than_chance(drop, documents, 3)
    assert ranked and all(value == 1.0 for value, _ in ranked)
    assert all(span == (1, 2) for table in drop for span, _ in segments(table, 2))
    nothing = [np.where(np.isnan(table), NAN, 0.0) for table in drop]
    assert {value for value, _ in higher_than_chance(nothing, documents, 3)} == {0.5}
    with pytest.raises(PatchscopesError, match="no late layer"):
        chosen_late(p, documents, 3)


def test_the_experiment_on_the_bundled_model(tmp_path: Path) -> None:
    found = token_erasure.evaluate(Asked(n=30, runs=tmp_path), Settings(layers="1:8:3"))
    scores: Any = found.scores
    assert scores["early"] == 1 and scores["late"] in (4, 7) and scores["texts"] <= 30 and scores["units"] > 10
    assert set(scores["lost"]) == {"0", "-1", "-2"} and 0 < scores["spans_that_are_units"] < 0.2
    assert [line.name for line in found.figures[0].lines][:2] == ["i = 0, ends of words", "i = 0, elsewhere"]  # type: ignore[union-attr]
    early = found.figures[0].lines[1]  # type: ignore[union-attr]
    assert early.y[0] > 0.5  # near the embeddings a state gives its own token away
    again = token_erasure.evaluate(Asked(n=30, runs=tmp_path), Settings(layers="1:8:3"))
    assert again.to_json() == found.to_json()


def test_random_weights_do_not_favour_words(tmp_path: Path) -> None:
    model = ps.load("atlas")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.hf.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.05)
    asked = Asked(n=60, runs=tmp_path, models={"atlas": ps.load((model.hf, model.tokenizer))})
    found: Any = token_erasure.evaluate(asked, Settings(layers="1:8:3")).scores["higher_than_another_span"]
    assert found.low < 0.5 and found.value < 0.6 and found.n > 20


def test_wrong_input(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a\n")
    with pytest.raises(PatchscopesError, match="at least two texts and two such words"):
        token_erasure.evaluate(Asked(runs=tmp_path, data=tmp_path / "a.txt"))
    with pytest.raises(PatchscopesError, match=r"expected layer 1 \(early\)"):
        token_erasure.evaluate(Asked(runs=tmp_path, n=8), Settings(layers="2:5"))
