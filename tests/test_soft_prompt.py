"""Future lens with a learned soft prompt: its gradient and its scope by hand, resuming, files, refusing, and the baselines beside it."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import loaded, tiny, tiny_tokenizer

import patchscopes as ps
from patchscopes.core.edits import Edit
from patchscopes.core.errors import InputError, LayerError, RefusedError, VectorError
from patchscopes.lenses import (
    PromptRecipe,
    SoftPrompt,
    TrainingProgress,
    load_soft_prompt,
    soft_prompt,
    train_soft_prompt,
    windows,
)
from patchscopes.lenses.descent import CHECKPOINT
from patchscopes.lenses.soft_prompt import PROMPT, bigrams, evaluate, futures, rows_of_step, untrained
from patchscopes.model import Model
from patchscopes.organisms.atlas.corpus import Corpus
from patchscopes.organisms.atlas.facts import world

TEXTS = [f"{a} the {b} of {c}" for a in "abcde" for b in ("hill", "sea") for c in ("x y z", "some town")]
QUICK = PromptRecipe(slots=3, ahead=2, per_text=2, steps=6, batch=4, rate=0.01)


@pytest.fixture(scope="module")
def model() -> Model:
    return loaded("llama")


@pytest.fixture(scope="module")
def atlas() -> Model:
    return ps.load("atlas")


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    documents = Corpus(world()).documents(random.Random("tests of soft prompts"))
    return [next(documents) for _ in range(60)]


def by_hand(hf: Any, lead: list[int], slots: torch.Tensor, layer: int, h: torch.Tensor, behind: list[int]) -> torch.Tensor:
    """Logits of the model reading embeddings, with h written at the last slot of `layer` by one hook."""
    embed = hf.get_input_embeddings().weight
    x = torch.cat([embed[lead], slots, embed[behind]])[None]
    at = len(lead) + len(slots) - 1

    def write(_module: Any, args: tuple) -> tuple:
        return (torch.cat([args[0][:, :at], h[None, None], args[0][:, at + 1 :]], 1), *args[1:])

    handle = hf.model.layers[layer].register_forward_pre_hook(write)
    try:
        return hf(inputs_embeds=x, use_cache=False).logits[0, at:]
    finally:
        handle.remove()


@pytest.mark.parametrize("layer", [0, 2])
def test_the_gradient_is_that_of_the_mean_divergence(layer: int) -> None:
    hf = tiny("llama").double()
    model = ps.load((hf, tiny_tokenizer()))
    some = futures(model, windows(model, TEXTS[:4]), layer, replace(QUICK, ahead=3))
    start = untrained(model, layer, QUICK)
    rows = [0, 3, 5]
    lead = list(start.ids[: start.places[0]])
    slots = start.slots.double().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        ids, said = list(some.ids[row]), list(some.said[row])
        with torch.no_grad():
            plain = hf(torch.tensor([[*ids, *said[:-1]]]), output_hidden_states=True, use_cache=False)
            log_p = plain.logits[0, -3:].log_softmax(-1)
            assert said == log_p.argmax(-1).tolist()  # the model's own words
            h = plain.hidden_states[layer][0, len(ids) - 1]
        log_q = by_hand(hf, lead, slots, layer, h, said[:-1]).log_softmax(-1)
        total = total + (log_p.exp() * (log_p - log_q)).sum() / 3 / len(rows)
    total.backward()
    edit = Edit("embed", start.places, start.slots.double())
    kl, grad = soft_prompt._gradient(model, start.ids, layer, some, rows, edit)
    assert kl == pytest.approx(float(total.detach()), rel=1e-4)
    assert slots.grad is not None and float((grad - slots.grad).abs().max()) < 1e-4 * float(slots.grad.abs().max())
    parts: dict[str, Any] = {name: tuple(getattr(some, name)[row] for row in rows) for name in ("ids", "said")}
    parts |= {name: getattr(some, name)[rows] for name in ("h", "last", "log_p")}
    bits = float(total.detach()) / math.log(2)
    assert start.divergence(model, replace(some, **parts)) == pytest.approx(bits, rel=1e-4)


def test_it_is_a_patchscope(model: Model) -> None:
    prompt = replace(untrained(model, 2, QUICK), slots=torch.randn(3, model.d_model, generator=torch.Generator().manual_seed(0)))
    source = ps.Source(model, ["the hill", "sea x"], layer=[2, 3])
    readings = prompt.scope(model)(source, keep_logits=True, evidence=False)
    assert readings.logits is not None and set(readings.table["target_layer"]) == {2}
    assert "text" not in set(readings.table["control"])  # the source's words have no place among embeddings
    lead = list(prompt.ids[: prompt.places[0]])
    for row, logits in zip(readings.table.iter_rows(named=True), readings.logits, strict=True):
        if row["control"] != "none":
            continue
        site = f"resid.{row['source_layer']}"
        h = model.run(row["prompt_text"], read=site)[site][0, -1]
        want = by_hand(model.hf, lead, prompt.slots, 2, h, [])[0]
        assert float((logits - want).abs().max()) < 1e-4 * float(want.abs().max())


def test_stopped_and_resumed_equals_not_stopped(model: Model, tmp_path: Path) -> None:
    whole = train_soft_prompt(model, TEXTS, 2, tmp_path / "whole", QUICK)
    folder = tmp_path / "stopped"
    for stop in (2, 3):

        def impatient(progress: TrainingProgress, stop: int = stop) -> None:
            if progress.step == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train_soft_prompt(model, TEXTS, 2, folder, QUICK, progress=impatient)
        assert (folder / CHECKPOINT).exists() and not (folder / PROMPT).exists()
    steps: list[int] = []
    found = train_soft_prompt(model, TEXTS, 2, folder, QUICK, progress=lambda p: steps.append(p.step))
    assert (
        steps == [4, 5, 6]
        and torch.equal(found.slots, whole.slots)
        and not torch.equal(whole.slots, untrained(model, 2, QUICK).slots)
    )
    assert found.provenance["tokens"] == whole.provenance["tokens"] and not (folder / CHECKPOINT).exists()
    again = train_soft_prompt(model, TEXTS, 2, folder, QUICK, progress=lambda p: pytest.fail("it was finished"))
    assert torch.equal(again.slots, whole.slots) and again.provenance == json.loads(json.dumps(found.provenance))
    for changed in ({"layer": 1}, {"recipe": replace(QUICK, seed=1)}):
        with pytest.raises(RefusedError, match="belongs to another soft prompt"):
            train_soft_prompt(model, TEXTS, changed.get("layer", 2), folder, changed.get("recipe", QUICK))  # type: ignore[arg-type]


def test_training_beats_where_it_started_and_leaves_the_model_alone(atlas: Model, corpus: list[str], tmp_path: Path) -> None:
    hashed = atlas.weight_hash
    recipe = PromptRecipe(steps=30, rate=0.01, per_text=3, held_out=0.3)
    found = train_soft_prompt(atlas, corpus, 4, None, recipe)
    assert ps.load((atlas.hf, atlas.tokenizer)).weight_hash == hashed and all(p.grad is None for p in atlas.hf.parameters())
    fresh = futures(atlas, windows(atlas, corpus[:20]), 4, recipe)
    assert found.divergence(atlas, fresh) < 0.9 * untrained(atlas, 4, recipe).divergence(atlas, fresh)
    report = found.provenance["report"]
    assert set(report["precision"]) == {"soft prompt", "fixed prompt", "linear", "bigram"} and report["n"] > 20
    found.save(tmp_path / "p.safetensors")
    again = load_soft_prompt(tmp_path / "p.safetensors", atlas)
    assert torch.equal(again.slots, found.slots) and (again.layer, again.ids, again.ahead) == (4, found.ids, 3)


def test_the_baselines_are_their_definitions(atlas: Model, corpus: list[str]) -> None:
    recipe = PromptRecipe(per_text=2, ahead=2)
    some = futures(atlas, windows(atlas, corpus[:10]), atlas.n_layers, recipe)
    report = evaluate(untrained(atlas, atlas.n_layers, recipe), atlas, some, some)
    assert report.precision["linear"][0] == 1.0  # at layer L the state is what is decoded
    assert report.precision["soft prompt"][0] == report.precision["fixed prompt"][0] == 1.0
    source = ps.Source.of_vectors(atlas, some.h, layer=atlas.n_layers)
    said = ps.scopes.future_lens(layer=atlas.n_layers, max_new_tokens=2)(source, controls=False).table["text"].to_list()
    hits = [text == atlas.decode(ids) for text, ids in zip(said, some.said, strict=True)]
    assert report.precision["fixed prompt"][1] == pytest.approx(sum(hits) / len(hits))
    assert report.table.height == 8 and report.n == len(some.ids)
    chains = [(1, 2, 3), (1, 2, 4), (1, 5, 2), (2, 4, 4)]
    assert bigrams(chains, [(9, 1), (2,), (7,)], 2) == [(2, 4), (4, 4), (2, 4)]  # 2 and 4 are as common; 2 was first


def test_every_epoch_sees_every_state_once() -> None:
    recipe = PromptRecipe(batch=4)
    seen = [row for step in range(10) for row in rows_of_step(10, recipe, step)]
    assert sorted(seen[:10]) == sorted(seen[10:20]) == list(range(10)) and seen[:10] != seen[10:20]


def test_those_of_other_models_are_refused(atlas: Model, model: Model, tmp_path: Path) -> None:
    prompt = untrained(atlas, 4, PromptRecipe())
    noise = replace(prompt, slots=5 * torch.randn(10, 192, generator=torch.Generator().manual_seed(0)))
    noise.save(tmp_path / "p.safetensors")
    with pytest.raises(RefusedError, match=r"does not fit atlas.* bits a token .*check=False"):
        load_soft_prompt(tmp_path / "p.safetensors", atlas)
    assert torch.equal(load_soft_prompt(tmp_path / "p.safetensors", atlas, check=False).slots, noise.slots)
    with pytest.raises(VectorError, match=r"192 wide; .* 64 wide"):
        load_soft_prompt(tmp_path / "p.safetensors", model, check=False)
    with pytest.raises(LayerError, match="for layer 9; atlas has 8"):
        replace(prompt, layer=9).scope(atlas)
    with pytest.raises(InputError, match="ids up to 8192"):
        replace(prompt, ids=(*prompt.ids[:-1], 8192)).require(atlas)


def test_wrong_input_is_told(model: Model, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no soft prompt"):
        load_soft_prompt(tmp_path)
    ps.maps.save_map(tmp_path / "map.safetensors", ps.maps.Scale(2.0))
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    for name in ("map", "torn"):
        with pytest.raises(InputError, match="could not be read as a soft prompt"):
            load_soft_prompt(tmp_path / f"{name}.safetensors")
    with pytest.raises(InputError, match="slots=0; expected"):
        PromptRecipe(slots=0)
    with pytest.raises(InputError, match=r"rate=0\.0; expected"):
        PromptRecipe(rate=0.0)
    with pytest.raises(InputError, match="2 embeddings were given for 1 tokens"):
        SoftPrompt(torch.zeros(2, 4), 1, (1,))
    with pytest.raises(VectorError, match="finite"):
        SoftPrompt(torch.full((1, 4), torch.nan), 1, (1,))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], corpus: list[str]) -> None:
    from patchscopes.cli.app import run

    (tmp_path / "texts.txt").write_text("\n".join(text.replace("\n", " ") for text in corpus[:12]))
    options = [
        "--texts",
        str(tmp_path / "texts.txt"),
        "--out",
        str(tmp_path / "p"),
        "--steps",
        "2",
        "--ahead",
        "2",
        "--per-text",
        "1",
    ]
    assert run(["lens", "soft-prompt", *options, "--layer", "3", "--json"]) == 0
    captured = capsys.readouterr()
    told = json.loads(captured.out)
    assert told["layer"] == 3 and len(told["precision"]["soft prompt"]) == 2 and "step 2 of 2" in captured.err
    assert run(["lens", "soft-prompt", *options, "--layer", "3"]) == 0  # finished: as it is
    assert "2 ahead" in capsys.readouterr().out
    assert run(["lens", "soft-prompt", *options, "--layer", "4"]) == 6
    assert run(["lens", "soft-prompt", *options, "--layer", "30"]) == 2
