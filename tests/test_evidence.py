"""The evidence on numbers worked by hand, its p-values under exchange, and the vectors and prompts that stand in for a reading's own."""

from __future__ import annotations

import math

import pytest
import torch
from families import loaded
from torch import Tensor

import patchscopes as ps
from patchscopes.controls.evidence import SIGNIFICANT, bits_over, explained, p_value, verdict
from patchscopes.controls.vectors import N_OTHERS, N_RANDOM, POOL, SECOND_LOOKS, random_like, seed_of
from patchscopes.scopes.viewing import Viewing

NAN, INF = math.nan, math.inf


def logs(*probabilities: float) -> Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


class TestBits:
    """log2 p − log2 mean p(control)."""

    @pytest.mark.parametrize(
        ("p", "controls", "bits"),
        [
            (0.5, (0.125,), 2),
            (0.5, (0.5,), 0),
            (0.125, (0.5,), -2),
            (0.5, (0.25, 0.25, 0.25), 1),
            (0.5, (0.2, 0.05), 2),  # the mean of probabilities, 1/8; the mean of logs, 1/10, would give 2.32
            (0.25, (1.0, 0.0), -1),  # one control that cannot say it at all counts as one that cannot
        ],
    )
    def test_by_hand(self, p: float, controls: tuple[float, ...], bits: float) -> None:
        assert bits_over(math.log(p), logs(*controls)) == pytest.approx(bits, abs=1e-12)

    def test_no_controls(self) -> None:
        assert math.isnan(bits_over(-1.0, logs()))

    def test_an_empty_text_tells_nothing(self) -> None:
        assert bits_over(0.0, torch.zeros(5)) == pytest.approx(0, abs=1e-12)

    def test_texts_too_unlikely_for_their_probability_to_be_a_number(self) -> None:
        assert bits_over(-2000.0, torch.tensor([-2000.0 - 3 * math.log(2)] * 4, dtype=torch.float64)) == pytest.approx(
            3, abs=1e-9
        )

    def test_what_no_control_can_say(self) -> None:
        assert bits_over(-1.0, torch.tensor([-INF, -INF])) == INF
        assert math.isnan(bits_over(-INF, torch.tensor([-INF])))

    def test_nan_stays_nan(self) -> None:
        assert math.isnan(bits_over(NAN, logs(0.5)))
        assert math.isnan(bits_over(-1.0, torch.tensor([-1.0, NAN])))

    def test_single_precision_controls_are_summed_in_double(self) -> None:
        controls = torch.full((24,), -60.0) + torch.linspace(0, 1e-3, 24)
        want = (-60 - math.log(sum(math.exp(float(c)) for c in controls) / 24)) / math.log(2)
        assert bits_over(-60.0, controls) == pytest.approx(want, abs=1e-10)


class TestExplained:
    """1 − log p / log mean p(other)."""

    @pytest.mark.parametrize(
        ("p", "others", "share"),
        [
            (1.0, (0.125,), 1),  # all three bits
            (0.5, (0.125,), 2 / 3),  # two bits of three
            (0.125, (0.125,), 0),
            (0.125, (0.5, 0.5), -2),  # two bits fewer than none, of one
            (0.5, (0.25, 0.0), 2 / 3),  # the mean is 1/8
        ],
    )
    def test_by_hand(self, p: float, others: tuple[float, ...], share: float) -> None:
        assert explained(math.log(p), logs(*others)) == pytest.approx(share, abs=1e-12)

    def test_it_is_the_evidence_as_a_share_of_what_there_was_to_tell(self) -> None:
        others = logs(0.3, 0.01, 0.2)
        most = bits_over(0.0, others)
        assert explained(math.log(0.4), others) == pytest.approx(bits_over(math.log(0.4), others) / most, abs=1e-12)

    def test_where_nothing_is_left_to_explain(self) -> None:
        assert explained(0.0, logs(1.0, 1.0)) == 0 and explained(0.0, torch.zeros(5)) == 0
        assert math.isnan(explained(-1.0, logs())) and math.isnan(explained(NAN, logs(0.5)))


class TestPValue:
    """(1 + number of others at least as likely) / (n + 1)."""

    @pytest.mark.parametrize(
        ("log_p", "others", "p"),
        [
            (-1.0, (-2.0, -3.0, -4.0), 1 / 4),
            (-3.5, (-2.0, -3.0, -4.0), 3 / 4),
            (-5.0, (-2.0, -3.0, -4.0), 1),
            (-3.0, (-2.0, -3.0, -3.0, -4.0), 4 / 5),  # ties count against the reading
            (0.0, (0.0,) * 24, 1),  # an empty text
            (-1.0, (-INF,) * 24, 1 / 25),
            (-INF, (-INF,) * 3, 1),
        ],
    )
    def test_by_hand(self, log_p: float, others: tuple[float, ...], p: float) -> None:
        assert p_value(log_p, torch.tensor(others, dtype=torch.float64)) == pytest.approx(p)

    def test_no_others(self) -> None:
        assert math.isnan(p_value(-1.0, logs()))

    @pytest.mark.parametrize(("log_p", "others"), [(NAN, (-1.0, -2.0)), (-1.0, (NAN, -2.0)), (-1.0, (NAN, NAN))])
    def test_what_is_not_a_number_has_no_rank(self, log_p: float, others: tuple[float, ...]) -> None:
        """NaN is at least as likely as nothing and would make the smallest p-value of all."""
        assert math.isnan(p_value(log_p, torch.tensor(others, dtype=torch.float64)))

    @staticmethod
    def p_values(scores: Tensor) -> Tensor:
        return torch.tensor([p_value(float(row[0]), row[1:]) for row in scores], dtype=torch.float64)

    def test_uniform_if_the_second_look_is_one_among_the_others(self, generator: torch.Generator) -> None:
        n = 6000
        scores = torch.randn(
            n, 1, generator=generator, dtype=torch.float64
        ) * 5 + torch.randn(  # a text has its own likelihood, shared by all
            n, N_OTHERS + 1, generator=generator, dtype=torch.float64
        ) * torch.rand(n, 1, generator=generator, dtype=torch.float64)
        counts = torch.bincount((self.p_values(scores) * (N_OTHERS + 1)).round().long(), minlength=N_OTHERS + 2)
        assert counts[0] == 0  # never 0: the smallest is 1/25
        expected = n / (N_OTHERS + 1)
        chi2 = float(((counts[1:] - expected) ** 2 / expected).sum())
        assert chi2 < 51.2  # 99.9 % point of χ² with 24 degrees of freedom
        distance = float((counts[1:].cumsum(0) / n - torch.arange(1, N_OTHERS + 2) / (N_OTHERS + 1)).abs().max())
        assert distance < 1.95 / math.sqrt(n)  # Kolmogorov, 0.1 %

    def test_never_too_small_where_there_are_ties(self, generator: torch.Generator) -> None:
        scores = torch.randint(0, 4, (4000, N_OTHERS + 1), generator=generator).double()
        p = self.p_values(scores)
        for level in (1 / 25, 0.1, 0.25, 0.5, 0.8):
            assert float((p <= level + 1e-9).double().mean()) <= level + 3 * math.sqrt(level * (1 - level) / 4000)

    def test_small_where_the_text_tells_of_its_source(self, generator: torch.Generator) -> None:
        scores = torch.randn(500, N_OTHERS + 1, generator=generator, dtype=torch.float64)
        scores[:, 0] += 3
        assert float((self.p_values(scores) <= SIGNIFICANT).double().mean()) > 0.7


class TestVerdict:
    @pytest.mark.parametrize(
        ("nothing", "random", "others", "p", "want"),
        [
            (1.0, 2.0, 0.1, 0.04, "above"),
            (1.0, 2.0, 0.1, 0.05, "above"),
            (1.0, 2.0, 0.1, 0.0501, "same"),
            (0.0, 2.0, 0.1, 0.04, "same"),
            (1.0, -0.1, 3.0, 0.04, "same"),
            (1.0, 1.0, -1e-9, 0.04, "same"),
            (-1.0, -1.0, -1.0, 1.0, "same"),
            (INF, 1.0, 1.0, 0.04, "above"),
            (NAN, 1.0, 1.0, 0.04, "not run"),
            (1.0, NAN, 1.0, 0.04, "not run"),
            (1.0, 1.0, NAN, 0.04, "not run"),
            (1.0, 1.0, 1.0, NAN, "not run"),
        ],
    )
    def test_by_hand(self, nothing: float, random: float, others: float, p: float, want: str) -> None:
        assert verdict(nothing, random, others, p) == want

    def test_the_built_in_controls_can_reach_it(self) -> None:
        assert 1 / (N_OTHERS + 1) <= SIGNIFICANT == 0.05


class TestRandomVectors:
    VECTORS = torch.randn(5, 64, generator=torch.Generator().manual_seed(4)) * torch.tensor(
        [[1e-3], [1.0], [20.0], [300.0], [0.5]]
    )

    def test_norms_are_those_of_the_vectors(self) -> None:
        found = random_like(self.VECTORS, "k")
        assert found.norm(dim=-1).tolist() == pytest.approx(self.VECTORS.norm(dim=-1).tolist(), rel=1e-5)

    def test_equal_keys_give_equal_vectors_and_others_others(self) -> None:
        first, again, other = (random_like(self.VECTORS, key) for key in ("k", "k", "k2"))
        assert torch.equal(first, again)
        assert float(torch.cosine_similarity(first, other).abs().max()) < 0.6

    def test_the_rest_of_the_programme_has_no_say(self) -> None:
        torch.manual_seed(1)
        first = random_like(self.VECTORS, "k")
        state = torch.random.get_rng_state()
        torch.manual_seed(2)
        assert torch.equal(random_like(self.VECTORS, "k"), first)
        torch.manual_seed(1)
        assert torch.equal(torch.random.get_rng_state(), state), "the global generator was used"

    def test_the_number_format_is_kept_and_the_direction_does_not_depend_on_it(self) -> None:
        half = random_like(self.VECTORS.to(torch.bfloat16), "k")
        assert half.dtype == torch.bfloat16
        assert float(torch.cosine_similarity(half.float(), random_like(self.VECTORS, "k")).min()) > 0.999

    def test_directions_are_isotropic_and_independent_of_the_vectors(self) -> None:
        n, d = 4000, 16
        ones = torch.ones(n, d)
        unit = random_like(ones, "isotropic") / math.sqrt(d)
        second_moment = unit.T @ unit / n  # I / d
        assert float((second_moment * d - torch.eye(d)).abs().max()) < 0.12
        assert float(unit.mean(0).abs().max()) < 4 / math.sqrt(n * d)
        assert float((unit @ ones[0]).mean().abs()) < 4 / math.sqrt(n)

    def test_seeds_depend_on_the_text_alone(self) -> None:
        keys = [f"0 random {(place, layer)}" for place in range(20) for layer in range(20)]
        assert len({seed_of(key) for key in keys}) == len(keys)
        assert seed_of("patchscopes") == 55889345627389260  # in every process, on every machine: SHA-256 and not hash()
        assert all(0 <= seed_of(key) < 2**63 for key in keys)


class TestPool:
    def test_prompts_are_distinct_and_say_something(self) -> None:
        assert len({prompt.strip().lower() for prompt in POOL}) == len(POOL)
        assert all(prompt == prompt.strip() and len(prompt.split()) >= 3 for prompt in POOL)

    def test_their_last_words_differ(self) -> None:
        """Each is read at its last token: two that end alike would be one source twice."""
        assert len({prompt.split()[-1] for prompt in POOL}) == len(POOL)

    def test_there_are_enough(self) -> None:
        assert len(POOL) > N_OTHERS and N_RANDOM >= 2  # one more than is drawn: the source's own prompt may be among them

    def test_the_second_look_says_nothing_about_any_of_them(self) -> None:
        assert len(set(SECOND_LOOKS)) == len(SECOND_LOOKS) == 3
        neutral = {"here", "is", "some", "text", "a", "the", "listen", "facts", "what", "we", "know"}
        for look in SECOND_LOOKS:
            assert look.strip() and {word.strip(".,\n").lower() for word in look.split()} <= neutral


def test_a_control_is_one_vector_wherever_a_state_is_written() -> None:
    """Over maps, target prompts, target layers and draws; of each source, and of each of its layers, another."""
    model = loaded("llama")
    maps = [ps.maps.Identity(), ps.maps.Scale(3.0)]
    scope = ps.Patchscope(["hello {x} is", "a {x}"], layer=[1, 2], map=maps, temperature=1.0, draws=2, max_new_tokens=1)
    viewing = Viewing(scope, ps.Source(model, ["the cat", "a dog", "ab"], layer=[2, 3]))
    assert viewing.controls is not None
    viewing.sight.need(set(range(3)))
    viewing.controls.need(set(range(3)))
    ways: dict[tuple[str, int, int], set[tuple[float, ...]]] = {}
    requests: set[str] = set()
    for cell in viewing.cells:
        for kind, run in viewing.controls.runs(cell, viewing.written(cell)):
            if kind in ("random", "other"):
                key, _, state = run
                assert state is not None
                unit = (state / state.norm()).flatten()[:6]
                ways.setdefault((kind, cell.place, cell.source_layer), set()).add(tuple(round(x, 4) + 0.0 for x in unit.tolist()))
                requests.add(key)
    assert len(ways) == 2 * 3 * 2 and all(len(one) == 1 for one in ways.values())
    assert len({one for (kind, *_), some in ways.items() if kind == "random" for one in some}) == 3 * 2
    assert len(requests) > 3 * 2 * 16  # and yet every run in which one is written is a run of its own
