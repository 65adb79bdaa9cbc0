"""The controls that scopes run as rows beside their readings, against runs with an edit: named, of other models, in sweeps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
import torch
from families import loaded, tiny, tiny_tokenizer
from oracle import error
from torch import Tensor

import patchscopes as ps
from patchscopes.controls.vectors import CONTEXT, POOL, covariance_like
from patchscopes.core.errors import InputError, RefusedError, UnknownName, VectorError
from patchscopes.experiment.spec import Experiment
from patchscopes.runs import sweep
from patchscopes.scopes.viewing import Viewing

TARGET = "hello {x} is"


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SOURCES = ["see the cat", "a dog ran", "ab cd"]
PUSH = ps.maps.Affine(torch.eye(64) * 0.5 + 0.01 * randn(64, 64), randn(64, seed=8))


def rows_of(readings: ps.Readings, control: str) -> tuple[pl.DataFrame, Tensor]:
    assert readings.logits is not None
    some = readings.table.with_row_index("row").filter(pl.col("control") == control)
    return some, readings.logits[some["row"].to_list()]


KINDS = ("nothing", "zero", "map_of_zero", "mean", "random", "random_covariance", "other", "context", "text", "text_at_position")


@pytest.fixture(scope="module")
def readings() -> ps.Readings:
    source = ps.Source(loaded("llama"), SOURCES, layer=[1, 4])
    scope = ps.Patchscope(TARGET, layer=[0, 3], map=PUSH, max_new_tokens=3)
    return scope(source, controls=list(KINDS), keep_logits=True, evidence=False)


class TestRows:
    """Every named control of a scope against `model.run` with an edit that writes what the control is said to be."""

    @staticmethod
    def check(readings: ps.Readings, control: str, value_of) -> None:
        model = loaded("llama")
        rows, logits = rows_of(readings, control)
        assert len(rows) == 12
        for k, row in enumerate(rows.iter_rows(named=True)):
            value = value_of(row)
            edits = [] if value is None else [ps.Edit(f"resid.{row['target_layer']}", "x", value)]
            want = model.generate("hello x is", edits=edits, max_new_tokens=3)[0]
            assert error(logits[k], want.logits) < 1e-4, (control, row["prompt"], row["source_layer"])
            assert row["text"] == want.text

    @staticmethod
    def state(text: str, layer: int) -> Tensor:
        return loaded("llama").run(text, read=f"resid.{layer}").at(f"resid.{layer}", position=-1)

    def test_all_are_there(self, readings: ps.Readings) -> None:
        assert dict(readings.table.group_by("control").len().iter_rows()) == dict.fromkeys(("none", *KINDS), 12)
        assert readings.table["control"][:11].to_list() == ["none", *KINDS], "in the order that was asked for"
        assert readings.provenance["controls"]["kinds"] == list(KINDS) and readings.provenance["controls"]["absent"] == {}

    def test_nothing(self, readings: ps.Readings) -> None:
        self.check(readings, "nothing", lambda row: None)

    def test_zero(self, readings: ps.Readings) -> None:
        self.check(readings, "zero", lambda row: torch.zeros(64))

    def test_map_of_zero_is_the_bias(self, readings: ps.Readings) -> None:
        self.check(readings, "map_of_zero", lambda row: PUSH.bias)

    def test_mean_and_other_are_of_other_sources(self, readings: ps.Readings) -> None:
        """Two sources of the call and 22 of the pool's 32: which, the viewing's own rings say; none is the reading's own prompt."""
        viewing = Viewing(ps.Patchscope(TARGET, max_new_tokens=1), ps.Source(loaded("llama"), SOURCES, layer=[1, 4]))
        assert viewing.controls is not None

        def others(row: dict) -> list[Tensor]:
            which = viewing.controls.others(row["prompt"])
            texts = [SOURCES[k] if kind == "call" else POOL[k] for kind, k in which]
            assert SOURCES[row["prompt"]] not in texts and len(set(texts)) == 24
            return [self.state(text, row["source_layer"]) for text in texts]

        self.check(readings, "mean", lambda row: PUSH(torch.stack(others(row)).mean(0)))
        rows, logits = rows_of(readings, "other")
        model = loaded("llama")
        for k, row in enumerate(rows.iter_rows(named=True)):
            if row["target_layer"] == 3:
                runs = [model.run("hello x is", edits=[ps.Edit("resid.3", "x", PUSH(value))]) for value in others(row)]
                assert min(error(logits[k], run.logits[0, -1]) for run in runs) < 1e-4

    def test_context_is_the_last_word_behind_another_text(self, readings: ps.Readings) -> None:
        words = ["cat", "ran", "cd"]  # the blank in front of a word is a token of its own here, and not part of it
        self.check(readings, "context", lambda row: PUSH(self.state(CONTEXT + words[row["prompt"]], row["source_layer"])))

    def test_texts(self, readings: ps.Readings) -> None:
        model = loaded("llama")
        for control, words in (("text", SOURCES), ("text_at_position", ["t", "n", "d"])):
            rows, logits = rows_of(readings, control)
            for k, row in enumerate(rows.iter_rows(named=True)):
                want = model.generate(f"hello {words[row['prompt']]} is", max_new_tokens=3)[0]
                assert error(logits[k], want.logits) < 1e-4 and row["text"] == want.text and row["norm_ratio"] == 1

    def test_random_vectors_have_the_readings_norm(self, readings: ps.Readings) -> None:
        own = readings.readings["norm_ratio"].to_list()
        for control in ("random", "random_covariance"):
            assert rows_of(readings, control)[0]["norm_ratio"].to_list() == pytest.approx(own, rel=1e-3)

    def test_random_covariance_lies_as_the_states_of_others_do(self) -> None:
        """By its formula: drawn from the other sources' states and the pool's, then f, then the reading's norm."""
        model = loaded("llama")
        scope = ps.Patchscope(TARGET, map=PUSH, layer=2, max_new_tokens=1)
        viewing = Viewing(scope, ps.Source(model, SOURCES, layer=4), ["random_covariance"])
        outcomes = viewing.read(keep_logits=True)
        controls = viewing.controls
        assert controls is not None
        for cell, outcome in zip(viewing.cells, outcomes, strict=True):
            near = [SOURCES[k] if kind == "call" else POOL[k] for kind, k in controls.others(cell.place)]
            sample = torch.stack([self.state(text, 4) for text in [*near, *(text for text in POOL if text not in near)]])
            assert len(sample) == len(SOURCES) - 1 + len(POOL)
            h = self.state(SOURCES[cell.place], 4)
            z = PUSH(covariance_like(h[None], sample, f"0 random_covariance {viewing.read_identity(cell)} 0")[0])
            value = z * PUSH(h).norm() / z.norm()
            want = model.run("hello x is", edits=[ps.Edit("resid.2", "x", value)]).logits[0, -1]
            assert outcome.logits is not None and error(outcome.logits[1], want) < 1e-4

    def test_one_draw_for_everything_that_a_state_is_written_in(self) -> None:
        maps = [ps.maps.Identity(), ps.maps.Scale(3.0)]
        scope = ps.Patchscope(["hello {x} is", "a {x}"], layer=[1, 2], map=maps, temperature=1.0, draws=2, max_new_tokens=1)
        viewing = Viewing(scope, ps.Source(loaded("llama"), SOURCES, layer=[2, 3]), ["random_covariance"], evidence=False)
        assert viewing.controls is not None
        viewing.sight.need(set(range(3)))
        viewing.controls.need(set(range(3)))
        ways: dict[tuple[int, int], set[tuple[float, ...]]] = {}
        for cell in viewing.cells:
            ((_, run),) = viewing.controls.runs(cell, viewing.written(cell))
            state = run[2]
            assert isinstance(state, Tensor)
            unit = (state / state.norm()).flatten()[:6]
            ways.setdefault((cell.place, cell.source_layer), set()).add(tuple(round(x, 4) + 0.0 for x in unit.tolist()))
        assert len(ways) == 6 and all(len(one) == 1 for one in ways.values())
        assert len(set().union(*ways.values())) == 6

    def test_rows_are_isolated(self) -> None:
        """A cell read alone, with its controls, says to the last row what it says among all."""
        kinds = list(KINDS)
        viewing = Viewing(
            ps.Patchscope(TARGET, layer=[0, 3], max_new_tokens=2), ps.Source(loaded("llama"), SOURCES, layer=[1, 4]), kinds, False
        )
        whole = viewing.read(keep_logits=True)
        for cell, want in list(zip(viewing.cells, whole, strict=True))[::5]:
            (alone,) = viewing.read([cell], keep_logits=True)
            assert [row["text"] for row in alone.rows] == [row["text"] for row in want.rows]
            assert alone.logits is not None and want.logits is not None
            assert max(error(a, b) for a, b in zip(alone.logits, want.logits, strict=True)) < 1e-5

    def test_spans_are_controlled_token_by_token(self) -> None:
        model = loaded("llama")
        source = ps.Source(model, "see the cat", position="cat", layer=2, span="piece")
        kinds = ["zero", "random_covariance", "context", "text_at_position"]
        readings = ps.Patchscope(TARGET, layer=1, max_new_tokens=1)(source, kinds, keep_logits=True, evidence=False)
        assert readings.table["control"].to_list() == ["none", *kinds]
        words = model.run(CONTEXT + "cat", read="resid.2")["resid.2"][0, -3:]
        want = model.run("hello xxx is", edits=[ps.Edit("resid.1", p, words[p - 7]) for p in (7, 8, 9)])
        assert readings.logits is not None and error(readings.logits[3], want.logits[0, -1]) < 1e-4
        plain = model.run("hello cat is").logits[0, -1]
        assert error(readings.logits[4], plain) < 1e-4
        zero = model.run("hello xxx is", edits=[ps.Edit("resid.1", p, torch.zeros(64)) for p in (7, 8, 9)]).logits[0, -1]
        assert error(readings.logits[1], zero) < 1e-4

    @pytest.mark.parametrize("family", ["gpt2", "mamba"])
    def test_lenses_have_them_too(self, family: str) -> None:
        model = loaded(family)
        lens = ps.scopes.logit_lens()
        readings = lens(ps.Source(model, "ab", layer=[1, 3]), ["zero", "random_covariance"], keep_logits=True, evidence=False)
        rows, logits = rows_of(readings, "zero")
        want = model.unembed(torch.zeros(64))
        assert len(rows) == 2 and float((logits - want).abs().max()) < 1e-5


class TestWhatCannotBe:
    def test_a_bare_vector_has_no_text_and_no_context(self) -> None:
        source = ps.Source.of_vectors(loaded("llama"), randn(2, 64), layer=2)
        kinds = ["zero", "context", "text", "text_at_position", ps.controls.OtherModel(loaded("gpt2"))]
        readings = ps.Patchscope(TARGET, max_new_tokens=1)(source, kinds)
        assert readings.table["control"].to_list() == ["none", "zero"] * 2
        absent = readings.provenance["controls"]["absent"]
        assert {name: list(reasons.values()) for name, reasons in absent.items()} == {
            name: [2] for name in ("context", "text", "text_at_position", "other_model")
        }
        assert all("vector without a prompt" in reason for reasons in absent.values() for reason in reasons)

    def test_a_token_of_the_tokenizer_is_no_word(self) -> None:
        source = ps.Source(loaded("llama"), "ab", position=0, layer=2)
        readings = ps.Patchscope(TARGET, max_new_tokens=1)(source, ["context", "text_at_position", "zero"], evidence=False)
        assert readings.table["control"].to_list() == ["none", "zero"]
        assert set(readings.provenance["controls"]["absent"]) == {"context", "text_at_position"}

    def test_zero_has_no_direction(self) -> None:
        scope = ps.Patchscope(TARGET, write="add_matched", max_new_tokens=1)
        readings = scope(ps.Source(loaded("llama"), "ab", layer=2), ["zero", "map_of_zero", "random"], evidence=False)
        assert readings.table["control"].to_list() == ["none", "random"]
        assert all("no direction" in reason for r in readings.provenance["controls"]["absent"].values() for reason in r)
        matched = ps.Patchscope(TARGET, map=ps.maps.NormMatch(torch.tensor(2.0)), max_new_tokens=1)
        found = matched(ps.Source(loaded("llama"), "ab", layer=2), "map_of_zero", evidence=False)
        assert found.table["control"].to_list() == ["none"]
        assert "zero vector" in next(iter(found.provenance["controls"]["absent"]["map_of_zero"]))

    def test_no_room_behind_another_text(self) -> None:
        model = loaded("llama")
        assert model.context is not None
        source = ps.Source(model, "a" * (model.context - 3), layer=1)
        readings = ps.Patchscope(TARGET, max_new_tokens=1)(source, ["context", "zero"], evidence=False)
        assert readings.table["control"].to_list() == ["none", "zero"]
        assert "reads at most" in next(iter(readings.provenance["controls"]["absent"]["context"]))

    def test_unknown_names(self) -> None:
        source, scope = ps.Source(loaded("llama"), "ab", layer=1), ps.Patchscope(TARGET, max_new_tokens=1)
        with pytest.raises(UnknownName, match=r"unknown control 'randon'. Did you mean 'random'"):
            scope(source, ["nothing", "randon"])
        with pytest.raises(InputError, match="empty list"):
            scope(source, [])
        with pytest.raises(InputError, match="'zero' is there twice"):
            scope(source, ["zero", "mean", "zero"])
        with pytest.raises(InputError, match="'random_blocks' is there twice"):
            scope(source, [ps.controls.RandomBlocks(0), ps.controls.RandomBlocks(1)])


class TestDefaults:
    def test_true_is_the_five_of_old(self) -> None:
        source, scope = ps.Source(loaded("llama"), SOURCES, layer=[1, 4]), ps.Patchscope(TARGET, max_new_tokens=3)
        usual, named = scope(source), scope(source, ["nothing", "random", "other", "mean", "text"])
        assert usual.table["control"][:6].to_list() == ["none", "nothing", "random", "other", "mean", "text"]
        assert usual.table.equals(named.table)
        assert scope(source, False).table["control"].unique().to_list() == ["none"]

    def test_evidence_does_not_hang_on_the_rows(self) -> None:
        source, scope = ps.Source(loaded("llama"), SOURCES, layer=[1, 4]), ps.Patchscope(TARGET, max_new_tokens=3)
        columns = [
            name for name in scope(source, False).table.columns if name.startswith("bits") or name in ("p_value", "verdict")
        ]
        usual, zero = scope(source).readings, scope(source, "zero").readings
        assert usual["verdict"].ne("not run").all()
        assert usual.select(columns).equals(zero.select(columns))
        assert scope(source, "zero", evidence=False).readings["verdict"].unique().to_list() == ["not run"]


class TestOtherModel:
    def test_its_state_at_the_same_character(self) -> None:
        """The other model's tokenizer puts nothing in front, so that all positions are one less."""
        plain = tiny_tokenizer()
        plain._tokenizer.post_processor = None  # type: ignore[attr-defined]
        other = ps.load((tiny("gpt2", seed=3), plain))
        model = loaded("llama")
        assert len(other.tokens("see the cat")) == len(model.tokens("see the cat")) - 1
        source = ps.Source(model, "see the cat", position=["the", -1], layer=2)
        scope = ps.Patchscope(TARGET, layer=1, map=PUSH, max_new_tokens=2)
        readings = scope(source, ps.controls.OtherModel(other), keep_logits=True, evidence=False)
        rows, logits = rows_of(readings, "other_model")
        assert len(rows) == 2
        for k, end in enumerate(("see the", "see the cat")):
            value = other.run(end, read="resid.2").at("resid.2", position=-1)
            want = model.generate("hello x is", edits=[ps.Edit("resid.1", "x", PUSH(value))], max_new_tokens=2)[0]
            assert error(logits[k], want.logits) < 1e-4 and rows["text"][k] == want.text
        assert readings.provenance["controls"]["other_model"]["architecture"] == "GPT2LMHeadModel"

    def test_widths_agree_or_a_map_is_given(self) -> None:
        import transformers
        from families import CONFIGS

        config = transformers.LlamaConfig(**{**CONFIGS["llama"].to_dict(), "hidden_size": 32, "num_hidden_layers": 3})
        torch.manual_seed(5)
        narrow = ps.load((transformers.LlamaForCausalLM(config).eval(), tiny_tokenizer()))
        model = loaded("llama")
        source, scope = ps.Source(model, "ab", layer=[2, 4]), ps.Patchscope(TARGET, layer=1, max_new_tokens=1)
        with pytest.raises(VectorError, match=r"32 wide.*64 wide.*OtherModel"):
            scope(source, ps.controls.OtherModel(narrow))
        up = ps.maps.Affine(randn(64, 32))
        readings = scope(source, ps.controls.OtherModel(narrow, map=up), keep_logits=True, evidence=False)
        rows, logits = rows_of(readings, "other_model")
        assert rows["source_layer"].to_list() == [2]  # it has no layer 4, and no other stands in for it
        assert "no layer 4" in next(iter(readings.provenance["controls"]["absent"]["other_model"]))
        value = up(narrow.run("ab", read="resid.2").at("resid.2", position=-1))
        assert error(logits[0], model.run("hello x is", edits=[ps.Edit("resid.1", "x", value)]).logits[0, -1]) < 1e-4


class TestRandomBlocks:
    def test_the_users_model_is_left_as_it_was(self) -> None:
        model = ps.load((tiny("llama", seed=4), tiny_tokenizer()))
        before = {name: t.clone() for name, t in model.hf.state_dict().items()}
        state = torch.random.get_rng_state()
        drawn = ps.controls.random_blocks(model, 3)
        assert all(torch.equal(t, before[name]) for name, t in model.hf.state_dict().items())
        assert torch.equal(state, torch.random.get_rng_state())
        for name, t in drawn.hf.state_dict().items():
            kept = "layers" not in name
            assert torch.equal(t, before[name]) is kept, name
            if not kept and t.ndim == 2:
                assert abs(float(t.std()) - drawn.hf.config.initializer_range) < 0.002, "as the architecture initialises it"
        again, other = ps.controls.random_blocks(model, 3), ps.controls.random_blocks(model, 4)
        assert drawn.weight_hash == again.weight_hash != other.weight_hash

    def test_the_readings_own_state_is_written_into_it(self) -> None:
        model = loaded("llama")
        source, scope = ps.Source(model, SOURCES[:2], layer=[1, 4]), ps.Patchscope(TARGET, layer=2, max_new_tokens=3)
        readings = scope(source, ["nothing", ps.controls.RandomBlocks(3)], keep_logits=True)
        rows, logits = rows_of(readings, "random_blocks")
        drawn = ps.controls.random_blocks(model, 3)
        for k, row in enumerate(rows.iter_rows(named=True)):
            value = TestRows.state(SOURCES[row["prompt"]], row["source_layer"])
            want = drawn.generate("hello x is", edits=[ps.Edit("resid.2", "x", value)], max_new_tokens=3)[0]
            assert error(logits[k], want.logits) < 1e-4 and row["text"] == want.text
        assert error(logits[0], rows_of(readings, "none")[1][0]) > 1e-2
        assert readings.readings["verdict"].ne("not run").all(), "evidence is of the reading's own model"
        usual = scope(source).readings
        assert readings.readings["text"].equals(usual["text"]) and readings.readings["verdict"].equals(usual["verdict"])
        for name in ("bits_over_nothing", "bits_over_random", "bits_over_others", "bits_over_text", "p_value", "logprob"):
            assert readings.readings[name].to_list() == pytest.approx(usual[name].to_list(), abs=1e-3)

    def test_where_the_architecture_does_not_say_how(self) -> None:
        with pytest.raises(RefusedError, match="does not say how"):
            ps.controls.random_blocks(loaded("openai-gpt"))


class TestSweeps:
    PROMPTS = ("Yesterday we talked about France", "We looked at a picture of Paris", "She lives in Rome")

    def test_a_recorded_run_equals_the_call(self, tmp_path: Path) -> None:
        atlas = ps.load("atlas")
        (tmp_path / "e.toml").write_text(
            f"prompts = {list(self.PROMPTS)}\nlayers = [1, 5]\nscope = 'The capital of {{x}} is'\ntokens = 3\nshard = 1\n"
            "controls = ['zero', 'random_covariance', 'context', 'text_at_position']\nevidence = false\n"
        )
        experiment = Experiment.load(tmp_path / "e.toml")
        assert experiment.controls == ("zero", "random_covariance", "context", "text_at_position")
        run = sweep(experiment, runs=tmp_path / "runs", models={"atlas": atlas})
        table = run.table()
        scope = replace(ps.scopes.extract("The capital of {x} is"), max_new_tokens=3)
        call = scope(ps.Source(atlas, self.PROMPTS, layer=[1, 5]), list(experiment.controls), evidence=False).table
        keys = ["prompt", "source_layer", "control"]
        both = call.join(table, on=keys, suffix="_run")
        assert len(both) == len(call) == len(table) == 3 * 2 * 5 and set(table["status"]) == {"ok"}
        assert both["text"].equals(both["text_run"]) and both["next_token_id"].equals(both["next_token_id_run"])
        assert both["logprob"].to_list() == pytest.approx(both["logprob_run"].to_list(), abs=1e-3)
        assert run.record["looks"][0]["controls"] == list(experiment.controls)

    def test_what_cannot_be_is_no_part_of_the_plan(self, tmp_path: Path) -> None:
        atlas = ps.load("atlas")
        keys = {"prompts": self.PROMPTS[0], "layers": [3], "scope": "logit-lens", "evidence": False}
        run = sweep(
            Experiment(**keys, controls=["map_of_zero", "text_at_position"], map=[{"scale": 2.0}]),
            runs=tmp_path,
            models={"atlas": atlas},
        )
        assert set(run.table()["control"]) >= {"none", "map_of_zero"}

    def test_files_and_options(self) -> None:
        from patchscopes.cli.settings import gather

        assert Experiment(prompts="a", controls="zero").controls == ("zero",)
        assert Experiment(prompts="a", controls=["zero", "mean"]).document()["controls"] == ["zero", "mean"]
        assert Experiment(prompts="a").document()["controls"] is True
        with pytest.raises(InputError, match=r"controls: unknown control 'men'. Did you mean"):
            Experiment(prompts="a", controls=["men"])
        with pytest.raises(InputError, match=r"parts\[0\].controls: .*expected true or false"):
            Experiment(prompts="a", parts=[{"name": "p", "controls": [1]}])
        found = gather(None, {"prompt": ["a"], "control": ["zero", "context"]})
        assert found.filled()["controls"] == ["zero", "context"]
        with pytest.raises(InputError, match="--control"):
            gather(None, {"prompt": ["a"], "control": ["zero"], "controls": False})
