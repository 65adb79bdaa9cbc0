"""Intervals, paired tests, permutations, the best of N, power and uniformity, against hand-worked values and slow oracles."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchscopes.core.errors import InputError
from patchscopes.evaluate import best_of, bootstrap, paired, permutation, power, probe, statistics, uniformity
from patchscopes.evaluate.binomial import clopper_pearson, tail
from patchscopes.evaluate.paired import Table, compared, sign_flip


def test_binomial_tails_by_hand() -> None:
    assert tail(2, 3, 0.5) == pytest.approx(4 / 8)
    assert tail(1, 4, 0.1) == pytest.approx(1 - 0.9**4)
    assert (tail(0, 3, 0.0), tail(1, 3, 0.0), tail(3, 3, 1.0), tail(4, 3, 1.0)) == (1.0, 0.0, 1.0, 0.0)
    with pytest.raises(InputError, match="p lies between 0 and 1"):
        tail(1, 3, 1.5)


def test_clopper_pearson_against_published_values() -> None:
    # none of n: 1 − 0.025^(1/n), the rule of three's exact form; 5 of 10 and 1 of 10 as tables have them
    assert clopper_pearson(0, 20) == (0.0, pytest.approx(1 - 0.025 ** (1 / 20)))
    assert clopper_pearson(7, 7) == (pytest.approx(0.025 ** (1 / 7)), 1.0)
    assert clopper_pearson(5, 10) == (pytest.approx(0.1871, abs=1e-4), pytest.approx(0.8129, abs=1e-4))
    assert clopper_pearson(1, 10) == (pytest.approx(0.0025, abs=1e-4), pytest.approx(0.4450, abs=1e-4))
    low, high = clopper_pearson(3, 40, level=0.9)
    assert tail(3, 40, low) == pytest.approx(0.05) and 1 - tail(4, 40, high) == pytest.approx(0.05)
    assert all(math.isnan(bound) for bound in clopper_pearson(0, 0))
    with pytest.raises(InputError, match="5 hits in 4 rows"):
        clopper_pearson(5, 4)


def test_a_bootstrap_of_a_mean_is_that_of_rates() -> None:
    # two clusters with 0 and 1: resamples give 0, ½ and 1
    one = bootstrap.bootstrapped(lambda rows: float(np.array([0.0, 1.0])[rows].mean()), ["a", "b"])
    assert (one.value, one.low, one.high, one.n, one.clusters) == (0.5, 0.0, 1.0, 2, 2)
    rng = np.random.default_rng(0)
    hits = rng.integers(0, 2, 60).astype(float)
    of_rate = statistics.rate(hits, range(60))
    of_any = bootstrap.bootstrapped(lambda rows: float(hits[rows].mean()), range(60))
    assert (of_any.low, of_any.high) == (pytest.approx(of_rate.low, abs=0.03), pytest.approx(of_rate.high, abs=0.03))
    five = np.repeat(hits, 5)
    together = bootstrap.bootstrapped(lambda rows: float(five[rows].mean()), np.repeat(range(60), 5).tolist())
    as_if_new = bootstrap.bootstrapped(lambda rows: float(five[rows].mean()), range(300))
    assert together.high - together.low > 1.6 * (as_if_new.high - as_if_new.low)


def test_a_bootstrap_that_proves_nothing_is_unknown() -> None:
    for statistic, clusters in ((len, ["a"] * 3), (lambda rows: 1.0, "abc"), (lambda rows: math.nan, "abc")):
        assert math.isnan(bootstrap.bootstrapped(statistic, list(clusters)).low)
    assert math.isnan(bootstrap.bootstrapped(lambda rows: 0.0, []).value)
    # one of the two classes is missing from half of the resamples of two rows
    y = np.array([0.0, 1.0])
    assert math.isnan(bootstrap.bootstrapped(lambda rows: math.nan if np.ptp(y[rows]) == 0 else 1.0, "ab").low)


def test_mcnemar_on_a_table() -> None:
    first, second = [1, 1, 1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1, 1, 0]
    found = compared(first, second, range(8))
    assert found.table == Table(both=1, only_first=5, only_second=1, neither=1)
    assert found.p_exact == pytest.approx(2 * (1 + 6) / 64)  # of 6 discordant at most one to a side: 1 + 6 of 64, both sides
    assert found.p_clustered == pytest.approx(found.p_exact)  # a row is an entity
    assert (found.first.value, found.second.value, found.difference.value) == (0.75, 0.25, 0.5)


def test_flips_of_clusters_by_hand() -> None:
    # sums ±3 ±1 ±1: of 8, six are as far from 0 as 3 + 1 − 1
    differences, clusters = [1, 1, 1, 1, -1], ["a", "a", "a", "b", "c"]
    assert sign_flip(differences, clusters) == pytest.approx(6 / 8)
    assert sign_flip([1] * 9, ["a"] * 9) == 1.0  # one entity proves nothing, however many rows it has
    assert sign_flip([0, 0], ["a", "b"]) == 1.0 and sign_flip([], []) == 1.0
    assert sign_flip([1] * 10, range(10)) == pytest.approx(2 / 2**10)
    with pytest.raises(InputError, match=r"rows \[1\] have no difference"):
        sign_flip([1, math.nan], ["a", "b"])


@given(st.lists(st.tuples(st.sampled_from([-1, 0, 1]), st.integers(0, 5), st.sampled_from("rs")), min_size=1, max_size=14))
@settings(max_examples=60, deadline=None)
def test_flips_against_all_of_them(rows: list[tuple[int, int, str]]) -> None:
    differences, clusters, groups = map(list, zip(*rows, strict=True))
    names = sorted(set(clusters))

    def mean(signs: dict[int, int]) -> float:
        by_group = [[signs[c] * d for d, c, g in rows if g == name] for name in sorted(set(groups))]
        return float(np.mean([np.mean(some) for some in by_group]))

    all_of_them = [mean(dict(zip(names, signs, strict=True))) for signs in itertools.product([1, -1], repeat=len(names))]
    as_far = np.mean([abs(one) >= abs(all_of_them[0]) - 1e-9 for one in all_of_them])
    assert sign_flip(differences, clusters, groups) == pytest.approx(float(as_far))
    k, n = differences.count(1), differences.count(-1)
    assert sign_flip(differences, range(len(rows))) == pytest.approx(statistics.mcnemar(k, n))


def test_random_flips_come_near_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    differences, clusters = rng.integers(-1, 2, 90) + (rng.random(90) < 0.2), rng.integers(0, 25, 90).tolist()
    exact = sign_flip(differences, clusters)
    monkeypatch.setattr(paired, "EXACT", 4)
    assert 0.001 < exact < 0.6 and sign_flip(differences, clusters) == pytest.approx(exact, abs=0.012)


def test_rows_that_are_repeated_prove_no_more() -> None:
    first, second = np.array([1, 1, 1, 1, 0, 1]), np.array([0, 0, 0, 0, 1, 1])
    once = compared(first, second, range(6))
    often = compared(np.repeat(first, 6), np.repeat(second, 6), np.repeat(range(6), 6).tolist())
    assert often.p_clustered == pytest.approx(12 / 32) and once.p_clustered == pytest.approx(12 / 32)  # 1 + 5 of 32, twice
    assert often.p_exact < 0.002 < once.p_exact


def test_paired_refuses_what_is_no_pair_of_hits() -> None:
    with pytest.raises(InputError, match=r"0\.5"):
        compared([0.5, 1], [0, 1], "ab")
    with pytest.raises(InputError, match="1 hits of the first and 2 of the second"):
        compared([1], [0, 1], "ab")


def test_a_family_is_corrected_as_a_whole() -> None:
    # p = 2/2⁶, 2/2⁸ and 1 → Holm: 2 · 2/2⁶, 3 · 2/2⁸, 1
    found = {
        ("colour", 2): compared([1] * 6, [0] * 6, range(6)),
        ("colour", 3): compared([1] * 8, [0] * 8, range(8)),
        ("shape", 2): compared([1, 0], [0, 1], range(2)),
    }
    family = paired.family(found)
    assert [(one.task, one.layer) for one in family] == list(found)
    assert [one.adjusted for one in family] == pytest.approx([4 / 64, 6 / 256, 1.0])
    assert [one.significant for one in family] == [False, True, False]


def test_permutations_by_hand() -> None:
    # of the 6 shuffles of three rows one keeps all in place, and one row in three stays on average
    found = permutation.paired(np.eye(3), "rrr")
    assert (found.observed, found.units, found.alone) == (1.0, 3, ())
    assert found.mean == pytest.approx(1 / 3, abs=0.03) and found.p == pytest.approx(1 / 6, abs=0.03)
    assert found.deranged == 0.0
    # derangements take rows to one of their own group alike: r (1 + 2)/2, s (3 + 4)/2
    two = permutation.paired(np.array([[9, 1, 0, 0], [2, 9, 0, 0], [0, 0, 9, 3], [0, 0, 4, 9]]), "rrss")
    assert two.deranged == pytest.approx((1.5 + 3.5) / 2) and two.observed == 9.0
    # means over groups: r has 1 and 0, s has 1, 1 and 1; the row of t has nobody to change with
    scores = np.diag([1.0, 0, 1, 1, 1, 1])
    assert permutation.paired(scores, "rrssst").observed == pytest.approx((0.5 + 1) / 2)
    assert permutation.paired(scores, "rrssst").alone == (5,)
    alone = permutation.paired(np.eye(2), "rs")
    assert math.isnan(alone.p) and alone.alone == (0, 1)
    assert permutation.paired(np.eye(2), "rs", kind="across").p == pytest.approx(0.5, abs=0.05)


def test_permutations_against_all_of_them() -> None:
    scores = np.random.default_rng(5).random((5, 5))
    means = [np.mean([scores[k, other] for k, other in enumerate(order)]) for order in itertools.permutations(range(5))]
    found = permutation.paired(scores, [0] * 5, draws=8000)
    assert found.mean == pytest.approx(scores.mean(), abs=0.01)
    assert found.p == pytest.approx(np.mean(np.array(means) >= means[0] - 1e-12), abs=0.02)


def test_rows_of_one_entity_are_shuffled_as_one() -> None:
    # two entities of three equal rows: two orders, so p can be no less than a half
    entities = np.repeat([0, 1], 3)
    scores = (entities[:, None] == entities).astype(float)
    found = permutation.paired(scores, [0] * 6, entities.tolist())
    assert (found.observed, found.units) == (1.0, 2) and found.p == pytest.approx(0.5, abs=0.05)
    assert permutation.paired(scores, [0] * 6).p < 0.2  # as if they were six


def test_noise_gives_uniform_p_values() -> None:
    rng = np.random.default_rng(0)
    for kind in ("within", "across"):
        p = [
            permutation.paired(rng.random((12, 12)), ["r"] * 6 + ["s"] * 6, kind=kind, draws=19, seed=seed).p
            for seed in range(400)
        ]
        found = uniformity.uniformity(p, 19)
        assert found.share.low <= found.expected == 0.05 <= found.share.high
        assert found.ks_p > 0.01 and found.chi2_p > 0.01


def test_a_planted_linear_signal_beats_its_shuffles() -> None:
    # 60 entities of 4 classes: the class is a direction of their vectors, once with a signal and once with none
    rng = np.random.default_rng(0)
    classes, directions = np.arange(60) % 4, rng.normal(size=(4, 16))
    for strength, signal in ((2.0, True), (0.0, False)):
        x = torch.tensor(rng.normal(size=(60, 16)) + strength * directions[classes], dtype=torch.float32)
        fold = probe.folds_of(range(60))
        said = np.zeros(60, int)
        for k in range(probe.FOLDS):
            weight, bias = probe.fit(x[None, fold != k], torch.tensor(classes[fold != k]), 4)
            said[fold == k] = (x[fold == k].double() @ weight[0].T + bias[0]).argmax(-1).numpy()
        found = permutation.paired((said[:, None] == classes).astype(float), [0] * 60, draws=999)
        assert (found.p < 0.01) if signal else (found.p > 0.05)
        assert found.mean == pytest.approx(0.25, abs=0.05)


def test_permutation_refuses_half_a_matrix() -> None:
    with pytest.raises(InputError, match=r"shape \(2, 3\) for 2 rows"):
        permutation.paired(np.zeros((2, 3)), "rr")
    with pytest.raises(InputError, match="1 scores are not a number"):
        permutation.paired(np.array([[1, math.nan], [0, 1]]), "rr")


def test_the_curve_of_any_of_n_by_hand() -> None:
    # of 4 draws 1 hits: n/4. 2 hit: 1 − C(2, n)/C(4, n) = 1/2, 1 − 1/6, 1, 1. None and all: 0 and 1
    hits = np.array([[0, 0, 1, 0], [1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]])
    assert best_of.any_of_n(hits) == pytest.approx(
        np.array([[1 / 4, 1 / 2, 3 / 4, 1], [1 / 2, 5 / 6, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]])
    )
    assert best_of.best_of_curve(hits)[1] == pytest.approx((1 / 2 + 5 / 6 + 0 + 1) / 4)
    assert best_of.best_of_curve(hits, list("rrrs"))[0] == pytest.approx(((1 / 4 + 1 / 2 + 0) / 3 + 1) / 2)


@given(st.lists(st.booleans(), min_size=1, max_size=7))
@settings(max_examples=40, deadline=None)
def test_the_curve_against_all_subsets(row: list[bool]) -> None:
    want = [np.mean([any(some) for some in itertools.combinations(row, n)]) for n in range(1, len(row) + 1)]
    assert best_of.any_of_n(np.array([row]))[0] == pytest.approx(want)


def test_the_best_of_noise_is_its_null() -> None:
    rng = np.random.default_rng(0)
    own, null = rng.random((300, 20)) < 0.1, (rng.random((300, 20)) < 0.1).astype(float)
    null[:5] = math.nan
    found = best_of.best_of(own, null, range(300))
    assert (found.n, found.left_out, found.any_of.n) == (20, 5, 295)
    assert found.any_of.value == pytest.approx(1 - 0.9**20, abs=0.05) and found.per_draw.value == pytest.approx(0.1, abs=0.02)
    assert found.over_null.low < 0 < found.over_null.high and found.p > 0.05
    assert found.curve[0] == pytest.approx(found.per_draw.value) and found.curve[-1] == pytest.approx(found.any_of.value)
    assert found.curve_null[-1] == pytest.approx(found.any_of_null.value)
    assert list(found.curve) == sorted(found.curve)
    assert found.held_out is not None and found.held_out_null is not None
    assert found.held_out.value == pytest.approx(0.1, abs=0.06) and found.held_out.n < 200


def test_the_best_of_a_signal_is_above_its_null() -> None:
    rng = np.random.default_rng(1)
    own, null = rng.random((200, 8)) < 0.1, rng.random((200, 8)) < 0.1
    own[:, 3] |= rng.random(200) < 0.6
    found = best_of.best_of(own, null, range(200))
    assert found.column == 3 and found.p < 1e-6 and found.over_null.low > 0.1
    assert found.held_out is not None and found.held_out_null is not None and found.held_out.low > found.held_out_null.high


def test_best_of_wants_the_same_n() -> None:
    with pytest.raises(InputError, match="same N"):
        best_of.best_of(np.zeros((3, 4)), np.zeros((3, 5)), range(3))
    with pytest.raises(InputError, match="none of 2 rows"):
        best_of.best_of(np.zeros((2, 1)), np.full((2, 1), math.nan), range(2))
    assert best_of.best_of(np.zeros((2, 1)), np.zeros((2, 1)), "aa").held_out is None


def test_detectable_rates_by_hand() -> None:
    # five of five is the only result at ½ below .05 (1/32), and p⁵ = .8
    assert power.detectable_rate(5, 0.5) == pytest.approx(0.8 ** (1 / 5))
    assert power.detectable_rate(10, 0.0) == pytest.approx(1 - 0.2 ** (1 / 10))  # one hit is enough
    assert math.isnan(power.detectable_rate(4, 0.5))  # 1/16: nothing is
    assert power.detectable_rate(1000, 0.5) == pytest.approx(0.5 + 2.4865 * math.sqrt(0.25 / 1000), abs=0.003)  # z.95 + z.8
    with pytest.raises(InputError, match="p0 lies between"):
        power.detectable_rate(4, 2)


def test_detectable_differences_by_hand() -> None:
    # all six pairs differ: significant only if all do so to one side (2/64), θ⁶ + (1 − θ)⁶ = .8
    delta = power.detectable_difference(6, 1.0)
    theta = (1 + delta) / 2
    assert theta**6 + (1 - theta) ** 6 == pytest.approx(0.8)
    theta = (1 + power.detectable_difference(6, 1.0, power=0.05)) / 2  # so little power is near 2/64, of both sides
    assert theta**6 + (1 - theta) ** 6 == pytest.approx(0.05)
    assert math.isnan(power.detectable_difference(5, 1.0))  # 2/32
    rng = np.random.default_rng(0)
    delta = power.detectable_difference(60, 0.4)
    only = rng.multinomial(60, [(0.4 + delta) / 2, (0.4 - delta) / 2, 0.6], size=4000)
    assert np.mean([statistics.mcnemar(int(a), int(b)) <= 0.05 for a, b, _ in only]) == pytest.approx(0.8, abs=0.03)


def test_effective_n_by_hand() -> None:
    assert power.effective_n(["a", "a", "a", "b"]) == pytest.approx(16 / 10)  # n²/Σm²
    assert power.effective_n(list("aabbcc")) == 3.0 and power.effective_n(range(7)) == 7.0 and power.effective_n([]) == 0.0
    assert power.effective_n(list("aabb"), [1, 1, 0, 0]) == pytest.approx(2)  # rows of an entity are one
    assert power.effective_n(list("aabb"), [0, 1, 0, 1]) == pytest.approx(4)  # entities do not differ
    # between (2 · ¼ · ½ …): means ½, 1, 0 about ½ → 2(0 + ¼ + ¼)/2 = ½; within ½/3 = 1/6; ρ = (½ − 1/6)/(½ + 1/6) = ½; 6/(1 + ½)
    assert power.effective_n(list("aabbcc"), [0, 1, 1, 1, 0, 0]) == pytest.approx(4)


def test_uniformity_by_hand() -> None:
    both = uniformity.uniformity([0.5, 1.0], 1)
    assert (both.ks, both.chi2, both.ks_p, both.expected) == (0.0, 0.0, 1.0, 0.0)
    one = uniformity.uniformity([0.5, 0.5], 1)  # F̂(½) = 1 instead of ½; χ² = 1 + 1; two draws are alike half of the time
    assert (one.ks, one.chi2) == (0.5, 2.0) and one.ks_p == pytest.approx(0.5, abs=0.05)
    few = uniformity.uniformity([1 / 20] * 3 + [k / 20 for k in range(4, 21)], 19)
    assert (few.share.value, few.expected) == (3 / 20, 1 / 20)
    assert (few.share.low, few.share.high) == clopper_pearson(3, 20)
    of_two = uniformity.uniformity([1 / 20, 1 / 20, 1.0, 1.0], 19, ["a", "a", "b", "b"])
    assert (of_two.share.low, of_two.share.high, of_two.share.clusters) == (0.0, 1.0, 2)
    assert math.isnan(uniformity.uniformity([], 19).ks)


def test_uniformity_sees_what_is_not() -> None:
    rng = np.random.default_rng(0)
    small = uniformity.uniformity(np.minimum(rng.integers(1, 21, 200), rng.integers(1, 21, 200)) / 20, 19)
    assert small.ks_p < 0.01 and small.chi2_p < 0.01 and small.share.low > 0.05
    for odd in ([0.33], [0.0], [math.nan], [1.05]):
        with pytest.raises(InputError, match="not on the grid"):
            uniformity.uniformity(odd, 19)


def test_an_entity_is_shuffled_alike_in_all_its_relations() -> None:
    """What ties an entity's relations together (its culture) is no information of its own: p stays uniform."""
    rng = np.random.default_rng(3)
    entities, relations = [k for k in range(12) for _ in range(6)], [r for _ in range(12) for r in range(6)]
    small = []
    for seed in range(400):
        truth, said = (rng.integers(4, size=12) for _ in range(2))
        scores = (said[entities][:, None] == truth[entities][None, :]).astype(float)
        small.append(permutation.paired(scores, relations, entities, draws=199, seed=seed).p <= 0.05)
    assert np.mean(small) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 400)  # relations shuffled one by one: 0.23
