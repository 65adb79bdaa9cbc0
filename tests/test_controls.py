"""The controls as pure functions, on planted data and against slow oracles: vectors, shuffles, texts, probes."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from families import loaded
from oracle import error
from torch import Tensor

import patchscopes as ps
from patchscopes.controls.vectors import covariance_like, gaussian_of, mean_of, shrinkage, zero_like
from patchscopes.core.errors import InputError, UnknownName, VectorError
from patchscopes.evaluate import permutation, uniformity
from patchscopes.evaluate.selectivity import control_task, selectivity

TARGET = "hello {x} is"


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class TestVectors:
    SAMPLE = randn(9, 5, seed=1) * torch.tensor([4.0, 2.0, 1.0, 0.3, 0.1]) + torch.tensor([5.0, -3.0, 0.0, 1.0, 0.0])

    @staticmethod
    def slow(sample: Tensor) -> tuple[np.ndarray, np.ndarray, float]:
        """Mean, covariance and shrinkage as their formulas stand, matrix by matrix."""
        x = sample.double().numpy()
        mean = x.mean(0)
        x = x - mean
        n, d = x.shape
        s = x.T @ x / n
        m = np.trace(s) / d
        apart = ((s - m * np.eye(d)) ** 2).sum()
        error = sum(((np.outer(row, row) - s) ** 2).sum() for row in x) / n**2
        return mean, s, min(1.0, error / apart)

    def test_shrinkage_is_what_its_formula_says(self) -> None:
        for sample in (self.SAMPLE, randn(4, 30, seed=2), randn(200, 6, seed=3)):
            assert shrinkage(sample) == pytest.approx(self.slow(sample)[2], rel=1e-9)
        assert shrinkage(torch.ones(3, 4)) == 1.0
        assert shrinkage(randn(2000, 6) * torch.tensor([9.0, 5, 3, 1, 1, 1])) < 0.01  # much data, nothing to shrink
        assert shrinkage(randn(5, 400)) > 0.5  # hardly any

    def test_drawn_vectors_have_the_mean_and_the_covariance(self) -> None:
        mean, s, alpha = self.slow(self.SAMPLE)
        want = (1 - alpha) * s + alpha * np.trace(s) / 5 * np.eye(5)
        n = 40_000
        found = gaussian_of(self.SAMPLE, (n,), "k").numpy()
        deviation = np.sqrt(np.diag(want))
        assert np.abs((found.mean(0) - mean) / deviation).max() < 4 / math.sqrt(n)
        got = np.cov(found.T, bias=True)
        assert np.abs((got - want) / np.outer(deviation, deviation)).max() < 6 / math.sqrt(n)
        assert np.abs((np.cov(randn(n, 5).numpy().T) - want) / np.outer(deviation, deviation)).max() > 0.5, "the test can fail"

    def test_brought_to_the_norms_of_the_vectors(self) -> None:
        vectors = randn(3, 2, 5) * 7
        found = covariance_like(vectors, self.SAMPLE, "k")
        assert found.norm(dim=-1).flatten().tolist() == pytest.approx(vectors.norm(dim=-1).flatten().tolist(), rel=1e-5)
        drawn = gaussian_of(self.SAMPLE, (3, 2), "k").float()
        assert float(torch.cosine_similarity(found, drawn, -1).min()) > 1 - 1e-6

    def test_the_key_alone_decides(self) -> None:
        vectors = randn(2, 5)
        first = covariance_like(vectors, self.SAMPLE, "k")
        torch.manual_seed(3)
        assert torch.equal(first, covariance_like(vectors, self.SAMPLE, "k"))
        assert not torch.allclose(first, covariance_like(vectors, self.SAMPLE, "l"))
        assert covariance_like(vectors.half(), self.SAMPLE, "k").dtype == torch.float16

    def test_zero_and_mean(self) -> None:
        assert zero_like(randn(2, 3)).tolist() == [[0, 0, 0]] * 2
        assert mean_of(torch.tensor([[[1.0, 2.0]], [[3.0, 6.0]]])).tolist() == [2, 4]

    def test_samples_that_are_too_small(self) -> None:
        with pytest.raises(VectorError, match=r"sample of 1 vectors.*at least 2"):
            covariance_like(randn(2, 5), self.SAMPLE[:1], "k")
        with pytest.raises(VectorError, match="at least 1"):
            mean_of(randn(0, 5))


class TestShuffle:
    def test_within_a_group_and_across(self) -> None:
        rng = np.random.default_rng(0)
        for trial in range(300):
            groups = rng.integers(0, 3, rng.integers(1, 14)).tolist()
            clusters = [f"{rng.integers(0, 5)}" for _ in groups]
            for within, entities in itertools.product((True, False), (None, clusters)):
                found = ps.controls.shuffled(groups, within=within, clusters=entities, seed=trial)
                used = [j for j in found if j is not None]
                assert len(set(used)) == len(used), "nobody stands in twice"
                for k, j in enumerate(found):
                    if j is not None:
                        assert j != k and (groups[j] == groups[k]) is within
                        assert entities is None or entities[j] != entities[k]
                if within or entities is None:  # as many as there can be: twice what is not of the largest block, or all
                    blocks = (
                        [
                            list(
                                Counter((entities or range(len(groups)))[k] for k, one in enumerate(groups) if one == g).values()
                            )
                            for g in set(groups)
                        ]
                        if within
                        else [list(Counter(groups).values())]
                    )
                    assert len(used) == sum(min(sum(sizes), 2 * (sum(sizes) - max(sizes))) for sizes in blocks)

    def test_every_other_row_is_as_likely(self) -> None:
        n, trials = 5, 4000
        counts = np.zeros((n, n))
        for seed in range(trials):
            for k, j in enumerate(ps.controls.shuffled([0] * n, seed=seed)):
                assert j is not None
                counts[k, j] += 1
        away = counts[~np.eye(n, dtype=bool)]
        assert np.trace(counts) == 0
        assert np.abs(away - trials / (n - 1)).max() < 4.5 * math.sqrt(trials * 3 / 16)

    def test_seeds(self) -> None:
        groups = [0] * 8
        assert (
            ps.controls.shuffled(groups, seed=1) == ps.controls.shuffled(groups, seed=1) != ps.controls.shuffled(groups, seed=2)
        )
        assert len({tuple(ps.controls.shuffled(groups, seed=seed)) for seed in range(20)}) > 15
        assert ps.controls.shuffled([], seed=1) == ps.controls.shuffled([], within=False) == []
        with pytest.raises(InputError, match=r"2 clusters.*8 rows"):
            ps.controls.shuffled(groups, clusters=["a", "b"])

    @staticmethod
    def fits(states: Tensor, labels: Sequence[int]) -> np.ndarray:
        """[state, row]: whether the nearest class mean of other rows says the row's label of the state."""
        means = torch.stack([states[np.array(labels) == c].sum(0) for c in sorted(set(labels))])
        sizes = torch.bincount(torch.tensor(labels)).double()
        found = np.zeros((len(labels), len(labels)))
        for j, k in np.ndindex(found.shape):
            left, size = means.clone(), sizes.clone()
            for one in {j, k}:  # whoever is read or asked about teaches nothing
                left[labels[one]] -= states[one]
                size[labels[one]] -= 1
            found[j, k] = int((left / size[:, None] - states[j]).norm(dim=-1).argmin()) == labels[k]
        return found

    def test_a_planted_signal_beats_shuffled_states(self) -> None:
        labels = [k % 4 for k in range(24)]
        codes, rows = randn(4, 16, seed=5), range(24)
        for strength, signal in ((1.0, True), (0.0, False)):
            fits = self.fits(strength * codes[labels] + 0.5 * randn(24, 16, seed=6), labels)
            own = fits[rows, rows].mean()
            others = [fits[ps.controls.shuffled([0] * 24, seed=seed), rows].mean() for seed in range(100)]
            found = permutation.paired(fits, [0] * 24)
            assert (own > 0.9 and found.p < 0.01) if signal else (abs(own - np.mean(others)) < 0.15 and found.p > 0.05)
            assert np.mean(others) == pytest.approx(found.deranged, abs=0.02)  # one derangement at a time, and all of them

    def test_noise_gives_uniform_p_values(self) -> None:
        """Whether row k is served by state j is a draw of its own for all pairs alike, in groups of four, where derangements would fail."""
        rng = np.random.default_rng(0)
        p = [permutation.paired(rng.normal(size=(12, 12)), "rrrrsssstttt", draws=19, seed=seed).p for seed in range(400)]
        found = uniformity.uniformity(p, 19)
        assert found.share.low <= found.expected == 0.05 <= found.share.high
        assert found.ks_p > 0.01 and found.chi2_p > 0.01


class TestStandIns:
    VECTORS = randn(6, 5, seed=3)
    SAMPLE = randn(12, 5, seed=4)

    def test_every_kind(self) -> None:
        f = ps.maps.Affine(randn(3, 5), randn(3, seed=9))
        groups = ["a", "a", "a", "b", "b", "b"]
        found = ps.controls.stand_ins(self.VECTORS, ps.controls.VECTOR_KINDS, sample=self.SAMPLE, groups=groups, map=f, seed=2)
        assert tuple(found) == ps.controls.VECTOR_KINDS
        assert not found["zero"].any() and found["zero"].shape == (6, 5)
        assert f.bias is not None and torch.equal(found["map_of_zero"], f.bias.expand(6, 3))
        assert torch.allclose(found["mean"], self.SAMPLE.mean(0).expand(6, 5))
        for kind in ("random", "random_covariance"):
            assert found[kind].norm(dim=-1).tolist() == pytest.approx(self.VECTORS.norm(dim=-1).tolist(), rel=1e-5)
        rows = self.VECTORS.tolist()
        for k in range(6):
            mine = rows[:3] if k < 3 else rows[3:]
            other = rows[3:] if k < 3 else rows[:3]
            assert found["shuffled_within"][k].tolist() in [one for one in mine if one != rows[k]]
            assert found["shuffled_across"][k].tolist() in other

    def test_a_batch_equals_its_rows(self) -> None:
        kinds = ("zero", "mean", "random", "random_covariance")
        whole = ps.controls.stand_ins(self.VECTORS, kinds, sample=self.SAMPLE)
        for k in range(6):
            alone = ps.controls.stand_ins(self.VECTORS[k : k + 1], kinds, sample=self.SAMPLE)
            assert all(torch.equal(alone[kind][0], whole[kind][k]) for kind in kinds)
        assert len({tuple(row) for row in whole["random"].tolist()}) == 6

    def test_without_a_sample_the_other_rows_are_it(self) -> None:
        found = ps.controls.stand_ins(self.VECTORS, ["mean"])["mean"]
        assert found[2].tolist() == pytest.approx(self.VECTORS[[0, 1, 3, 4, 5]].mean(0).tolist(), abs=1e-6)

    def test_a_row_without_a_partner_is_no_vector(self) -> None:
        found = ps.controls.stand_ins(self.VECTORS, ["shuffled_within"], groups=["a", "a", "a", "a", "a", "b"])["shuffled_within"]
        assert bool(found[5].isnan().all()) and not found[:5].isnan().any()

    def test_bad_input(self) -> None:
        with pytest.raises(UnknownName, match=r"Did you mean 'random'"):
            ps.controls.stand_ins(self.VECTORS, ["randon"])
        with pytest.raises(InputError, match="map=…"):
            ps.controls.stand_ins(self.VECTORS, ["map_of_zero"])


class TestTexts:
    def test_the_majority_counts_no_row_of_the_own_entity(self) -> None:
        answers = ["won", "won", "won", "yen", "yen", "rand", "rugby"]
        groups = ["currency"] * 6 + ["sport"]
        clusters = ["Korea", "Korea", "Korea", "Japan", "Nippon", "Africa", "Pat"]
        # without Korea's own rows yen leads; without Japan's, won; the only row of a relation has nobody to ask
        assert ps.controls.majority(answers, groups, clusters) == ["yen", "yen", "yen", "won", "won", "won", None]
        with pytest.raises(InputError, match="one each"):
            ps.controls.majority(["a"], [], [])

    def test_the_question_alone_is_what_nothing_reads(self) -> None:
        model, prompt = loaded("llama"), "the {x} of {x}"
        readings = ps.Patchscope(prompt, max_new_tokens=1)(
            ps.Source(model, "ab", layer=2), controls="nothing", keep_logits=True, evidence=False
        )
        plain = model.run(ps.controls.question_alone(prompt)).logits[0, -1]
        assert readings.logits is not None and error(readings.logits[1], plain) < 1e-5

    def test_texts_of_positions(self) -> None:
        tokens = loaded("llama").tokens("the cat")  # <s> t h e ␣ c a t
        assert ps.controls.source_text(tokens, 3) == "the"
        assert ps.controls.at_positions(tokens, range(5, 8)) == "cat"
        assert ps.controls.at_positions(tokens, [-1]) == "t"
        assert ps.controls.at_positions(tokens, [0]) == ""  # the tokenizer's own
        assert ps.controls.at_positions(tokens, [1, 2, 5]) == "th c"

    def test_pieces_of_one_character_are_one_text(self) -> None:
        tokens = ps.load("atlas").tokens("on the 日 day")
        pieces = [k for k, (a, b) in enumerate(tokens.offsets) if tokens.text[a:b].strip() == "日"]
        assert len(pieces) > 1, "the bundled model spells it in bytes"
        assert ps.controls.at_positions(tokens, pieces).strip() == "日"

    def test_flags(self) -> None:
        assert ps.controls.answer_in_source("tackle", "He plays Tackle.") and not ps.controls.answer_in_source("won", "wonderful")
        assert ps.controls.answer_in_source(["South Korean won", "won"], "it won") and not ps.controls.answer_in_source([], "it")
        conflict = ps.controls.conflict
        assert conflict("It is chess.", "chess", "Go") == "target"
        assert conflict("It is chess.", ["Go", "weiqi"], "chess") == "verbalizer"
        assert conflict("Chess or Go", "chess", "Go") == "both"
        assert conflict("no idea", "chess", "Go") == "neither"
        assert conflict("It is chess.", "Chess", ["chess", "Go"]) == "agree"


class TestSelectivity:
    def test_answers_are_dealt_out_anew_among_entities(self) -> None:
        answers = ["a", "a", "b", "c", "c", "d"]
        clusters = ["1", "1", "2", "3", "4", "5"]
        found = control_task(answers, clusters, seed=1, groups=[0, 0, 0, 0, 1, 1])
        assert found[0] == found[1] and sorted([found[0], found[2], found[3]]) == ["a", "b", "c"]  # type: ignore[type-var]
        assert sorted(found[4:]) == ["c", "d"]  # type: ignore[type-var]
        assert len({tuple(control_task(answers, clusters, seed=k)) for k in range(20)}) > 5

    def test_a_planted_signal_is_selective_and_noise_is_not(self) -> None:
        clusters = [f"{k // 2}" for k in range(60)]
        answers = [k // 2 % 3 for k in range(60)]
        noise = randn(60, 8, seed=1)
        signal = noise + 4 * torch.nn.functional.one_hot(torch.tensor(answers), 8)
        found = selectivity(torch.stack([signal, noise]), answers, clusters, draws=3)
        assert found is not None and found.hits.shape == found.control.shape == (60, 2)
        assert found.accuracy[0] > 0.95 and found.control_accuracy[0] < 0.6
        assert found.selectivity[0] > 0.4 and abs(found.selectivity[1]) < 0.25
        assert selectivity(noise[None], ["a"] * 60, clusters) is None
