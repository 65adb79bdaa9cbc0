"""Confidences: calibration, ranking, recalibration and agreement, against hand-worked values and slow oracles."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patchscopes.core.errors import InputError
from patchscopes.evaluate import calibration, ranking
from patchscopes.evaluate.agreement import agreement, mode_frequency
from patchscopes.evaluate.paired import Table
from patchscopes.evaluate.recalibration import cross_fitted, isotonic, platt

ROWS = st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.5, 0.7, 1.0]), st.integers(0, 1)), min_size=1, max_size=30)
REAL = st.lists(st.tuples(st.sampled_from([-math.inf, -2.5, -1.0, 0.0, 0.5, 3.0, math.inf]), st.integers(0, 1)), max_size=25)


def test_auroc_by_hand() -> None:
    assert ranking.auroc([3, 2, 1], [1, 0, 1]) == 0.5  # 3 beats 2, 1 does not
    assert ranking.auroc([0.9, 0.8, 0.4, 0.3], [1, 1, 0, 0]) == 1.0
    assert ranking.auroc([2, 2, 1, 3], [1, 0, 0, 1]) == pytest.approx((0.5 + 1 + 1 + 1) / 4)  # 2 = 2 counts half
    assert ranking.auroc([math.inf, -math.inf, 0.0], [1, 0, 1]) == 1.0
    assert ranking.auroc([math.inf, math.inf], [1, 0]) == 0.5
    assert math.isnan(ranking.auroc([1, 2], [1, 1])) and math.isnan(ranking.auroc([], []))
    with pytest.raises(InputError, match=r"1 scores are not a number \(rows \[1\]\)"):
        ranking.auroc([1, math.nan], [0, 1])
    with pytest.raises(InputError, match=r"right \(1\) or wrong"):
        ranking.auroc([1, 2], [0, 0.5])


@given(REAL)
@settings(max_examples=80, deadline=None)
def test_auroc_counts_pairs(rows: list[tuple[float, int]]) -> None:
    right, wrong = [s for s, y in rows if y], [s for s, y in rows if not y]
    pairs = [(a > b) + 0.5 * (a == b) for a in right for b in wrong]
    found = ranking.auroc([s for s, _ in rows], [y for _, y in rows])
    assert found == pytest.approx(np.mean(pairs)) if pairs else math.isnan(found)


def test_auroc_has_an_interval_over_entities() -> None:
    rng = np.random.default_rng(0)
    correct = rng.integers(0, 2, 60)
    scores = correct + rng.normal(0, 1.2, 60)
    own = ranking.auroc_of(scores, correct, range(60))
    assert own.low < own.value < own.high and own.low > 0.5
    five, truth = np.repeat(scores, 5), np.repeat(correct, 5)
    together = ranking.auroc_of(five, truth, np.repeat(range(60), 5).tolist())
    as_if_new = ranking.auroc_of(five, truth, range(300))
    assert own.value == pytest.approx(together.value) and own.value == pytest.approx(as_if_new.value)
    assert together.high - together.low > 1.6 * (as_if_new.high - as_if_new.low)
    apart = ranking.auroc_difference(correct + rng.normal(0, 0.5, 60), rng.normal(size=60), correct, range(60))
    assert apart.low > 0
    same = ranking.auroc_difference(scores, 2 * scores + 1, correct, range(60))  # only the order counts
    assert same.value == 0.0 and math.isnan(same.low)
    assert math.isnan(ranking.auroc_of([1, 2], [1, 1], "ab").value)
    perfect = ranking.auroc_of([1, 2, 3, 4], [0, 0, 1, 1], "abcd")
    assert perfect.value == 1.0 and math.isnan(perfect.low)


def test_risk_and_coverage_by_hand() -> None:
    found = ranking.selective([4, 3, 2, 1], [1, 0, 1, 1])
    assert found.coverage == (0.25, 0.5, 0.75, 1.0) and found.risk == pytest.approx((0, 1 / 2, 1 / 3, 1 / 4))
    assert found.area == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 4)
    assert (found.at_chance, found.at_best) == (0.25, pytest.approx(0.25 / 4))  # the wrong one last
    assert (found.accuracy_at(0.5), found.accuracy_at(0.51), found.accuracy_at(1)) == pytest.approx((0.5, 2 / 3, 0.75))
    tie = ranking.selective([1, 1, 1, 0], [1, 0, 0, 1])
    assert tie.risk == pytest.approx((2 / 3, 2 / 3, 2 / 3, 1 / 2))  # whichever of the three is answered first
    assert ranking.selective([2.0, -math.inf], [1, 0]).area == ranking.selective([2.0, -9.0], [1, 0]).area == 0.25
    assert math.isnan(ranking.selective([], []).area) and math.isnan(ranking.selective([], []).accuracy_at(1))
    with pytest.raises(InputError, match="no coverage"):
        found.accuracy_at(0)


@given(REAL.filter(bool), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_risk_does_not_know_the_order_of_rows(rows: list[tuple[float, int]], random) -> None:
    one = ranking.selective([s for s, _ in rows], [y for _, y in rows])
    random.shuffle(rows)
    other = ranking.selective([s for s, _ in rows], [y for _, y in rows])
    assert one.risk == pytest.approx(other.risk)
    assert one.at_best - 1e-12 <= one.area and one.risk[-1] == pytest.approx(one.at_chance)


def test_ece_by_hand() -> None:
    # bins .1–.2, .2–.3, .8–.9 and .9–1, a row each: .15, .25, .85 and .05 off
    bins = calibration.equal_width([0.95, 0.85, 0.15, 0.25], [1, 0, 0, 0])
    assert [(round(b.low, 9), round(b.high, 9), b.n) for b in bins] == [
        (0.1, 0.2, 1),
        (0.2, 0.3, 1),
        (0.8, 0.9, 1),
        (0.9, 1.0, 1),
    ]
    assert calibration.ece(bins) == pytest.approx((0.15 + 0.25 + 0.85 + 0.05) / 4)
    # one bin of .72 and .78, of which one is right
    assert calibration.ece(calibration.equal_width([0.72, 0.78], [1, 0])) == pytest.approx(0.25)
    edges = calibration.equal_width([0.0, 0.3, 0.6, 0.7, 1.0], [0, 0, 0, 0, 1])
    assert [round(b.low, 9) for b in edges] == [0.0, 0.3, 0.6, 0.7, 0.9]  # an edge belongs to the bin above, 1 to the last
    assert math.isnan(calibration.ece(calibration.equal_width([], [])))


def test_bins_of_equal_mass_by_hand() -> None:
    found = calibration.equal_mass([0.1, 0.2, 0.3, 0.9], [0, 1, 1, 1], bins=2)
    assert [(b.low, b.high, b.n, b.rate) for b in found] == [(0.1, 0.2, 2, 0.5), (0.3, 0.9, 2, 1.0)]
    assert calibration.ece(found) == pytest.approx((2 * 0.35 + 2 * 0.4) / 4)
    tied = calibration.equal_mass([0.5, 0.5, 0.5, 0.9], [0, 1, 0, 1], bins=2)
    assert [b.n for b in tied] == [3, 1]  # equal confidences stay together
    assert calibration.equal_mass([], []) == ()


def test_brier_by_hand() -> None:
    # of .8 half is right, of .2 none; all in all a quarter
    found = calibration.brier([0.8, 0.8, 0.2, 0.2], [1, 0, 0, 0])
    assert found.score == pytest.approx((0.04 + 0.64 + 0.04 + 0.04) / 4)
    assert found.reliability == pytest.approx((0.3**2 + 0.2**2) / 2)
    assert found.resolution == pytest.approx(0.25**2)
    assert found.uncertainty == pytest.approx(0.25 * 0.75)
    assert math.isnan(calibration.brier([], []).score)


@given(ROWS)
@settings(max_examples=80, deadline=None)
def test_the_parts_of_brier_add_up(rows: list[tuple[float, int]]) -> None:
    c, y = [c for c, _ in rows], [y for _, y in rows]
    found = calibration.brier(c, y)
    assert found.score == pytest.approx(found.reliability - found.resolution + found.uncertainty, abs=1e-12)
    assert found.score == pytest.approx(np.mean([(a - b) ** 2 for a, b in rows]))
    for bins in (calibration.equal_width(c, y), calibration.equal_mass(c, y)):
        assert sum(b.n for b in bins) == len(rows) and 0 <= calibration.ece(bins) <= 1
        assert all(b.low - 1e-9 <= b.confidence <= b.high + 1e-9 for b in bins)


def test_nll_by_hand() -> None:
    assert calibration.nll([0.5, 0.25], [1, 0]) == pytest.approx((math.log(2) + math.log(4 / 3)) / 2)
    assert calibration.nll([1.0, 0.0], [1, 0]) == 0.0
    assert calibration.nll([1.0, 0.5], [0, 1]) == math.inf  # certain, and wrong
    assert math.isnan(calibration.nll([], []))


def test_a_calibrated_confidence_looks_so() -> None:
    rng = np.random.default_rng(0)
    c = rng.random(400)
    y = (rng.random(400) < c).astype(int)
    found = calibration.calibrated(c, y, range(400))
    assert 0.5 * found.ece_floor < found.ece < 1.7 * found.ece_floor and found.ece_floor < 0.06
    assert found.gap.low < 0 < found.gap.high and found.auroc.value == pytest.approx(5 / 6, abs=0.05)
    assert found.brier_interval.value == pytest.approx(found.brier.score)
    assert found.brier.score == pytest.approx(1 / 6, abs=0.03)
    assert found.selective.area < found.selective.at_chance
    sure = calibration.calibrated(np.where(c > 0.5, 1.0, 0.0), y, range(400))
    assert sure.ece > 5 * sure.ece_floor and sure.nll == math.inf and sure.ece_floor == 0.0
    with pytest.raises(InputError, match="no confidences"):
        calibration.calibrated([1.5], [1], ["a"])


def test_the_floor_of_ece_by_hand() -> None:
    # one row of ½ is half off whichever way it falls; of two, half of the time: E|mean − ½| = ¼
    assert calibration.ece_floor([0.5]) == 0.5
    assert calibration.ece_floor([0.5, 0.5]) == pytest.approx(0.25, abs=0.02)
    assert calibration.ece_floor([0.0, 1.0]) == 0.0 and math.isnan(calibration.ece_floor([]))


def test_platt_finds_the_line() -> None:
    rng = np.random.default_rng(0)
    bits = rng.normal(0, 2, 20000)
    right = rng.random(20000) < 1 / (1 + np.exp(-(1.5 * bits - 1)))
    found = platt(bits, right)
    assert (found.slope, found.intercept) == (pytest.approx(1.5, abs=0.07), pytest.approx(-1, abs=0.07))
    # the same scores for both classes: the smoothed rate, here (2 · 3/4 + 2 · 1/4) / 4
    assert platt([1, 1, 1, 1], [1, 1, 0, 0]).probability([1.0]) == pytest.approx([0.5])
    with pytest.raises(InputError, match="2 of 2 rows are right"):
        platt([1, 2], [1, 1])


def test_platt_stays_finite() -> None:
    # separable: targets 3/4 and 1/4, which a line through (±1) meets exactly: slope ln 3
    found = platt([1, 1, -1, -1], [1, 1, 0, 0])
    assert (found.slope, found.intercept) == (pytest.approx(math.log(3)), pytest.approx(0, abs=1e-6))
    with_infinite = platt([math.inf, 1, -1, -math.inf], [1, 1, 0, 0])
    assert with_infinite.slope == pytest.approx(math.log(3))
    assert with_infinite.probability([math.inf, -math.inf]) == pytest.approx([0.75, 0.25])
    assert platt([math.inf, -math.inf], [1, 0]).probability([0.0]) == pytest.approx([0.5])
    with pytest.raises(InputError, match="not a number"):
        found.probability([math.nan])


def test_isotonic_by_hand() -> None:
    found = isotonic([1, 2, 3, 4, 5], [0, 1, 0, 1, 1])  # 1, 0 at 2 and 3 are out of order and become ½
    assert (found.starts, found.values) == ((1, 2, 4), (0, 0.5, 1))
    assert found.probability([-math.inf, 1.5, 2, 3.9, 4, math.inf]).tolist() == [0, 0, 0.5, 0.5, 1, 1]
    assert isotonic([7, 7, 7], [1, 0, 0]).probability([1, 9]) == pytest.approx([1 / 3, 1 / 3])
    with pytest.raises(InputError, match="0 of 1 rows are right"):
        isotonic([1], [0])


@given(REAL.filter(lambda rows: len({y for _, y in rows}) == 2))
@settings(max_examples=80, deadline=None)
def test_isotonic_is_the_best_of_all_that_rise(rows: list[tuple[float, int]]) -> None:
    scores, y = [s for s, _ in rows], [y for _, y in rows]
    levels = sorted(set(scores))

    def mean(a: int, b: int) -> float:
        return float(np.mean([y for s, y in rows if levels[a] <= s <= levels[b]]))

    # the closed form of least squares: max over starts of min over ends
    n = len(levels)
    want = [max(min(mean(a, b) for b in range(k, n)) for a in range(k + 1)) for k in range(n)]
    found = isotonic(scores, y).probability(levels)
    assert found == pytest.approx(want) and (np.diff(found) >= 0).all()


def test_the_other_half_makes_the_fit() -> None:
    rng = np.random.default_rng(0)
    clusters = [f"e{k // 2}" for k in range(400)]
    bits = rng.normal(0, 2, 400)
    right = (rng.random(400) < 1 / (1 + np.exp(-bits))).astype(int)
    for fit in (platt, isotonic):
        found = cross_fitted(bits, right, clusters, fit)
        assert calibration.ece(calibration.equal_width(found, right)) < 0.1
        one = clusters[0]
        mine = np.array([c == one for c in clusters])
        turned = cross_fitted(bits, np.where(mine, 1 - right, right), clusters, fit)
        assert (turned[mine] == found[mine]).all()  # a row's own truth has no part in its probability
        assert (turned != found).any()
    with pytest.raises(InputError, match="0 of 0 rows"):
        cross_fitted([1, 2], [0, 1], "aa", platt)


def test_kappa_by_hand() -> None:
    # both 20, first alone 5, second alone 10, neither 15: p_o = .7, p_e = .5 · .6 + .5 · .4 = .5
    judge = [1] * 25 + [0] * 25
    alias = [1] * 20 + [0] * 5 + [1] * 10 + [0] * 15
    found = agreement(judge, alias, range(50))
    assert (found.kappa.value, found.raw.value) == (pytest.approx(0.4), 0.7)
    assert found.table == Table(20, 5, 10, 15) and found.kappa.low < 0.4 < found.kappa.high
    assert agreement([1, 0], [0, 1], "ab").kappa.value == -1.0
    assert math.isnan(agreement([1, 1], [1, 1], "ab").kappa.value)  # no chance to differ
    assert math.isnan(agreement([], [], []).kappa.value)


def test_the_mode_of_draws_by_hand() -> None:
    found = mode_frequency(["Rome", "Paris.", "paris", ' "Paris"'])
    assert (found.text, found.share, found.n) == ("Paris.", 0.75, 4)
    assert mode_frequency(["a", "b"]).text == "a" and mode_frequency(["", ""]).share == 1.0
    assert mode_frequency(["12 men", "twelve", "13"], lambda a, b: a[:1] == "1" or b[:1] == "1").share == 1.0
    with pytest.raises(InputError, match="no draws"):
        mode_frequency([])
