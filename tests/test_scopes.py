"""Patchscopes against full passes with one hook, cell by cell; the controls and the evidence against their definitions."""

from __future__ import annotations

import math

import polars as pl
import pytest
import torch
from families import loaded, tiny, tiny_tokenizer
from oracle import Patch, error, full_logits, say, states, text_log_p

import patchscopes as ps
from patchscopes.controls.vectors import N_OTHERS, POOL, SECOND_LOOKS
from patchscopes.core.errors import InputError, LayerError, PositionError, PromptError, SiteError, UnknownName, VectorError
from patchscopes.scopes.target import resolve_target

PROMPTS = ("ab cd", "the cat sat on", "q")
TARGET = "hello {x} is"


def state(family: str, text: str, layer: int, position: int) -> torch.Tensor:
    model = loaded(family)
    ids = torch.tensor([model.tokens(text).ids])
    return states(model.hf, family, ids)[f"resid.{layer}"][0, position]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "bloom", "mamba"])
def test_every_cell_equals_a_full_pass_with_one_hook(family: str) -> None:
    model = loaded(family)
    scope = ps.Patchscope([TARGET, "{x}"], layer=[0, 2, 5], max_new_tokens=4)
    readings = scope(ps.Source(model, PROMPTS, position=[0, -1], layer=[0, 3, -1]), controls=False, keep_logits=True)
    assert readings.table.height == len(PROMPTS) * 2 * 3 * 2 * 3
    assert readings.logits is not None and readings.logits.shape == (readings.table.height, model.vocab)
    for k, row in enumerate(readings.table.iter_rows(named=True)):
        target = resolve_target(model, (TARGET, "{x}")[row["target"]], "x")
        value = state(family, PROMPTS[row["prompt"]], row["source_layer"], row["position"])
        patch = Patch(f"resid.{row['target_layer']}", target.position, value)
        said = say(model.hf, family, target.tokens.ids, patch, 4)
        assert error(readings.logits[k], said.logits[0]) < 1e-4, row
        if min(said.leads) > 2e-4 and not model.end_ids & set(said.tokens):
            assert row["text"] == model.decode(said.tokens), row
        assert row["norm_ratio"] == pytest.approx(said.norm_ratio, rel=1e-3) or target.position == 0
        assert row["next_token_id"] == int(readings.logits[k].argmax())
        assert row["logprob"] == pytest.approx(float(said.logits[0].log_softmax(-1).max()), abs=1e-3)


def test_layers_multiply_out_and_same_follows_the_source() -> None:
    model = loaded("llama")
    same = ps.Patchscope(TARGET, max_new_tokens=1)(ps.Source(model, "ab", layer="all"), controls=False).table
    assert same["source_layer"].to_list() == same["target_layer"].to_list() == list(range(6))
    every = ps.Patchscope(TARGET, layer="all", max_new_tokens=1)(ps.Source(model, "ab", layer="all"), controls=False).table
    assert every.height == 36
    diagonal = every.filter(pl.col("source_layer") == pl.col("target_layer"))
    assert diagonal["logprob"].to_list() == pytest.approx(same["logprob"].to_list(), abs=1e-5)


def test_surprisal_is_of_the_source_models_distribution() -> None:
    model = loaded("llama")
    row = ps.Patchscope(TARGET, max_new_tokens=1)(ps.Source(model, "ab cd", position=2, layer=3), controls=False).table.row(
        0, named=True
    )
    true = full_logits(model.hf, "llama", model.tokens("ab cd").ids)[2].log_softmax(-1)
    assert row["surprisal"] == pytest.approx(-float(true[row["next_token_id"]]) / math.log(2), abs=1e-4)


def test_a_state_patched_onto_itself_says_what_the_model_says() -> None:
    model, text = loaded("gpt2"), "the cat sat on"
    tokens = model.tokens(text)
    for position in (1, len(tokens) - 1):
        scope = ps.Patchscope(text, position=position, max_new_tokens=1)
        readings = scope(ps.Source(model, text, position=position, layer="all"), controls=False, keep_logits=True)
        plain = full_logits(model.hf, "gpt2", tokens.ids)[-1]
        assert readings.logits is not None
        for logits in readings.logits:
            assert error(logits, plain) < 1e-5


def test_the_last_layer_moves_nothing_unless_it_is_read_there() -> None:
    readings = ps.Patchscope(TARGET, layer=-1, max_new_tokens=3)(ps.Source(loaded("llama"), "ab", layer=[1, 4]))
    texts = readings.table.filter(pl.col("control") != "text")["text"]
    assert texts.n_unique() == 1  # i* is not the last token: nothing above layer L reads it
    assert readings.readings["bits_over_nothing"].to_list() == pytest.approx([0, 0], abs=1e-4)
    assert set(readings.readings["verdict"]) == {"same"}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj", "mamba"])
@pytest.mark.parametrize("site", ["attn_in", "mlp_in"])
def test_what_blocks_read_is_written_as_an_edit_writes_it(family: str, site: str) -> None:
    model = loaded(family)
    if family == "mamba" and site == "mlp_in":
        pytest.skip("a Mamba block has no MLP")
    value = model.run("ab", read=f"{site}.2").at(f"{site}.2", position=-1)
    scope = ps.Patchscope("hello x is", position="x", site=site, layer=[0, 3], max_new_tokens=3)
    readings = scope(ps.Source(model, "ab", site=site, layer=2), controls=False, keep_logits=True)
    for row, block in enumerate((0, 3)):
        want = model.generate("hello x is", edits=[ps.Edit(f"{site}.{block}", "x", value)], max_new_tokens=3)[0]
        assert readings.logits is not None and error(readings.logits[row], want.logits) < 1e-4
        assert readings.readings["text"][row] == want.text


@pytest.mark.parametrize("write", ["scale", "mask", "knock_out", "stop_gradient", "interpolate"])
def test_writes_that_are_for_edits_only_are_refused(write) -> None:
    with pytest.raises(UnknownName, match="a scope cannot write"):
        ps.Patchscope(TARGET, write=write, max_new_tokens=1)(ps.Source(loaded("llama"), "ab", layer=2), controls=False)


def test_writes_and_sites() -> None:
    model = loaded("llama")
    tokens = model.tokens("hello x is")
    value = states(model.hf, "llama", torch.tensor([model.tokens("ab").ids]))["attn_out.2"][0, -1]
    for write in ("replace", "add", "add_matched", "replace_matched"):
        scope = ps.Patchscope(TARGET, site="attn_out", layer=3, write=write, max_new_tokens=1)
        readings = scope(ps.Source(model, "ab", site="attn_out", layer=2), controls=False, keep_logits=True)
        want = say(model.hf, "llama", tokens.ids, Patch("attn_out.3", tokens.position("x"), value, write), 1)
        assert readings.logits is not None and error(readings.logits[0], want.logits[0]) < 1e-4


@pytest.fixture(scope="module")
def readings() -> ps.Readings:
    source = ps.Source(loaded("llama"), PROMPTS[0], layer=[1, 4])
    return ps.Patchscope(TARGET, layer=[0, 3], max_new_tokens=5)(source, keep_logits=True)


class TestControls:
    """One call with every control, on a tiny model, against the definitions."""

    family = "llama"

    def test_every_reading_has_every_control(self, readings: ps.Readings) -> None:
        counts = readings.table.group_by("control").len()
        assert dict(counts.iter_rows()) == {kind: 4 for kind in ("none", "nothing", "random", "other", "mean", "text")}

    def test_nothing_and_text_are_unpatched_runs(self, readings: ps.Readings) -> None:
        model = loaded(self.family)
        assert readings.logits is not None
        for kind, text in (("nothing", "hello x is"), ("text", "hello ab cd is")):
            want = say(model.hf, self.family, model.tokens(text).ids, None, 5)
            for k, row in enumerate(readings.table.iter_rows(named=True)):
                if row["control"] == kind:
                    assert row["norm_ratio"] == 1
                    assert error(readings.logits[k], want.logits[0]) < 1e-4

    def test_random_vectors_have_the_readings_norm(self, readings: ps.Readings) -> None:
        own = readings.readings["norm_ratio"].to_list()
        noise = readings.table.filter(pl.col("control") == "random")
        assert noise["norm_ratio"].to_list() == pytest.approx(own, rel=1e-3)
        assert readings.table.filter(pl.col("control") == "other")["norm_ratio"].to_list() != pytest.approx(own, rel=1e-3)

    def test_evidence_is_what_its_formula_says(self, readings: ps.Readings) -> None:
        """log p of the text under the second look, under nothing, under each of the pool's second looks: by full passes."""
        model = loaded(self.family)
        looks = [model.tokenizer(look, add_special_tokens=False)["input_ids"] for look in SECOND_LOOKS]
        tokens = model.tokens("hello x is")
        sources = readings.provenance["controls"]["pool_prompts"]
        assert sources == list(POOL) and readings.provenance["controls"]["others_per_reading"] == [N_OTHERS]

        def second(text: str, layer: int, words: list[int] = looks[0]) -> torch.Tensor:
            ids = model.tokens(text).ids
            return states(model.hf, self.family, torch.tensor([[ids[0], *words, *ids[1:]]]))[f"resid.{layer}"][0, -1]

        for row in readings.readings.iter_rows(named=True):
            text = model.tokenizer(row["text"], add_special_tokens=False)["input_ids"]
            assert len(text) == row["n_tokens"], "characters are tokens here, so the text gives its tokens back"

            def log_p(value: torch.Tensor | None, row: dict = row, text: list[int] = text) -> float:
                patch = None if value is None else Patch(f"resid.{row['target_layer']}", tokens.position("x"), value)
                return float(text_log_p(model.hf, self.family, tokens.ids, patch, text).double().sum())

            each = [log_p(second(PROMPTS[0], row["source_layer"], words)) for words in looks]
            first, own = each[0], sum(each) / len(each)
            assert row["bits_over_nothing"] == pytest.approx((own - log_p(None)) / math.log(2), abs=2e-3)
            words_alone = text_log_p(model.hf, self.family, model.tokens("hello ab cd is").ids, None, text)
            assert row["bits_over_text"] == pytest.approx((own - float(words_alone.double().sum())) / math.log(2), abs=2e-3)
            pool = torch.tensor([log_p(second(text_, row["source_layer"])) for text_ in POOL], dtype=torch.float64)
            # 24 of the 32 are drawn: rank and mean lie within what 24 of them can give
            worse = int((pool < first - 1e-4).sum())
            assert (1 + max(0, N_OTHERS - worse)) / 25 <= row["p_value"] + 1e-9
            assert row["p_value"] <= (1 + min(N_OTHERS, len(POOL) - worse)) / 25 + 1e-9
            best, least = (pool.topk(N_OTHERS, largest=up).values for up in (True, False))
            low, high = ((own - float(torch.logsumexp(some, 0) - math.log(N_OTHERS))) / math.log(2) for some in (best, least))
            assert low - 2e-3 <= row["bits_over_others"] <= high + 2e-3
            surprise = row["bits_over_others"] - own / math.log(2)
            assert row["explained"] == pytest.approx(row["bits_over_others"] / surprise, abs=1e-3)

    def test_other_sources_of_the_call_stand_in_for_the_pool(self) -> None:
        prompts = [f"{a} {b}" for a in "abcde" for b in "vwxyz"]
        readings = ps.Patchscope(TARGET, max_new_tokens=2)(ps.Source(loaded(self.family), prompts, layer=2))
        assert readings.provenance["controls"]["pool"] is None
        assert set(readings.provenance["controls"]["others_per_reading"]) == {N_OTHERS}
        few = ps.Patchscope(TARGET, max_new_tokens=2)(ps.Source(loaded(self.family), prompts[:3], layer=2))
        assert few.provenance["controls"]["pool"] is not None

    def test_asking_twice_gives_the_same(self, readings: ps.Readings) -> None:
        source = ps.Source(loaded(self.family), PROMPTS[0], layer=[1, 4])
        again = ps.Patchscope(TARGET, layer=[0, 3], max_new_tokens=5)(source)
        assert again.table.equals(readings.table)

    def test_a_cell_does_not_depend_on_the_cells_beside_it(self, readings: ps.Readings) -> None:
        alone = ps.Patchscope(TARGET, layer=3, max_new_tokens=5)(ps.Source(loaded(self.family), PROMPTS[0], layer=4))
        same = readings.table.filter(
            (pl.col("source_layer") == 4) & (pl.col("target_layer") == 3) & (pl.col("control") != "random")
        )
        ours = alone.table.filter(pl.col("control") != "random")
        assert ours.filter(pl.col("control") == "none")["text"].equals(same.filter(pl.col("control") == "none")["text"])
        assert ours["logprob"].to_list() == pytest.approx(same["logprob"].to_list(), abs=1e-3)

    def test_bare_vectors_have_controls_and_no_evidence(self) -> None:
        model = loaded(self.family)
        source = ps.Source.of_vectors(
            model, torch.randn(2, 64, generator=torch.Generator().manual_seed(3)), layer=2, labels=["a", "b"]
        )
        readings = ps.Patchscope(TARGET, max_new_tokens=2)(source)
        assert set(readings.readings["verdict"]) == {"not run"}
        assert readings.readings["token"].to_list() == ["a", "b"]
        assert readings.readings["p_value"].null_count() == 2
        assert {"nothing", "random", "other", "mean"} <= set(readings.table["control"])


def test_draws_are_sampled_with_seeds_of_their_own() -> None:
    source = ps.Source(loaded("llama"), "ab", layer=[1, 2])
    many = ps.Patchscope(TARGET, max_new_tokens=6, temperature=1.0, draws=4, seed=7)(source, controls=False).table
    few = ps.Patchscope(TARGET, max_new_tokens=6, temperature=1.0, draws=2, seed=7)(source, controls=False).table
    other = ps.Patchscope(TARGET, max_new_tokens=6, temperature=1.0, draws=4, seed=8)(source, controls=False).table
    assert many.height == 8 and many["text"].n_unique() > 2
    assert many.filter(pl.col("draw") < 2)["text"].to_list() == few["text"].to_list()
    assert many["text"].to_list() != other["text"].to_list()


def test_a_stop_string_ends_the_text_and_is_not_part_of_it() -> None:
    model, source = loaded("llama"), ps.Source(loaded("llama"), "ab", layer="all")
    free = ps.Patchscope(TARGET, max_new_tokens=8)(source, controls=False).table["text"].to_list()
    stop = next(text[3] for text in free if len(text) > 4)
    held = ps.Patchscope(TARGET, max_new_tokens=8, stop=[stop])(source, controls=False).table["text"].to_list()
    assert held == [text.split(stop)[0] for text in free] and held != free
    assert model.end_ids  # and the model's own end token is there too


class TestPresets:
    """Each preset is its paper's configuration: the same numbers as the plain Patchscope, or as the plain method."""

    def test_logit_lens_is_the_models_own_unembedding(self) -> None:
        for family in ("llama", "gemma2", "cohere", "granite"):
            model = loaded(family)
            readings = ps.scopes.logit_lens()(
                ps.Source(model, "the cat", position="all", layer="all"), controls=False, keep_logits=True
            )
            run = model.run("the cat", read=["resid.*"])
            for k, row in enumerate(readings.table.iter_rows(named=True)):
                want = model.unembed(run[f"resid.{row['source_layer']}"][0, row["position"]])
                assert readings.logits is not None and error(readings.logits[k], want) < 1e-5
            last = readings.table.filter(
                (pl.col("source_layer") == model.n_layers) & (pl.col("position") == len(model.tokens("the cat")) - 1)
            )
            assert last["next_token_id"].item() == int(run.logits[0, -1].argmax())

    def test_identity_is_the_papers_prompt(self) -> None:
        scope = ps.scopes.identity()
        assert scope.prompt == "cat -> cat\n1135 -> 1135\nhello -> hello\n?" and scope.position == -1 and scope.layer == "same"
        source = ps.Source(loaded("llama"), "the cat", layer="all")
        same = ps.Patchscope(scope.prompt, position=-1, max_new_tokens=1)(source, controls=False)
        assert scope(source, controls=False).table.equals(same.table)
        assert ps.scopes.identity(()).prompt == "?"

    def test_describe_is_the_papers_prompt(self) -> None:
        target = resolve_target(loaded("bloom"), ps.scopes.describe().prompt, "x")
        assert target.tokens.text == (
            "Syria: Country in the Middle East, Leonardo DiCaprio: American actor, "
            "Samsung: South Korean multinational major appliance and consumer electronics corporation, x"
        )
        assert target.position == len(target.tokens) - 1

    def test_extract_puts_x_anywhere(self) -> None:
        for template, position in (("{x} has", 1), ("The tax of {x} is", 12), ("of {x}", 4)):
            target = resolve_target(loaded("llama"), ps.scopes.extract(template).prompt, "x")
            assert target.tokens.text == template.replace("{x}", "x") and target.position == position


class TestAcrossModels:
    """M* is another model: of another width, depth, tokenizer."""

    def test_a_map_carries_vectors_to_another_width(self) -> None:
        import transformers
        from families import CONFIGS

        other_config = transformers.LlamaConfig(**{**CONFIGS["llama"].to_dict(), "hidden_size": 32, "num_hidden_layers": 3})
        torch.manual_seed(5)
        other = ps.load((transformers.LlamaForCausalLM(other_config).eval(), tiny_tokenizer()))
        weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
        source = ps.Source(loaded("llama"), "the cat", layer=2)
        with pytest.raises(VectorError, match=r"64 wide.*32 wide.*map"):
            ps.Patchscope(TARGET, layer=1, model=other)(source)
        with pytest.raises(LayerError, match="0 to 3"):
            ps.Patchscope(TARGET, layer="same", model=other, map=ps.maps.Affine(weight))(
                ps.Source(loaded("llama"), "the cat", layer=5)
            )
        readings = ps.Patchscope(TARGET, layer=1, model=other, map=ps.maps.Affine(weight), max_new_tokens=2)(
            source, keep_logits=True
        )
        value = weight @ state("llama", "the cat", 2, -1)
        tokens = other.tokens("hello x is")
        run = other.run(tokens, edits=[ps.Edit("resid.1", position="x", value=value)])
        assert readings.logits is not None and error(readings.logits[0], run.logits[0, -1]) < 1e-4
        assert readings.provenance["target_model"]["d_model"] == 32
        assert readings.readings["verdict"].item() in ("above", "same")

    def test_the_same_weights_twice_are_the_same_as_once(self) -> None:
        twin = ps.load((tiny("llama"), tiny_tokenizer()))
        source = ps.Source(loaded("llama"), "the cat", layer=[1, 3])
        here, there = (ps.Patchscope(TARGET, model=m, max_new_tokens=3)(source).table for m in (None, twin))
        assert here.equals(there)


class TestBadInput:
    """Each mistake is said before anything runs, with what was found and what was expected."""

    def source(self, **kwargs: object) -> ps.Source:
        return ps.Source(loaded("llama"), **{"prompt": "the cat", "layer": 1, **kwargs})  # type: ignore[arg-type]

    def test_sources(self) -> None:
        scope = ps.Patchscope(TARGET, max_new_tokens=1)
        for source, kind, words in (
            (self.source(prompt=" "), PromptError, "empty"),
            (self.source(prompt=[]), PromptError, "at least one"),
            (self.source(position="dog"), PositionError, "does not occur"),
            (self.source(position="t"), PositionError, "occurs 2 times"),
            (self.source(position=99), PositionError, "0 to 7"),
            (self.source(layer=6), LayerError, "0 to 5"),
            (self.source(layer=[]), LayerError, "no layer"),
            (self.source(site="residual"), SiteError, "resid"),
            (self.source(prompt="a" * 200), PromptError, "at most 128"),
        ):
            with pytest.raises(kind, match=words):
                scope(source)
        with pytest.raises(PromptError):
            scope([])

    def test_scopes(self) -> None:
        for scope, kind, words in (
            (ps.Patchscope("hello is"), PositionError, r"\{x\}"),
            (ps.Patchscope("hello x", position=[]), PositionError, "empty list"),
            (ps.Patchscope(TARGET, layer=7), LayerError, "0 to 5"),
            (ps.Patchscope(TARGET, site="mlp"), UnknownName, "mlp_out"),
            (ps.Patchscope(TARGET, max_new_tokens=0), InputError, "at least 1"),
            (ps.Patchscope(TARGET, draws=3), InputError, "temperature"),
            (ps.Patchscope(TARGET, max_new_tokens=500), PromptError, "at most 128"),
        ):
            with pytest.raises(kind, match=words):
                scope(self.source())
        scope = ps.Patchscope(TARGET)
        object.__setattr__(scope, "write", "append")  # past the annotations, which are checked while tests run
        with pytest.raises(UnknownName, match="add"):
            scope(self.source())

    def test_vectors(self) -> None:
        with pytest.raises(VectorError, match="32 wide"):
            ps.Source.of_vectors(loaded("llama"), torch.zeros(32), layer=1)
        with pytest.raises(VectorError, match="not finite"):
            ps.Source.of_vectors(loaded("llama"), torch.full((64,), math.nan), layer=1)
        with pytest.raises(InputError, match="one each"):
            ps.Source.of_vectors(loaded("llama"), torch.zeros(2, 64), layer=1, labels=["a"])


class TestUnderEdits:
    """Further edits of every target run, of the controls too."""

    def test_a_reading_is_a_run_with_all_edits(self) -> None:
        model = loaded("llama")
        push = torch.ones(64) * 0.3
        edits = [ps.Edit("resid.3", -1, push, "add", steps="always"), *ps.edits.knock_out("2:4", -1, 0)]
        scope = ps.Patchscope("ab {x} c", layer=2, max_new_tokens=3, edits=edits)
        source = ps.Source(model, "hello", layer=1)
        readings = scope(source, keep_logits=True)
        value = model.run("hello", read=["resid.1"]).at("resid.1", position=-1)
        position = scope_position(model, "ab x c")
        want = model.generate("ab x c", edits=[ps.Edit("resid.2", position, value), *edits], max_new_tokens=3)[0]
        none = readings.table.filter(pl.col("control") == "none")
        assert none["text"][0] == want.text
        assert readings.logits is not None and error(readings.logits[0], want.logits) < 1e-4
        nothing = readings.table.with_row_index().filter(pl.col("control") == "nothing")
        plain = model.run("ab x c", edits=[edits[0], edits[1]]).logits[0, -1]
        assert error(readings.logits[int(nothing["index"][0])], plain) < 1e-4
        assert readings.provenance["scope"]["edits"] and "knock_out" in readings.provenance["scope"]["edits"][1]

    def test_an_edit_that_is_none_here_is_refused_before_anything_runs(self) -> None:
        model = loaded("llama")
        with pytest.raises(ps.PatchscopesError, match="no mixture of experts"):
            ps.Patchscope("ab {x} c", edits=[ps.Edit("router.1", 0, torch.zeros(4))])(ps.Source(model, "hello", layer=1))


def scope_position(model: ps.Model, text: str) -> int:
    return model.tokens(text).find("x").last
