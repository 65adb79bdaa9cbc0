"""The experiment as data: what is taken, what is refused and how it is told, files and their paths, the digest, the JSON Schema."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from patchscopes.core.edits import OF_SCOPES
from patchscopes.core.errors import InputError, LayerError, PatchscopesError
from patchscopes.core.names import DTYPES, SCOPES
from patchscopes.core.sites import SCOPED
from patchscopes.experiment.documents import read_document
from patchscopes.experiment.spec import DRAFT, Experiment, Part, schema
from patchscopes.experiment.spec_tables import ModelSpec, PromptFile, PromptSpec, ScaleMap, ScopeSpec, VectorFile
from patchscopes.scopes.named import named

RICH: dict[str, Any] = {
    "name": "big one",
    "model": ["atlas", {"name": "org/other", "revision": "abc", "dtype": "bfloat16", "device_map": {"": 0}}],
    "prompts": [
        "We talked about France",
        {"text": "日本の首都 is", "at": "日本", "labels": {"answer": "東京", "n": 1, "ok": True, "w": 0.5}},
    ],
    "at": ["France", -1],
    "layers": [0, 2],
    "site": "attn_out",
    "scope": ["describe", "The capital of {x} is", {"name": "mine", "prompt": ["a {x}", {"ids": [1, 2]}], "at": 0, "tokens": 3}],
    "map": ["identity", {"scale": 2}],
    "target_layer": "0:2",
    "tokens": 7,
    "stop": [".", "\n"],
    "temperature": 1,
    "draws": 3,
    "seed": 11,
    "controls": False,
    "second_look": "Well,",
    "outputs": {"top_k": 5, "logits": True},
    "shard": 16,
    "on_bad_prompt": "skip",
    "parts": [{"name": "a"}, {"name": "b", "layers": "all", "prompts": "only this", "temperature": 0, "draws": 1}],
}
TOML = """
name = "one"
model = "atlas"
layers = "0:4"      # a comment
prompts = ["a b", { text = "c", at = "c", labels = { k = 1 } }]

[outputs]
top_k = 2

[[parts]]
name = "first"

[[parts]]
name = "second"
scope = ["logit-lens", { prompt = "is {x}", name = "own" }]
"""
YAML = """
name: one
model: atlas
layers: "0:4"  # a comment
prompts:
  - a b
  - {text: c, at: c, labels: {k: 1}}
outputs: {top_k: 2}
parts:
  - name: first
  - name: second
    scope: [logit-lens, {prompt: "is {x}", name: own}]
"""


def said(**keys: Any) -> str:
    """The message of what is wrong with these keys."""
    with pytest.raises(InputError) as caught:
        Experiment(**{"prompts": "a", **keys})
    assert "pydantic" not in str(caught.value)
    return str(caught.value)


# ----------------------------------------------------------------------------------------------------------------------------- forms


def test_an_experiment_of_one_prompt_has_the_defaults() -> None:
    experiment = Experiment(prompts="We talked about France")
    assert experiment.prompts == (PromptSpec(text="We talked about France"),)
    assert (experiment.name, experiment.at, experiment.layers, experiment.site) == ("sweep", -1, "all", "resid")
    assert experiment.model == (ModelSpec(name="atlas"),) and experiment.scope == (ScopeSpec(preset="describe"),)
    assert experiment.map == ("identity",) and experiment.parts == () and experiment.controls is True
    assert (experiment.temperature, experiment.draws, experiment.seed, experiment.tokens) == (0.0, 1, 0, None)
    assert experiment.outputs.model_dump() == {"top_k": 0, "vectors": False, "logits": False}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"at": "3"}, {"at": 3}),
        ({"at": " -1 "}, {"at": -1}),
        ({"at": "1984#1"}, {"at": "1984#1"}),
        ({"at": ["2", "word"]}, {"at": (2, "word")}),
        ({"at": "all"}, {"at": "all"}),
        ({"layers": range(2, 4)}, {"layers": (2, 3)}),
        ({"layers": "3"}, {"layers": 3}),
        ({"layers": " 0:8:2 "}, {"layers": "0:8:2"}),
        ({"layers": "-1,2"}, {"layers": "-1,2"}),
        ({"layers": ":"}, {"layers": ":"}),
        ({"target_layer": "same"}, {"target_layer": "same"}),
        ({"target_layer": -1}, {"target_layer": -1}),
        ({"stop": "."}, {"stop": (".",)}),
        ({"stop": []}, {"stop": ()}),
        ({"map": {"scale": 2}}, {"map": (ScaleMap(scale=2.0),)}),
        ({"scope": "{x}"}, {"scope": (ScopeSpec(prompt="{x}"),)}),
        ({"model": Path("org/name")}, {"model": (ModelSpec(name="org/name"),)}),
        ({"temperature": 1, "draws": 2}, {"temperature": 1.0, "draws": 2}),
        ({"prompts": {"ids": [1, 2], "at": "0"}}, {"prompts": (PromptSpec(ids=(1, 2), at=0),)}),
    ],
)
def test_short_forms_become_the_canonical_one(given: dict, expected: dict) -> None:
    experiment = Experiment(**{"prompts": "a", **given})
    for key, value in expected.items():
        assert getattr(experiment, key) == value and type(getattr(experiment, key)) is type(value)


def test_forms_that_say_the_same_are_equal() -> None:
    one = Experiment(prompts="a", model="atlas", scope="describe", map="identity", layers="2", stop="x")
    other = Experiment(
        prompts=[{"text": "a"}], model=[{"name": "atlas"}], scope=[{"preset": "describe"}], map=["identity"], layers=2, stop=["x"]
    )
    assert one == other and one.digest == other.digest


def test_it_is_frozen() -> None:
    experiment = Experiment(prompts="a")
    with pytest.raises(Exception, match="frozen"):
        experiment.name = "b"  # type: ignore[misc]


def test_a_document_gives_an_equal_experiment(tmp_path: Path) -> None:
    for keys in (RICH, {"prompts": {"file": tmp_path / "x.csv", "labels": "a"}}, {"prompts": {"vectors": "v.safetensors"}}):
        experiment = Experiment(**keys)
        document = experiment.document()
        assert Experiment.model_validate(document) == experiment
        assert Experiment.model_validate(json.loads(json.dumps(document, allow_nan=False))) == experiment
        assert Experiment(**document).document() == document


def test_a_document_says_everything() -> None:
    document = Experiment(prompts="a").document()
    assert set(document) == set(Experiment.model_fields)
    assert document["scope"][0]["preset"] == "describe" and document["seed"] == 0


# ----------------------------------------------------------------------------------------------------------------------------- parts


def test_parts_inherit_what_they_lack() -> None:
    a, b = Experiment(**RICH).split()
    assert (a.name, a.layers, a.temperature, a.draws, len(a.prompts or ())) == ("a", (0, 2), 1.0, 3, 2)  # type: ignore[arg-type]
    assert (b.name, b.layers, b.temperature, b.draws) == ("b", "all", 0.0, 1)
    assert b.prompts == (PromptSpec(text="only this"),) and b.scope == a.scope and b.seed == a.seed == 11
    assert a.parts == b.parts == ()


def test_every_key_of_a_part_is_one_of_the_experiment_and_wins() -> None:
    other: dict[str, Any] = {
        "model": "other",
        "prompts": "b",
        "at": 0,
        "layers": 1,
        "span": 2,
        "site": "mlp_out",
        "scope": "identity",
        "map": {"scale": 3},
        "target_layer": 2,
        "tokens": 4,
        "stop": "!",
        "temperature": 2,
        "draws": 9,
        "seed": 5,
        "controls": False,
        "evidence": False,
        "second_look": "So",
    }
    assert set(other) == set(Part.model_fields) - {"name"} <= set(Experiment.model_fields)
    whole = Experiment(prompts="a", parts=[{"name": "p", **other}]).split()[0]
    alone = Experiment(**other, name="p")
    assert whole == alone


def test_false_and_nothing_of_a_part_count_as_said() -> None:
    assert Experiment(prompts="a", stop=["x"], parts=[{"name": "p", "stop": [], "controls": False}]).split()[0].stop == ()
    assert Experiment(prompts="a", parts=[{"name": "p", "controls": False}]).split()[0].controls is False


def test_an_experiment_without_parts_is_its_own_part() -> None:
    experiment = Experiment(prompts="a", name="solo")
    assert experiment.split() == [experiment]


def test_models_are_each_named_once_with_those_that_are_patched() -> None:
    experiment = Experiment(
        prompts="a",
        model=["atlas", {"name": "atlas", "dtype": "float64"}],
        scope={"prompt": "{x}", "model": "judge"},
        parts=[{"name": "a"}, {"name": "b", "model": "third"}],
    )
    assert [model.key for model in experiment.models()] == ["atlas", "atlas dtype=float64", "judge", "third"]
    assert ModelSpec(name="a", revision="main", device="cpu").key == "a@main device=cpu"


# ---------------------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"promts": 1}, ("'promts'", "Did you mean 'prompts'")),
        ({"device": "cpu"}, ("belongs into the table model",)),
        ({"top_k": 3}, ("belongs into the table outputs",)),
        ({"column": "a"}, ("belongs into the table prompts",)),
        ({"model": {"nam": "x"}}, ("model[0]", "'nam'", "'name'")),
        ({"model": {"name": "x", "revison": "y"}}, ("model[0]", "'revision'")),
        ({"prompts": [{"txt": "x"}]}, ("prompts[0]", "'txt'", "'text'")),
        ({"prompts": {"txt": "x"}}, ("prompts", "text, ids, file or vectors", "'text'")),
        ({"prompts": {"file": "x", "colum": 1}}, ("prompts:", "'colum'", "'column'")),
        ({"prompts": {"vectors": "x", "tenser": 1}}, ("prompts:", "'tenser'", "'tensor'")),
        ({"scope": {"promt": "{x}"}}, ("scope[0]", "'promt'", "'prompt'")),
        ({"scope": {"prompt": {"txt": "{x}"}}}, ("scope[0].prompt[0]", "'txt'", "'text'")),
        ({"map": [{"scal": 2}]}, ("map[0]", "'scale'")),
        ({"map": [{"scale": 2, "shift": 1}]}, ("map[0]", "'shift'")),
        ({"outputs": {"logit": True}}, ("outputs:", "'logits'")),
        ({"parts": [{"name": "a"}, {"name": "b", "layrs": 3}]}, ("parts[1]:", "'layrs'", "'layers'")),
        ({"parts": [{"name": "a", "outputs": {}}]}, ("parts[0]:", "'outputs'")),
        ({"parts": [{"name": "a", "scope": ["describe", {"promt": 1}]}]}, ("parts[0].scope[1]:", "'prompt'")),
    ],
)
def test_unknown_keys_are_refused_with_a_suggestion(keys: dict, words: tuple[str, ...]) -> None:
    message = said(**keys)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"prompts": None}, ("prompts: nothing to read",)),
        ({"prompts": []}, ("prompts: found an empty list",)),
        ({"prompts": ""}, ("prompts[0].text", "empty")),
        ({"prompts": ["a", "  \n"]}, ("prompts[1].text", "empty")),
        ({"prompts": ["a", 3]}, ("prompts[1]", "the number 3")),
        ({"prompts": 3}, ("prompts: found the number 3", "a list of prompts")),
        ({"prompts": {"text": "a", "ids": [1]}}, ("prompts[0]: text and ids were both",)),
        ({"prompts": [{"text": None}]}, ("prompts[0]: neither text nor ids",)),
        ({"prompts": {"ids": []}}, ("prompts[0].ids", "empty list")),
        ({"prompts": {"ids": [3, -1]}}, ("prompts[0].ids[1]", "-1", "at least 0")),
        ({"prompts": {"ids": [3], "chat": True}}, ("prompts[0]: chat",)),
        ({"prompts": [{"text": "a", "labels": {"k": [1]}}]}, ("prompts[0].labels", "'k'", "[1]")),
        ({"prompts": [{"text": "a", "labels": {"k": float("nan")}}]}, ("prompts[0].labels", "finite")),
        ({"prompts": {"file": ""}}, ("prompts.file", "path")),
        ({"prompts": {"file": "x", "limit": 1, "sample": 1}}, ("prompts: limit and sample",)),
        ({"prompts": {"file": "x", "limit": 0}}, ("prompts.limit", "at least 1")),
        ({"layers": "x"}, ("layers:", "'x'", "3:9")),
        ({"layers": "1:2:3:4"}, ("layers:",)),
        ({"layers": "0:4:0"}, ("layers:", "step of 0")),
        ({"layers": ""}, ("layers:",)),
        ({"layers": "1,,2"}, ("layers:",)),
        ({"layers": []}, ("layers:",)),
        ({"layers": [1.5]}, ("layers:", "[1.5]")),
        ({"layers": [True]}, ("layers:",)),
        ({"layers": "same"}, ("layers:", "'same'")),
        ({"target_layer": "sme"}, ("target_layer:", "'sme'")),
        ({"at": []}, ("at:", "empty list")),
        ({"at": ""}, ("at:",)),
        ({"at": True}, ("at: found true",)),
        ({"at": ["all", 1]}, ("at:", "'all' alone")),
        ({"site": "resi"}, ("site:", "'resi'", "Did you mean 'resid'")),
        ({"site": "logits"}, ("site:", "resid, attn_in")),
        ({"scope": "descrbe"}, ("scope[0]: unknown scope 'descrbe'", "'describe'")),
        ({"scope": "The capital of"}, ("scope[0]", "no {x}")),
        ({"scope": []}, ("scope: found an empty list",)),
        ({"scope": {"preset": "descrbe"}}, ("scope[0].preset", "'descrbe'", "Did you mean 'describe'")),
        ({"scope": {"preset": "describe", "prompt": "{x}"}}, ("scope[0]: preset and prompt were both",)),
        ({"scope": {"tokens": 3}}, ("scope[0]: neither preset nor prompt",)),
        ({"scope": {"prompt": "a {x}", "at": 3}}, ("scope[0]: at was given",)),
        ({"scope": {"preset": "describe", "at": 3}}, ("scope[0]: at was given",)),
        ({"scope": {"prompt": "{x}", "write": "ad"}}, ("scope[0].write", "'ad'", "'add'")),
        ({"scope": {"prompt": "{x}", "site": "z"}}, ("scope[0].site", "'z'")),
        ({"scope": {"preset": "logit-lens", "tokens": 3}}, ("scope[0]: the logit lens",)),
        ({"scope": "logit-lens", "tokens": 3}, ("scope: the logit lens",)),
        ({"scope": ["describe", "describe"]}, ("scope: 'describe' is there twice",)),
        ({"model": ["atlas", "atlas"]}, ("model: 'atlas' is there twice",)),
        ({"model": []}, ("model: found an empty list",)),
        ({"model": " "}, ("model[0].name", "empty")),
        ({"model": {"name": "x", "dtype": "float12"}}, ("model[0].dtype", "'float12'", "'float16'")),
        ({"model": {"name": "x", "device": "cpu", "device_map": "auto"}}, ("model[0]: device and device_map",)),
        ({"map": "scale"}, ("map[0]: unknown map 'scale'", "{ scale = … }")),
        ({"map": 2.0}, ("map[0]", "the number 2.0")),
        ({"map": {"scale": float("inf")}}, ("map[0].scale", "finite")),
        ({"tokens": 0}, ("tokens:", "the number 0", "at least 1")),
        ({"tokens": "5"}, ("tokens:", "the text '5'", "a whole number")),
        ({"tokens": 1.5}, ("tokens:", "a whole number")),
        ({"temperature": -0.1}, ("temperature:", "at least 0")),
        ({"temperature": float("nan")}, ("temperature:", "finite")),
        ({"draws": 3}, ("draws: 3 draws at temperature 0",)),
        ({"scope": {"prompt": "{x}", "draws": 2}}, ("scope[0].draws: 2 draws",)),
        ({"temperature": 1, "draws": 2, "scope": {"prompt": "{x}", "temperature": 0}}, ("draws: 2 draws at temperature 0",)),
        ({"seed": True}, ("seed: found true", "a whole number")),
        ({"controls": 1}, ("controls: found the number 1", "true or false")),
        ({"on_bad_prompt": "skp"}, ("on_bad_prompt:", "'skip'")),
        ({"outputs": {"top_k": -1}}, ("outputs.top_k", "at least 0")),
        ({"outputs": True}, ("outputs: found true", "table")),
        ({"shard": 0}, ("shard:",)),
        ({"name": ""}, ("name:",)),
        ({"name": "a\nb"}, ("name:", "one line")),
        ({"parts": [{"layers": 1}]}, ("parts[0].name: this key is missing",)),
        ({"parts": [{"name": "a"}, {"name": "a"}]}, ("two parts are named 'a'",)),
        ({"parts": [{"name": "a"}, {"name": "b", "layers": "x"}]}, ("parts[1].layers:", "'x'")),
        ({"parts": [{"name": "a"}, {"name": "b", "draws": 2}]}, ("parts[1].draws: 2 draws",)),
        ({"prompts": None, "parts": [{"name": "a", "prompts": "x"}, {"name": "b"}]}, ("parts[1].prompts: nothing to read",)),
        ({"parts": {"name": "a"}}, ("parts:", "a list")),
    ],
)
def test_what_cannot_be_is_told_with_its_place(keys: dict, words: tuple[str, ...]) -> None:
    message = said(**keys)
    assert all(word in message for word in words), message


def test_several_mistakes_are_told_together_and_not_too_many() -> None:
    message = said(tokens=0, seed="x", controls=3)
    assert [line.split(":")[0] for line in message.splitlines()] == ["tokens", "seed", "controls"]
    many = said(prompts=[{"text": " "}] * 9)
    assert len(many.splitlines()) == 6 and many.endswith("and 4 more mistakes")


def test_a_document_with_mistakes_is_an_input_error() -> None:
    with pytest.raises(InputError, match="unknown key 'promts'"):
        Experiment.model_validate({"promts": 1})
    with pytest.raises(InputError, match="expected a table"):
        Experiment.model_validate([1])
    with pytest.raises(InputError, match=r"^the key ids|neither text nor ids"):
        PromptSpec()


def test_tables_of_their_own_say_the_same() -> None:
    with pytest.raises(InputError, match="'colum'"):
        PromptFile(file="x", colum="y")
    assert issubclass(LayerError, InputError)


def test_names_are_those_of_the_library() -> None:
    kinds = schema()["$defs"]
    assert kinds["ModelSpec"]["properties"]["dtype"]["anyOf"][0]["enum"] == list(DTYPES)
    assert kinds["ScopeSpec"]["properties"]["preset"]["anyOf"][0]["enum"] == list(SCOPES)
    assert kinds["ScopeSpec"]["properties"]["write"]["anyOf"][0]["enum"] == list(OF_SCOPES)
    assert schema()["properties"]["site"]["enum"] == list(SCOPED)
    assert [named(scope).name for scope in SCOPES] == ["back-patch", "describe", "identity", "identity", *SCOPES[4:]]


# ----------------------------------------------------------------------------------------------------------------------------- files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a name that is not Latin and has spaces."""
    folder = tmp_path / "опыты и данные 実験"
    folder.mkdir()
    return folder


def test_toml_yaml_and_json_say_the_same(folder: Path) -> None:
    (folder / "один.toml").write_text(TOML, encoding="utf-8")
    (folder / "two.yaml").write_text(YAML, encoding="utf-8")
    (folder / "two.yml").write_text("\ufeff" + YAML, encoding="utf-8")  # a byte-order mark, as Windows writes
    one = Experiment.load(folder / "один.toml")
    (folder / "three.json").write_text(json.dumps(one.document()), encoding="utf-8")
    assert (
        one
        == Experiment.load(folder / "two.yaml")
        == Experiment.load(folder / "two.yml")
        == Experiment.load(folder / "three.json")
    )
    assert (one.name, one.layers, one.outputs.top_k, [part.name for part in one.parts]) == ("one", "0:4", 2, ["first", "second"])
    assert one.prompts[1].labels == {"k": 1}  # type: ignore[index]
    assert [scope.called for scope in one.split()[1].scope] == ["logit-lens", "own"]


def test_paths_in_a_file_are_seen_from_its_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "my model").mkdir()
    (folder / "my model" / "config.json").write_text("{}")
    (folder / "x.toml").write_text(
        """
        model = ["my model", "./other", "org/name", "atlas", { name = "../there" }]
        prompts = { file = "data/my prompts.csv", labels = ["file"] }
        map = [{ affine = "../f.safetensors" }]
        scope = { prompt = "{x}", edits = "e.safetensors", model = "my model" }
        [[parts]]
        name = "v"
        prompts = { vectors = "v.safetensors" }
        [[parts]]
        name = "inline"
        prompts = { text = "a", labels = { file = "not a path", vectors = "nor this" } }
        """
    )
    (folder / "atlas").mkdir()
    (folder / "atlas" / "config.json").write_text("{}")  # bundled models come first
    monkeypatch.chdir(folder.parent)
    experiment = Experiment.load(f"{folder.name}/x.toml")
    assert isinstance(experiment.prompts, PromptFile) and experiment.prompts.file == str(folder / "data" / "my prompts.csv")
    assert experiment.map[0].affine == str(folder.parent / "f.safetensors")  # type: ignore[union-attr]
    assert experiment.scope[0].edits == str(folder / "e.safetensors")
    assert experiment.scope[0].model is not None and experiment.scope[0].model.name == str(folder / "my model")
    names = [str(folder / "my model"), str(folder / "other"), "org/name", "atlas", str(folder.parent / "there")]
    assert [model.name for model in experiment.model] == names
    vectors, inline = (part.prompts for part in experiment.parts)
    assert isinstance(vectors, VectorFile) and vectors.vectors == str(folder / "v.safetensors")
    assert inline[0].labels == {"file": "not a path", "vectors": "nor this"}  # type: ignore[index]
    monkeypatch.chdir(folder)
    assert Experiment.model_validate(experiment.document()) == experiment, "absolute paths do not hang on where one stands"


def test_paths_given_in_python_are_seen_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    experiment = Experiment(prompts={"file": "a/../b.csv"}, map={"affine": Path("~/f.safetensors")})
    assert experiment.prompts.file == str(tmp_path / "b.csv")  # type: ignore[union-attr]
    assert experiment.map[0].affine == str(Path.home() / "f.safetensors")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.toml", "name = 'x'\nlayers = \n", ("valid TOML", "line 2")),
        ("a.toml", "name = 'x'\nname = 'y'\n", ("valid TOML", "line 2")),
        ("a.yaml", "name: x\n  at: [1\n", ("valid YAML", "line 2")),
        ("a.yaml", "name: x\nat: 1\nname: y\n", ("'name' twice",)),
        ("a.yaml", "name: !!python/object/apply:os.getcwd []\n", ("valid YAML",)),
        ("a.yaml", "", ("holds nothing",)),
        ("a.yaml", "- a\n- b\n", ("holds a list",)),
        ("a.json", '{"name": "x",\n "at": }', ("valid JSON", "line 2")),
        ("a.json", '{"name": "x", "name": "y"}', ("'name' twice",)),
        ("a.json", "[" * 100_000, ("nested too deep",)),
        ("a.txt", "", ("suffix", ".toml")),
        ("a.toml", "prompts = 'a'\n[[parts]]\nname = 'b'\nlayrs = 3\n", ("a.toml: parts[0]", "'layers'")),
        ("a.yaml", "prompts: [a]\nseed: 2020-01-01\n", ("a.yaml: seed", "a whole number")),
    ],
)
def test_files_that_are_wrong_are_told_with_the_line(folder: Path, name: str, text: str, words: tuple[str, ...]) -> None:
    (folder / name).write_text(text)
    with pytest.raises(InputError) as caught:
        Experiment.load(folder / name)
    assert all(word in str(caught.value) for word in words), caught.value


def test_files_that_cannot_be_read_are_told(folder: Path) -> None:
    (folder / "latin.toml").write_bytes('name = "caf\xe9"'.encode("latin-1"))
    (folder / "folder.toml").mkdir()
    for name, words in (("none.toml", "there is no file"), ("latin.toml", "UTF-8"), ("folder.toml", "could not be read")):
        with pytest.raises(InputError, match=words):
            Experiment.load(folder / name)


def test_a_yaml_file_may_repeat_itself_by_reference(folder: Path) -> None:
    (folder / "a.yaml").write_text("prompts: [a]\nparts:\n  - &p {name: a, layers: 1}\n  - {<<: *p, name: b}\n")
    assert [(part.name, part.layers) for part in Experiment.load(folder / "a.yaml").parts] == [("a", 1), ("b", 1)]


# ---------------------------------------------------------------------------------------------------------------------------- digest


def test_the_digest_is_of_what_is_asked_for() -> None:
    digest = Experiment(**RICH).digest
    assert digest.startswith("sha256:") and len(digest) == 71
    for change in ({"name": "other"}, {"shard": 99}, {"on_bad_prompt": "refuse"}):
        assert Experiment(**{**RICH, **change}).digest == digest, change
    others = {
        "model": "atlas",
        "prompts": ["We talked about Franc"],
        "at": -1,
        "layers": [0, 3],
        "span": 2,
        "site": "resid",
        "scope": "describe",
        "map": "identity",
        "target_layer": "same",
        "tokens": 8,
        "stop": ["."],
        "temperature": 2,
        "draws": 2,
        "seed": 12,
        "controls": True,
        "evidence": False,
        "second_look": None,
        "outputs": {},
        "parts": [],
    }
    assert set(others) == set(Experiment.model_fields) - {"name", "shard", "on_bad_prompt"}
    digests = {Experiment(**{**RICH, **{key: value}}).digest for key, value in others.items()}
    assert len(digests) == len(others) and digest not in digests


def test_files_count_with_their_content_and_not_their_path(tmp_path: Path) -> None:
    def of(name: str, content: str, **more: Any) -> str:
        path = tmp_path / name
        path.write_text(content)
        prompts = {"file": path, **more}
        edits = {"prompt": "{x}", "edits": path}
        return Experiment(
            prompts=prompts, scope=edits, map={"affine": path}, parts=[{"name": "v", "prompts": {"vectors": path}}]
        ).digest

    assert of("a.csv", "prompt\na") == of("b.csv", "prompt\na") != of("a.csv", "prompt\nb")
    assert of("a.csv", "prompt\na", column="x") != of("a.csv", "prompt\na")
    with pytest.raises(InputError, match="could not be read"):
        _ = Experiment(prompts={"file": tmp_path / "none.csv"}).digest


# ---------------------------------------------------------------------------------------------------------------------------- schema


def test_the_schema_describes_every_key() -> None:
    found = schema()
    assert found["$schema"] == DRAFT and found["title"] and found["additionalProperties"] is False
    tables = {"": found, **found["$defs"]}
    expected = {
        "",
        "ModelSpec",
        "PromptSpec",
        "PromptFile",
        "VectorFile",
        "ScaleMap",
        "AffineMap",
        "FileMap",
        "TargetPrompt",
        "ScopeSpec",
    }
    assert set(tables) == expected | {"Outputs", "Part", "TunedLensMap", "JacobianLensMap"}
    for name, table in tables.items():
        assert table["additionalProperties"] is False, name
        for key, kind in table["properties"].items():
            assert kind.get("description") or key == "outputs", f"{name}.{key} has no description"
    assert found["$defs"]["Outputs"]["description"]
    assert found["$defs"]["Part"]["required"] == ["name"]


def test_the_schema_takes_what_is_taken() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    found = schema()
    jsonschema.Draft202012Validator.check_schema(found)
    check = jsonschema.Draft202012Validator(found)
    for keys in (RICH, {"prompts": "a"}, {"prompts": {"file": "x.csv"}, "model": {"name": "x"}}, Experiment(**RICH).document()):
        assert list(check.iter_errors(json.loads(json.dumps(keys)))) == []
    for keys in ({"promts": "a"}, {"parts": [{}]}, {"tokens": "5"}, {"draws": 0}, {"scope": 3}, {"outputs": {"logit": True}}):
        assert list(check.iter_errors(keys)), keys


# --------------------------------------------------------------------------------------------------------------------------- imports


def test_an_experiment_needs_no_torch() -> None:
    code = (
        "import sys; from patchscopes.experiment.spec import Experiment, schema;"
        "import patchscopes.experiment.prompts, patchscopes.cli.settings;"
        "e = Experiment(prompts='a'); e.document(); e.digest; schema();"
        "print({'torch', 'transformers', 'numpy', 'yaml'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"


def test_every_document_is_plain(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(Experiment(**RICH).document()))
    assert read_document(path) == Experiment(**RICH).document()
    assert issubclass(InputError, PatchscopesError)
