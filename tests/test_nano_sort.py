"""An outside oracle: a model that sorts letters, with activations computed by its authors' own code (bbycroft/llm-viz, MIT)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import patchscopes
from patchscopes.engine.run import Run
from patchscopes.model import Model

pytestmark = pytest.mark.shared

# their name -> our site; of attention and MLP they kept the first block's
SITES = {"x": "resid.0", "block0": "resid.1", "block1": "resid.2", "block2": "resid.3", "yProj": "attn_out.0", "mlp": "mlp_out.0"}


@pytest.fixture(scope="module")
def model(shared: Path) -> Model:
    return patchscopes.load(str(shared / "models" / "gpt-nano-sort"))


@pytest.fixture(scope="module")
def reference(shared: Path) -> dict[str, Tensor]:
    return load_file(shared / "models" / "gpt-nano-sort" / "reference_activations.safetensors")


@pytest.fixture(scope="module")
def texts(reference: dict[str, Tensor]) -> list[str]:
    return ["".join("ABC"[int(i)] for i in row) for row in reference["idx"]]


@pytest.fixture(scope="module")
def run(model: Model, texts: list[str]) -> Run:
    return model.run(texts, read=["resid.*", "attn_out.*", "mlp_out.*"])


def close(got: Tensor, want: Tensor) -> bool:
    return got.shape == want.shape and bool((got - want).abs().max() <= 1e-5)


def test_the_prompts_are_theirs(model: Model, texts: list[str], reference: dict[str, Tensor]) -> None:
    assert [list(model.tokens(text).ids) for text in texts] == reference["idx"].long().tolist()


@pytest.mark.parametrize("name", SITES)
def test_sites_hold_what_the_authors_computed(run: Run, reference: dict[str, Tensor], name: str) -> None:
    assert close(run[SITES[name]], reference[name])


def test_layers_and_writers_meet_in_the_middle_of_a_block(run: Run, reference: dict[str, Tensor]) -> None:
    assert close(run["resid.0"] + run["attn_out.0"], reference["attnResid"])
    assert close(run["resid.1"] - run["mlp_out.0"], reference["attnResid"])


def test_logits(run: Run, reference: dict[str, Tensor]) -> None:
    assert close(run.logits, reference["lm_head"])
    assert close(run.logits.softmax(-1), reference["probs"])


def test_the_last_layer_is_before_the_final_norm_and_unembeds_to_the_logits(model: Model, run: Run, reference: dict) -> None:
    assert not close(reference["block2"], reference["ln_f"])
    assert close(model.hf.transformer.ln_f(run["resid.3"]), reference["ln_f"])
    assert close(model.unembed(reference["block2"]), reference["lm_head"])


def test_their_states_patched_in_lead_to_their_logits(model: Model, texts: list[str], reference: dict[str, Tensor]) -> None:
    """Every position of one prompt replaced by their states of another, at every layer."""
    for layer, name in enumerate(("x", "block0", "block1", "block2")):
        states = reference[name][1]
        edits = [patchscopes.Edit(f"resid.{layer}", i, state) for i, state in enumerate(states)]
        assert close(model.run(texts[0], edits=edits).logits[0], reference["lm_head"][1])


def test_it_sorts(model: Model) -> None:
    """Six letters in; after the sixth the model says them in order."""
    letters = "CABBCA"
    said = ""
    for _ in letters:
        said += model.show(int(model.run(letters + said).logits[0, -1].argmax()))
    assert said == "".join(sorted(letters)), torch.__version__
