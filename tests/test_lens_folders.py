"""Tuned lenses named in experiments: files, folders of ours and public ones; refused where they were made for another model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import patchscopes as ps
from patchscopes.core.errors import InputError, NotAvailableError, RefusedError
from patchscopes.evaluate import next_token
from patchscopes.evaluate.frame import Asked
from patchscopes.experiment import Experiment
from patchscopes.experiment.documents import rooted
from patchscopes.lenses import load_tuned_lens
from patchscopes.runs import open_run, sweep

TEXTS = ["The capital of France", "My sister saw a lynx"]


@pytest.fixture(scope="module")
def atlas() -> ps.Model:
    return ps.load("atlas")


@pytest.fixture(scope="module")
def other(atlas: ps.Model) -> ps.Model:
    """A model with the head of atlas, so that a hash of the head says that they are the same, and other blocks."""
    hf = ps.load("atlas").hf
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if "layers." in name and parameter.ndim > 1:
                parameter.normal_(0, 0.05)
    assert torch.equal(hf.get_output_embeddings().weight, atlas.hf.get_output_embeddings().weight)
    return ps.load((hf, atlas.tokenizer))


@pytest.fixture
def public(atlas: ps.Model, tmp_path: Path) -> Path:
    """The lens of atlas as AlignmentResearch/tuned-lens would leave it."""
    lens, folder = load_tuned_lens("atlas"), tmp_path / "public"
    folder.mkdir()
    params = {f"{i}.{name}": t[i] for name, t in (("weight", lens.weight), ("bias", lens.bias)) for i in range(lens.n_layers)}
    torch.save({name: t.clone() for name, t in params.items()}, folder / "params.pt")
    about = {"base_model_name_or_path": "x/y", "d_model": 192, "num_hidden_layers": 8, "bias": True, "unembed_hash": "0"}
    (folder / "config.json").write_text(json.dumps({**about, "lens_type": "linear_tuned_lens"}))
    return folder


def experiment(lens: Path, **more: Any) -> Experiment:
    scope = {"preset": "logit-lens", "map": {"tuned_lens": str(lens)}}
    return Experiment.model_validate({"prompts": TEXTS, "layers": [0, 4, 8], "scope": scope, "controls": False, **more})


def test_a_public_folder_is_a_lens_of_an_experiment(atlas: ps.Model, public: Path, tmp_path: Path) -> None:
    (public / "notes.txt").write_text("not part of the lens")
    run = sweep(experiment(public), runs=tmp_path / "runs", models={"atlas": atlas})
    table = run.table()
    want = load_tuned_lens("atlas").scope()(ps.Source(atlas, TEXTS, layer=[0, 4, 8]), controls=False).table
    assert table.height == 6 and set(table["map"]) == {"tuned-lens"}
    assert table["next_token_id"].to_list() == want["next_token_id"].to_list()
    assert table["logprob"].to_list() == pytest.approx(want["logprob"].to_list(), abs=1e-4)
    plain = ps.scopes.logit_lens()(ps.Source(atlas, TEXTS, layer=[0, 4, 8]), controls=False).table
    assert plain["next_token_id"].to_list() != want["next_token_id"].to_list()
    (copy,) = (run.path / "inputs").iterdir()
    assert sorted(file.name for file in copy.iterdir()) == ["config.json", "params.pt"]
    digest = experiment(public).digest
    shutil.move(public, tmp_path / "elsewhere")
    kept = Experiment.model_validate(rooted(open_run(run.path).spec, run.path))  # the run folder alone says what was asked
    assert kept.digest == experiment(tmp_path / "elsewhere").digest == digest
    torch.save({}, tmp_path / "elsewhere" / "params.pt")
    assert experiment(tmp_path / "elsewhere").digest != digest


def test_a_folder_of_ours_is_one_too(atlas: ps.Model, tmp_path: Path) -> None:
    (tmp_path / "ours").mkdir()
    load_tuned_lens("atlas").save(tmp_path / "ours" / "tuned_lens.safetensors")
    run = sweep(experiment(tmp_path / "ours"), runs=tmp_path / "runs", models={"atlas": atlas})
    assert run.counts["ok"] == 6 and (next((run.path / "inputs").iterdir()) / "tuned_lens.safetensors").is_file()


def test_a_lens_of_another_model_is_refused_whatever_its_head_is(other: ps.Model, public: Path, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="further from what the model says in the end than the logit lens"):
        load_tuned_lens(public, other)
    with pytest.raises(RefusedError, match="most likely made for another model"):
        sweep(experiment(public), runs=tmp_path / "runs", models={"atlas": other})
    assert load_tuned_lens(public, ps.load("atlas")).n_layers == 8


def test_a_folder_that_holds_no_lens_is_told(atlas: ps.Model, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"holds no tuned lens: expected config\.json and params\.pt .*tuned_lens\.safetensors"):
        sweep(experiment(tmp_path / "empty"), runs=tmp_path / "runs", models={"atlas": atlas})
    with pytest.raises(InputError, match="there is no map"):
        sweep(experiment(tmp_path / "nothing"), runs=tmp_path / "runs", models={"atlas": atlas})


def test_next_tokens_through_a_tuned_lens_of_any_form(public: Path, tmp_path: Path) -> None:
    asked = Asked(n=6, runs=tmp_path / "runs")
    found = {
        str(lens): next_token.evaluate(asked, next_token.Settings(scopes=(), lens=str(lens))).scores["scopes"]
        for lens in ("atlas", public)
    }
    one, two = (by_scope["tuned lens"] for by_scope in found.values())  # type: ignore[index]
    assert one == two and set(one) == set(map(str, range(8)))
    with pytest.raises(NotAvailableError, match="no tuned lens in"):
        next_token.evaluate(asked, next_token.Settings(lens=str(tmp_path / "nothing")))
