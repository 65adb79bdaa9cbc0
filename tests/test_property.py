"""Generation against the oracle for whatever hypothesis thinks of: any family, any prompt, any rows."""

from __future__ import annotations

import torch
from families import DEPTH, FAMILIES, ROUTES, VOCAB, WRITERS, loaded, prompt, row_of, target
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import CLOSE, agree, error, random_patches, say, text_log_p

from patchscopes.engine.generate import Decoding, Request, generate, stream
from patchscopes.engine.score import score

SEEDS = st.integers(0, 2**16)
UNHURRIED = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, list[int], list[tuple[str, int]], list[str], int]:
    """A family, a prompt of 1 to 9 tokens, (site, position) of every row, how each is written, a seed."""
    family = draw(st.sampled_from(FAMILIES))
    ids = prompt(draw(st.integers(1, 9)), seed=draw(SEEDS))
    blocks = st.integers(0, DEPTH - 1)
    sites = [st.integers(0, DEPTH).map("resid.{}".format), blocks.map("attn_out.{}".format)]
    if WRITERS[family][1]:
        sites.append(blocks.map("mlp_out.{}".format))
    rows = st.tuples(st.one_of(sites), st.integers(0, len(ids) - 1))
    places = draw(st.lists(rows, min_size=1, max_size=6))
    ways = st.sampled_from(["replace", "add", "add_matched", "replace_matched"])
    writes = draw(st.lists(ways, min_size=len(places), max_size=len(places)))
    return family, ids, places, writes, draw(SEEDS)


@UNHURRIED
@given(requests(), st.integers(1, 3))
def test_generation_equals_the_oracle(request: tuple, steps: int) -> None:
    family, ids, places, writes, seed = request
    model = loaded(family)
    patches = random_patches(model.hf, family, ids, places, torch.Generator().manual_seed(seed), writes)
    got = generate(model.engine, target(ids), [row_of(patch) for patch in patches], Decoding(steps), route=ROUTES[family])
    for one, patch in zip(got, patches, strict=True):
        want = say(model.hf, family, ids, patch, steps)
        assert error(one.logits, want.logits[0]) <= CLOSE
        assert agree(one.tokens, want)


@UNHURRIED
@given(
    st.sampled_from(FAMILIES),
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, DEPTH), st.integers(0, 8), st.booleans()), min_size=1, max_size=7),
    st.integers(1, 4),
    st.integers(1, 4),
    st.frozensets(st.integers(0, VOCAB - 1), max_size=30),
    SEEDS,
)
def test_streams_over_several_targets_equal_the_oracle(
    family: str, asked: list[tuple[int, int, int, bool]], steps: int, at_most: int, end: frozenset[int], seed: int
) -> None:
    """Any lengths, layers and positions, patched or not, any number of places, any end tokens."""
    model, rows, wants = loaded(family), [], []
    for length, layer, position, plain in asked:
        ids, place = prompt(length, seed=seed % 7 + length), min(position, length - 1)
        (patch,) = random_patches(model.hf, family, ids, [(f"resid.{layer}", place)], torch.Generator().manual_seed(seed))
        patch = None if plain else patch
        rows.append(Request(tuple(ids), row_of(patch, last=length - 1)))
        wants.append(say(model.hf, family, ids, patch, steps))
    found = dict(stream(model.engine, rows, Decoding(steps, end), route=ROUTES[family], at_most=at_most))
    assert len(found) == len(rows)
    for k, want in enumerate(wants):
        assert error(found[k].logits, want.logits[0]) <= CLOSE
        if min(want.leads) > 2 * CLOSE:
            assert found[k].tokens == want.tokens[: next((n for n, token in enumerate(want.tokens) if token in end), steps)]


@UNHURRIED
@given(requests(), st.lists(st.lists(st.integers(0, VOCAB - 1), max_size=5), min_size=1, max_size=3), st.booleans())
def test_scores_equal_the_oracle(request: tuple, texts: list[list[int]], unpatched: bool) -> None:
    family, ids, places, writes, seed = request
    model = loaded(family)
    patches = [*random_patches(model.hf, family, ids, places, torch.Generator().manual_seed(seed), writes), *[None] * unpatched]
    rows = [row_of(patch, last=len(ids) - 1, target=k % len(texts)) for k, patch in enumerate(patches)]
    got = score(model.engine, target(ids), rows, texts, route=ROUTES[family])
    for k, (log_p, patch) in enumerate(zip(got, patches, strict=True)):
        want = text_log_p(model.hf, family, ids, patch, texts[k % len(texts)])
        assert log_p.shape == want.shape
        assert not len(want) or error(log_p, want) <= CLOSE
