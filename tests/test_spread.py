"""Several placeholders, spans of states and several layers, against full passes with as many hooks; their controls and identities."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
import torch
from families import loaded
from oracle import Patch, error, full_logits, states
from test_looks import back_and_forth

import patchscopes as ps
from patchscopes.controls.vectors import SECOND_LOOKS
from patchscopes.core.errors import InputError, PositionError, PromptError, UnknownName
from patchscopes.experiment.spec import Experiment
from patchscopes.model import Span
from patchscopes.scopes.spread import steps
from patchscopes.scopes.viewing import Viewing

FAMILIES = ["llama", "gpt2", "gemma2", "mamba"]
TEXT = "the cat sat on"


def seen(family: str, text: str = TEXT) -> dict[str, torch.Tensor]:
    model = loaded(family)
    return states(model.hf, family, torch.tensor([model.tokens(text).ids]))


def say(family: str, ids: tuple[int, ...], patches: list[Patch], n: int) -> tuple[list[int], torch.Tensor]:
    """Tokens and first logits of full passes with a hook for every patch."""
    model, tokens, first = loaded(family), list(ids), None
    for _ in range(n):
        logits = full_logits(model.hf, family, tokens, *patches)[-1]
        first = logits if first is None else first
        tokens.append(int(logits.argmax()))
    assert first is not None
    return tokens[len(ids) :], first


def agrees(readings: ps.Readings, family: str, ids: tuple[int, ...], patches: list[Patch], row: int = 0) -> None:
    model = loaded(family)
    said, first = say(family, ids, patches, 3)
    assert readings.logits is not None and error(readings.logits[row], first) < 1e-4
    if not model.end_ids & set(said):
        assert readings.table["text"][row] == model.decode(said)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [0, 2, 5])
def test_one_state_goes_to_all_placeholders(family: str, layer: int) -> None:
    model = loaded(family)
    readings = ps.Patchscope("a {x} b {x}{x} c", layer=layer, max_new_tokens=3)(
        ps.Source(model, TEXT, position="cat", layer=3), controls=False, keep_logits=True
    )
    tokens = model.tokens("a x b xx c")
    value = seen(family)["resid.3"][0, model.tokens(TEXT).position("cat")]
    places = [tokens.find("x", occurrence=k).last for k in (1, 2, 3)]
    agrees(readings, family, tokens.ids, [Patch(f"resid.{layer}", p, value) for p in places])
    listed = ps.Patchscope("a x b xx c", position=places, layer=layer, max_new_tokens=3)
    same = listed(ps.Source(model, TEXT, position="cat", layer=3), controls=False)
    assert same.table.equals(readings.table)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [0, 2])
def test_a_span_of_states_goes_to_as_many_places(family: str, layer: int) -> None:
    """A single placeholder is repeated; several take the states in order."""
    model = loaded(family)
    span = model.tokens(TEXT).find("cat")
    source = ps.Source(model, TEXT, position="cat", layer=3, span="piece")
    assert source.places()[0].token == "cat" and [*source.places()[0].positions] == [*range(span.first, span.last + 1)]
    scope = ps.Patchscope("a {x} b", layer=layer, max_new_tokens=3)
    tokens = model.tokens("a xxx b")
    first = tokens.find("xxx").first
    value = seen(family)["resid.3"][0]
    patches = [Patch(f"resid.{layer}", first + k, value[span.first + k]) for k in range(3)]
    agrees(scope(source, controls=False, keep_logits=True), family, tokens.ids, patches)
    for other in (
        ps.Source(model, TEXT, position=Span(span.first, span.last), layer=3, span="piece"),
        ps.Source(model, TEXT, position=span.last, layer=3, span=3),
    ):
        assert scope(other, controls=False).table.equals(scope(source, controls=False).table)
    three = ps.Patchscope("a {x}{x}{x} b", layer=layer, max_new_tokens=3)
    assert three(source, controls=False).table["text"].equals(scope(source, controls=False).table["text"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("write", ["replace", "add", "replace_matched"])
def test_everything_below_the_target_layer_is_written(family: str, write) -> None:
    model = loaded(family)
    scope = ps.Patchscope("hello {x} is", layer=3, spread="below", write=write, max_new_tokens=3)
    readings = scope(ps.Source(model, TEXT, layer=2), controls=False, keep_logits=True)
    tokens = model.tokens("hello x is")
    value, at = seen(family)["resid.2"][0, -1], tokens.position("x")
    if write == "replace_matched":  # lengths of what stands there change as layers below are written: edits in their turn
        edits = [ps.Edit(f"resid.{layer}", at, value, write) for layer in range(4)]
        want = model.generate("hello x is", edits=edits, max_new_tokens=3)[0]
        assert readings.logits is not None and error(readings.logits[0], want.logits) < 1e-4
        return
    agrees(readings, family, tokens.ids, [Patch(f"resid.{layer}", at, value, write) for layer in range(4)])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_can_get_a_state_of_its_own(family: str) -> None:
    model = loaded(family)
    scope = ps.Patchscope("hello {x} is", layer=3, spread=(0, -2, 1, 9), carry="each", max_new_tokens=3)
    source = ps.Source(model, TEXT, position="cat", layer=2, span=2)
    readings = scope(source, controls=False, keep_logits=True)
    tokens, found = model.tokens("hello xx is"), seen(family)
    first, own = tokens.find("xx").first, model.tokens(TEXT).find("cat").last - 1
    patches = [
        Patch(f"resid.{3 + step}", first + k, found[f"resid.{2 + step}"][0, own + k]) for step in (-2, 0, 1) for k in (0, 1)
    ]
    agrees(readings, family, tokens.ids, patches)


def test_steps_stay_inside_both_models() -> None:
    assert steps("here", "one", (2, 5), (3, 5)) == [0]
    assert steps("below", "one", (1, 5), (3, 5)) == [0, -3, -2, -1]
    assert steps("below", "each", (1, 5), (3, 5)) == [0, -1]
    assert steps((0, 1, -1, 1), "one", (5, 5), (4, 5)) == [0, -1, 1]
    assert steps((0, 1, -1), "each", (5, 5), (4, 5)) == [0, -1]


def test_the_state_goes_where_it_was_read() -> None:
    """position="same": a state of the same prompt, written where it stood, changes nothing."""
    model = loaded("llama")
    source = ps.Source(model, TEXT, position=[2, 4, -1], layer=[0, 2, 5], span=2)
    readings = ps.Patchscope(TEXT, position="same", max_new_tokens=1)(source, keep_logits=True)
    plain = full_logits(model.hf, "llama", model.tokens(TEXT).ids)[-1]
    assert readings.logits is not None
    for logits in readings.logits[(readings.table["control"] == "none").to_numpy()]:
        assert error(logits, plain) < 1e-5
    assert set(readings.table["control"]) == {"none", "nothing", "random", "other", "mean"}  # no words to put anywhere
    with pytest.raises(PositionError, match="0 to 2"):
        ps.Patchscope("ab", position="same", max_new_tokens=1)(source)


def test_nothing_of_the_placeholder_is_left_below() -> None:
    """Written at every layer up to ℓ*, it does not matter what the placeholder was; at ℓ* alone it does."""
    model = loaded("llama")

    def logits(letter: str, spread) -> torch.Tensor:
        scope = ps.Patchscope(f"hello {letter} is", position=letter, layer=3, spread=spread, max_new_tokens=1)
        found = scope(ps.Source(model, TEXT, layer=2), controls=False, keep_logits=True).logits
        assert found is not None
        return found[0]

    assert error(logits("x", "below"), logits("q", "below")) < 1e-5
    assert error(logits("x", "here"), logits("q", "here")) > 1e-3


class TestControls:
    """Controls write states of the same form."""

    def readings(self) -> ps.Readings:
        source = ps.Source(loaded("llama"), TEXT, position="cat", layer=[1, 3], span="piece")
        scope = ps.Patchscope("hello {x} is", layer=[2], spread="below", max_new_tokens=4, second_look=SECOND_LOOKS[0])
        return scope(source, keep_logits=True)

    def test_all_are_there(self) -> None:
        readings = self.readings()
        counts = readings.table.group_by("control").len()
        assert dict(counts.iter_rows()) == {kind: 2 for kind in ("none", "nothing", "random", "other", "mean", "text")}
        assert readings.readings["bits_over_nothing"].is_finite().all() and readings.readings["p_value"].is_finite().all()
        other = readings.table.filter(pl.col("control") == "other")["text"]
        assert other.to_list() != readings.readings["text"].to_list()

    def test_nothing_is_the_widened_prompt_and_text_the_words(self) -> None:
        readings, model = self.readings(), loaded("llama")
        assert readings.logits is not None
        for kind, text in (("nothing", "hello xxx is"), ("text", "hello the cat is")):
            row = readings.table.with_row_index().filter(pl.col("control") == kind)["index"][0]
            assert error(readings.logits[row], full_logits(model.hf, "llama", model.tokens(text).ids)[-1]) < 1e-4

    def test_evidence_of_a_state_is_its_own(self) -> None:
        """log p of what was said under the second look at the span, by full passes with a hook for each layer and place."""
        model, readings = loaded("llama"), self.readings()

        words = model.tokenizer(SECOND_LOOKS[0], add_special_tokens=False)["input_ids"]
        ids = model.tokens(TEXT).ids
        again = states(model.hf, "llama", torch.tensor([[ids[0], *words, *ids[1:]]]))
        span = model.tokens(TEXT).find("cat")
        tokens = model.tokens("hello xxx is")
        first = tokens.find("xxx").first
        for row in readings.readings.iter_rows(named=True):
            text = model.tokenizer(row["text"], add_special_tokens=False)["input_ids"]
            patches = [
                Patch(f"resid.{layer}", first + k, again[f"resid.{row['source_layer']}"][0, span.first + k + len(words)])
                for layer in range(3)
                for k in range(3)
            ]

            def log_p(patches: list[Patch], text: list[int] = text) -> float:
                full = full_logits(model.hf, "llama", [*tokens.ids, *text], *patches).double().log_softmax(-1)
                return float(sum(full[len(tokens) - 1 + k, token] for k, token in enumerate(text)))

            want = (log_p(patches) - log_p([])) / torch.log(torch.tensor(2.0))
            assert row["bits_over_nothing"] == pytest.approx(float(want), abs=2e-3)


def test_cells_are_told_apart_by_what_is_written() -> None:
    model = loaded("llama")

    def key(source: ps.Source, **scope) -> str:
        viewing = Viewing(ps.Patchscope("hello {x} is", layer=2, max_new_tokens=1, **scope), source)
        return f"{viewing.content} {viewing.identity(viewing.cells[0])}"

    plain = ps.Source(model, TEXT, layer=2)
    keys = [
        key(plain),
        key(ps.Source(model, TEXT, layer=2, span=2)),
        key(plain, spread="below"),
        key(plain, spread=(0, 1)),
        key(plain, spread="below", carry="each"),
    ]
    assert len(set(keys)) == len(keys)
    assert key(plain, carry="each") == key(plain)  # with one layer they are the same


def test_they_can_be_recorded(tmp_path: Path) -> None:
    model = ps.load("atlas")
    source = ps.Source(model, "We talked about South Korea", position="South Korea", layer=[1, 2], span="piece")
    scope = ps.Patchscope("The capital of {x} is", layer=1, spread="below", carry="each", max_new_tokens=2)
    look = back_and_forth(model, source, scope, tmp_path)
    assert look.scope.spread == "below" and look.scope.carry == "each"
    both = [source, ps.Source(model, "A tale of France", position="France", layer=[1, 2], span="piece")]
    assert back_and_forth(model, both, scope, tmp_path).sources[0].span == "piece"
    listed = ps.Patchscope("The capital of x y is", position=["x", "y"], spread=(0, 1), max_new_tokens=2)
    assert back_and_forth(model, ps.Source(model, "We talked about Japan", layer=1), listed, tmp_path).scope.spread == (0, 1)
    same = ps.Patchscope("We talked about Japan", position="same", max_new_tokens=1)
    back_and_forth(model, ps.Source(model, "We spoke about Kenya", layer=[1]), same, tmp_path)


def test_mistakes_are_told() -> None:
    source = ps.Source(loaded("llama"), TEXT, layer=2, span=2)
    for scope, kind, words in (
        (
            ps.Patchscope("{x} {x} {x}", max_new_tokens=1),
            PositionError,
            "3 placeholders; expected one, which is then repeated, or 2",
        ),
        (ps.Patchscope("{x}", spread=(1, 2), max_new_tokens=1), InputError, "0 .the layer itself. among"),
        (ps.Patchscope("hello {x}" + " a" * 60, max_new_tokens=3), PromptError, "at most 128"),
    ):
        with pytest.raises(kind, match=words):
            scope(source)
    for field, value in (("spread", "above"), ("carry", "all")):
        scope = ps.Patchscope("{x}", max_new_tokens=1)
        object.__setattr__(scope, field, value)
        with pytest.raises(UnknownName, match=f"{field} is '{value}'"):
            scope(source)
    for span in (0, 99):
        with pytest.raises(InputError, match=f"span is {span}"):
            ps.Patchscope("{x}")(ps.Source(loaded("llama"), TEXT, layer=2, span=span))
    for keys, words in (
        ({"span": 0}, "span: found the number 0"),
        ({"scope": {"prompt": "{x}", "spread": [1]}}, "distances from the target layer with 0"),
        ({"scope": {"prompt": "{x}", "spread": "up"}}, "'here', 'below'"),
    ):
        with pytest.raises(InputError, match=words):
            Experiment(model="m", prompts="ab", **keys)
