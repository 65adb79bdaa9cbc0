"""Back-patching, self-correction and attention knockout against full passes with plain hooks and masks."""

from __future__ import annotations

import polars as pl
import pytest
import torch
from families import loaded
from oracle import Patch, error, full_logits, patched, say, states

import patchscopes as ps
from patchscopes.core.errors import InputError, PositionError
from patchscopes.scopes.back_patch import back, forward

PROMPTS = ("the cat sat on", "ab cd ef")


def state(family: str, ids: tuple[int, ...], layer: int, position: int) -> torch.Tensor:
    return states(loaded(family).hf, family, torch.tensor([ids]))[f"resid.{layer}"][0, position]


# ---------------------------------------------------------------------------------------------------------------------- back-patching


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mamba"])
@pytest.mark.parametrize("written", [None, -1])
def test_back_patching_equals_a_full_pass_of_the_same_prompt(family: str, written: int | None) -> None:
    model = loaded(family)
    scope = ps.scopes.back_patch(written, layer=[0, 2, 5], max_new_tokens=3)
    readings = scope(ps.Source(model, PROMPTS, position=[1, -1], layer=[1, 3, 5]), controls=False, keep_logits=True)
    assert readings.table.height == 2 * 2 * 3 * 3 and readings.logits is not None
    assert set(readings.table["target"]) == {0}
    for k, row in enumerate(readings.table.iter_rows(named=True)):
        ids = model.tokens(PROMPTS[row["prompt"]]).ids
        place = row["position"] if written is None else len(ids) - 1
        value = state(family, ids, row["source_layer"], row["position"])
        said = say(model.hf, family, ids, Patch(f"resid.{row['target_layer']}", place, value), 3)
        assert error(readings.logits[k], said.logits[0]) < 1e-4, row
        if min(said.leads) > 2e-4 and not model.end_ids & set(said.tokens):
            assert row["text"] == model.decode(said.tokens), row


def test_the_same_layer_changes_nothing_and_is_the_control_nothing() -> None:
    model = loaded("llama")
    readings = ps.scopes.back_patch(max_new_tokens=2)(ps.Source(model, PROMPTS, layer="all"), keep_logits=True)
    assert set(readings.table["control"]) == {
        "none",
        "nothing",
        "random",
        "other",
        "mean",
    }  # no words stand for a state of its own
    assert readings.logits is not None
    for k, row in enumerate(readings.table.iter_rows(named=True)):
        if row["control"] == "nothing" or (row["control"] == "none" and row["source_layer"] == row["target_layer"]):
            plain = full_logits(model.hf, "llama", model.tokens(PROMPTS[row["prompt"]]).ids)[-1]
            assert error(readings.logits[k], plain) < 1e-5
    grid = readings.grid("logprob", prompt=1)
    assert grid.values.shape == (6, 6)


def test_the_papers_pairs_and_as_many_the_other_way() -> None:
    readings = ps.scopes.back_patch(max_new_tokens=1)(ps.Source(loaded("llama"), PROMPTS[0], layer="all"), controls=False)
    there = {(a, b) for a, b in readings.table.filter(back).select("source_layer", "target_layer").iter_rows()}
    assert there == {(a, b) for a in range(6) for b in range(1, 6) if a > b} and len(there) == 5 * 4 // 2
    assert readings.table.filter(forward).height == len(there)


def test_what_cannot_go_back_is_refused() -> None:
    model = loaded("llama")
    with pytest.raises(InputError, match="without a prompt"):
        ps.scopes.back_patch()(ps.Source.of_vectors(model, torch.ones(model.d_model), layer=1))
    with pytest.raises(PositionError):
        ps.scopes.back_patch("absent")(ps.Source(model, PROMPTS[0], layer=1))


def test_it_is_recorded_and_read_again(tmp_path) -> None:
    from patchscopes.experiment.looks import looks
    from patchscopes.experiment.written_down import experiment_of, models_of

    model = ps.load("atlas")
    given = [
        ("same", ps.Source(model, PROMPTS, layer=[2, 5]), ps.scopes.back_patch(layer=[1, 3], max_new_tokens=2)),
        ("end", ps.Source(model, PROMPTS, position=1, layer=[2, 5]), ps.scopes.back_patch(-1, layer=[1], max_new_tokens=2)),
    ]
    experiment = experiment_of(given, folder=tmp_path, controls=False)
    for (_, source, scope), look in zip(given, looks(experiment, models_of(given))[0], strict=True):
        assert (look.scope.prompt, look.scope.position) == (None, scope.position)
        assert look.scope(look.sources, controls=False).table.equals(scope(source, controls=False).table)
    run = ps.sweep(experiment, runs=tmp_path / "runs")
    assert run.status == "done" and run.table(control="none").height == 2 * 2 * 2 + 2 * 2
    assert ps.sweep(experiment, runs=tmp_path / "runs").id == run.id


def test_controls_can_run_without_evidence(tmp_path) -> None:
    scope, source = ps.scopes.back_patch(layer=[1, 3], max_new_tokens=2), ps.Source(loaded("llama"), PROMPTS, layer=[2, 4])
    bare, whole = scope(source, evidence=False).table, scope(source).table
    said = ["control", "text", "logprob"]
    assert bare.select(said).equals(whole.select(said))
    assert set(bare["verdict"].drop_nulls()) == {"not run"} and set(whole["verdict"].drop_nulls()) != {"not run"}
    asked = {"prompts": list(PROMPTS), "scope": {"preset": "back-patch", "layer": 1, "tokens": 1}, "layers": 2}
    runs = [ps.sweep({**asked, "evidence": evidence}, runs=tmp_path / "runs") for evidence in (False, True)]
    assert [run.table(control="random").height for run in runs] == [2, 2]
    assert not set(runs[0].plan["cell"]) & set(runs[1].plan["cell"])  # rows with and without evidence are not the same rows


# -------------------------------------------------------------------------------------------------------------------- self-correction


def masked(family: str, ids: list[int], split: int, patch: Patch, hidden: bool = True) -> torch.Tensor:
    """Logits after `ids`, whose tokens from `split` on do not see those before: one full pass with a mask of four axes."""
    hf = loaded(family).hf
    n = len(ids)
    mask = torch.full((n, n), torch.finfo(torch.float32).min).triu(1)
    if hidden:
        mask[split:, :split] = torch.finfo(torch.float32).min
    with torch.no_grad(), patched(hf, family, patch):
        return hf(torch.tensor([ids]), attention_mask=mask[None, None], use_cache=False).logits[0, -1]


def test_self_correction_with_two_prompts_equals_a_full_pass() -> None:
    model = loaded("llama")
    first, second = "the cat", "hello ab"
    source = ps.Source(model, first, layer="all")
    readings = ps.scopes.self_correct(second, layer=[0, 2, 4], max_new_tokens=3)(source, controls=False, keep_logits=True)
    ids, one = model.tokens(second).ids, model.tokens(first).ids
    assert readings.logits is not None
    for k, row in enumerate(readings.table.iter_rows(named=True)):
        patch = Patch(f"resid.{row['target_layer']}", len(ids) - 1, state("llama", one, row["source_layer"], len(one) - 1))
        assert error(readings.logits[k], say(model.hf, "llama", ids, patch, 1).logits[0]) < 1e-4
    slotted = ps.scopes.self_correct("The capital of {x} is", layer=1, max_new_tokens=1)(source, controls=False)
    assert slotted.table.height == 6


def test_one_masked_prompt_equals_a_full_pass_with_a_mask() -> None:
    model, family = loaded("llama"), "llama"
    first, second = "the cat", "hello ab"
    source, scope = ps.scopes.in_one_prompt(model, first, second, source_layer=[1, 3], layer=[0, 2], max_new_tokens=3)
    readings = scope(source, controls=False, keep_logits=True)
    one, two = model.tokens(first).ids, model.tokens(second).ids
    assert readings.logits is not None
    for k, row in enumerate(readings.table.iter_rows(named=True)):
        value = state(family, one, row["source_layer"], len(one) - 1)
        said, ids = [], [*one, *two]
        for step in range(3):
            logits = masked(family, ids, len(one), Patch(f"resid.{row['target_layer']}", len(one) + len(two) - 1, value))
            if step == 0:
                assert error(readings.logits[k], logits) < 1e-4
            ids.append(int(logits.argmax()))
            said.append(ids[-1])
        assert row["text"] == model.decode(said)


@pytest.mark.parametrize(("family", "same"), [("llama", True), ("gpt2", False)])
def test_both_forms_agree_where_positions_are_relative(family: str, same: bool) -> None:
    model = loaded(family)
    first, second = "the cat sat", "hello ab"
    settings = {"layer": [0, 2, 4], "max_new_tokens": 3}
    source, scope = ps.scopes.in_one_prompt(model, first, second, source_layer=[1, 3, 5], **settings)
    together = scope(source, controls=False, keep_logits=True)
    apart = ps.scopes.self_correct(second, **settings)(ps.Source(model, first, layer=[1, 3, 5]), controls=False, keep_logits=True)
    assert together.logits is not None and apart.logits is not None
    close = error(together.logits, apart.logits) < 1e-4
    assert close == same
    if same:
        assert together.table["text"].to_list() == apart.table["text"].to_list()
        where = pl.col("source_layer", "target_layer")
        assert together.table.select(where).equals(apart.table.select(where))
