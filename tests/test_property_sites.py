"""Runs and generation with any edits, against plain transformers, for whatever hypothesis thinks of: any family, prompts, sites, writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from families import CONFIGS, DEPTH, loaded, prompt
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from oracle import CLOSE, Said, agree, error
from oracle_sites import EDGES, Written, attention_in, blocks_in, pass_with
from torch import Tensor, nn

from patchscopes.core.edits import Edit
from patchscopes.core.errors import InputError, SiteError
from patchscopes.core.sites import Site
from patchscopes.engine.places import shape_of

UNHURRIED = settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
)
# Models whose one-token steps are not their full pass: what they generate is compared elsewhere.
STEPWISE = ("zamba2", "nemotron_h")
HEADED = ("q", "k", "v", "z", *EDGES)


@cache
def known(family: str) -> tuple[dict[nn.Module, int], dict[str, tuple[tuple[int, ...], float]]]:
    """Attention modules that the oracle may watch; and of each site that oracle and model know shape and standard deviation."""
    model = loaded(family)
    if blocks_in(model.hf, family) is None or model.engine.streams:
        return {}, {}
    ids, found = prompt(5), {}
    attends = attention_in(model.hf, family, ids)
    for site, value in pass_with(model.hf, family, ids, [], attends)[1].items():
        name, index = site.split(".")
        try:
            shape_of(model.engine, Site(name, int(index)))
        except SiteError:
            continue
        found[site] = (tuple(value.shape[:1] if name in EDGES else value.shape[1:]), float(value.float().std()))
    return attends, found


@dataclass(frozen=True, eq=False)
class Case:
    """Edits as users give them; and what each means at the prompt: (prompt, steps, positions None for all of it, keys, the rest)."""

    family: str
    prompts: list[list[int]]
    edits: list[Edit]
    meant: list[tuple[int, Any, bool, Written]]

    def plain(self, which: int, length: int) -> list[Written]:
        """The edits of one prompt in a text of so many tokens."""
        found, n = [], len(self.prompts[which])
        for p, steps, _, edit in self.meant:
            if p != which:
                continue
            if isinstance(steps, tuple):
                at = [n + t for t in steps if n + t < length]
            else:
                at = edit.positions + (list(range(n, length)) if steps == "always" else [])
            value = edit.value
            if value is not None and len(at) != len(value):
                value = value[:1].expand(len(at), *value.shape[1:])
            found.append(replace(edit, positions=at, value=value))
        return found


def some_case(draw: Callable[..., Any], steps: bool = False) -> Case:
    """A family, 1 to 3 prompts of 2 to 9 tokens, 1 to 4 edits. No strategy of its own: models are built on the way, with randomness."""
    family = draw(st.sampled_from([f for f in CONFIGS if not (steps and f in STEPWISE)]))
    _, sites = known(family)
    if not sites:
        reject()
    lengths = draw(st.lists(st.integers(2, 9), min_size=1, max_size=3))
    prompts = [prompt(n, seed=draw(st.integers(0, 99))) for n in lengths]
    by_name: dict[str, list[str]] = {}
    for site in sites:
        by_name.setdefault(site.split(".")[0], []).append(site)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    edits: list[Edit] = []
    meant: list[tuple[int, Any, bool, Written]] = []
    for _ in range(draw(st.integers(1, 4))):
        name = draw(st.sampled_from(sorted(by_name)))
        site = draw(st.sampled_from(by_name[name]))
        shape, spread = sites[site]
        one = draw(st.none() | st.integers(0, len(prompts) - 1))
        who = range(len(prompts)) if one is None else [one]
        shortest = min(lengths[p] for p in who)
        index = st.integers(-shortest, shortest - 1)
        position = draw(st.none() | index | st.lists(index, min_size=1, max_size=3, unique_by=lambda i, n=shortest: i % n))
        if len({lengths[p] for p in who}) > 1 and isinstance(position, list):  # -1 and 3 may be one in a prompt, two in another
            position = [i % shortest for i in position]
        head = draw(st.none() | st.integers(0, shape[0] - 1)) if name in HEADED else None
        when: Any = draw(st.sampled_from(["prompt", "always", (0, 2)])) if steps else "prompt"
        at = {p: places(position, lengths[p]) for p in who}
        keys = None
        if name in EDGES:
            write: Any = draw(st.sampled_from(["knock_out"] if name == "scores" else ["knock_out", "scale", "replace"]))
            keys = [0, *draw(st.lists(st.just(1), max_size=1))]
            if name == "scores":  # a query keeps itself
                keys = draw(st.sampled_from([[0], [0, 1]]))
                late = [i for i in range(len(keys), shortest)]
                if not late:
                    continue
                position = draw(st.lists(st.sampled_from(late), min_size=1, max_size=3, unique=True))
                at = {p: list(position) for p in who}
        else:
            write = draw(st.sampled_from(["replace", "add", "add_matched", "replace_matched", "scale", "interpolate", "mask"]))
        amount = draw(st.sampled_from([1.0, 0.5, -0.7])) if write not in ("replace", "mask", "knock_out") else 1.0
        value = None
        if write in ("replace", "add", "add_matched", "replace_matched", "interpolate", "mask"):
            counts = {len(found) for found in at.values()}
            each = when == "prompt" and len(counts) == 1 and draw(st.booleans())
            if name in EDGES:
                full = (counts.pop() if each else 1, len(keys or ()))
                value = torch.rand(full, generator=generator)
            else:
                own = shape[1:] if head is not None else shape
                own = own[-1:] if len(own) > 1 and draw(st.booleans()) else own
                if each:
                    own = (counts.pop(), *(shape[1:] if head is not None else shape))
                value = torch.randn(own, generator=generator) * (1 if write == "mask" else spread)
        text = site if head is None else f"{site}.{head}"
        edits.append(Edit(text, position, value, write, one, amount, keys, when))
        for p in who:
            spelled = value
            if value is not None and name not in EDGES:
                inner = len(shape) - (head is not None)
                spelled = value if value.ndim > inner else value.expand(len(at[p]), *value.shape)
                if spelled.ndim < inner + 1:
                    spelled = spelled[:, None]
            elif value is not None:
                spelled = value.expand(len(at[p]), -1)
            meant.append((p, when, position is None, Written(site, at[p], write, spelled, amount, head, keys or [])))
    if not edits:
        reject()
    return Case(family, prompts, edits, meant)


def places(position: int | Sequence[int] | None, length: int) -> list[int]:
    """Positions from 0."""
    if position is None:
        return list(range(length))
    return [i % length for i in ([position] if isinstance(position, int) else position)]


def unless_contradictory(case: Case, call: Any) -> Any:
    try:
        return call()
    except InputError as refused:
        if "contradict one another" in str(refused):
            reject()
        raise AssertionError(f"{case.family}: {case.edits}") from refused


@settings(UNHURRIED, max_examples=30)
@given(st.data(), st.lists(st.integers(0, 10**6), max_size=3))
def test_any_edits_do_and_show_what_plain_hooks_do(drawn: st.DataObject, others: list[int]) -> None:
    case = some_case(drawn.draw)
    model, (attends, sites) = loaded(case.family), known(case.family)
    read = list(dict.fromkeys([*(e.site for *_, e in case.meant), *(sorted(sites)[n % len(sites)] for n in others)]))
    tokens = [model.tokens(ids) for ids in case.prompts]
    run = unless_contradictory(case, lambda: model.run(tokens, read=read, edits=case.edits))
    for p, ids in enumerate(case.prompts):
        logits, seen = pass_with(model.hf, case.family, ids, case.plain(p, len(ids)), attends)
        assert error(run.logits[p, -len(ids) :], logits) <= CLOSE, case
        for site in read:
            edges = site.split(".")[0] in EDGES
            want = seen[site].movedim(1, 0) if edges else seen[site]
            got = torch.stack([run.at(site, prompt=p, position=i) for i in range(len(ids))])
            if edges:  # what is masked is −∞ or the lowest number, as the models have it
                got, want = (torch.where(x < -1e30, 0, x) for x in (got, want))
            assert error(got, want) <= CLOSE, (case, site)
    for module in model.hf.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks and "forward" not in vars(module)


@settings(UNHURRIED, max_examples=10)
@given(st.data())
def test_generation_under_edits_equals_a_run_anew_for_every_token(drawn: st.DataObject) -> None:
    case = some_case(drawn.draw, steps=True)
    model, (attends, _), steps = loaded(case.family), known(case.family), 4
    tokens = [model.tokens(ids) for ids in case.prompts]
    found = unless_contradictory(case, lambda: model.generate(tokens, edits=case.edits, max_new_tokens=steps))
    for p, ids in enumerate(case.prompts):
        said: list[int] = []
        logits: list[Tensor] = []
        for _ in range(steps):
            text = [*ids, *said]
            logits.append(pass_with(model.hf, case.family, text, case.plain(p, len(text)), attends)[0][-1])
            said.append(int(logits[-1].argmax()))
            if said[-1] in model.end_ids:
                break
        top = torch.stack(logits).topk(2).values
        leads = ((top[:, 0] - top[:, 1]) / torch.stack(logits).abs().amax(-1)).tolist()
        assert error(found[p].logits, logits[0]) <= CLOSE, case
        ended = said[-1] in model.end_ids
        if ended and min(leads) < 2 * CLOSE:
            continue
        want = Said(said[: len(said) - ended], torch.stack(logits), leads[: len(said) - ended], 1.0)
        assert agree(found[p].ids, want), (case, found[p].ids, said)


def test_the_oracle_sees_what_it_should() -> None:
    """Else the comparisons above would compare nothing."""
    names = {name for family in ("llama", "gpt2", "mixtral") for name in (site.split(".")[0] for site in known(family)[1])}
    assert names == {
        *("resid", "attn_in", "attn_out", "mlp_in", "mlp_out", "neurons", "router"),
        *HEADED,
    }
    assert len([s for s in known("llama")[1] if s.startswith("pattern")]) == DEPTH
