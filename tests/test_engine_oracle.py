"""Patched generation and scoring against the oracle: full passes, one prompt, one hook, no cache (see oracle.py)."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any

import pytest
import torch
from families import DEPTH, FAMILIES, ROUTES, VOCAB, WIDTH, WRITERS, loaded, prompt, row_of, target, tiny, tiny_tokenizer
from oracle import CLOSE, Patch, Said, agree, error, full_logits, random_patches, say, states, text_log_p
from torch import Tensor, nn

import patchscopes
from patchscopes.engine.generate import Decoding, Generated, generate
from patchscopes.engine.patch import Stem, next_logits
from patchscopes.engine.score import score
from patchscopes.model import Model

LENGTH = 9  # tokens of a target prompt: longer than Gemma-2's window of 6
STEPS = 4
PREFIX = 5  # rows from here on share a prefix


@dataclass(frozen=True, eq=False)
class Case:
    """A model, a target prompt, an edit at every layer of four positions in no order, and what the oracle says to each."""

    family: str
    model: Model
    ids: list[int]
    patches: list[Patch]
    said: list[Said]

    @property
    def hf(self) -> nn.Module:
        return self.model.hf

    @property
    def route(self) -> str:
        return ROUTES[self.family]

    def late(self) -> list[int]:
        """The patches that lie behind a prefix."""
        return [k for k, patch in enumerate(self.patches) if patch.position >= PREFIX]


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest) -> Case:
    family, ids = request.param, prompt(LENGTH)
    model = loaded(family)
    places = [(f"resid.{layer}", i) for layer in range(DEPTH + 1) for i in (0, 2, PREFIX, LENGTH - 1)]
    random.Random(0).shuffle(places)
    patches = random_patches(model.hf, family, ids, places, torch.Generator().manual_seed(1))
    return Case(family, model, ids, patches, [say(model.hf, family, ids, patch, STEPS) for patch in patches])


def assert_equal(got: list[Generated], said: list[Said], what: object) -> None:
    assert len(got) == len(said)
    for one, want in zip(got, said, strict=True):
        assert error(one.logits, want.logits[0]) <= CLOSE, what
        assert agree(one.tokens, want), (what, one.tokens, want.tokens)
        assert one.norm_ratio == pytest.approx(want.norm_ratio, rel=1e-4), what


def test_the_edits_of_the_case_matter_and_differ(case: Case) -> None:
    """Else the equalities below would say little."""
    plain = full_logits(case.hf, case.family, case.ids)[-1]
    moved = [want for want in case.said if error(want.logits[0], plain) > 10 * CLOSE]
    assert len(moved) >= 0.75 * len(case.said)  # not those at layer L before the last position, nor beyond Gemma-2's window
    assert all(error(a.logits[0], b.logits[0]) > 10 * CLOSE for a, b in combinations(moved, 2))
    assert len({tuple(want.tokens) for want in moved}) > 0.4 * len(moved)


def test_the_route_is_the_fastest_that_is_exact(case: Case) -> None:
    """The tests below name their route: one that is broken would be passed over by the engine, and so by them."""
    capabilities = case.model.capabilities
    assert (capabilities.route, capabilities.readout_route) == (case.route, case.route)


@pytest.mark.parametrize("route", ["fastest", "whole", "hooks"])
def test_every_layer_and_position_in_one_batch(case: Case, route: str) -> None:
    route = case.route if route == "fastest" else route
    some = range(8 if route == "hooks" else len(case.patches))
    rows = [row_of(case.patches[k]) for k in some]
    got = generate(case.model.engine, target(case.ids), rows, Decoding(STEPS), route=route)
    assert_equal(got, [case.said[k] for k in some], (case.family, route))


def test_rows_behind_a_shared_prefix(case: Case) -> None:
    rows = [row_of(case.patches[k]) for k in case.late()]
    got = generate(case.model.engine, target(case.ids), rows, Decoding(STEPS), route=case.route)
    assert_equal(got, [case.said[k] for k in case.late()], case.family)


def test_rows_that_do_not_fit_at_once_run_in_chunks(case: Case) -> None:
    """The prefix and the unpatched base serve every chunk, and none spoils them for the next."""
    heard: list[int] = []
    rows, route = [row_of(case.patches[k]) for k in case.late()], case.route
    got = generate(case.model.engine, target(case.ids), rows, Decoding(STEPS), route=route, done=heard.append, at_most=3)
    assert_equal(got, [case.said[k] for k in case.late()], case.family)
    assert sum(heard) == len(rows)


def test_the_logits_of_every_step(case: Case) -> None:
    """Greedy tokens hide much: here what each step computed is compared, seen by a hook on the model; rows run in any order."""
    seen: list[Tensor] = []

    def see(_module: nn.Module, _args: tuple, out: Any) -> None:
        if out.logits.shape[1]:  # of prefix and base nothing is unembedded
            seen.append(out.logits[:, -1])

    handle = case.hf.register_forward_hook(see)
    rows = [row_of(case.patches[k]) for k in case.late()]
    generate(case.model.engine, target(case.ids), rows, Decoding(STEPS), route=case.route)
    handle.remove()
    compared = 0
    for want in (case.said[k] for k in case.late()):
        for step, got in enumerate(seen[-STEPS:]):
            if min([1.0, *want.leads[:step]]) > 2 * CLOSE:  # at a tie texts may part
                nearest = (got - want.logits[step]).abs().amax(-1).min() / want.logits[step].abs().max()
                assert nearest <= CLOSE, (case.family, step)
                compared += 1
    assert compared > 0.9 * STEPS * len(rows)


def test_rows_with_and_without_an_edit_run_together(case: Case) -> None:
    plain = say(case.hf, case.family, case.ids, None, STEPS)
    rows = [row_of(None, last=LENGTH - 1), *(row_of(patch) for patch in case.patches[:3]), row_of(None, last=LENGTH - 1)]
    got = generate(case.model.engine, target(case.ids), rows, Decoding(STEPS), route=case.route)
    assert_equal(got, [plain, *case.said[:3], plain], case.family)


@pytest.mark.parametrize("first", [0, PREFIX, LENGTH - 1])
def test_next_logits(case: Case, first: int) -> None:
    """By the route for one token, with the prefix that the rows allow."""
    some = [k for k, patch in enumerate(case.patches) if patch.position >= first]
    rows, route = [*(row_of(case.patches[k]) for k in some), row_of(None, last=LENGTH - 1)], case.route
    want = torch.stack([*(case.said[k].logits[0] for k in some), full_logits(case.hf, case.family, case.ids)[-1]])
    got = next_logits(case.model.engine, target(case.ids), rows, route)
    one = generate(case.model.engine, target(case.ids), rows, Decoding(1), route=route)
    assert max(map(error, got, want)) <= CLOSE, case.family
    assert max(error(g.logits, w) for g, w in zip(one, want, strict=True)) <= CLOSE
    assert [g.tokens for g in one] == [[int(logits.argmax())] for logits in got]


def test_a_target_prompt_of_one_token_is_patched(case: Case) -> None:
    ids, family = prompt(1, seed=3), case.family
    places = [(f"resid.{layer}", 0) for layer in reversed(range(DEPTH + 1))]
    patches = random_patches(case.hf, family, ids, places, torch.Generator().manual_seed(2))
    said = [say(case.hf, family, ids, patch, STEPS) for patch in patches]
    plain = full_logits(case.hf, family, ids)[-1]
    assert min(error(want.logits[0], plain) for want in said) > 10 * CLOSE
    rows = [row_of(patch) for patch in patches]
    got = generate(case.model.engine, target(ids), rows, Decoding(STEPS), route=case.route)
    assert_equal(got, said, family)
    readout = next_logits(case.model.engine, target(ids), rows, case.route)
    assert max(error(logits, want.logits[0]) for logits, want in zip(readout, said, strict=True)) <= CLOSE


def test_every_way_to_write_at_every_site(case: Case) -> None:
    """resid, attn_out and mlp_out of all blocks, replaced, added to and added to in proportion, in one batch."""
    ids, family, steps = case.ids, case.family, 2
    names = ("resid", "attn_out", "mlp_out") if WRITERS[family][1] else ("resid", "attn_out")
    places = [(f"{name}.{b}", i) for b in range(DEPTH) for name in names for i in (PREFIX, LENGTH - 1)]
    random.Random(1).shuffle(places)
    writes = ("replace", "add", "add_matched", "replace_matched")
    patches = random_patches(case.hf, family, ids, places, torch.Generator().manual_seed(3), writes)
    assert {(p.site.split(".")[0], p.write) for p in patches} == set(product(names, writes))
    said = [say(case.hf, family, ids, patch, steps) for patch in patches]
    plain = full_logits(case.hf, family, ids)[-1]
    assert sum(error(want.logits[0], plain) > 10 * CLOSE for want in said) > 0.6 * len(said)
    rows = [row_of(patch) for patch in patches]
    for route in (case.route, "hooks"):
        assert_equal(generate(case.model.engine, target(ids), rows, Decoding(steps), route=route), said, (family, route))


def test_a_state_patched_onto_itself_changes_nothing(case: Case) -> None:
    seen = states(case.hf, case.family, target(case.ids))
    places = product(range(DEPTH + 1), range(LENGTH))
    rows = [row_of(Patch(f"resid.{layer}", i, seen[f"resid.{layer}"][0, i])) for layer, i in places]
    plain = say(case.hf, case.family, case.ids, None, 3)
    for got in generate(case.model.engine, target(case.ids), rows, Decoding(3), route=case.route):
        assert error(got.logits, plain.logits[0]) <= 2e-5
        assert agree(got.tokens, plain)
        assert got.norm_ratio == pytest.approx(1, abs=1e-6)


def test_a_stem_walked_twice_gives_the_same(case: Case) -> None:
    """Rows in no order, and nothing of the first walk, nor of what was decoded from it, is left in what walks share."""
    late = case.late()
    rows = [row_of(case.patches[k]) for k in late]
    stem = Stem(case.model.engine, target(case.ids), rows, route=case.route)
    first = stem.walk(rows, [LENGTH - 1], caching=True)
    said = torch.tensor([[case.said[k].tokens[0]] for k in late])
    step = case.model.engine.forward(said, offset=LENGTH, cache=first.cache, keep=[0])
    for walked, at in ((first.logits, 0), (step, 1)):
        assert max(error(got[0], case.said[k].logits[at]) for got, k in zip(walked, late, strict=True)) <= CLOSE, case.family
    again = stem.walk(rows, [LENGTH - 1], caching=True)
    assert torch.equal(first.logits, again.logits)


@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom", "mamba", "gemma4"])
def test_rows_of_target_prompts_that_differ_early(family: str) -> None:
    """The shared prefix ends where the prompts part, before the first edit."""
    model = loaded(family)
    begin = prompt(3, seed=30)
    targets = [[*begin, *prompt(LENGTH - 3, seed=seed)] for seed in (31, 32, 33)]
    chosen = []
    for t, ids in enumerate(targets):
        places = [(f"resid.{layer}", PREFIX + layer % 3) for layer in (4, t, DEPTH)]
        chosen += [(p, t) for p in random_patches(model.hf, family, ids, places, torch.Generator().manual_seed(t))]
    random.Random(4).shuffle(chosen)
    rows = [row_of(patch, target=t) for patch, t in chosen]
    stem = Stem(model.engine, torch.tensor(targets), rows, route=ROUTES[family], caching=False)
    got = stem.walk(rows, [LENGTH - 2, LENGTH - 1]).logits
    for logits, (patch, t) in zip(got, chosen, strict=True):
        assert error(logits, full_logits(model.hf, family, targets[t], patch)[-2:]) <= CLOSE


def test_equal_rows_give_equal_results_and_vectors_stay_as_they_are() -> None:
    vector = torch.randn(WIDTH, generator=torch.Generator().manual_seed(8))
    kept, rows = vector.clone(), [row_of(Patch(f"resid.{layer}", 3, vector)) for layer in (2, 0, 2)]
    a, _, b = generate(loaded("gpt2").engine, target(prompt(LENGTH)), rows, Decoding(2))
    assert error(a.logits, b.logits) <= 1e-6 and a.tokens == b.tokens
    assert torch.equal(vector, kept)


@pytest.mark.parametrize(
    ("family", "route"),
    {
        "gemma3n": "stairs",
        "gemma4": "stairs",
        "mamba2": "stairs",
        "rwkv": "hooks",
        "granite": "stairs",
        "falcon": "stairs",
    }.items(),
)
def test_what_other_models_carry_along(family: str, route: str) -> None:
    """Keys and values shared between blocks, residual streams, recurrent states, and a model that can only run in full."""
    model, ids = loaded(family), prompt(LENGTH)
    assert model.capabilities.route == route
    places = [(f"resid.{layer}", i) for layer in range(DEPTH + 1) for i in (1, PREFIX, LENGTH - 1)]
    random.Random(3).shuffle(places)
    patches = random_patches(model.hf, family, ids, places, torch.Generator().manual_seed(9))
    said = [say(model.hf, family, ids, patch, 3) for patch in patches]
    for first in (0, PREFIX):
        some = [k for k, patch in enumerate(patches) if patch.position >= first]
        got = generate(model.engine, target(ids), [row_of(patches[k]) for k in some], Decoding(3), route=route)
        assert_equal(got, [said[k] for k in some], (family, first))
        texts = [prompt(3, seed=1), prompt(1, seed=2)]
        rows = [row_of(patches[k], target=k % 2) for k in some]
        scores = score(model.engine, target(ids), rows, texts, route=route)
        for k, log_p in zip(some, scores, strict=True):
            assert error(log_p, text_log_p(model.hf, family, ids, patches[k], texts[k % 2])) <= CLOSE, (family, first)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "bloom"])
def test_in_float64_only_rounding_is_left(family: str) -> None:
    """So the differences in float32 are those of sums in another order, and no term is missing."""
    hf = tiny(family, dtype=torch.float64)
    model, ids = patchscopes.load((hf, tiny_tokenizer())), prompt(LENGTH)
    places = [(f"resid.{layer}", i) for layer in range(DEPTH + 1) for i in (PREFIX, LENGTH - 1)]
    patches = [
        replace(p, value=p.value.double()) for p in random_patches(hf, family, ids, places, torch.Generator().manual_seed(4))
    ]
    got = generate(model.engine, target(ids), [row_of(patch) for patch in patches], Decoding(STEPS), route=ROUTES[family])
    for one, patch in zip(got, patches, strict=True):
        want = say(hf, family, ids, patch, STEPS)
        assert one.tokens == want.tokens
        assert error(one.logits, want.logits[0]) <= 1e-12


# -------------------------------------------------------------------------------------------------------------------- scoring


def assert_scores(case: Case, texts: list[list[int]], chosen: list[tuple[Patch | None, int]]) -> None:
    """`chosen`: (edit, number of the text) of each row."""
    rows = [row_of(patch, last=LENGTH - 1, target=t) for patch, t in chosen]
    got = score(case.model.engine, target(case.ids), rows, texts, route=case.route)
    for (patch, t), log_p in zip(chosen, got, strict=True):
        want = text_log_p(case.hf, case.family, case.ids, patch, texts[t])
        assert log_p.shape == want.shape
        if len(want):
            assert error(log_p, want) <= CLOSE, (case.family, t)
            assert float(log_p.double().sum()) == pytest.approx(float(want.double().sum()), rel=CLOSE)


def test_scores_are_the_log_probabilities_of_full_passes(case: Case) -> None:
    """Texts of different lengths, an empty one among them, several rows to a text, with and without an edit."""
    texts = [prompt(3, seed=10), [], prompt(7, seed=11), prompt(1, seed=12), prompt(3, seed=13)]
    late = [(case.patches[k], n % len(texts)) for n, k in enumerate(case.late())]
    assert_scores(case, texts, late)  # behind a prefix
    assert_scores(case, texts, [*late[::2], (None, 2), (None, 3), (case.patches[0], 2), (case.patches[5], 0)])


def test_texts_that_begin_alike_are_scored_apart(case: Case) -> None:
    """What texts share may join the prefix, but never across an edit or a position whose logits are wanted."""
    begin = prompt(4, seed=20)
    texts = [[*begin, 7], [*begin, 8, 9], begin, begin[:2]]
    last = [patch for patch in case.patches if patch.position == LENGTH - 1]
    assert_scores(case, texts, [(patch, k % len(texts)) for k, patch in enumerate(last)] + [(None, k) for k in range(len(texts))])
    assert_scores(case, texts, [(None, k) for k in range(len(texts))])


def test_scores_are_what_generate_saw(case: Case) -> None:
    got = generate(
        case.model.engine,
        target(case.ids),
        [row_of(patch) for patch in case.patches],
        Decoding(STEPS),
        route=case.route,
    )
    rows = [row_of(patch, target=k) for k, patch in enumerate(case.patches)]
    scores = score(case.model.engine, target(case.ids), rows, [g.tokens for g in got], route=case.route)
    for one, log_p, want in zip(got, scores, case.said, strict=True):
        assert float(log_p[0]) == pytest.approx(float(one.logits.log_softmax(-1)[one.tokens[0]]), abs=1e-4)
        if one.tokens == want.tokens:
            assert error(log_p, want.logits.log_softmax(-1).amax(-1)) <= CLOSE


def test_scoring_in_small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks hold rows of texts of nearly one length; each text keeps its own row of the base."""
    model, ids = loaded("llama"), prompt(LENGTH)
    texts = [prompt(n, seed=n) for n in (5, 1, 3, 4, 2)]
    places = [(f"resid.{layer}", PREFIX) for layer in range(DEPTH + 1)] * 2
    patches = random_patches(model.hf, "llama", ids, places, torch.Generator().manual_seed(5))
    monkeypatch.setattr("patchscopes.engine.score.LOGITS_AT_ONCE", 3 * 5 * VOCAB)
    passes: list[int] = []
    handle = model.hf.lm_head.register_forward_hook(lambda _module, _args, out: passes.append(out.shape[0]))
    got = score(model.engine, target(ids), [row_of(patch, target=k % len(texts)) for k, patch in enumerate(patches)], texts)
    handle.remove()
    assert len(passes) > 6  # a prefix, a base and a walk for each of at least three chunks
    for k, log_p in enumerate(got):
        assert error(log_p, text_log_p(model.hf, "llama", ids, patches[k], texts[k % len(texts)])) <= CLOSE
