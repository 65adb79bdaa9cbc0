"""Classifier-free guidance against a naive loop: two full passes a token, one with the patch and one without."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from families import loaded
from oracle import Patch, error, full_logits, states

import patchscopes as ps
from patchscopes.controls.vectors import SECOND_LOOKS
from patchscopes.core.errors import InputError
from patchscopes.engine.generate import Decoding, Request, stream

TEXT = "the cat sat on"


def naive(family: str, ids: tuple[int, ...], patches: list[Patch], w: float, n: int) -> tuple[list[int], list[torch.Tensor]]:
    model, tokens, seen = loaded(family), list(ids), []
    for _ in range(n):
        patched, plain = (full_logits(model.hf, family, tokens, *some)[-1] for some in (patches, []))
        seen.append((1 + w) * patched - w * plain)
        tokens.append(int(seen[-1].argmax()))
    return tokens[len(ids) :], seen


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mamba"])
@pytest.mark.parametrize("w", [1.5, -0.5])
def test_every_token_is_chosen_by_both_runs(family: str, w: float) -> None:
    model = loaded(family)
    scope = ps.Patchscope("hello {x} is {x}", layer=[0, 2], guidance=w, max_new_tokens=5)
    source = ps.Source(model, [TEXT, "ab"], layer=[1, 3])
    readings = scope(source, controls=False, keep_logits=True)
    tokens = model.tokens("hello x is x")
    places = [tokens.find("x", occurrence=k).last for k in (1, 2)]
    for k, row in enumerate(readings.table.iter_rows(named=True)):
        ids = torch.tensor([model.tokens(row["prompt_text"]).ids])
        value = states(model.hf, family, ids)[f"resid.{row['source_layer']}"][0, -1]
        patches = [Patch(f"resid.{row['target_layer']}", place, value) for place in places]
        said, logits = naive(family, tokens.ids, patches, w, 5)
        assert readings.logits is not None and error(readings.logits[k], logits[0]) < 1e-4
        leads = [float((two := one.topk(2).values)[0] - two[1]) for one in logits]
        if min(leads) > 1e-2 and not model.end_ids & set(said):
            assert row["text"] == model.decode(said)


@pytest.mark.parametrize("route", ["stairs", "whole", "hooks"])
@pytest.mark.parametrize("at_most", [None, 1, 2])
def test_every_route_and_any_batch_gives_the_same(route, at_most: int | None) -> None:
    model = loaded("llama")
    viewing_scope = ps.Patchscope("hello {x} is", layer=2, guidance=2.0, max_new_tokens=4)
    from patchscopes.scopes.viewing import Viewing

    viewing = Viewing(viewing_scope, ps.Source(model, [TEXT, "ab", "q"], layer=3), controls=False)
    viewing.sight.need({0, 1, 2})
    requests: list[Request] = []
    for cell in viewing.cells:
        state = viewing.written(cell)
        requests.append(Request(viewing.target_of(cell).tokens.ids, viewing.row(cell, state), 0, viewing.without(cell, state)))
    decoding = Decoding(4, guidance=2.0)
    found = dict(stream(model.engine, requests, decoding, route=route, at_most=at_most))
    want = dict(stream(model.engine, requests, decoding))
    for k in range(3):
        assert found[k].tokens == want[k].tokens and error(found[k].logits, want[k].logits) < 1e-4
        assert found[k].norm_ratio == pytest.approx(want[k].norm_ratio, rel=1e-3)


def test_no_guidance_and_nothing_patched_are_plain_runs() -> None:
    model = loaded("llama")
    scope = ps.Patchscope("hello {x} is", layer=2, max_new_tokens=4)
    source = ps.Source(model, TEXT, layer=3)
    plain = scope(source, keep_logits=True)
    guided = replace(scope, guidance=3.0)(source, keep_logits=True)
    assert plain.logits is not None and guided.logits is not None
    for k, kind in enumerate(plain.table["control"]):
        if kind in ("nothing", "text"):
            assert error(guided.logits[k], plain.logits[k]) < 1e-5
        else:
            assert error(guided.logits[k], plain.logits[k]) > 1e-3
    last = replace(scope, layer=-1, guidance=3.0)(source, controls=False, keep_logits=True)  # at L nothing hears the patch
    assert last.logits is not None
    assert error(last.logits[0], plain.logits[plain.table["control"].to_list().index("nothing")]) < 1e-4


def test_evidence_is_of_the_guided_distribution() -> None:
    model, w = loaded("llama"), 1.5
    scope = ps.Patchscope("hello {x} is", layer=2, guidance=w, max_new_tokens=4, second_look=SECOND_LOOKS[0])
    row = scope(ps.Source(model, TEXT, layer=3)).readings.row(0, named=True)
    words = model.tokenizer(SECOND_LOOKS[0], add_special_tokens=False)["input_ids"]
    ids = model.tokens(TEXT).ids
    value = states(model.hf, "llama", torch.tensor([[ids[0], *words, *ids[1:]]]))["resid.3"][0, -1]
    tokens = model.tokens("hello x is")
    text = model.tokenizer(row["text"], add_special_tokens=False)["input_ids"]

    def log_p(patches: list[Patch]) -> float:
        both = [full_logits(model.hf, "llama", [*tokens.ids, *text], *some).double() for some in (patches, [])]
        full = ((1 + w) * both[0] - w * both[1]).log_softmax(-1)
        return float(sum(full[len(tokens) - 1 + k, token] for k, token in enumerate(text)))

    want = (log_p([Patch("resid.2", tokens.position("x"), value)]) - log_p([])) / math.log(2)
    assert row["bits_over_nothing"] == pytest.approx(want, abs=2e-3)


def test_guidance_must_be_a_number() -> None:
    with pytest.raises(InputError, match="guidance is nan"):
        ps.Patchscope("{x}", guidance=math.nan)(ps.Source(loaded("llama"), TEXT, layer=3))
