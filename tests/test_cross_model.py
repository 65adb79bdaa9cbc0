"""Cross-model patching: a model and its wider copy, whose map is known; floors; other tokenizers; what is refused; the bundled pair."""

from __future__ import annotations

import dataclasses
import json
import random
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import tiny_tokenizer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import patchscopes as ps
from patchscopes import PatchscopesError, maps
from patchscopes.evaluate import cross_model
from patchscopes.evaluate.cross_model import Settings
from patchscopes.evaluate.frame import Asked, Result
from patchscopes.organisms import bundled

NARROW, WIDE, LAYERS = 24, 40, 3
SETTINGS = Settings("small", read=12, fit=60, known="all", tokens=3, tasks=("country.capital",), scopes=("same text",))


def made_texts(n: int, seed: int = 0) -> list[str]:
    """Of random letters, so that states span all directions."""
    rng = random.Random(seed)
    return ["".join(rng.choices(string.ascii_letters + " ", k=30)).strip() for _ in range(n)]


def llama(width: int, seed: int = 0, vocab: int = 97) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        rms_norm_eps=1e-6 * NARROW / width,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def copied_into(wide: LlamaForCausalLM, small: LlamaForCausalLM, r: torch.Tensor) -> LlamaForCausalLM:
    """The model that computes what the small one does, its residual stream being r h. r: [wide, narrow], rᵀ r = 1. What reads the stream
    reads rᵀ, what writes to it writes r; the root mean square over more dimensions is smaller, which the norms' gains undo."""
    gain = (r.shape[1] / r.shape[0]) ** 0.5
    own: Any = dict(small.named_parameters())
    for name, p in wide.named_parameters():
        if p.ndim == 1:
            p.data = torch.full_like(p, gain)
        elif any(part in name for part in ("o_proj", "down_proj")):
            p.data = r @ own[name]
        else:  # embeddings, head and all that reads the stream
            p.data = own[name] @ r.T
    return wide


@pytest.fixture(scope="module")
def rotation() -> torch.Tensor:
    return torch.linalg.qr(torch.randn(WIDE, NARROW, generator=torch.Generator().manual_seed(1)))[0]


@pytest.fixture(scope="module")
def pair(rotation: torch.Tensor) -> dict[str, ps.Model]:
    small = llama(NARROW)
    big = copied_into(llama(WIDE, seed=1), small, rotation)
    return {"small": ps.load((small, tiny_tokenizer())), "big": ps.load((big, tiny_tokenizer()))}


@pytest.fixture
def texts(tmp_path: Path) -> str:
    (tmp_path / "texts.txt").write_text("\n".join(made_texts(90)))
    return str(tmp_path / "texts.txt")


def asked(pair: dict[str, ps.Model], tmp_path: Path, **more: Any) -> Asked:
    return Asked(model="big", models=pair, runs=tmp_path / "runs", n=more.pop("n", 4), **more)


def test_the_copy_is_one(pair: dict[str, ps.Model], rotation: torch.Tensor) -> None:
    a, b = (pair[name].run("some text", read="resid.*") for name in ("small", "big"))
    assert torch.allclose(a.logits, b.logits, atol=1e-4)
    assert torch.allclose(a["resid.2"] @ rotation.T, b["resid.2"], atol=1e-4)


def test_the_fit_recovers_the_rotation_and_shuffled_pairs_do_not(pair: dict[str, ps.Model], rotation: torch.Tensor) -> None:
    at = [(layer, layer) for layer in range(LAYERS + 1)]
    texts = made_texts(60)
    found = maps.fit(pair["small"], texts, at, target=pair["big"], ridge=0.0)
    for layer in range(LAYERS + 1):
        f = found[layer, layer]
        assert isinstance(f, maps.Affine) and (f.weight - rotation).abs().max() < 1e-3
    assert all(one.error < 1e-6 and one.mean is not None and one.mean > 0.9 for one in found.reports)
    shuffled = maps.fit(pair["small"], texts, at, target=pair["big"], shuffled=True)
    assert all(one.error > 0.9 for one in shuffled.reports)  # about that of the mean
    assert shuffled.provenance["shuffled"] and not found.provenance["shuffled"]
    again = maps.fit(pair["small"], texts, at, target=pair["big"], shuffled=True)
    assert maps.digest_of(again.map) == maps.digest_of(shuffled.map) != maps.digest_of(found.map)


@pytest.fixture(scope="module")
def result(pair: dict[str, ps.Model], tmp_path_factory: pytest.TempPathFactory) -> Result:
    folder = tmp_path_factory.mktemp("cross")
    (folder / "texts.txt").write_text("\n".join(made_texts(90)))
    settings = dataclasses.replace(SETTINGS, texts=str(folder / "texts.txt"))
    return cross_model.evaluate(asked(pair, folder), settings)


def test_through_the_map_the_copy_says_what_the_model_says(result: Result) -> None:
    table = {row[:4]: row[4].value for row in result.tables[1].rows}
    assert len(table) == 3 * (LAYERS + 1) ** 2
    for layer in range(LAYERS + 1):
        assert table["same text", "mapped", layer, layer] == 1.0
    assert table["same text", "unmapped", LAYERS, LAYERS] < 0.9 > table["same text", "shuffled", LAYERS, LAYERS]
    tokens: Any = result.scores["next_token"]
    assert tokens["models_agree"].value == 1.0 and tokens["texts"] == 12 and tokens["one_vocabulary"]
    own = tokens["scopes"]["same text"]
    assert own["mapped"]["held_out"].value == 1.0 and own["mapped"]["held_out"].clusters < 12
    assert np.isfinite(own["mapped"]["held_out_surprisal_bits"].value)
    assert all(one["error"] < 1e-4 for one in result.scores["maps"]["reports"] if one["source_layer"] == one["target_layer"])  # type: ignore[index]
    json.dumps(result.to_json())


def test_attributes_stand_beside_as_many_looks_at_other_vectors(result: Result) -> None:
    found: Any = result.scores["attributes"]
    assert found["pairs"] == (LAYERS - 1) ** 2 and found["items"] == 4
    for kind in ("none", "other", "random", "mean", "nothing"):
        assert f"any_of_N {kind}" in found["maps"]["mapped"]
    assert set(found["maps"]) == {"mapped", "shuffled", "unmapped"}
    assert {figure.name for figure in result.figures} >= {"pairs-same-text", "depth-same-text", "pairs-attributes", "controls"}


def test_maps_are_fitted_once(pair: dict[str, ps.Model], tmp_path: Path, texts: str) -> None:
    settings = dataclasses.replace(SETTINGS, texts=texts, layers="1", target_layers="1:3")
    heard: list[str] = []
    listen = asked(pair, tmp_path, listeners=[lambda event: heard.append(event.get("message", ""))])
    first = cross_model.evaluate(listen, settings)
    assert any("fitting maps" in one for one in heard)
    heard.clear()
    again = cross_model.evaluate(listen, settings)
    assert not any("fitting maps" in one for one in heard) and again.scores["maps"] == first.scores["maps"]
    (folder,) = (tmp_path / "runs" / "maps").iterdir()
    given = dataclasses.replace(settings, map=str(folder / "mapped.safetensors"))
    assert cross_model.evaluate(listen, given).to_json()["scores"] == first.to_json()["scores"]
    assert any(path.name.startswith("mapped-") for path in (first.runs[0].path / "inputs").iterdir())


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Two letters a token, where the other tokenizer has one."""
    letters = string.ascii_letters + " "
    pieces = [*letters, *(a + b for a in letters for b in letters)]
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, **{p: i + 2 for i, p in enumerate(pieces)}}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S][\s\S]?"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<s>", pad_token="<s>")


def test_another_tokenizer_is_compared_as_text_and_told(pair: dict[str, ps.Model], tmp_path: Path, texts: str) -> None:
    tokenizer = word_tokenizer()
    both = {**pair, "big": ps.load((llama(WIDE, vocab=len(tokenizer)), tokenizer))}
    settings = dataclasses.replace(
        SETTINGS, texts=texts, layers="1", target_layers="1,2", scopes=("token identity", "same text"), read=6
    )
    found = cross_model.evaluate(asked(both, tmp_path), settings)
    tokens: Any = found.scores["next_token"]
    assert set(tokens["scopes"]) == {"token identity"} and not tokens["one_vocabulary"]
    assert tokens["scopes"]["token identity"]["mapped"]["held_out_surprisal_bits"].n == 0
    assert any("different tokens" in text for text in found.caveats)


def test_texts_that_share_no_position_are_told(pair: dict[str, ps.Model], tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    both = {**pair, "big": ps.load((llama(WIDE, vocab=len(tokenizer)), tokenizer))}
    (tmp_path / "texts.txt").write_text("ab\ncd\nef")  # one token of the one, whose first is left out
    with pytest.raises(PatchscopesError, match=r"none of the 3 texts has tokens of .* that end at one character"):
        cross_model.evaluate(asked(both, tmp_path), dataclasses.replace(SETTINGS, texts=str(tmp_path / "texts.txt")))


def test_maps_of_another_width_are_refused(pair: dict[str, ps.Model], tmp_path: Path, texts: str) -> None:
    maps.save_map(tmp_path / "square.safetensors", maps.Affine(torch.eye(NARROW)))
    settings = dataclasses.replace(SETTINGS, texts=texts, map=str(tmp_path / "square.safetensors"))
    with pytest.raises(PatchscopesError, match=r"24 wide; .* is 40 wide"):
        cross_model.evaluate(asked(pair, tmp_path), settings)
    maps.fit(pair["small"], made_texts(20), [(1, 1)], target=pair["big"]).save(tmp_path / "one.safetensors")
    settings = dataclasses.replace(settings, map=str(tmp_path / "one.safetensors"))
    with pytest.raises(PatchscopesError, match="has none from layer 0 to 0"):
        cross_model.evaluate(asked(pair, tmp_path), settings)


@pytest.mark.parametrize(
    ("lines", "change", "message"),
    [
        (made_texts(90), {"source": "big"}, "and so is the model that speaks"),
        (made_texts(90), {"source": "medium"}, "models were given, but not medium"),
        (made_texts(90), {"scopes": ("token",)}, "unknown scope 'token'"),
        (made_texts(90), {"layers": "0"}, "between 1 and L − 1"),
        (made_texts(90), {"layers": "7"}, "0 to 3"),
        (["a", "b"] * 9, {}, "texts are left to fit"),
        (made_texts(12), {}, "0 texts are left to fit"),
        (["abc", "abd", "abe", "abf"], {"read": 1}, "such a map fits anything"),
    ],
)
def test_what_cannot_be_is_said(
    lines: list[str], change: dict[str, Any], message: str, pair: dict[str, ps.Model], tmp_path: Path
) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(lines))
    settings = dataclasses.replace(SETTINGS, texts=str(tmp_path / "texts.txt"), **change)
    with pytest.raises(PatchscopesError, match=message):
        cross_model.evaluate(asked(pair, tmp_path), settings)


both = pytest.mark.skipif("atlas-small" not in bundled(), reason="this checkout has no weights of atlas-small")


@both
def test_the_bundled_pair(tmp_path: Path) -> None:
    settings = Settings(
        layers="3,4", target_layers="2,4", read=40, fit=500, tokens=6, tasks=("country.capital", "city.country"), at_least=4
    )
    found = cross_model.evaluate(Asked(n=8, runs=tmp_path), settings)
    tokens: Any = found.scores["next_token"]
    own = tokens["scopes"]["same text"]
    assert own["mapped"]["per_pair"].value > own["unmapped"]["per_pair"].value + 0.1
    assert own["mapped"]["per_pair"].value > own["shuffled"]["per_pair"].value + 0.1
    maps_: Any = found.scores["attributes"]["maps"]
    for name, kind in (("mapped", "random"), ("mapped", "nothing"), ("shuffled", "none"), ("unmapped", "none")):
        assert maps_[name][f"held_out {kind}"].value < 0.35, (name, kind)
    assert next(run.name for run in found.runs) == "cross-model-tokens"
    again = cross_model.evaluate(Asked(n=8, runs=tmp_path), settings)
    assert [run.id for run in again.runs] == [run.id for run in found.runs]


@both
def test_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from patchscopes.cli import app

    assert app.run(["evaluate", "cross-model", "--quick", "--dry-run", "--json", "--runs", str(tmp_path / "runs")]) == 0
    plans = json.loads(capsys.readouterr().out)["plans"]
    assert [one["name"] for one in plans] == ["cross-model-tokens", *["attribute-known"] * 2, "cross-model-attributes"]
    assert plans[0]["cells"] == 24 * (2 + 2 * 3 * 7 * 9) and not (tmp_path / "runs").exists()
