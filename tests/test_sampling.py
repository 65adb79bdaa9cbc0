"""Sampling from seeds, and how rows end: end tokens, a stop callback, the number of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from families import DEPTH, ROUTES, VOCAB, WIDTH, loaded, prompt, row_of, target
from oracle import Said, full_logits, random_patches, say

from patchscopes.engine.generate import Decoding, Generated, generate
from patchscopes.engine.rows import Row

SOME = ["llama", "gemma2", "bloom", "mamba"]  # keys and values, a sliding window, fused heads, recurrent states
LENGTH, STEPS = 7, 6


def cases(family: str, n: int = 6) -> tuple[list[int], list[Row], list[Said]]:
    """A prompt, rows at several layers and positions, and what the oracle says to each."""
    hf, ids = loaded(family).hf, prompt(LENGTH, seed=5)
    places = [(f"resid.{(3 * k) % (DEPTH + 1)}", LENGTH - 1 - k % 3) for k in range(n)]
    patches = random_patches(hf, family, ids, places, torch.Generator().manual_seed(1))
    return ids, [row_of(patch) for patch in patches], [say(hf, family, ids, patch, STEPS) for patch in patches]


def go(family: str, ids: Sequence[int], rows: Sequence[Row], decoding: Decoding, seeds: Sequence[int] = ()) -> list[Generated]:
    return generate(loaded(family).engine, target(ids), rows, decoding, route=ROUTES[family], seeds=seeds)


# ------------------------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("family", SOME)
def test_a_seed_says_the_same_again_and_in_any_company(family: str) -> None:
    ids, rows, _ = cases(family)
    seeds, sampling = [11, 12, 13, 14, 15, 16], Decoding(STEPS, temperature=1.5)
    texts = [g.tokens for g in go(family, ids, rows, sampling, seeds)]
    assert [g.tokens for g in go(family, ids, rows, sampling, seeds)] == texts
    alone = [go(family, ids, [row], sampling, [seed])[0].tokens for row, seed in zip(rows, seeds, strict=True)]
    assert alone == texts
    reverse = go(family, ids, rows[::-1], sampling, seeds[::-1])
    assert [g.tokens for g in reverse] == texts[::-1]
    others = go(family, ids, rows, sampling, [seed + 100 for seed in seeds])
    assert [g.tokens for g in others] != texts


def test_a_seed_says_the_same_when_others_finish_early() -> None:
    """A row that leaves takes its own randomness with it and nobody else's."""
    ids, rows, _ = cases("llama")
    seeds = list(range(6))
    texts = [g.tokens for g in go("llama", ids, rows, Decoding(STEPS, temperature=2.0), seeds)]
    end = frozenset({texts[0][1], texts[3][2]})
    ended = [g.tokens for g in go("llama", ids, rows, Decoding(STEPS, end, temperature=2.0), seeds)]
    assert ended == [until(text, end) for text in texts]
    assert 0 < sum(len(text) == STEPS for text in ended) < 6


def test_rows_differ_by_their_seeds_alone() -> None:
    ids, rows, _ = cases("llama")
    got = go("llama", ids, [rows[0]] * 12, Decoding(STEPS, temperature=1.5), [*range(6), *range(6)])
    texts = [g.tokens for g in got]
    assert texts[:6] == texts[6:]
    assert len({tuple(text) for text in texts}) == 6


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_their_probability_says(temperature: float) -> None:
    """3000 seeds: no token of the vocabulary is further than five standard errors from its share."""
    ids, rows, _ = cases("llama", 1)
    n = 3000
    got = go("llama", ids, rows * n, Decoding(1, temperature=temperature), range(n))
    share = torch.bincount(torch.tensor([g.tokens[0] for g in got]), minlength=VOCAB) / n
    p = (got[0].logits / temperature).softmax(-1)
    assert ((share - p).abs() <= 5 * (p * (1 - p) / n).sqrt() + 1 / n).all()
    assert p.max() < 0.9  # else all would be said by chance


def test_a_low_temperature_is_greedy() -> None:
    ids, rows, said = cases("llama")
    got = go("llama", ids, rows, Decoding(STEPS, temperature=1e-5), range(6))
    assert [g.tokens for g in got] == [want.tokens for want in said]


def test_later_tokens_are_sampled_under_the_patch() -> None:
    """The second token follows p(· | prompt, patch, first token), from a full pass of the oracle."""
    hf, ids, n = loaded("llama").hf, prompt(LENGTH, seed=5), 1500
    (patch,) = random_patches(hf, "llama", ids, [("resid.1", LENGTH - 1)], torch.Generator().manual_seed(1))
    got = go("llama", ids, [row_of(patch)] * n, Decoding(2, temperature=0.7), range(10000, 10000 + n))
    first = max(set(g.tokens[0] for g in got), key=[g.tokens[0] for g in got].count)
    second = torch.tensor([g.tokens[1] for g in got if g.tokens[0] == first])
    p = (full_logits(hf, "llama", [*ids, first], patch)[-1] / 0.7).softmax(-1)
    share = torch.bincount(second, minlength=VOCAB) / len(second)
    assert len(second) > 100
    assert ((share - p).abs() <= 5 * (p * (1 - p) / len(second)).sqrt() + 1 / len(second)).all()


# --------------------------------------------------------------------------------------------------------------------- endings


def until(tokens: list[int], end: frozenset[int]) -> list[int]:
    """The tokens before the first that ends the text."""
    return tokens[: next((k for k, token in enumerate(tokens) if token in end), len(tokens))]


@pytest.mark.parametrize("family", SOME)
def test_end_tokens_end_a_row_and_leave_the_others_alone(family: str) -> None:
    """Rows end in the first step, later and never; what is left of the batch goes on as if alone."""
    ids, rows, said = cases(family)
    end = frozenset({said[1].tokens[0], said[2].tokens[3], said[4].tokens[1]})
    want = [until(one.tokens, end) for one in said]
    assert min(min(one.leads) for one in said) > 2e-4  # no ties among these
    assert min(map(len, want)) == 0 and len({len(text) for text in want}) >= 3
    assert [g.tokens for g in go(family, ids, rows, Decoding(STEPS, end))] == want
    by_hooks = generate(loaded(family).engine, target(ids), rows, Decoding(STEPS, end), route="hooks")
    assert [g.tokens for g in by_hooks] == want


def test_a_row_that_ends_at_once_says_nothing_but_keeps_its_logits() -> None:
    ids, rows, said = cases("llama", 1)
    (got,) = go("llama", ids, rows, Decoding(STEPS, frozenset({said[0].tokens[0]})))
    assert got.tokens == []
    assert int(got.logits.argmax()) == said[0].tokens[0]


@pytest.mark.parametrize("family", SOME)
def test_a_stop_callback_sees_each_row_grow_and_says_where_to_cut(family: str) -> None:
    ids, rows, said = cases(family)
    heard: list[list[int]] = []
    two = tuple(said[0].tokens[1:3])

    def stop(tokens: list[int]) -> int | None:
        heard.append(list(tokens))
        return len(tokens) - 2 if tuple(tokens[-2:]) == two else None

    want = []
    for one in said:
        at = next((k for k in range(STEPS - 1) if tuple(one.tokens[k : k + 2]) == two), STEPS)
        want.append(one.tokens[:at])
    assert want[0] == said[0].tokens[:1] and max(map(len, want)) == STEPS
    assert [g.tokens for g in go(family, ids, rows, Decoding(STEPS, stop=stop))] == want
    assert {tuple(text) for text in heard} == {
        tuple(one.tokens[:k]) for one, text in zip(said, want, strict=True) for k in range(1, min(len(text) + 2, STEPS) + 1)
    }


def test_a_stop_callback_may_keep_all_or_nothing() -> None:
    ids, rows, said = cases("llama", 2)
    keep_all = go("llama", ids, rows, Decoding(STEPS, stop=lambda tokens: 3 if len(tokens) == 3 else None))
    assert [g.tokens for g in keep_all] == [one.tokens[:3] for one in said]
    keep_none = go("llama", ids, rows, Decoding(STEPS, stop=lambda tokens: 0 if len(tokens) == 2 else None))
    assert [g.tokens for g in keep_none] == [[], []]


def test_no_token_is_asked_for_in_vain() -> None:
    ids, rows, said = cases("llama", 2)
    assert [g.tokens for g in go("llama", ids, rows, Decoding(1))] == [one.tokens[:1] for one in said]
    assert rows[0].value is not None and rows[0].value.shape == (WIDTH,)
