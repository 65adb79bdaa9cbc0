"""From an experiment to sources and scopes of loaded models, and back."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import WIDTH, loaded, tiny, tiny_tokenizer
from safetensors.torch import save_file

import patchscopes as ps
from patchscopes.core.edits import save_edits
from patchscopes.core.errors import InputError, LayerError, RefusedError, VectorError
from patchscopes.experiment.looks import Look, looks
from patchscopes.experiment.spec import Experiment
from patchscopes.experiment.written_down import experiment_of, models_of, spec_of
from patchscopes.model import Model, Span
from patchscopes.scopes.named import named

CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}!{% endfor %}say:"


@pytest.fixture
def model() -> Model:
    return loaded("llama")


def of(model: Model, **keys: Any) -> list[Look]:
    return looks(Experiment(model="m", **keys), {"m": model})[0]


def places(look: Look) -> list[tuple[str, int]]:
    return [(place.text, place.position) for source in look.sources for place in source.places()]


# -------------------------------------------------------------------------------------------------------------------------- there


def test_one_look_for_every_part_model_and_scope(model: Model) -> None:
    other = loaded("gpt2")
    experiment = Experiment(
        model=["m", {"name": "m", "dtype": "float64"}],
        prompts="ab cd",
        scope=["describe", "the {x} is"],
        parts=[{"name": "one"}, {"name": "two", "model": "m", "controls": False}],
    )
    found, caveats = looks(experiment, {"m": model, "m dtype=float64": other})
    assert [(look.part, look.model, look.scope_name, look.controls) for look in found] == [
        ("one", "m", "describe", True),
        ("one", "m", "the {x} is", True),
        ("one", "m dtype=float64", "describe", True),
        ("one", "m dtype=float64", "the {x} is", True),
        ("two", "m", "describe", False),
        ("two", "m", "the {x} is", False),
    ]
    assert [look.sources[0].model for look in found] == [model, model, other, other, model, model] and caveats == []
    with pytest.raises(InputError, match="'m dtype=float64' was not loaded"):
        looks(experiment, {"m": model})


def test_prompts_have_positions_and_labels_of_their_own(model: Model) -> None:
    prompts = [
        "ab cd",
        {"text": "the cat", "at": "cat", "labels": {"k": 1}},
        {"text": "xyz", "at": "all"},
        {"ids": [5, 6, 7], "at": 1, "labels": {"k": None}},
        {"text": "the the", "at": ["the#2", 0, -1, "the#1"]},
    ]
    look = of(model, prompts=prompts, at=0, layers="1:3", scope="a {x}", tokens=1)[0]
    at: list[list[int]] = []
    for source in look.sources:
        at.append([place.position for place in source.places()])
        assert source.layers() == [1, 2] and source.model is model
    n = {text: len(model.tokens(text)) for text in ("xyz", "the cat", "the the")}
    the = [model.tokens("the the").position(p) for p in ("the#2", 0, -1, "the#1")]
    assert at == [[0], [n["the cat"] - 1], list(range(n["xyz"])), [1], list(dict.fromkeys(the))]
    assert look.labels == [{}, {"k": 1}, {}, {"k": None}, {}] and look.numbers == [0, 1, 2, 3, 4]
    assert look.sources[3].places()[0].tokens.ids == (5, 6, 7)  # type: ignore[union-attr]
    readings = look.scope(look.sources, controls=False).table
    assert readings["prompt"].unique().sort().to_list() == [0, 1, 2, 3, 4], "labels are in the order of the table's prompts"


def test_a_prompt_of_its_own_is_as_in_python(model: Model) -> None:
    keys: dict[str, Any] = {
        "layers": [1, 3],
        "tokens": 3,
        "target_layer": "0:2",
        "stop": ["q"],
        "map": ["identity", {"scale": 2}],
    }
    look = of(model, prompts="ab cd", at="ab", scope="the {x} is", **keys)[0]
    scope = ps.Patchscope(
        "the {x} is", layer="0:2", map=[ps.maps.Identity(), ps.maps.Scale(2.0)], max_new_tokens=3, stop=("q",), name="extract"
    )
    source = ps.Source(model, "ab cd", position="ab", layer=[1, 3])
    assert look.scope(look.sources, controls=False).table.equals(scope(source, controls=False).table)


def test_what_a_scope_lacks_is_the_parts_and_then_the_presets(model: Model) -> None:
    def scope(given: Any, **keys: Any) -> ps.Patchscope:
        return of(model, prompts="a", scope=given, **keys)[0].scope

    plain = named("describe")
    for name in ("prompt", "layer", "max_new_tokens", "stop", "site", "write", "position", "second_look", "name"):
        assert getattr(scope("describe"), name) == getattr(plain, name), name
    assert scope("describe", tokens=3).max_new_tokens == 3
    assert scope({"preset": "describe", "tokens": 4}, tokens=3).max_new_tokens == 4
    assert scope("describe", stop=[]).stop == () and scope({"preset": "describe", "stop": "x"}, stop=[]).stop == ("x",)
    assert scope("a {x}").max_new_tokens == named("a {x}").max_new_tokens
    full = {
        "name": "mine",
        "prompt": ["a {x}", "b c"],
        "at": -1,
        "layer": [1, 2],
        "map": {"scale": 3},
        "site": "mlp_out",
        "write": "add",
        "temperature": 0.5,
        "draws": 2,
    }
    built = scope(full, map="identity", target_layer="all", temperature=0, draws=1, seed=7, second_look="So ", site="attn_out")
    assert (built.name, list(built.prompt), built.position, built.layer) == ("mine", ["a {x}", "b c"], -1, [1, 2])
    assert built.map == ps.maps.Scale(3.0) and (built.site, built.write) == ("mlp_out", "add")
    assert (built.temperature, built.draws, built.seed, built.second_look) == (0.5, 2, 7, "So ")
    assert scope("a {x}", site="attn_out").site == "resid", "site is what is read; where a scope writes it says itself"


def test_the_logit_lens_keeps_its_layer_and_its_token_beside_others(model: Model) -> None:
    lens, other = of(model, prompts="a", scope=["logit-lens", "a {x}"], tokens=5, target_layer="all")
    assert (lens.scope.layer, lens.scope.max_new_tokens) == (-1, 1) and (other.scope.layer, other.scope.max_new_tokens) == (
        "all",
        5,
    )


def test_another_model_can_be_patched(model: Model) -> None:
    other = loaded("gpt2")
    scope = {"prompt": [{"ids": [5, 6]}, "a b"], "at": 1, "model": "judge"}
    look = looks(Experiment(model="m", prompts="a", scope=scope), {"m": model, "judge": other})[0][0]
    assert look.scope.model is other and look.sources[0].model is model
    assert look.scope.prompt[0].ids == (5, 6)  # type: ignore[union-attr, index]


def test_maps_and_edits_come_from_files(model: Model, tmp_path: Path) -> None:
    f = ps.maps.Affine(torch.randn(WIDTH, WIDTH), torch.randn(WIDTH), name="fitted")
    ps.maps.save_map(tmp_path / "f.safetensors", f, {"by": "me"})
    edits = [ps.Edit("resid.1", 0, torch.ones(WIDTH))]
    save_edits(str(tmp_path / "e.safetensors"), edits)
    keys = {"map": {"affine": tmp_path / "f.safetensors"}, "scope": {"prompt": "a {x}", "edits": tmp_path / "e.safetensors"}}
    scope = of(model, prompts="a", **keys)[0].scope
    assert isinstance(scope.map, ps.maps.Affine) and scope.map.name == "fitted" and torch.equal(scope.map.weight, f.weight)
    assert scope.map.bias is not None and f.bias is not None and torch.equal(scope.map.bias, f.bias)
    assert list(scope.edits) == edits
    for keys in ({"map": {"affine": tmp_path / "none"}}, {"scope": {"prompt": "{x}", "edits": tmp_path / "none"}}):
        with pytest.raises(InputError, match="none"):
            of(model, prompts="a", **keys)


def test_vectors_are_looked_at_as_if_they_stood_at_the_layers(model: Model, tmp_path: Path) -> None:
    rows = torch.randn(3, WIDTH)
    path = tmp_path / "v.safetensors"
    save_file({"rows": rows, "other": torch.zeros(2)}, path, {"labels": json.dumps(["a", "b", "c"])})
    prompts = {"vectors": path, "tensor": "rows"}
    look = of(model, prompts=prompts, layers=[1, 2])[0]
    assert [(p.text, p.tokens) for p in look.sources[0].places()] == [("a", None), ("b", None), ("c", None)]
    assert torch.equal(torch.stack([p.vector for p in look.sources[0].places()]), rows)  # type: ignore[misc]
    assert look.sources[0].layers() == [1, 2] and look.labels == [{}, {}, {}] and look.numbers == [0, 1, 2]
    expected = ps.Patchscope("a {x}", max_new_tokens=2)(ps.Source.of_vectors(model, rows, layer=2), controls=False).table
    found = of(model, prompts=prompts, layers=2, scope="a {x}", tokens=2)[0]
    assert found.scope(found.sources, controls=False).table["text"].to_list() == expected["text"].to_list()


@pytest.mark.parametrize(
    ("tensors", "tensor", "error", "words"),
    [
        ({"a": torch.zeros(2, WIDTH), "b": torch.zeros(1)}, None, InputError, "holds 2 tensors (a, b)"),
        ({"rows": torch.zeros(2, WIDTH)}, "row", InputError, "Did you mean 'rows'"),
        ({"rows": torch.zeros(2, 3, WIDTH)}, None, InputError, "(2, 3, 64)"),
        ({"rows": torch.zeros(0, WIDTH)}, None, InputError, "(0, 64)"),
        ({"rows": torch.zeros(2, WIDTH, dtype=torch.int64)}, None, InputError, "int64"),
        ({"rows": torch.zeros(2, 3)}, None, VectorError, "3 wide"),
        ({"rows": torch.full((1, WIDTH), torch.nan)}, None, VectorError, "not finite"),
    ],
)
def test_vectors_that_cannot_be_are_told(
    model: Model, tmp_path: Path, tensors: dict, tensor: str | None, error: type, words: str
) -> None:
    path = tmp_path / "v.safetensors"
    save_file(tensors, path)
    with pytest.raises(error) as caught:
        of(model, prompts={"vectors": path, "tensor": tensor}, layers=1)
    assert words in str(caught.value)


def test_files_that_hold_no_vectors_are_told(model: Model, tmp_path: Path) -> None:
    (tmp_path / "torn.safetensors").write_bytes(b"\x00" * 5)
    for name, words in (("torn.safetensors", "could not be read"), ("none.safetensors", "there is no file")):
        with pytest.raises(InputError, match=words):
            of(model, prompts={"vectors": tmp_path / name}, layers=1)
    for data, words in ((b"torn", "could not be read"), (None, "holds x")):
        path = tmp_path / "map.safetensors"
        path.write_bytes(data) if data else save_file({"x": torch.zeros(2)}, path)
        with pytest.raises(InputError, match=words):
            ps.maps.load_map(path)
    save_file({"weight": torch.full((2, 2), torch.inf)}, path)
    with pytest.raises(VectorError, match="not finite"):
        ps.maps.load_map(path)
    save_file({"weight": torch.zeros(2, 2)}, path, {"map": '{"format": 9}'})
    with pytest.raises(InputError, match="format 9"):
        ps.maps.load_map(path)


# ----------------------------------------------------------------------------------------------------------------------- bad prompts


def bad_file(tmp_path: Path) -> Path:
    path = tmp_path / "x.csv"
    long = "a" * 200
    path.write_text(f"prompt,where\nab cd,cd\nab cd,zz\nthe the,the\n{long},0\nab cd,99\nab,b\nab,5\nab 5,5\n")
    return path


def test_prompts_that_cannot_be_read_are_told_together(model: Model, tmp_path: Path) -> None:
    prompts = {"file": bad_file(tmp_path), "at_column": "where"}
    with pytest.raises(InputError) as caught:
        of(model, prompts=prompts, name="mine")
    message = str(caught.value)
    assert f"6 of 8 prompts of 'mine' cannot be read by {model.name}" in message
    for words in (
        "row 2: position 'zz' does not occur",
        "row 3: position 'the' occurs 2 times",
        "row 4: the prompt has",
        "row 5:",
    ):
        assert f"x.csv {words}" in message
    assert (
        "and 1 more" in message
        and "row 8" not in message
        and "on_bad_prompt" in message
        and max(map(len, message.splitlines())) < 400
    )


def test_prompts_that_cannot_be_read_are_left_out_on_request(model: Model, tmp_path: Path) -> None:
    prompts = {"file": bad_file(tmp_path), "at_column": "where", "labels": "where"}
    found, caveats = looks(
        Experiment(model="m", prompts=prompts, on_bad_prompt="skip", scope=["describe", "a {x}"]), {"m": model}
    )
    for look in found:
        assert look.numbers == [0, 5] and [label["where"] for label in look.labels] == ["cd", "b"]
        assert [text for text, _ in places(look)] == ["ab cd", "ab"]
    assert len(caveats) == 1 and "6 of 8 prompts" in caveats[0] and "were skipped" in caveats[0]
    with pytest.raises(InputError, match="does not occur"):
        of(model, prompts="a", at="zz", on_bad_prompt="skip")


def test_a_number_that_may_be_meant_as_text_is_hinted_at(model: Model) -> None:
    with pytest.raises(InputError, match="'1984#1'"):
        of(model, prompts="in 1984", at="1984")


def test_layers_that_a_model_has_not_are_told(model: Model) -> None:
    with pytest.raises(LayerError, match=r"mine: .*0 to 5"):
        of(model, prompts="a", layers=[9], name="mine")


def test_notes_on_tokens_become_caveats(model: Model) -> None:
    _, caveats = looks(Experiment(model="m", prompts=["ab ", "cd ", "ef"]), {"m": model})
    assert len(caveats) == 1 and "ends in a space" in caveats[0] and "2 of 3 prompts" in caveats[0]


def test_planning_needs_no_weights() -> None:
    from patchscopes.model.loading import outline

    experiment = Experiment(prompts=["We talked about France", "A story about Nokia"], scope=["describe", "logit-lens"])
    drawn, _ = looks(experiment, {"atlas": outline("atlas")})
    real, _ = looks(experiment, {"atlas": ps.load("atlas")})
    assert [places(look) for look in drawn] == [places(look) for look in real]


# ------------------------------------------------------------------------------------------------------------------------------ back


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model that was loaded from a folder, so that it can be loaded again; with a chat template."""
    folder = tmp_path_factory.mktemp("tiny model")
    hf = tiny("llama")
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = CHAT
    hf.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ps.load(str(folder), dtype="float32")


def back_and_forth(kept: Model, source: Any, scope: ps.Patchscope, folder: Path) -> Look:
    given = [("part", source, scope)]
    experiment = experiment_of(given, folder=folder, outputs={"top_k": 2})
    again = Experiment.model_validate(json.loads(json.dumps(experiment.document())))
    assert again == experiment and experiment.outputs.top_k == 2
    found, caveats = looks(again, models_of(given))
    assert [look.part for look in found] == ["part"] and caveats == []
    table = scope(source, controls=False).table
    assert found[0].scope(found[0].sources, controls=False).table.equals(table) and table.height
    return found[0]


def test_what_was_made_in_python_can_be_written_down(kept: Model, tmp_path: Path) -> None:
    sources = [
        ps.Source(kept, ["ab cd", kept.tokens("the cat")], position=[-1, 0], layer=range(1, 3), site="mlp_out"),
        ps.Source(kept, kept.tokens("hello", chat=True), position="hello", layer=(1, 2), site="mlp_out"),
        ps.Source(kept, kept.tokens([5, 6, 7]), position=Span(0, 1), layer=[1, 2], site="mlp_out"),
        ps.Source(kept, "12 34", position="34", layer=[1, 2], site="mlp_out"),
        ps.Source(kept, "xyz", position="all", layer=[1, 2], site="mlp_out"),
    ]
    f = ps.maps.Affine(torch.eye(WIDTH) * 2, name="mine")
    scope = ps.Patchscope(
        ["a {x} b", kept.tokens("c d x"), kept.tokens("x", chat=True)],
        layer=range(0, 3, 2),
        map=[ps.maps.Identity(), ps.maps.Scale(0.5), f],
        max_new_tokens=2,
        stop=["q"],
        site="attn_out",
        write="add",
        edits=[ps.Edit("resid.1", 0, torch.ones(WIDTH))],
        temperature=0.7,
        draws=2,
        seed=5,
        second_look="Well. ",
        name="own",
    )
    look = back_and_forth(kept, sources, scope, tmp_path)
    assert look.scope_name == look.scope.name == "own" and look.scope.second_look == "Well. " and look.scope.edits == scope.edits
    texts = Experiment.model_validate(experiment_of([("part", sources, scope)], folder=tmp_path).document()).split()[0].prompts
    assert [(p.text, p.chat) for p in texts][:3] == [("ab cd", False), ("the cat", False), ("hello", True)]  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["describe", "identity", "identity-bare", "logit-lens", "the {x} is"])
def test_presets_can_be_written_down(kept: Model, tmp_path: Path, name: str) -> None:
    model = ps.load("atlas") if name == "describe" else kept  # its prompt is longer than the tiny model reads
    back_and_forth(model, ps.Source(model, "We met in France", layer="0:2"), named(name), tmp_path)


def test_places_of_target_prompts_can_be_written_down(kept: Model, tmp_path: Path) -> None:
    source = ps.Source(kept, "ab", layer=1)
    for position in (0, -1, "b", "1", "a#2", Span(0, 1)):
        back_and_forth(kept, source, ps.Patchscope("a b 1 a", position=position, max_new_tokens=1), tmp_path)


def test_vectors_can_be_written_down(kept: Model, tmp_path: Path) -> None:
    source = ps.Source.of_vectors(kept, torch.randn(3, WIDTH), layer=2, labels=["α", "b", "c"])
    back_and_forth(kept, source, ps.Patchscope("a {x}", max_new_tokens=2), tmp_path)
    with pytest.raises(InputError, match="beside other sources"):
        experiment_of([("p", [source, ps.Source(kept, "a", layer=2)], named("describe"))], folder=tmp_path)


def test_what_is_the_same_is_saved_once(kept: Model, tmp_path: Path) -> None:
    source = ps.Source(kept, "ab", layer=1)
    scope = ps.Patchscope("a {x}", map=ps.maps.Affine(torch.eye(WIDTH)))
    one = experiment_of([("a", source, scope), ("b", source, scope)], folder=tmp_path / "new")
    assert len(list((tmp_path / "new").iterdir())) == 1
    assert experiment_of([("a", source, scope), ("b", source, scope)], folder=tmp_path / "other").digest == one.digest


def test_another_model_can_be_written_down(kept: Model, tmp_path: Path) -> None:
    atlas = ps.load("atlas")
    f = ps.maps.Affine(torch.randn(atlas.d_model, WIDTH) * 0.1)
    scope = ps.Patchscope("a {x}", model=atlas, map=f, max_new_tokens=2)
    look = back_and_forth(kept, ps.Source(kept, "ab", layer=1), scope, tmp_path)
    assert look.scope.model is atlas


def test_how_a_model_was_loaded_is_written_down(kept: Model) -> None:
    spec = spec_of(kept)
    assert (spec.dtype, spec.device, spec.revision, spec.trust_remote_code) == ("float32", None, None, False)
    assert Path(spec.name).is_absolute() and ps.load(spec.name, dtype=spec.dtype).weight_hash == kept.weight_hash
    assert spec_of(ps.load("atlas")).key == "atlas"


def test_what_cannot_be_written_down_is_told(kept: Model, tmp_path: Path, model: Model) -> None:
    class Own:
        name = "own"

        def __call__(self, h: torch.Tensor) -> torch.Tensor:
            return h

    source = ps.Source(kept, "ab", layer=1)
    for given, words in (
        ([("a", source, ps.Patchscope("a {x}", map=Own()))], "a Own, which cannot be written down"),
        ([("a", ps.Source(model, "ab"), named("describe"))], "given as an object"),
        ([("a", source, ps.Patchscope("{x}", model=model))], "given as an object"),
        ([("a", [source, ps.Source(kept, "cd", layer=2)], named("describe"))], "must share"),
        ([("a", [], named("describe"))], "has no source"),
        ([("a", source, named("describe")), ("a", source, named("describe"))], "two parts are named 'a'"),
        ([], "nothing to look at"),
    ):
        with pytest.raises(InputError, match=words):
            experiment_of(given, folder=tmp_path)  # type: ignore[arg-type]


def test_maps_of_any_kind_and_lenses_come_from_files(kept: Model, tmp_path: Path) -> None:
    n, d = kept.n_layers, kept.d_model
    f = ps.maps.ByLayer({(0, 2): ps.maps.Zero(), (1, 2): ps.maps.LowRank(torch.randn(d, 2), torch.randn(2, d))}, "fitted")
    ps.maps.save_map(tmp_path / "f.safetensors", f)
    lens = ps.lenses.TunedLens(torch.zeros(n, d, d), torch.zeros(n, d), {"model": kept.provenance()})
    lens.save(tmp_path / "t.safetensors")
    jacobian = ps.lenses.JacobianLens({1: torch.eye(d)}, n, {"model": kept.provenance()})
    jacobian.save(tmp_path / "j.safetensors")
    files = {
        "file": tmp_path / "f.safetensors",
        "tuned_lens": tmp_path / "t.safetensors",
        "jacobian_lens": tmp_path / "j.safetensors",
    }
    for (key, path), want in zip(files.items(), (f, lens.map, jacobian.map), strict=True):
        scope = of(kept, prompts="a", map={key: path}, scope="a {x}")[0].scope
        assert ps.maps.digest_of(scope.map) == ps.maps.digest_of(want)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"a ByLayer; expected an affine map"):
        of(kept, prompts="a", map={"affine": files["file"]})
    replace(lens, weight=torch.randn(n, d, d), provenance={}).save(files["tuned_lens"])
    with pytest.raises(RefusedError, match="does not fit"):
        of(kept, prompts="a", map={"tuned_lens": files["tuned_lens"]})
    scope = ps.Patchscope("a {x}", layer=2, map=[f, ps.maps.Noise(0.1), ps.maps.Zero()], max_new_tokens=1)
    back_and_forth(kept, ps.Source(kept, "ab", layer=[0, 1]), scope, tmp_path / "written")
