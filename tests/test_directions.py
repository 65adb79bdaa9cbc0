"""Directions and differences against closed forms, and at chance where there is nothing."""

from __future__ import annotations

import copy

import polars as pl
import pytest
import torch
from families import loaded, tiny, tiny_tokenizer
from oracle import Patch, error, full_logits, states

import patchscopes as ps
from patchscopes.core.errors import InputError, VectorError

ONE = ["ab cd", "the cat", "hello you", "it is so"]
OTHER = ["12 34", "5 and 6", "7 8 9", "10"]


def of(model: ps.Model, prompts: list[str], layer=(1, 3), position: object = -1) -> ps.Source:
    return ps.Source(model, prompts, position=position, layer=list(layer))  # type: ignore[arg-type]


def test_a_difference_is_one_of_means() -> None:
    model = loaded("llama")
    found = ps.scopes.activation_difference(of(model, ONE, position=[1, 2, 3]), of(model, OTHER), shuffles=9)

    def mean(prompts: list[str], positions: list[int], layer: int) -> torch.Tensor:
        each = [states(model.hf, "llama", torch.tensor([model.tokens(text).ids]))[f"resid.{layer}"][0] for text in prompts]
        return torch.stack([one[positions].mean(0) for one in each]).mean(0)

    for layer in (1, 3):
        assert error(found.vectors[layer], mean(ONE, [1, 2, 3], layer) - mean(OTHER, [-1], layer)) < 1e-5
    assert found.n == (4, 4) and not found.paired
    assert found.table["norm"].to_list() == pytest.approx([float(v.norm()) for v in found.vectors.values()])
    source = found.source(3)
    assert torch.equal(source.places()[0].vector, -source.places()[1].vector)  # type: ignore[arg-type, operator]


def test_two_models_are_compared_prompt_by_prompt() -> None:
    """A bias of the last block is exactly the difference at layer L, and nothing differs below."""
    base = loaded("gpt2")
    hf = copy.deepcopy(base.hf)
    moved = torch.zeros(64)
    moved[5] = 2.0
    hf.transformer.h[-1].mlp.c_proj.bias.data += moved
    tuned = ps.load((hf, tiny_tokenizer()))
    found = ps.scopes.activation_difference(of(tuned, ONE, (3, 5)), of(base, ONE, (3, 5)), shuffles=99)
    assert found.paired and error(found.vectors[5], moved) < 1e-5 and float(found.vectors[3].norm()) < 1e-6
    assert found.split_half[5] == pytest.approx(1, abs=1e-6) and found.p_value[3] == 1
    assert found.p_value[5] < 0.3  # four prompts have sixteen signs, of which two are as far


def test_nothing_is_found_where_there_is_nothing() -> None:
    """p-values of halves of one kind are uniform, and halves do not agree."""
    model = loaded("llama")
    prompts = [f"{a}{b}{c}" for a in "abcdef" for b in "ghijkl" for c in "mnopq"]
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0)).tolist()
    p, halves = [], []
    for k in range(0, 180, 12):
        some = [prompts[i] for i in order[k : k + 12]]
        found = ps.scopes.activation_difference(of(model, some[:6], [2]), of(model, some[6:], [2]), shuffles=99, seed=k)
        p.append(found.p_value[2])
        halves.append(found.split_half[2])
    assert 0.2 < sum(p) / len(p) < 0.8 and sum(one <= 0.1 for one in p) <= 5
    assert abs(sum(halves) / len(halves)) < 0.4
    real = ps.scopes.activation_difference(
        of(model, ["abc", "abd", "abe", "abf"] * 2, [2]), of(model, ["1", "12", "3", "4"] * 2, [2])
    )
    assert real.p_value[2] < 0.05


def test_tokens_that_all_prompts_bring_forth() -> None:
    model = loaded("llama")
    scope = ps.scopes.difference_scope((1, 2.5), [("a", "b"), ("c",), ("d", "1")])
    v = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    readings = scope(ps.Source.of_vectors(model, v, layer=3), keep_logits=True)
    found = ps.scopes.in_all(readings, model, 30)
    prompts = ["a -> a\nb -> b\n?", "c -> c\n?", "d -> d\n1 -> 1\n?"]
    for k, label in enumerate(("vector 0", "vector 1")):
        for alpha in (1.0, 2.5):
            p = []
            for text in prompts:
                ids = model.tokens(text).ids
                p.append(full_logits(model.hf, "llama", ids, Patch("resid.3", len(ids) - 1, alpha * v[k]))[-1].softmax(-1))
            tops = [set(one.topk(30).indices.tolist()) for one in p]
            want = set.intersection(*tops)
            name = f"scale({alpha:g})"
            mine = found.filter(pl.col("prompt_text") == label, pl.col("map") == name, pl.col("control") == "none")
            assert set(mine["token_id"]) == want
            for row in mine.iter_rows(named=True):
                assert row["p"] == pytest.approx(float(torch.stack(p).mean(0)[row["token_id"]]), abs=1e-5)
    assert {"none", "random", "nothing"} <= set(found["control"])
    with pytest.raises(InputError, match="keep_logits"):
        ps.scopes.in_all(scope(ps.Source.of_vectors(model, v, layer=3), controls=False), model)


def test_what_all_prompts_bring_forth_has_a_null_of_single_vectors() -> None:
    """As many tokens survive of random vectors as of the random vectors, and the other sources, beside them."""
    model = loaded("llama")
    scope = ps.scopes.difference_scope((4,), [("a", "b"), ("c",), ("d", "1")])
    v = 8 * torch.randn(40, 64, generator=torch.Generator().manual_seed(1))
    readings = scope(ps.Source.of_vectors(model, v, layer=3), keep_logits=True, evidence=False)
    found = ps.scopes.in_all(readings, model, 10)
    each = {kind: found.filter(pl.col("control") == kind).height / len(v) for kind in ("none", "random", "other")}
    unrelated = 10**3 / model.vocab**2  # what three vectors that have nothing to do with each other would share
    assert each["none"] > 2 * unrelated
    for kind in ("random", "other"):
        assert 0.75 < each[kind] / each["none"] < 1.33, each


def test_tokens_of_all_prompts_are_those_of_one_vector() -> None:
    """Two positions of one prompt, or two vectors of one name, are not taken together."""
    model = loaded("llama")
    scope = ps.scopes.difference_scope((1,), [("a",), ("c",)])
    both = ps.Source(model, "the cat", position=[2, -1], layer=3)
    found = ps.scopes.in_all(scope(both, controls=False, keep_logits=True), model, 10)
    for position in (2, len(model.tokens("the cat")) - 1):
        alone = scope(ps.Source(model, "the cat", position=position, layer=3), controls=False, keep_logits=True)
        want = ps.scopes.in_all(alone, model, 10)["token_id"].to_list()
        assert found.filter(pl.col("position") == position)["token_id"].to_list() == want


def test_directions_are_written_at_lengths_of_the_layer() -> None:
    model = loaded("llama")
    maps = ps.scopes.lengths(model, ["the cat sat", "hello you"], (1, 3, 9))
    scope = ps.Patchscope("hello {x} is", layer=2, map=maps, max_new_tokens=2)
    v = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
    found = ps.scopes.explain(model, v, scope, layer=1, labels=["a", "b", "c"], read=4, n_null=4)
    assert found.table["label"].to_list() == ["a", "b", "c"] and found.every.height == 7 * 3
    usual = torch.stack(
        [
            states(model.hf, "llama", torch.tensor([model.tokens(t).ids]))["resid.2"][0, k].norm()
            for t in ("the cat sat", "hello you")
            for k in range(1, len(model.tokens(t)))
        ]
    ).median()
    for k, row in enumerate(found.table.iter_rows(named=True)):
        mine = found.every.filter(pl.col("label") == row["label"])
        assert mine.filter(pl.col("map") == row["map"])["criterion"].item() == mine["criterion"].max()
        alpha = float(row["map"].split()[0])
        edit = ps.Edit("resid.2", "x", alpha * usual * v[k] / v[k].norm())
        run = model.run("hello x is", read="resid.4", edits=[edit])
        r = run.at("resid.4", position=-1)
        assert row["self_similarity"] == pytest.approx(float(v[k] @ r / v[k].norm() / r.norm()), abs=1e-3)
        assert row["text"] == model.generate("hello x is", edits=[edit], max_new_tokens=2)[0].text
        assert 1 / 5 <= row["p_value"] <= 1


def test_every_direction_has_a_null_of_its_own_length() -> None:
    """Under maps that leave the length as it is: what is said of a direction does not hang on which ones stand beside it."""
    model = loaded("llama")
    scope = ps.Patchscope("hello {x} is", layer=2, map=[ps.maps.Scale(1.0), ps.maps.Scale(2.0)], max_new_tokens=1, write="add")
    v = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
    v = v / v.norm(dim=-1, keepdim=True) * torch.tensor([[0.1], [40.0], [40.0]])
    found = ps.scopes.explain(model, v, scope, layer=1, read=3, n_null=20)
    alone = [ps.scopes.explain(model, v[k], scope, layer=1, labels=[f"direction {k}"], read=3, n_null=20).table for k in range(3)]
    assert found.table["p_value"].to_list() == [one["p_value"].item() for one in alone]
    null = found.every.filter("null")
    assert null.height == 2 * 20 * 2 and sorted(set(null["norm"].round(3))) == [0.1, 40.0]
    matched = ps.Patchscope("hello {x} is", layer=2, map=ps.scopes.lengths(model, "the cat", (1, 2)), max_new_tokens=1)
    assert ps.scopes.explain(model, v, matched, layer=1, read=4, n_null=5).every.height == (3 + 5) * 2
    for labels in (["a", "a", "b"], ["a", "b"]):
        with pytest.raises(InputError, match="all different"):
            ps.scopes.explain(model, v, scope, layer=1, labels=labels, read=4)


def test_random_directions_are_at_chance() -> None:
    model = ps.load((tiny("llama"), tiny_tokenizer()))
    scope = ps.Patchscope("hello {x} is", layer=2, map=ps.scopes.lengths(model, "the cat sat", (1, 4)), max_new_tokens=1)
    v = torch.randn(40, 64, generator=torch.Generator().manual_seed(3))
    p = ps.scopes.explain(model, v, scope, layer=2, read=3).table["p_value"]
    assert 0.25 < float(p.mean() or 0) < 0.75 and (p <= 0.1).sum() <= 12  # type: ignore[arg-type]


def test_mistakes_are_told() -> None:
    model = loaded("llama")
    with pytest.raises(InputError, match="at least two"):
        ps.scopes.activation_difference(of(model, ONE[:1]), of(model, OTHER))
    with pytest.raises(InputError, match="the same layers"):
        ps.scopes.activation_difference(of(model, ONE, (1,)), of(model, OTHER))
    with pytest.raises(VectorError, match="64 and 192 wide"):
        ps.scopes.activation_difference(of(model, ONE), of(ps.load("atlas"), OTHER))
    with pytest.raises(InputError, match="no layer 2"):
        ps.scopes.activation_difference(of(model, ONE), of(model, OTHER), shuffles=9).source(2)
    for make in (ps.scopes.difference_scope, lambda alphas: ps.scopes.lengths(model, "ab", alphas)):
        with pytest.raises(InputError, match="alphas is empty"):
            make(())
