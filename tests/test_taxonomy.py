"""The taxonomy of the paper (tables 1 and 4): every scope against an independent implementation, and names of one configuration
against each other."""

from __future__ import annotations

import copy

import polars as pl
import pytest
import torch
from families import blocks_of, loaded, tiny, tiny_tokenizer
from oracle import Patch, error, full_logits, say, states

import patchscopes as ps
from patchscopes.core.errors import InputError, PositionError, VectorError
from patchscopes.scopes.describe import EXAMPLES

TEXT = "the cat sat on"
FAMILIES = ["llama", "gpt2", "gemma2"]


def seen(family: str, text: str = TEXT) -> dict[str, torch.Tensor]:
    model = loaded(family)
    return states(model.hf, family, torch.tensor([model.tokens(text).ids]))


def logits_of(scope: ps.Patchscope, source: ps.Source) -> torch.Tensor:
    found = scope(source, controls=False, keep_logits=True).logits
    assert found is not None
    return found


def head_of(family: str, h: torch.Tensor) -> torch.Tensor:
    """The model's own final norm and head on raw last states, by a hook that writes them in a one-token pass."""
    hf = loaded(family).hf
    handle = blocks_of(hf, family)[-1].register_forward_hook(
        lambda _m, _a, out: (h[None, None], *out[1:]) if isinstance(out, tuple) else h[None, None]
    )
    try:
        with torch.no_grad():
            return hf(torch.tensor([[5]]), use_cache=False).logits[0, -1]
    finally:
        handle.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_lenses_are_one_configuration(family: str) -> None:
    """Logit lens, embedding space, and with a map linear shortcut and attribute lens: head(norm(f(h)))."""
    model = loaded(family)
    source = ps.Source(model, TEXT, position=-1, layer=[0, 3, -1])
    f = ps.maps.Affine(0.3 * torch.randn(64, 64), torch.randn(64))
    plain, found = logits_of(ps.scopes.logit_lens(), source), seen(family)
    assert torch.equal(plain, logits_of(ps.scopes.embedding_space(), source))
    behind = logits_of(ps.scopes.logit_lens(map=f), source)
    for same in (ps.scopes.linear_shortcut, ps.scopes.attribute_lens):
        assert torch.equal(behind, logits_of(same(f), source))
    for k, layer in enumerate((0, 3, 5)):
        h = found[f"resid.{layer}"][0, -1]
        assert error(plain[k], head_of(family, h)) < 1e-4
        assert error(behind[k], head_of(family, f.weight @ h + f.bias)) < 1e-4
    assert error(plain[2], full_logits(model.hf, family, model.tokens(TEXT).ids)[-1]) < 1e-4  # layer L is the model's own answer


def test_t_does_not_matter_at_the_last_layer() -> None:
    """LRE's T = S and i* = i, and T any, are the same numbers."""
    model, f = loaded("llama"), ps.maps.Scale(0.5)
    source = ps.Source(model, TEXT, position=-1, layer=[1, 3])
    own = ps.Patchscope(TEXT, position="same", layer=-1, map=f, max_new_tokens=1)
    assert error(logits_of(own, source), logits_of(ps.scopes.attribute_lens(f), source)) < 1e-5


def pairs_of_names(model: ps.Model) -> dict[str, tuple[ps.Patchscope, ps.Patchscope]]:
    """Presets that are the same configuration where their settings are: (one, the other)."""
    few = {"ab": "cd", "ef": "gh"}
    say = {"max_new_tokens": 3}
    shown = "ab: cd, ef: gh, x"
    scopes = ps.scopes
    return {
        "describing with the source's own model": (
            scopes.cross_model(model, ps.maps.Identity(), few, **say),
            scopes.describe(few, **say),
        ),
        "one α, 1": (scopes.superscope([1], scope=scopes.describe(few, **say)), scopes.describe(few, layer="same", **say)),
        "a description is an extraction": (scopes.extract(shown.replace(" x", " {x}"), **say), scopes.describe(few, **say)),
        "a future lens on the prompt of identity": (scopes.future_lens("a -> a\n?", **say), scopes.identity(("a",), **say)),
        "the second hop in a slot": (
            scopes.self_correct("size of {x}", layer="same", **say),
            scopes.extract("size of {x}", **say),
        ),
        "the second hop at its end": (scopes.self_correct("a -> a\n?", layer="same", **say), scopes.identity(("a",), **say)),
        "no noise": (scopes.causal_tracing(model, TEXT, "cat", noise=0.0), scopes.back_patch(layer="same", max_new_tokens=1)),
        "identity at the last layer": (scopes.identity(layer=-1), scopes.logit_lens()),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_two_names_of_one_configuration_give_the_same_numbers(family: str) -> None:
    model = loaded(family)
    source = ps.Source(model, TEXT, position=["cat", -1], layer=[0, 2, 5])
    for name, (one, other) in pairs_of_names(model).items():
        found = [scope(source, controls=False, keep_logits=True) for scope in (one, other)]
        assert found[0].logits is not None and found[1].logits is not None and found[0].table.height == 6, name
        assert error(found[0].logits, found[1].logits) < 1e-5, name
        assert found[0].table["text"].to_list() == found[1].table["text"].to_list(), name


def test_one_setting_apart_gives_other_numbers() -> None:
    """So the comparison above can fail."""
    source = ps.Source(loaded("llama"), TEXT, position="cat", layer=[2])
    plain = logits_of(ps.scopes.extract("size of {x}"), source)
    for scope in (
        ps.scopes.extract("size of {x}", layer=1),
        ps.scopes.extract("size of {x}", map=ps.maps.Scale(3.0)),
        ps.scopes.extract("ab of {x}"),
        ps.Patchscope("size of {x}", write="add"),
    ):
        assert error(plain, logits_of(scope, source)) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_presets_are_their_settings(family: str) -> None:
    """Each against full passes with one hook, at the target layer and place of the tables."""
    model, found = loaded(family), seen(family)
    for scope, text, place in (
        (ps.scopes.identity(("a",)), "a -> a\n?", -1),
        (ps.scopes.extract("size of {x}"), "size of x", -1),
        (ps.scopes.describe({"ab": "cd", "ef": "gh"}, max_new_tokens=3), "ab: cd, ef: gh, x", -1),
        (ps.scopes.future_lens("tell me: (", max_new_tokens=3), "tell me: (", -1),
    ):
        tokens = model.tokens(text)
        readings = scope(ps.Source(model, TEXT, layer=[0, 3]), controls=False, keep_logits=True)
        for k, layer in enumerate((0, 3)):
            patch = Patch(f"resid.{layer}", tokens.position(place), found[f"resid.{layer}"][0, -1])
            want = say(model.hf, family, tokens.ids, patch, 1)
            assert readings.logits is not None and error(readings.logits[k], want.logits[0]) < 1e-4
            assert readings.table["target_layer"][k] == layer


def test_a_larger_model_describes_states_of_a_smaller_one() -> None:
    small, large = loaded("gpt2"), loaded("llama")
    f = ps.maps.Affine(0.2 * torch.randn(64, 64))
    scope = ps.scopes.cross_model(large, f, {"ab": "cd"}, layer=2, max_new_tokens=3)
    readings = scope(ps.Source(small, TEXT, layer=3), controls=False, keep_logits=True)
    tokens = large.tokens("ab: cd, x")
    value = f.weight @ seen("gpt2")["resid.3"][0, -1]
    want = say(large.hf, "llama", tokens.ids, Patch("resid.2", len(tokens) - 1, value), 1)
    assert readings.logits is not None and error(readings.logits[0], want.logits[0]) < 1e-4
    assert set(EXAMPLES) == {"Syria", "Leonardo DiCaprio", "Samsung"}
    narrow = ps.maps.Affine(torch.randn(32, 64))
    with pytest.raises(VectorError, match="32 wide"):
        ps.scopes.cross_model(large, narrow, {"ab": "cd"})(ps.Source(small, TEXT, layer=3))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_causal_tracing_is_noise_and_one_state_put_back(family: str) -> None:
    model = loaded(family)
    scope = ps.scopes.causal_tracing(model, TEXT, "cat", seed=3)
    source = ps.Source(model, TEXT, position=[4, 6, -1], layer=[0, 2, 4])
    readings = scope(source, keep_logits=True)
    tokens, found = model.tokens(TEXT), seen(family)
    span = tokens.find("cat")
    sigma = 3.0 * float(model.hf.get_input_embeddings().weight.std())
    epsilon = sigma * torch.randn(3, 64, generator=torch.Generator().manual_seed(3))

    def drowned(*patches: Patch) -> torch.Tensor:
        noise = [
            Patch("resid.0", span.first + k, epsilon[k], "add") for k in range(3)
        ]  # nothing lies between embed and layer 0 here
        return full_logits(model.hf, family, tokens.ids, *noise, *patches)[-1]

    assert readings.logits is not None
    for k, row in enumerate(readings.table.iter_rows(named=True)):
        if row["control"] == "nothing":
            assert error(readings.logits[k], drowned()) < 1e-4
        if row["control"] == "none":
            layer, place = row["source_layer"], row["position"]
            assert (row["target_layer"], place in (4, 6, len(tokens) - 1)) == (layer, True)
            if not (layer == 0 and span.first <= place <= span.last):  # there the hooks of the oracle have an order of their own
                patch = Patch(f"resid.{layer}", place, found[f"resid.{layer}"][0, place])
                assert error(readings.logits[k], drowned(patch)) < 1e-4
    quiet = ps.scopes.causal_tracing(model, TEXT, "cat", noise=0.0)(source, controls=False, keep_logits=True)
    plain = full_logits(model.hf, family, tokens.ids)[-1]
    assert quiet.logits is not None and max(error(one, plain) for one in quiet.logits) < 1e-4


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "granite"])
def test_noise_is_measured_in_what_the_blocks_get(family: str) -> None:
    """Wherever a model scales its embeddings: Gemma in the module that gives them, Granite behind it."""
    model = loaded(family)
    if family == "granite":
        hf = copy.deepcopy(model.hf)
        hf.model.embedding_multiplier = 12.0
        model = ps.load((hf, tiny_tokenizer()))
    text = "".join(chr(97 + k) for k in range(24))
    (edit,) = ps.scopes.causal_tracing(model, text, text, noise=3).edits
    clean, noisy = (model.run(text, read="resid.0", edits=edits)["resid.0"][0, 1:] for edits in ((), (edit,)))
    positions = model.hf.transformer.wpe.weight[1 : len(clean) + 1] if family == "gpt2" else 0.0
    assert float((noisy - clean).std() / (clean - positions).std()) == pytest.approx(3, rel=0.1)


def test_every_state_put_back_is_the_clean_run() -> None:
    """All layers of all tokens: nothing of the noise is left."""
    model = loaded("llama")
    n = len(model.tokens(TEXT))
    scope = ps.scopes.causal_tracing(model, TEXT, "cat", spread="below")
    readings = scope(ps.Source(model, TEXT, layer=5, span=n), controls=False, keep_logits=True)
    assert readings.logits is not None
    assert error(readings.logits[0], full_logits(model.hf, "llama", model.tokens(TEXT).ids)[-1]) < 1e-5


def test_windows_of_mlp_outputs_as_meng_et_al() -> None:
    model = loaded("llama")
    scope = ps.scopes.causal_tracing(model, TEXT, "cat", site="mlp_out", spread=(-1, 0, 1))
    readings = scope(ps.Source(model, TEXT, position="cat", site="mlp_out", layer=2), controls=False, keep_logits=True)
    at = model.tokens(TEXT).position("cat")
    found = seen("llama")
    edits = [*scope.edits, *(ps.Edit(f"mlp_out.{b}", at, found[f"mlp_out.{b}"][0, at]) for b in (1, 2, 3))]
    assert readings.logits is not None
    assert error(readings.logits[0], model.run(TEXT, edits=edits).logits[0, -1]) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("after", [False, True])
def test_attention_knockout_is_the_run_with_edges_closed(family: str, after: bool) -> None:
    model = loaded(family)
    scope = ps.scopes.attention_knockout(TEXT, -1, [4, 5, 6], blocks="1:4", after=after, max_new_tokens=3)
    readings = scope(ps.Source(model, TEXT, layer=0), controls=False, keep_logits=True)
    want = model.generate(TEXT, edits=ps.edits.knock_out("1:4", -1, [4, 5, 6], after=after), max_new_tokens=3)[0]
    assert readings.logits is not None and error(readings.logits[0], want.logits) < 1e-4
    assert readings.table["text"][0] == want.text


def test_selfie_writes_one_state_at_every_placeholder() -> None:
    model = loaded("llama")
    readings = ps.scopes.selfie("Sure:", placeholders=3, max_new_tokens=4)(
        ps.Source(model, TEXT, position="cat", layer=[2, 4]), controls=False, keep_logits=True
    )
    tokens = model.tokens("[INST] _ _ _ [/INST] Sure:")
    places = [tokens.find("_", occurrence=k).last for k in (1, 2, 3)]
    at = model.tokens(TEXT).position("cat")
    for k, layer in enumerate((2, 4)):
        patches = [Patch("resid.1", place, seen("llama")[f"resid.{layer}"][0, at]) for place in places]
        assert readings.logits is not None
        assert error(readings.logits[k], full_logits(model.hf, "llama", tokens.ids, *patches)[-1]) < 1e-4


def test_relevancy_is_a_difference_of_probabilities() -> None:
    model = loaded("llama")
    scope = ps.scopes.selfie("Sure:", placeholders=2, max_new_tokens=4)
    source = ps.Source(model, TEXT, position=["cat", -1], layer=[2, 4])
    found = ps.scopes.relevancy(scope, source)
    readings = scope(source, controls=False)
    assert [one.text for one in found] == readings.table["text"].to_list()
    tokens = model.tokens("[INST] _ _ [/INST] Sure:")
    places = [tokens.find("_", occurrence=k).last for k in (1, 2)]
    states_ = seen("llama")
    for one, row in zip(found, readings.table.iter_rows(named=True), strict=True):
        text = model.tokenizer(one.text, add_special_tokens=False)["input_ids"]
        value = states_[f"resid.{row['source_layer']}"][0, row["position"]]
        sides = []
        for patches in ([Patch("resid.1", place, value) for place in places], []):
            p = full_logits(model.hf, "llama", [*tokens.ids, *text], *patches).double().softmax(-1)
            sides.append(torch.stack([p[len(tokens) - 1 + k, token] for k, token in enumerate(text)]))
        assert torch.allclose(one.score, (sides[0] - sides[1]).abs(), atol=1e-4)
        assert len(one.tokens) == len(text) and 0 <= float(one.score.min()) <= float(one.score.max()) <= 1
    last = ps.Patchscope("hello {x} is", layer=-1, max_new_tokens=3)  # at L nothing hears it
    assert max(float(one.score.max()) for one in ps.scopes.relevancy(last, source)) < 1e-5


def test_a_random_model_says_nothing_of_its_sources() -> None:
    """At chance: p-values of the evidence are uniform, whichever scope looks."""
    model = ps.load((tiny("llama"), tiny_tokenizer()))
    source = ps.Source(model, [f"{a}{b} {c}" for a in "abc" for b in "de" for c in "fgh"], layer=[1, 3])
    for scope in (
        ps.scopes.future_lens("tell: (", max_new_tokens=2),
        ps.scopes.selfie("Sure:", placeholders=2, max_new_tokens=2),
        ps.Patchscope("hello {x} is", spread="below", max_new_tokens=2),
    ):
        p = scope(source).readings["p_value"]
        assert p.len() == 36 and float(p.filter(p <= 0.05).len()) / 36 < 0.5


def test_mistakes_are_told() -> None:
    model = loaded("llama")
    with pytest.raises(InputError, match="noise is -1"):
        ps.scopes.causal_tracing(model, TEXT, "cat", noise=-1.0)
    with pytest.raises(PositionError, match="does not occur"):
        ps.scopes.causal_tracing(model, TEXT, "dog")
    with pytest.raises(PositionError, match="does not occur"):
        ps.scopes.attention_knockout(TEXT, -1, "dog")(ps.Source(model, TEXT, layer=0))
    with pytest.raises(InputError, match="placeholders is 0"):
        ps.scopes.selfie(placeholders=0)


def test_atlas_future_lens_and_selfie_run() -> None:
    model = ps.load("atlas")
    source = ps.Source(model, "We talked about France until late", position="France", layer=[2])
    readings = ps.scopes.extract("The capital of {x} is", layer=1, stop=["."])(source, controls=False)
    assert readings.table.filter(pl.col("text") == " Paris").height == 1
