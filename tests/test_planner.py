"""Streams of requests against the oracle: targets of several lengths, few places, rows that leave and enter, equal rows."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from families import CONFIGS, DEPTH, WIDTH, blocks_of, loaded, prompt, row_of, target, tiny
from oracle import CLOSE, Patch, Said, agree, error, random_patches, say
from test_engine_cost import LENGTH, cost, counted
from test_engine_cost import patches as some_patches

from patchscopes.core.edits import Edit, knock_out
from patchscopes.engine.attention import NAME
from patchscopes.engine.continued import continued
from patchscopes.engine.decode import Batch
from patchscopes.engine.edits import Placed
from patchscopes.engine.engine import Engine
from patchscopes.engine.generate import Decoding, Generated, Request, generate, stream
from patchscopes.engine.memory import peak_bytes
from patchscopes.engine.packing import Packing, Wish, pack
from patchscopes.engine.patch import Stem, next_logits
from patchscopes.engine.score import Case, scores
from patchscopes.engine.speech import Speech

STEPS = 5
SHARING = ("gpt2", "llama", "gpt_neox", "gemma2", "qwen3", "mixtral", "opt", "phi3", "cohere", "granite", "gemma3n", "gemma4")
NEITHER = ("mamba", "rwkv")
COPYING = ("bloom", "falcon")  # their code calls no registered attention function
RAGGED = (*SHARING, *COPYING)
ENTERING = (*RAGGED, "mamba2")  # whose states see padding that comes behind a prefix: its packs are of one length
FEW = (*ENTERING, *NEITHER)  # for which it is said here what they allow


def wanted(family: str, seed: int = 0) -> tuple[list[Request], list[Said]]:
    """Rows at several layers and positions of targets of 3 to 12 tokens, some unpatched, in no order; what the oracle says to each."""
    hf = loaded(family).hf
    requests, said = [], []
    for t, length in enumerate((12, 4, 9, 12, 3)):
        ids = prompt(length, seed=100 * seed + t)
        places = [(f"resid.{(2 * k + t) % (DEPTH + 1)}", length - 1 - k % 3) for k in range(3)]
        patches: list[Patch | None] = [*random_patches(hf, family, ids, places, torch.Generator().manual_seed(t)), None]
        requests += [Request(tuple(ids), row_of(patch, last=length - 1)) for patch in patches]
        said += [say(hf, family, ids, patch, STEPS) for patch in patches]
    order = list(range(len(requests)))
    random.Random(seed).shuffle(order)
    return [requests[k] for k in order], [said[k] for k in order]


def route_of(family: str) -> str:
    return loaded(family).capabilities.route


def collect(family: str, requests: Sequence[Request], decoding: Decoding, **options: int) -> list[Generated]:
    found = dict(stream(loaded(family).engine, requests, decoding, route=route_of(family), **options))
    assert sorted(found) == list(range(len(requests)))
    return [found[k] for k in range(len(requests))]


def ended(tokens: Sequence[int], end: frozenset[int]) -> list[int]:
    return list(tokens[: next((k for k, token in enumerate(tokens) if token in end), len(tokens))])


@pytest.mark.parametrize("family", FEW)
def test_what_a_model_allows(family: str) -> None:
    """Said here and not asked of the engine, which would go a slower way in silence."""
    packing = loaded(family).engine.packing
    # mamba2 has no keys and values to share; it is not harmed either
    assert packing.shared_prefix == (family in SHARING or family == "mamba2")
    assert packing.gaps == (family in ENTERING)
    assert packing.ragged == (family in RAGGED)


@pytest.mark.parametrize("at_most", [3, 100])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_stream_equals_the_oracle(family: str, at_most: int) -> None:
    requests, said = wanted(family)
    for one, want in zip(collect(family, requests, Decoding(STEPS), at_most=at_most), said, strict=True):
        assert error(one.logits, want.logits[0]) <= CLOSE
        assert agree(one.tokens, want)
        assert one.norm_ratio == pytest.approx(want.norm_ratio, rel=1e-4)
    for one, want in zip(collect(family, requests, Decoding(1), at_most=at_most), said, strict=True):
        assert error(one.logits, want.logits[0]) <= CLOSE
        assert one.tokens == want.tokens[:1] or want.leads[0] < 2 * CLOSE


@pytest.mark.parametrize("family", FEW)
def test_rows_leave_and_others_enter(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few places and many ends: late rows run beside early ones, and each says what it says alone."""
    together: list[list[int]] = []
    forward = Batch.forward

    def spied(batch: Batch, tokens: torch.Tensor) -> torch.Tensor:
        together.append(list(batch.age))
        return forward(batch, tokens)

    monkeypatch.setattr(Batch, "forward", spied)
    requests, said = wanted(family, seed=1)
    end = frozenset(said[k].tokens[k % 4] for k in (1, 6, 11, 16))
    got = collect(family, requests, Decoding(STEPS, end), at_most=4)
    for one, want in zip(got, said, strict=True):
        if min(want.leads) > 2 * CLOSE:
            assert one.tokens == ended(want.tokens, end)
    mixed = any(len(set(ages)) > 1 for ages in together)
    assert mixed == (family in RAGGED)  # no pack of one length has as many rows here as are wanted for others to enter


def test_equal_rows_run_once() -> None:
    model, (patch, other) = loaded("llama"), some_patches([2, 3])
    again = Patch(patch.site, patch.position, patch.value.clone())
    rows = [row_of(p) for p in (patch, other, again, patch)]
    with counted(model.hf, "llama") as calls:
        got = generate(model.engine, target(prompt(LENGTH)), rows, Decoding(3))
    assert sum(calls) == cost([2, 3], start=patch.position) + 2 * 2 * DEPTH
    assert got[0] is got[2] is got[3] and got[0] is not got[1]
    apart = generate(model.engine, target(prompt(LENGTH)), rows, Decoding(9, temperature=3.0), seeds=[1, 2, 3, 1])
    assert apart[0].tokens == apart[3].tokens != apart[2].tokens


@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom", "mamba2"])
def test_sampled_texts_do_not_depend_on_company(family: str) -> None:
    requests, _ = wanted(family, seed=2)
    requests = [Request(request.target, request.row, seed=k) for k, request in enumerate(requests)]
    decoding = Decoding(STEPS, frozenset(range(10)), temperature=1.0)
    texts = [one.tokens for one in collect(family, requests, decoding)]
    assert [one.tokens for one in collect(family, requests, decoding, at_most=2)] == texts
    assert [one.tokens for one in collect(family, requests[::-1], decoding, at_most=5)] == texts[::-1]


def test_a_closed_stream_leaves_nothing_behind() -> None:
    model, (requests, said) = loaded("llama"), wanted("llama")
    implementation = model.hf.config._attn_implementation
    run = stream(model.engine, requests, Decoding(STEPS), at_most=2)
    k, one = next(run)
    assert agree(one.tokens, said[k])  # handed over before the rest has run
    assert model.hf.config._attn_implementation == implementation != NAME  # and the model is the user's in between
    run.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.hf.modules())
    assert all("forward" not in block.__dict__ for block in blocks_of(model.hf, "llama"))


def test_models_that_could_be_trained_run_without_gradients() -> None:
    hf = tiny("llama").requires_grad_(True)
    engine, (requests, said) = Engine(hf), wanted("llama")
    engine.packing = loaded("llama").engine.packing
    some = [
        Request(r.target, replace(r.row, value=None if r.row.value is None else r.row.value.requires_grad_())) for r in requests
    ]
    for k, one in stream(engine, some, Decoding(3), at_most=3):
        assert not one.logits.requires_grad
        assert error(one.logits, said[k].logits[0]) <= CLOSE


def test_results_come_before_the_last_row_has_begun() -> None:
    model, (requests, _) = loaded("llama"), wanted("llama")
    with counted(model.hf, "llama") as calls:
        run = stream(model.engine, requests, Decoding(STEPS), at_most=2)
        next(run)
        first = sum(calls)
        list(run)
    assert first < 0.5 * sum(calls)


# ---------------------------------------------------------------------------------------------------------------- that it is fast


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("steps", [1, 4])
def test_a_prefix_is_not_copied_for_every_row(family: str, steps: int) -> None:
    """The bytes that live at a time hardly grow with rows × prefix."""
    model = loaded(family)

    def peak(length: int, n: int) -> int:
        patches = some_patches([k % DEPTH for k in range(n)], length - 1)
        with peak_bytes() as counted:
            generate(model.engine, target(prompt(length)), [row_of(patch) for patch in patches], Decoding(steps))
        return counted.most

    copies = 56 * (100 - 12) * DEPTH * 2 * 4 * (WIDTH if family == "gpt2" else WIDTH // 2)
    grown = (peak(100, 64) - peak(12, 64)) - (peak(100, 8) - peak(12, 8))
    assert grown < 0.15 * copies  # the scores of one block


def test_ragged_targets_run_in_one_pass_each_way() -> None:
    """Prefix, base, walk, and the steps: four kinds of passes, for five targets of four lengths."""
    model, (requests, _) = loaded("llama"), wanted("llama")
    with counted(model.hf, "llama") as calls:
        collect("llama", requests, Decoding(3))
    assert len(calls) <= 5 * DEPTH


def test_a_remembered_base_is_not_run_again() -> None:
    model, ids = loaded("llama"), target(prompt(LENGTH))
    rows = [row_of(patch) for patch in some_patches()]
    want = next_logits(model.engine, ids, rows, "stairs")
    with model.engine.remembering():
        for expected in (cost(range(0), start=0), 0):
            with counted(model.hf, "llama") as calls:
                got = next_logits(model.engine, ids, rows, "stairs")
            assert sum(calls) == expected + cost([4, 0, 2, DEPTH, 0, 3], start=6) - DEPTH * LENGTH
            assert torch.equal(got, want)
            generate(model.engine, ids, rows, Decoding(3))  # what is decoded does not spoil it
    assert model.engine.store is None


# ------------------------------------------------------------------------------------------------------------------------- plans


def packed(wishes: list[Wish], slack: float, *, ragged: bool = True) -> list[tuple[int, int]]:
    packs = pack(wishes, ragged=ragged, steps=1, slack=slack, d_model=64)
    assert sorted(k for one in packs for k in one.wishes) == list(range(len(wishes)))
    assert all({wishes[k].ids for k in one.wishes} == set(one.targets) for one in packs)
    return [(len(one.targets), len(one.wishes)) for one in packs]


def test_packs() -> None:
    a, b, c = tuple(range(10)), tuple(range(10, 20)), tuple(range(30))
    rows = [Wish(a, 2, 0.5)] * 20 + [Wish(b, 2, 0.5)] * 20
    assert packed(rows, slack=16.0) == [(2, 40)]
    assert packed([*rows, Wish(c, 2, 1.0)], slack=0.0) == [(2, 40), (1, 1)]  # padding would cost twice 20 tokens and seats
    assert packed([*rows, Wish(c, 2, 1.0)], slack=1000.0) == [(3, 41)]
    assert packed([*rows, Wish(c, 2, 1.0)], slack=1000.0, ragged=False) == [(2, 40), (1, 1)]
    far = [Wish(a, 9, 1.0)] * 20 + [Wish(a, 1, 1.0)] * 20
    assert packed(far, slack=0.0) == [(1, 20), (1, 20)]  # 20 rows would run 8 tokens in vain; the prefix twice is ten
    assert packed([], slack=0.0) == []


def test_speech_and_packing_have_defaults_that_promise_nothing() -> None:
    assert Packing() == Packing(shared_prefix=False, ragged=False, gaps=False)
    assert len(Speech(Decoding(3), torch.device("cpu"))) == 0


def test_a_cache_behind_a_shared_prefix_counts_all_tokens() -> None:
    model, ids = loaded("llama"), target(prompt(LENGTH))
    rows = [row_of(patch) for patch in some_patches()]
    stem = Stem(model.engine, ids, rows, shared=True, room=3)
    walked = stem.walk(rows, [LENGTH - 1], caching=True)
    assert walked.cache.get_seq_length() == LENGTH
    assert {tuple(layer.buffers[0].shape[:1]) for layer in walked.cache.layers} == {(len(rows),)}


# ------------------------------------------------------------------------------------------------------- rows with several edits


SEVERAL = ["gpt2", "llama", "gemma2", "mixtral", "bloom", "gemma3n", "gpt_oss", "falcon", "mamba2", "rwkv", "mamba"]


@pytest.mark.parametrize("at_most", [2, 100])
@pytest.mark.parametrize("family", SEVERAL)
def test_rows_may_have_any_edits_beside_their_patch(family: str, at_most: int) -> None:
    """At the prompt, at given steps and always, at inner sites too: as if the text were run anew for every token."""
    model = loaded(family)
    attends = family not in ("mamba", "mamba2", "rwkv")
    v = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(9)) * 0.5
    some: list[list[Edit]] = [
        [Edit("resid.3", -1, v[0], "add", steps="always")],
        [Edit("resid.4", None, v[1], "add", steps=(0, 2)), Edit("attn_in.2", 1, write="scale", amount=0.5)],
        [],
        [*knock_out("1:4", None, [1], steps="always"), Edit("k.2.0", 2, write="scale", amount=3.0)] if attends else [],
        [Edit("resid.5", -1, v[2]), Edit("logits", -1, write="scale", amount=-1.0)],
    ]
    requests, wanted = [], []
    for k, edits in enumerate(some * 2):
        ids = prompt((9, 6)[k % 2], seed=50 + k % 3)
        tokens = model.tokens(ids)
        patch = random_patches(model.hf, family, ids, [(f"resid.{k % 3}", 4)], torch.Generator().manual_seed(k))[0]
        placed = model.placed([*edits], [tokens])
        row = replace(row_of(patch), more=tuple(placed))
        requests.append(Request(tuple(ids), row))
        own = Placed(row.site, 0, (patch.position,), patch.value, "replace")
        one = continued(
            model.engine, [tokens.tensor], [own, *placed], Decoding(STEPS), seeds=[0], cached=False, padding_exact=True
        )
        wanted.append(one[0])
    got = collect(family, requests, Decoding(STEPS), at_most=at_most)
    for one, (tokens, logits) in zip(got, wanted, strict=True):
        assert error(one.logits, logits) <= CLOSE
        assert one.tokens == tokens
    cases = [Case(request.target, request.row, tokens) for request, (tokens, _) in zip(requests, wanted, strict=True)]
    found = dict(scores(model.engine, cases, route=model.capabilities.readout_route))
    for k, (tokens, logits) in enumerate(wanted):
        assert len(found[k]) == len(tokens)
        assert float(found[k][0]) == pytest.approx(float(logits.log_softmax(-1)[tokens[0]]), abs=1e-3)
        assert float(found[k].exp().min()) > 1 / 97 - 1e-3  # each was the likeliest under the same edits


def test_attention_given_beyond_a_window_is_given_in_plans_too() -> None:
    """A cache drops keys behind a sliding window; an edit that attends to them needs full passes."""
    model, ids = loaded("gemma2"), prompt(LENGTH, seed=5)  # longer than the window of 6
    tokens = model.tokens(ids)
    placed = model.placed([Edit("pattern.*", -1, torch.full((1, 1), 0.5), keys=[0])], [tokens])
    row = replace(row_of(some_patches([3], LENGTH - 2)[0]), more=tuple(placed))
    own = Placed(row.site, 0, (row.position,), row.value, "replace")
    (want,) = continued(model.engine, [tokens.tensor], [own, *placed], Decoding(3), seeds=[0], cached=False, padding_exact=True)
    (got,) = collect("gemma2", [Request(tuple(ids), row)], Decoding(3))
    assert got.tokens == want[0] and error(got.logits, want[1]) <= CLOSE
    case = Case(tuple(ids), row, want[0])
    scored = dict(scores(model.engine, [case], route="stairs"))[0]
    assert float(scored[0]) == pytest.approx(float(want[1].log_softmax(-1)[want[0][0]]), abs=1e-3)
