"""An experiment from the command line: flags, variables and files, which wins, and what `config` and `schema` print."""

from __future__ import annotations

import inspect
import json
import tomllib
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from patchscopes.cli import app as cli_app
from patchscopes.cli.config import as_toml
from patchscopes.cli.flags import FLAGS
from patchscopes.cli.settings import LOADING, gather, project_file, user_file
from patchscopes.cli.spec_options import experiment_from, with_experiment_options
from patchscopes.core.errors import InputError
from patchscopes.experiment.keys import KEYS
from patchscopes.experiment.spec import Experiment, schema
from patchscopes.experiment.spec_tables import ModelSpec, PromptFile, VectorFile

EXPERIMENT = """
layers = "0:3"
tokens = 5
model = ["atlas", { name = "org/b", device = "cuda:1" }]
prompts = { file = "p.csv", column = "q" }
scope = [{ prompt = "a {x}", tokens = 9, map = { scale = 3 }, model = "judge" }, "describe"]
outputs = { vectors = true }

[[parts]]
name = "one"
layers = 1
scope = { preset = "identity", tokens = 2 }

[[parts]]
name = "two"
prompts = { file = "other.csv" }
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory and a home of their own, and no variable of ours."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for flag in FLAGS:
        monkeypatch.delenv(f"PATCHSCOPES_{flag.name.upper()}", raising=False)
    return tmp_path


@pytest.fixture
def file(home: Path) -> Path:
    path = home / "here" / "experiment.toml"
    path.write_text(EXPERIMENT)
    return path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def asked(*args: str) -> Experiment:
    """What a command with the options makes of these arguments."""
    seen: list[Experiment] = []
    app = typer.Typer()

    @app.command()
    @with_experiment_options
    def sweep(file: Annotated[Path | None, typer.Argument()] = None, dry_run: bool = False, **flags: Any) -> None:
        seen.append(experiment_from(file, **flags))

    result = CliRunner().invoke(app, list(args))
    if result.exception is not None:
        raise result.exception
    return seen[0]


# ----------------------------------------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("args", "keys"),
    [
        (["-p", "a b"], {"prompts": "a b"}),
        (["--prompt", "a", "--prompt", "b", "--at", "3"], {"prompts": ["a", "b"], "at": 3}),
        (["-p", "a", "--chat"], {"prompts": {"text": "a", "chat": True}}),
        (["--prompts", "x.csv"], {"prompts": {"file": "x.csv"}}),
        (
            [
                "--prompts",
                "d",
                "--column",
                "q",
                "--at-column",
                "w",
                "--label",
                "a",
                "--label",
                "b",
                "--split",
                "s",
                "--limit",
                "3",
            ],
            {"prompts": {"file": "d", "column": "q", "at_column": "w", "labels": ["a", "b"], "split": "s", "limit": 3}},
        ),
        (["--prompts", "d", "--sample", "3", "--chat"], {"prompts": {"file": "d", "sample": 3, "chat": True}}),
        (["--vectors", "v.safetensors", "--tensor", "t"], {"prompts": {"vectors": "v.safetensors", "tensor": "t"}}),
        (["-p", "a", "-m", "atlas", "-m", "gpt2"], {"prompts": "a", "model": ["atlas", "gpt2"]}),
        (["-p", "a", "--layers", "0:3", "--site", "mlp_out"], {"prompts": "a", "layers": "0:3", "site": "mlp_out"}),
        (["-p", "a", "--scope", "identity", "--scope", "b {x}"], {"prompts": "a", "scope": ["identity", "b {x}"]}),
        (
            ["-p", "a", "--map", "scale:-2.5", "--map", "identity", "--map", "affine:f.safetensors"],
            {"prompts": "a", "map": [{"scale": -2.5}, "identity", {"affine": "f.safetensors"}]},
        ),
        (["-p", "a", "--target-layer", "all", "--tokens", "3"], {"prompts": "a", "target_layer": "all", "tokens": 3}),
        (["-p", "a", "--stop", ".", "--stop", "\n"], {"prompts": "a", "stop": [".", "\n"]}),
        (["-p", "a", "--temperature", "0.5", "--draws", "4"], {"prompts": "a", "temperature": 0.5, "draws": 4}),
        (["-p", "a", "--no-controls", "--seed", "4"], {"prompts": "a", "controls": False, "seed": 4}),
        (["-p", "a", "--controls"], {"prompts": "a", "controls": True}),
        (
            ["-p", "a", "--top-k", "5", "--save-vectors", "--save-logits"],
            {"prompts": "a", "outputs": {"top_k": 5, "vectors": True, "logits": True}},
        ),
        (["-p", "a", "--name", "n", "--shard", "4"], {"prompts": "a", "name": "n", "shard": 4}),
        (["-p", "a", "--on-bad-prompt", "skip"], {"prompts": "a", "on_bad_prompt": "skip"}),
        (
            ["-p", "a", "--device", "cpu", "--dtype", "float64", "--attention", "eager", "--trust-remote-code"],
            {
                "prompts": "a",
                "model": {"name": "atlas", "device": "cpu", "dtype": "float64", "attention": "eager", "trust_remote_code": True},
            },
        ),
        (["-p", "a", "--device-map", "auto"], {"prompts": "a", "model": {"name": "atlas", "device_map": "auto"}}),
    ],
)
def test_flags_ask_for_what_a_file_would(args: list[str], keys: dict) -> None:
    assert asked(*args) == Experiment(**keys)


def test_every_flag_is_a_key_with_its_help() -> None:
    tables = {**PromptFile.model_fields, **VectorFile.model_fields, **Experiment.model_fields}
    for flag in FLAGS:
        assert flag.key in (ModelSpec.model_fields if flag.name in LOADING else tables), flag.name
        assert flag.help.endswith(".") or flag.help.endswith("…"), flag.name
    assert {flag.key for flag in FLAGS} >= set(Experiment.model_fields) - {"parts", "second_look"}
    assert len({flag.option for flag in FLAGS}) == len(FLAGS)
    helps = {flag.name: flag.help for flag in FLAGS}
    assert all(helps[name] == KEYS[name] for name in ("at", "layers", "tokens", "draws", "controls", "dtype", "top_k"))


def test_a_command_keeps_its_own_parameters() -> None:
    @with_experiment_options
    def command(file: Path | None = None, **flags: Any) -> None: ...

    names = list(inspect.signature(command).parameters)
    assert names == ["file", *(flag.name for flag in FLAGS)]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["-p", "a", "--prompts", "b"], "--prompt and --prompts were given"),
        (["-p", "a", "--vectors", "b"], "--prompt and --vectors"),
        (["-p", "a", "--column", "b"], "--column is about prompts in a file"),
        (["--column", "b"], "--column is about prompts in a file"),
        (["-p", "a", "--map", "scale:x"], "'scale:x' has no number"),
        (["-p", "a", "--map", "scal:2"], "unknown map 'scal:2'"),
        (["-p", "a", "--layers", "x"], "layers (--layers): found the text 'x'"),
        (["-p", "a", "--scope", "descrbe"], "scope[0] (--scope): unknown scope 'descrbe'"),
        (["-p", "a", "--draws", "3"], "3 draws at temperature 0"),
        (["-p", "a", "--dtype", "float12"], "unknown dtype 'float12'"),
        (["-p", "a", "--device", "cpu", "--device-map", "auto"], "--device and --device-map were given"),
        ([], "nothing to read"),
        (["none.toml"], "there is no file"),
    ],
)
def test_what_is_wrong_is_told_with_the_flag(args: list[str], words: str) -> None:
    with pytest.raises(InputError) as caught:
        asked(*args)
    assert words in str(caught.value)


# ------------------------------------------------------------------------------------------------------------------- order of sources


def test_a_flag_wins_over_the_variable_over_the_file_over_the_project_over_the_user(
    home: Path, monkeypatch: pytest.MonkeyPatch, file: Path
) -> None:
    def layers(*args: str) -> tuple[Any, str]:
        found = gather(Path(args[0]) if args else None)
        return found.document.get("layers", "all"), found.origin.get("layers", "default")

    assert layers() == ("all", "default")
    user = write(home / "home" / "patchscopes" / "config.toml", "layers = 1\nseed = 8\noutputs = { top_k = 3 }")
    assert user == user_file() and layers() == (1, str(user))
    project = write(home / "here" / "patchscopes.toml", "layers = 2\noutputs = { logits = true }")
    assert project == project_file() and layers() == (2, str(project))
    assert layers("experiment.toml") == ("0:3", "experiment.toml")
    monkeypatch.setenv("PATCHSCOPES_LAYERS", "4")
    assert layers("experiment.toml") == ("4", "the variable PATCHSCOPES_LAYERS")
    experiment = asked("experiment.toml", "--layers", "5")
    assert experiment.layers == 5 and experiment.seed == 8
    assert experiment.outputs.model_dump() == {"top_k": 3, "vectors": True, "logits": True}, "outputs are merged key by key"


def test_flags_hold_for_all_parts_and_scopes(file: Path) -> None:
    plain = asked(str(file))
    assert [part.layers for part in plain.split()] == [1, "0:3"]
    changed = asked(str(file), "--layers", "2", "--tokens", "7", "--map", "identity")
    assert [part.layers for part in changed.split()] == [2, 2]
    assert [scope.tokens for part in changed.split() for scope in part.scope] == [None] * 3 and changed.tokens == 7
    assert all(scope.map is None for part in changed.split() for scope in part.scope)
    assert [part.name for part in asked(str(file), "--name", "new").parts] == ["one", "two"]
    both = asked(str(file), "--column", "other", "--limit", "2").split()
    assert [(Path(p.prompts.file).name, p.prompts.column, p.prompts.limit) for p in both] == [  # type: ignore[union-attr]
        ("p.csv", "other", 2),
        ("other.csv", "other", 2),
    ]
    assert {p.prompts[0].text for p in asked(str(file), "-p", "x").split()} == {"x"}  # type: ignore[index, union-attr]


def test_how_models_are_loaded_is_filled_in_or_put_over(home: Path, file: Path) -> None:
    write(home / "here" / "patchscopes.toml", 'device = "cpu"\ndtype = "float64"')
    filled = asked(str(file)).models()
    expected = [("atlas", "cpu", "float64"), ("judge", "cpu", "float64"), ("org/b", "cuda:1", "float64")]
    assert sorted((model.name, model.device, model.dtype) for model in filled) == expected
    over = asked(str(file), "--device", "mps").models()
    assert {model.device for model in over} == {"mps"} and {model.dtype for model in over} == {"float64"}
    spread = asked(str(file), "--device-map", "auto").models()
    assert {(model.device, model.device_map) for model in spread} == {(None, "auto")}
    assert asked("-p", "a").models() == [ModelSpec(name="atlas", device="cpu", dtype="float64")]


def test_of_the_ways_to_say_where_a_model_goes_the_later_wins(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(home / "home" / "patchscopes" / "config.toml", 'device = "cpu"')
    write(home / "here" / "patchscopes.toml", 'device_map = "auto"')
    assert asked("-p", "a").model[0].model_dump(exclude_none=True)["device_map"] == "auto"
    monkeypatch.setenv("PATCHSCOPES_DEVICE", "mps")
    assert (asked("-p", "a").model[0].device, asked("-p", "a").model[0].device_map) == ("mps", None)


def test_relative_paths_are_seen_from_where_they_were_said(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(home / "home" / "patchscopes" / "config.toml", 'map = { affine = "f.safetensors" }')
    path = write(home / "else where" / "x.toml", 'prompts = { file = "p.csv" }')
    experiment = asked(str(path))
    assert experiment.map[0].affine == str(home / "home" / "patchscopes" / "f.safetensors")  # type: ignore[union-attr]
    assert experiment.prompts.file == str(home / "else where" / "p.csv")  # type: ignore[union-attr]
    assert asked(str(path), "--prompts", "q.csv").prompts.file == str(home / "here" / "q.csv")  # type: ignore[union-attr]
    monkeypatch.setenv("PATCHSCOPES_PROMPTS", "r.csv")
    assert asked().prompts.file == str(home / "here" / "r.csv")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("variable", "text", "key", "value"),
    [
        ("TOKENS", "3", "tokens", 3),
        ("TEMPERATURE", "0.5", "temperature", 0.5),
        ("CONTROLS", "no", "controls", False),
        ("CONTROLS", "TRUE", "controls", True),
        ("AT", "2", "at", 2),
        ("TARGET_LAYER", "all", "target_layer", "all"),
        ("STOP", "q", "stop", ("q",)),
        ("SEED", "", "seed", 0),
    ],
)
def test_variables_are_read_as_flags(monkeypatch: pytest.MonkeyPatch, variable: str, text: str, key: str, value: Any) -> None:
    monkeypatch.setenv(f"PATCHSCOPES_{variable}", text)
    assert getattr(asked("-p", "a"), key) == value


@pytest.mark.parametrize(
    ("variable", "text", "words"),
    [
        ("TOKENS", "x", "PATCHSCOPES_TOKENS is 'x'; expected a whole number"),
        ("CONTROLS", "perhaps", "expected true or false"),
        ("TOKENS", "0", "tokens (the variable PATCHSCOPES_TOKENS): found the number 0"),
        ("LAYER", "1", "Did you mean PATCHSCOPES_LAYERS"),
    ],
)
def test_wrong_variables_are_told(monkeypatch: pytest.MonkeyPatch, variable: str, text: str, words: str) -> None:
    monkeypatch.setenv(f"PATCHSCOPES_{variable}", text)
    with pytest.raises(InputError) as caught:
        asked("-p", "a")
    assert words in str(caught.value)


def test_variables_of_others_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CACHE", "OFFLINE", "RUNS", "NO_HOST", "MAX", "TRUST_REMOTE_CODE"):
        monkeypatch.setenv(f"PATCHSCOPES_{name}", "1")
    assert asked("-p", "a") == Experiment(prompts="a")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("layrs = 3", "patchscopes.toml: unknown key 'layrs'. Did you mean 'layers'"),
        ("devic = 3", "Did you mean 'device'"),
        ("layers = 'x'", "layers (.*patchscopes.toml)"),
        ("trust_remote_code = true", "trust_remote_code cannot be said here"),
        ("model = { name = 'x', trust_remote_code = true }", "trust_remote_code cannot be said here"),
        ("parts = [{ name = 'a', scope = [{ model = { name = 'x', trust_remote_code = true } }] }]", "cannot be said here"),
        ("x =", "valid TOML"),
    ],
)
def test_a_project_file_that_is_wrong_is_told(home: Path, text: str, words: str) -> None:
    write(home / "here" / "patchscopes.toml", text)
    with pytest.raises(InputError, match=words.replace("(", r"\(").replace(")", r"\)")):
        asked("-p", "a")


def test_the_project_file_can_be_the_experiment(home: Path) -> None:
    write(home / "here" / "patchscopes.toml", "prompts = 'a'\nmodel = { name = 'x', trust_remote_code = true }")
    for path in ("patchscopes.toml", str(project_file())):
        assert asked(path).model[0].trust_remote_code is True, "it was named, so it was consented to"


# ------------------------------------------------------------------------------------------------------------------------- commands


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = cli_app.run(list(args))
    return code, *capsys.readouterr()


def test_config_show_prints_what_holds_and_where_it_comes_from(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(home / "here" / "patchscopes.toml", 'stop = ["\\n", "ü\\""]\ndevice = "cpu"\nmap = [{ scale = 2.0 }]')
    monkeypatch.setenv("PATCHSCOPES_TOKENS", "4")
    code, out, _ = run(capsys, "config", "show", "--origin")
    assert code == 0
    lines = {line.split("  #")[0].strip(): line.rsplit("# ", 1)[1] for line in out.splitlines()}
    assert lines['stop = ["\\n", "ü\\""]'] == lines['device = "cpu"'] == str(home / "here" / "patchscopes.toml")
    assert (
        lines["tokens = 4"] == "the variable PATCHSCOPES_TOKENS"
        and lines['layers = "all"'] == lines['model = "atlas"'] == "default"
    )
    assert "# target_layer is not set" in lines
    code, out, _ = run(capsys, "config", "show")
    found = tomllib.loads(out)
    assert found["stop"] == ["\n", 'ü"'] and found["map"] == [{"scale": 2.0}] and found["tokens"] == 4
    write(home / "here" / "patchscopes.toml", out)
    monkeypatch.delenv("PATCHSCOPES_TOKENS")
    assert run(capsys, "config", "show")[1] == out, "what was printed is a configuration file that says the same"
    code, out, _ = run(capsys, "config", "show", "--origin", "--json")
    assert json.loads(out)["tokens"] == {"value": 4, "origin": str(home / "here" / "patchscopes.toml")}
    assert set(json.loads(out)) == set(Experiment.model_fields) - {"prompts", "parts"} | {"device"}


def test_config_show_takes_an_experiment(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "config", "show", str(file), "--json", "--origin")
    assert code == 0 and json.loads(out)["layers"] == {"value": "0:3", "origin": str(file)}
    assert json.loads(out)["prompts"]["value"]["column"] == "q"


def test_config_show_tells_what_is_wrong(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(home / "here" / "patchscopes.toml", "tokens = 0")
    code, out, err = run(capsys, "config", "show")
    assert (code, out) == (2, "") and "tokens" in err and "at least 1" in " ".join(err.split())


def test_config_path_prints_where_settings_are_looked_for(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "config", "path")
    assert (code, out.splitlines()) == (0, [str(user_file()), str(project_file())])
    write(user_file(), "")
    found = json.loads(run(capsys, "config", "path", "--json")[1])
    assert (found["user"], found["project"]["exists"]) == ({"path": str(user_file()), "exists": True}, False)


def test_schema_prints_the_schema(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "schema")
    assert (code, json.loads(out), err) == (0, schema(), "")


@pytest.mark.parametrize(
    "value", ['a"b\\c\n\tü\x7f\x00', -1, 0.5, True, [], ["a", 1], {"a b": {"c": [1]}, "d-e": "f", "ü": 1}, {}, 1e300, {"a": None}]
)
def test_values_as_toml_read_back(value: Any) -> None:
    expected = {} if value == {"a": None} else value
    assert tomllib.loads(f"x = {as_toml(value)}")["x"] == expected
