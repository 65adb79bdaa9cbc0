"""Statistics and scoring of experiments, against hand-worked values."""

from __future__ import annotations

import math

import numpy as np
import pytest

from patchscopes.evaluate import scoring, statistics
from patchscopes.evaluate.statistics import Estimate


def test_rate_by_hand() -> None:
    one = statistics.rate([1, 0, 1, 1], ["a", "a", "b", "c"])
    assert (one.value, one.n, one.clusters) == (0.75, 4, 3)
    assert 0 <= one.low <= one.value <= one.high <= 1
    assert statistics.rate([1, 1, 1], ["a", "b", "c"]) == Estimate(1.0, pytest.approx(0.025 ** (1 / 3)), 1.0, 3, 3)
    assert statistics.rate([0, 0], ["a", "b"]).high == pytest.approx(1 - 0.025**0.5)
    assert math.isnan(statistics.rate([], []).value)


def test_interval_of_two_clusters_by_hand() -> None:
    # two clusters with rates 0 and 1: resamples give 0, ½ and 1 with probabilities ¼, ½, ¼
    one = statistics.rate([0, 1], ["a", "b"])
    assert (one.value, one.low, one.high) == (0.5, 0.0, 1.0)


def test_one_cluster_or_equal_numbers_prove_nothing() -> None:
    for one in (
        statistics.rate([1, 0], ["a", "a"]),
        statistics.rate([0.3] * 7, range(7)),
        statistics.mean_of_rates([1, 1, 0, 0], ["r", "r", "s", "s"], ["a"] * 4),
        statistics.difference([1, 1, 0], [0, 1, 0], ["a"] * 3),
        statistics.difference([2.5, 3.5], [2, 3], ["a", "b"]),
    ):
        assert math.isfinite(one.value) and math.isnan(one.low) and math.isnan(one.high)
    assert str(statistics.rate([1, 0], ["a", "a"])) == "50.0% (interval unknown)"
    assert statistics.rate([1, 1], ["a", "a"]).low == pytest.approx(0.025)  # one entity, of which all is right
    with_one_odd = statistics.rate([1] + [0] * 20, range(21))
    assert with_one_odd.low == 0 and 0.04 < with_one_odd.high < 0.3


def test_clusters_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    hits = rng.integers(0, 2, 60)
    own = statistics.rate(hits, range(60))
    five_times = statistics.rate(np.repeat(hits, 5), np.repeat(range(60), 5).tolist())
    as_if_new = statistics.rate(np.repeat(hits, 5), range(300))
    assert five_times.value == own.value == as_if_new.value
    assert five_times.high - five_times.low == pytest.approx(own.high - own.low, abs=1e-9)
    assert as_if_new.high - as_if_new.low < 0.6 * (own.high - own.low)


def test_interval_covers_about_95_percent() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for seed in range(100):
        rates = rng.beta(2, 2, 40)
        hits = (rng.random((40, 3)) < rates[:, None]).ravel()
        one = statistics.rate(hits, np.repeat(range(40), 3).tolist(), seed=seed)
        covered += one.low <= 0.5 <= one.high
    assert 86 <= covered <= 100


def test_mean_of_rates_weighs_groups_alike() -> None:
    one = statistics.mean_of_rates([1, 1, 1, 1, 0], ["r", "r", "r", "r", "s"], list("abcde"))
    assert one.value == 0.5  # (1 + 0) / 2, not 4/5


def test_any_of_rises_with_n_and_so_does_its_null() -> None:
    rng = np.random.default_rng(0)
    noise = rng.random((2000, 30)) < 0.1
    for n in (1, 5, 30):
        assert statistics.any_of(noise[:, :n]).mean() == pytest.approx(1 - 0.9**n, abs=0.03)
    assert statistics.per_draw(noise).mean() == pytest.approx(0.1, abs=0.01)


def test_a_cell_chosen_on_others_is_not_flattered() -> None:
    rng = np.random.default_rng(0)
    noise = rng.random((400, 50)) < 0.2
    found = statistics.held_out(noise, range(400))
    assert found is not None
    assert not set(found.chose) & set(found.scores) and len(found.chose) + len(found.scores) == 400
    assert noise[found.chose, found.cell].mean() > 0.23  # the best of fifty
    assert noise[found.scores, found.cell].mean() == pytest.approx(0.2, abs=0.06)


def test_halves_hold_entities_together() -> None:
    entities = [f"e{k % 20}" for k in range(100)]
    found = statistics.held_out(np.ones((100, 2)), entities)
    assert found is not None and found.cell == 1  # among equals the last
    assert not {entities[k] for k in found.chose} & {entities[k] for k in found.scores}
    assert statistics.held_out(np.ones((2, 2)), ["same", "same"]) is None


def test_chosen_cell_weighs_groups_alike() -> None:
    hits = np.array([[1, 0], [1, 0], [1, 0], [0, 1]])
    assert statistics.chosen_cell(hits) == 0
    assert statistics.chosen_cell(hits, ["r", "r", "r", "s"]) == 1  # ½ each; among equals the last


def test_strangers_share_the_group_and_nothing_else() -> None:
    groups, answers, clusters = ["r", "r", "r", "s"], ["x", "x", "y", "z"], ["a", "b", "c", "d"]
    found = statistics.strangers(groups, answers, clusters)
    assert found[0] == 2 and found[1] == 2 and found[2] in (0, 1) and found[3] is None


def test_mcnemar_and_holm_by_hand() -> None:
    assert statistics.mcnemar(0, 5) == pytest.approx(2 / 32)
    assert statistics.mcnemar(1, 3) == pytest.approx(2 * (1 + 4) / 16)
    assert statistics.mcnemar(3, 3) == 1.0 and statistics.mcnemar(0, 0) == 1.0
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_the_papers_test_and_whole_words() -> None:
    assert scoring.contains("the wonder", "Won") is False and scoring.contains("Wonderful", "Won")
    assert scoring.contains("New Yorkers", "New York") and scoring.contains("at last Leo nard", "Leonard")
    assert not scoring.contains("paris", "Paris") and not scoring.contains("anything", " ")
    assert not scoring.names("wonderful", "Won") and scoring.names("the won of Korea", "Won")
    assert scoring.names("It is NEW\n york.", "New York") and not scoring.names("renew york", "New York")
    assert scoring.names("a U.S. city", ["United States", "U.S."])
    assert not scoring.names("a text", "A") and scoring.names("vitamin A.", "A") and not scoring.names("", "")
    assert scoring.begins_with(" Paris.", "Paris") and not scoring.begins_with("Parisian", "Paris")


def test_an_echo_is_no_reading() -> None:
    assert scoring.echo_free(["Germany", "Berlin"], "the Bank of Germany") == ["Berlin"]


def test_rouge_l_by_hand() -> None:
    assert scoring.rouge_l("police killed the gunman", "police kill the gunman") == pytest.approx(0.75)
    assert scoring.rouge_l("the gunman kill police", "police kill the gunman") == pytest.approx(0.5)
    assert scoring.rouge_l("", "word") == 0.0 and scoring.rouge_l("Same, words!", "same words") == 1.0


def test_a_difference_is_paired() -> None:
    first, second = [1, 1, 0, 1], [0, 1, 0, 1]
    one = statistics.difference(first, second, list("abcd"))
    assert (one.value, one.low) == (0.25, 0.0) and 0.25 < one.high <= 0.75
    apart = statistics.difference(second, first, list("abcd"))
    assert apart.value == -0.25 and apart.low == pytest.approx(-one.high)
    by_group = statistics.difference(first, second, list("abcd"), ["r", "s", "s", "s"])
    assert by_group.value == 0.5  # the mean of 1 and 0


def test_a_difference_that_never_varies_has_the_exact_bound() -> None:
    bound = 0.025**0.5
    none = statistics.difference([1, 0], [1, 0], ["a", "b"])
    assert (none.value, none.low, none.high) == (0.0, pytest.approx(bound - 1), pytest.approx(1 - bound))
    up = statistics.difference([1, 1], [0, 0], ["a", "b"])
    down = statistics.difference([0, 0], [1, 1], ["a", "b"])
    assert (up.value, up.low, up.high) == (1.0, pytest.approx(bound), 1.0)
    assert (down.value, down.low, down.high) == (-1.0, -1.0, pytest.approx(-bound))
    assert math.isnan(statistics.difference([], [], []).value)
