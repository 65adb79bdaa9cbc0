"""The command line: exit codes, what goes to stdout and what to stderr, and that --help imports nothing heavy."""

from __future__ import annotations

import io
import json
import math
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertLMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
)

from patchscopes.cli import app, demo, doctor, inspect, organism, terminal, tokens
from patchscopes.core.errors import RefusedError
from patchscopes.evaluate.atlas import AtlasScores, Share
from patchscopes.model import Tokens
from patchscopes.organisms.atlas.train import Progress, Recipe
from patchscopes.scopes import Readings

CONTEXT = 160
HEAVY = {"torch", "transformers", "polars", "matplotlib", "numpy", "safetensors", "huggingface_hub", "yaml"}
COMMANDS = ("inspect", "tokens", "check", "doctor", "bench", "demo", "organism", "organism train", "organism evaluate")
COMMANDS += ("report", "figure", "evaluate", "schema", "config", "config show", "config path")


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys):
    """Run a command line in this process."""

    def run(*args: object) -> Result:
        capsys.readouterr()
        code = app.run([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return Result(code, out, err)

    return run


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Tiny models as folders: a decoder, the same without its tokenizer, an encoder, a vision model; and an empty folder."""
    torch.manual_seed(0)
    at = {kind: tmp_path_factory.mktemp(kind) for kind in ("decoder", "speechless", "encoder", "vision", "empty")}
    tokenizer = byte_tokenizer()
    size = {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    llama = LlamaConfig(**size, vocab_size=len(tokenizer), max_position_embeddings=CONTEXT, bos_token_id=0, eos_token_id=0)
    for kind in ("decoder", "speechless"):
        LlamaForCausalLM(llama).save_pretrained(at[kind])
    bert = BertLMHeadModel(BertConfig(**size, vocab_size=len(tokenizer), initializer_range=0.5))
    bert.save_pretrained(at["encoder"])
    ViTForImageClassification(ViTConfig(**size, image_size=32, patch_size=16)).save_pretrained(at["vision"])
    for kind in ("decoder", "encoder"):
        tokenizer.save_pretrained(at[kind])
    return at


@pytest.fixture(scope="session")
def model(folders) -> Path:
    return folders["decoder"]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few merges; a BOS in front of every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False)
    sentence = "The capital of France is Paris, Wales: Country in the Middle East, American actor, South Korean multinational "
    tokenizer.train_from_iterator([sentence * 20], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>", padding_side="left")


# ------------------------------------------------------------------------------------------------------------------ start


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_imports_nothing_heavy(command):
    script = (
        "import sys; from patchscopes.cli import app; code = app.run([*sys.argv[1:], '--help']);"
        f"heavy = {HEAVY!r} & set(sys.modules); print(sorted(heavy), file=sys.stderr); sys.exit(code or len(heavy))"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script, *command.split()], capture_output=True, text=True, timeout=120)
    print(f"patchscopes {command} --help: {time.perf_counter() - started:.2f} s")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Usage: patchscopes")


def test_the_module_runs_as_the_command_does():
    done = subprocess.run([sys.executable, "-m", "patchscopes", "--version"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, metadata.version("patchscopes"), "")


def test_every_command_is_in_the_help(cli):
    result = cli("--help")
    assert result.code == 0
    assert all(command.split()[0] in result.out for command in COMMANDS)


# ----------------------------------------------------------------------------------------------------------- wrong usage

OPTIONS = [
    (("inspct",), 2, "Did you mean 'inspect'"),
    (("inspect",), 2, "PROMPT"),
    (("inspect", "a", "--modle", "b"), 2, "--model"),
    (("inspect", "a", "--tokens", "0"), 2, "--tokens"),
    (("inspect", "a", "--scope", "descibe"), 2, "Did you mean 'describe'"),
    (("inspect", "a", "--scope", "The capital of"), 2, "has no {x}"),
    (("inspect", "a", "--scope", "logit-lens", "--target-layer", "all"), 2, "no --target-layer"),
    (("inspect", "a", "--figure", "map.gif"), 2, ".png, .svg, .pdf"),
    (("inspect", "a", "--dtype", "float12"), 2, "Did you mean"),
    (("organism", "train", "atlsa", "--out", "nowhere"), 2, "Did you mean 'atlas'"),
    (("organism", "train", "atlas", "--out", "nowhere", "--scale", "2"), 2, "at most 1"),
    (("organism", "evaluate", "atlsa"), 2, "Did you mean 'atlas'"),
]


@pytest.mark.parametrize(("args", "code", "words"), OPTIONS, ids=[" ".join(args) for args, _, _ in OPTIONS])
def test_wrong_usage_is_told_before_anything_is_loaded(cli, monkeypatch, args, code, words):
    monkeypatch.setattr("patchscopes.model.load", lambda *_args, **_options: pytest.fail("loaded"))
    result = cli(*args)
    assert (result.code, result.out) == (code, "")
    assert words in result.err


INPUTS = [
    (("",), 2, "is empty"),
    (("   ",), 2, "is empty"),
    (("the cat and the dog", "--at", "the"), 2, "#1 is token"),
    (("the cat and the dog", "--at", "Paris"), 2, "does not occur"),
    (("the cat", "--at", ""), 2, "does not occur"),
    (("the cat", "--at", "the#2"), 2, "occurs 1 times"),
    (("the cat", "--at", "99"), 2, "0 to 4 (-1 is the last)"),
    (("in 1984", "--at", "1984"), 2, "--at '1984#1'"),
    (("the cat", "--layers", "9"), 2, "layers 0 to 3"),
    (("the cat", "--layers", "0:9"), 2, "0 to 3"),
    (("the cat", "--layers", "first"), 2, "0 to 3"),
    (("the cat", "--target-layer", "9"), 2, "layers 0 to 3"),
    (("a" * 2 * CONTEXT,), 2, f"at most {CONTEXT}"),
    (("the cat", "--tokens", CONTEXT), 2, f"at most {CONTEXT}"),
    (("the cat", "--at", "all", "--target-layer", "all", "--figure", "map.png"), 2, "--figure"),
    (("the cat", "--device", "toaster"), 2, "expected cpu"),
    (("the cat", "--device", "cuda:77"), 4, "found cpu"),
    (("the cat", "--chat"), 4, "no chat template"),
]


@pytest.mark.parametrize(("args", "code", "words"), INPUTS, ids=[" ".join(map(str, args))[:60] for args, _, _ in INPUTS])
def test_wrong_input_says_what_and_what_else(cli, model, args, code, words):
    result = cli("inspect", *args, "--model", model)
    assert (result.code, result.out) == (code, "")
    assert words in result.err
    assert re.search("^error: ", result.err, re.MULTILINE)
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    "command", [("inspect", "the cat", "--model"), ("tokens", "the cat", "--model"), ("check",)], ids=lambda c: c[0]
)
@pytest.mark.parametrize(
    ("kind", "code", "words"),
    [
        ("atlsa", 4, "no model 'atlsa'"),
        ("./nowhere", 4, "no such folder"),
        ("empty", 4, "config.json"),
        ("speechless", 4, "no tokenizer"),
        ("encoder", 6, "decoder"),
        ("vision", 6, "decoder"),
    ],
)
def test_what_is_no_model_is_refused_with_the_reason(cli, folders, command, kind, code, words):
    result = cli(*command, folders.get(kind, kind))
    assert (result.code, result.out) == (code, "")
    assert words in result.err
    assert result.err.startswith("error: ")


def test_an_unknown_model_suggests_a_bundled_one(cli, monkeypatch, model):
    monkeypatch.setattr("patchscopes.organisms.bundled", lambda: {"atlas": model})
    assert "Did you mean 'atlas'" in cli("tokens", "a", "--model", "atlsa").err


@pytest.mark.parametrize("option", ["--save", "--figure"])
def test_a_place_that_cannot_be_written_is_told_before_the_run(cli, model, tmp_path, monkeypatch, option):
    monkeypatch.setattr("patchscopes.scopes.Patchscope.__call__", lambda *_args, **_options: pytest.fail("ran"))
    (tmp_path / "file").write_text("")
    result = cli("inspect", "the cat", "--model", model, option, tmp_path / "file" / "map.png")
    assert (result.code, result.out) == (2, "")
    assert "could not be written" in result.err


# --------------------------------------------------------------------------------------------------------------- failure


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyError("boom"), 1, "bug in patchscopes"),
        (ValueError(""), 1, "ValueError. This is a bug"),
        (MemoryError(), 5, "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), 5, "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 5, "out of memory"),
        (OSError(28, "No space left on device"), 5, "disk is full"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_what_goes_wrong_has_its_exit_code(cli, monkeypatch, error, code, words):
    def fail(*_args):
        raise error

    monkeypatch.setattr(tokens, "load_model", fail)
    result = cli("tokens", "hello")
    assert (result.code, result.out) == (code, "")
    assert words in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize("args", [("--debug", "tokens", "hello"), ("tokens", "hello", "--debug")])
def test_debug_shows_the_traceback(cli, monkeypatch, args):
    monkeypatch.setattr(tokens, "load_model", lambda *_args: 1 / 0)
    result = cli(*args)
    assert (result.code, result.out) == (1, "")
    assert "Traceback" in result.err
    assert result.err.rstrip().splitlines()[-1].startswith("error: ZeroDivisionError")


def test_after_two_dashes_debug_is_a_prompt(cli, monkeypatch):
    monkeypatch.setattr(tokens, "load_model", lambda *_args: 1 / 0)
    result = cli("tokens", "--", "--debug")
    assert result.code == 1
    assert "Traceback" not in result.err


def test_sigterm_ends_with_143():
    script = (
        "import os, signal, sys, time\n"
        "from patchscopes.cli import app, tokens\n"
        "tokens.load_model = lambda *args: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(60))\n"
        "sys.argv = ['patchscopes', 'tokens', 'hello']\n"
        "app.main()\n"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=120).returncode == 143


# --------------------------------------------------------------------------------------------------------------- inspect


def test_inspect_prints_the_table_on_stdout_and_talks_on_stderr(cli, model):
    result = cli("inspect", "We talked about France", "--at", "France", "--model", model, "--layers", "1,3")
    assert result.code == 0
    assert "verdict" in result.out
    assert "nothing patched in" in result.out
    assert "at token" in result.err
    assert "layers 1, 3" in result.err


def test_inspect_json_is_one_document(cli, model):
    prompt = "We talked about France"
    result = cli("inspect", prompt, "--at", "France", "--model", model, "--layers", "0:2", "--json")
    assert result.code == 0
    found = json.loads(result.out)
    assert (found["prompt"], found["model"], found["scope"]) == (prompt, str(model), "describe")
    assert [row["source_layer"] for row in found["readings"]] == [0, 1]
    assert all(row["control"] == "none" and row["verdict"] for row in found["readings"])
    assert {"bits_over_others", "p_value", "text", "surprisal"} <= set(found["readings"][0])
    assert {row["control"] for row in found["controls"]} == {"nothing", "random", "other", "mean", "text"}
    assert found["provenance"]["scope"]["stop"] == [",", "\n"]


SCOPES = {
    "back-patch": ("back-patch", 10, "all"),
    "describe": ("describe", 20, "same"),
    "identity": ("identity", 1, "same"),
    "identity-bare": ("identity", 1, "same"),
    "logit-lens": ("logit-lens", 1, -1),
    "embedding-space": ("embedding-space", 1, -1),
    "future-lens": ("future-lens", 4, "same"),
    "repeat": ("repeat", 20, 0),
    "The capital of {x} is": ("extract", 10, "same"),
}


@pytest.mark.parametrize("scope", SCOPES)
def test_every_scope_runs(cli, model, scope):
    result = cli("inspect", "the cat", "--model", model, "--scope", scope, "--layers", "2", "--no-controls", "--json")
    found = json.loads(result.out)
    settings = found["provenance"]["scope"]
    assert (settings["name"], settings["max_new_tokens"], settings["layer"]) == SCOPES[scope]
    assert found["controls"] == []
    assert found["readings"][0]["p_value"] is None


def test_options_reach_the_scope(cli, model):
    args = (
        "--scope",
        "A {x} is",
        "--tokens",
        "3",
        "--target-layer",
        "0:2",
        "--layers",
        "1",
        "--no-controls",
        "--dtype",
        "float64",
        "--json",
    )
    found = json.loads(cli("inspect", "the cat", "--model", model, *args).out)
    assert [row["target_layer"] for row in found["readings"]] == [0, 1]
    assert all(row["n_tokens"] <= 3 for row in found["readings"])
    assert found["provenance"]["source_model"]["dtype"] == "float64"


@pytest.mark.parametrize(("at", "position"), [("-1", 6), ("4", 4), ("the#2", 5), ("cat", 2)])
def test_at_is_an_index_or_a_text(at, position):
    pieces = ("<s>", "the", " cat", " and", "", " the", " dog")
    offsets = ((0, 0), (0, 3), (3, 7), (7, 11), (0, 0), (11, 15), (15, 19))
    words = Tokens("the cat and the dog", tuple(range(7)), pieces, offsets, tuple(a == b for a, b in offsets))
    assert inspect.resolve_at(words, at) == position


def test_saving_leaves_what_can_be_opened_and_a_map_of_layers(cli, model, tmp_path):
    args = ("--scope", "A {x} is", "--target-layer", "all", "--tokens", "2", "--save", tmp_path / "kept")
    result = cli("inspect", "the cat", "--model", model, *args)
    assert result.code == 0
    assert "target layer ℓ*" in result.out
    assert Readings.load(tmp_path / "kept").readings.height == 16
    assert (tmp_path / "kept" / "heatmap.png").read_bytes().startswith(b"\x89PNG")
    assert "saved to" in result.err


@pytest.mark.parametrize("at", ["-1", "all"])
def test_a_figure_of_one_position_or_of_all(cli, model, tmp_path, at):
    result = cli(
        "inspect",
        "the cat",
        "--at",
        at,
        "--model",
        model,
        "--no-controls",
        "--scope",
        "logit-lens",
        "--figure",
        tmp_path / "map.svg",
    )
    assert result.code == 0
    assert (tmp_path / "map.svg").stat().st_size > 1000
    assert ("position (right)" in result.out) == (at == "all")


# -------------------------------------------------------------------------------------------------------- tokens, check


def test_tokens_shows_every_position_and_byte(cli, model):
    found = json.loads(cli("tokens", "Zürich is", "--model", model, "--find", "is", "--json").out)
    rows = found["tokens"]
    assert [row["position"] for row in rows] == list(range(len(rows)))
    assert [row["from_end"] for row in rows] == list(range(-len(rows), 0))
    assert rows[0]["special"] and rows[0]["bytes"] == ""
    assert any(row["bytes"] == "c3 bc" for row in rows)  # ü
    assert found["find"]["occurrences"] == [{"first": len(rows) - 1, "last": len(rows) - 1}]


def test_tokens_finds_every_occurrence(cli, model):
    result = cli("tokens", "the cat and the dog", "--model", model, "--find", "the")
    assert result.code == 0
    assert "'the#1' is token" in result.out
    assert "'the#2' is token" in result.out
    assert "␣" in result.out


def test_tokens_without_the_text_says_so(cli, model):
    result = cli("tokens", "the cat", "--model", model, "--find", "dog")
    assert (result.code, result.out) == (2, "")
    assert "does not occur" in result.err


def test_check_tells_parts_sites_abilities_and_the_route(cli, model):
    found = json.loads(cli("check", model, "--json").out)
    assert found["architecture"] == "LlamaForCausalLM"
    assert found["sites"] == [f"{name}.{i}" for name, n in (("resid", 4), ("attn_out", 3), ("mlp_out", 3)) for i in range(n)]
    assert found["route"] == "stairs"
    assert all(ability["ok"] and ability["meaning"] for ability in found["abilities"].values())
    result = cli("check", model)
    assert result.code == 0
    assert "resid.0 to 3, attn_out.0 to 2, mlp_out.0 to 2" in " ".join(result.out.split())
    assert "All abilities are there." in result.out


# --------------------------------------------------------------------------------------------------------- doctor, demo


def test_doctor_tells_the_machine(cli):
    found = json.loads(cli("doctor", "--json").out)
    assert found["versions"]["torch"] == metadata.version("torch")
    assert found["cpu"]["cores"] >= 1
    assert found["hugging_face"]["offline"] is True
    result = cli("doctor")
    assert result.code == 0
    assert "model cache" in result.out


def test_doctor_works_where_torch_does_not(cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it raises
    result = cli("doctor")
    assert result.code == 0
    assert "cannot be imported" in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    ("version", "fits"), [("5.14.2", False), ("5.15.0", True), ("5.23.0.dev0", True), ("6.0.0", False), (None, False)]
)
def test_doctor_warns_of_a_transformers_that_does_not_fit(monkeypatch, version, fits):
    monkeypatch.setattr(doctor, "_version", lambda package: version if package == "transformers" else "1.0")
    assert any("transformers" in problem for problem in doctor.look()["problems"]) != fits


def test_doctor_wants_the_transformers_that_the_package_wants():
    wanted = next(r for r in metadata.requires("patchscopes") or () if r.startswith("transformers"))
    low, high = doctor.TRANSFORMERS
    assert f">={low[0]}.{low[1]}" in wanted
    assert f"<{high[0]}" in wanted


def test_doctor_names_what_brings_a_missing_package(cli, monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda package: None if package == "peft" else "5.20.0")
    assert "pip install 'patchscopes[peft]'" in " ".join(cli("doctor").out.split())


def test_demo_does_the_main_job_and_says_what_next(cli, model, tmp_path):
    result = cli("demo", "--model", model, "--out", tmp_path / "demo")
    assert result.code == 0
    assert (tmp_path / "demo" / "capital.png").read_bytes().startswith(b"\x89PNG")
    assert Readings.load(tmp_path / "demo" / "capital-map").readings.height == 16
    assert str(tmp_path / "demo" / "capital.png") in result.out
    assert result.out.rstrip().endswith(demo.NEXT[-1])


# -------------------------------------------------------------------------------------------------------------- organism


def test_training_reports_lines_and_the_folder(cli, monkeypatch, tmp_path):
    def train(out, recipe, *, device, report):
        assert recipe == Recipe(seed=3).scaled(0.5)
        report(Progress(1, 2, 2.5, 1000.0, 60.0))
        report(Progress(2, 2, 1.5, 1000.0, 0.0))

    monkeypatch.setattr("patchscopes.organisms.atlas.train.train", train)
    result = cli("organism", "train", "atlas", "--out", tmp_path / "new", "--scale", "0.5", "--seed", "3")
    assert (result.code, result.out.strip()) == (0, str(tmp_path / "new"))
    assert "step 2 of 2, loss 1.500 nats" in result.err


def test_stopped_training_says_how_to_go_on(cli, monkeypatch, tmp_path):
    def train(out, recipe, *, device, report):
        (out / "checkpoint").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr("patchscopes.organisms.atlas.train.train", train)
    result = cli("organism", "train", "atlas", "--out", tmp_path)
    assert (result.code, result.out) == (130, "")
    assert "same command goes on" in result.err


def test_training_over_another_recipe_is_refused(cli, monkeypatch, tmp_path):
    def train(out, recipe, *, device, report):
        raise RefusedError("a checkpoint of another recipe")

    monkeypatch.setattr("patchscopes.organisms.atlas.train.train", train)
    assert cli("organism", "train", "atlas", "--out", tmp_path).code == 6


def test_evaluation_prints_the_figures(cli, monkeypatch, model):
    asked = {}

    def evaluate(loaded, *, n, share, seed, progress):
        asked.update(n=n, share=share, seed=seed)
        progress(1, 1, "recall")
        half, none = Share(0.5, 10), Share(math.nan, 0)
        return AtlasScores(half, half, half, none, half, half, half, (2, 1), ((0.5,),), {"country.capital": half})

    monkeypatch.setattr("patchscopes.evaluate.atlas.evaluate", evaluate)
    found = json.loads(cli("organism", "evaluate", "atlas", "--model", model, "--quick", "--json").out)
    assert (found["recall"], found["n"]["recall"], found["best_cell"]) == (0.5, 10, {"layer": 2, "target_layer": 1})
    assert found["two_hop_held_out"] is None
    assert asked == {"n": organism.QUICK, "share": 1.0, "seed": 0}
    result = cli("organism", "evaluate", "atlas", "--model", model)
    assert "50.0%" in result.out
    assert asked["n"] is None


# -------------------------------------------------------------------------------------------------------------- terminal


def test_json_has_no_nan(capsys):
    terminal.print_json({"a": math.nan, "b": [math.inf, (1.5, None)], "c": "NaN"})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, [1.5, None]], "c": "NaN"}


def test_json_on_an_ascii_terminal_is_escaped(monkeypatch):
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="ascii"))
    terminal.print_json({"city": "Zürich 京都"})
    sys.stdout.flush()
    assert json.loads(out.getvalue()) == {"city": "Zürich 京都"}


@pytest.mark.parametrize(("n", "words"), [(0, "0 bytes"), (1536, "1.5 KiB"), (2**30, "1.0 GiB"), (2**41, "2.0 TiB")])
def test_amounts(n, words):
    assert terminal.amount(n) == words


@pytest.mark.parametrize(("seconds", "words"), [(0, "0 s"), (59, "59 s"), (61, "1 min"), (3900, "1 h 05 min")])
def test_durations(seconds, words):
    assert terminal.duration(seconds) == words


def test_progress_is_silent_where_nobody_looks(capsys):
    with terminal.progress() as report, terminal.waiting("loading"):
        report(1, 2, "generating")
    assert capsys.readouterr() == ("", "")
