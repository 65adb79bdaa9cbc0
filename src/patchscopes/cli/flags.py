"""The options of the command line that an experiment's keys become. Their help is the keys' own; nothing heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchscopes.core.errors import InputError
from patchscopes.core.names import CONTROLS
from patchscopes.experiment.keys import KEYS

MAPS = "identity, scale:2.0, affine:FILE, file:FILE, tuned_lens:FILE or jacobian_lens:FILE; may be given several times."


@dataclass(frozen=True)
class Flag:
    """An option.

    name     of the parameter: "target_layer" is --target-layer and PATCHSCOPES_TARGET_LAYER
    kind     str, int, float, bool or Path; a list of them where the option may be given several times
    key      the key of the experiment (or of its table of prompts) that it sets
    path     where in the table `outputs` it goes
    """

    name: str
    kind: Any
    key: str
    help: str
    declared: tuple[str, ...] = ()
    path: str = ""

    @property
    def option(self) -> str:
        """As it is typed."""
        return next((text for text in self.declared if text.startswith("--")), f"--{self.name.replace('_', '-')}").split("/")[0]

    @property
    def repeats(self) -> bool:
        """Whether it may be given several times."""
        return self.kind in (list[str],)


def _flag(name: str, kind: Any, *declared: str, key: str = "", help: str = "", path: str = "") -> Flag:
    key = key or name
    return Flag(name, kind, key, help or KEYS.get(name) or KEYS[key], declared, path)


FLAGS = (
    _flag(
        "model", list[str], "--model", "-m", help="A bundled model, a folder, or a Hugging Face id; may be given several times."
    ),
    _flag("prompt", list[str], "--prompt", "-p", key="prompts", help="A text to read; may be given several times."),
    _flag("prompts", Path, help=f"A file of prompts: {KEYS['file']}"),
    _flag("column", str),
    _flag("at_column", str),
    _flag("label", list[str], key="labels", help="A column carried along into the table of results; may be given several times."),
    _flag("split", str),
    _flag("limit", int),
    _flag("sample", int),
    _flag("chat", bool, "--chat"),
    _flag("vectors", Path, key="prompts", help=KEYS["vectors"]),
    _flag("tensor", str),
    _flag("at", str),
    _flag("layers", str),
    _flag("site", str),
    _flag("span", str),
    _flag("scope", list[str], help=KEYS["scope"].replace("; or several.", "; may be given several times.")),
    _flag("map", list[str], help=MAPS),
    _flag("target_layer", str),
    _flag("tokens", int),
    _flag("stop", list[str], help="A string that ends a text and is no part of it; may be given several times."),
    _flag("temperature", float),
    _flag("draws", int),
    _flag("seed", int),
    _flag("controls", bool, "--controls/--no-controls"),
    _flag("control", list[str], key="controls", help=f"A control to run: {', '.join(CONTROLS)}; may be given several times."),
    _flag("evidence", bool, "--evidence/--no-evidence"),
    _flag("top_k", int, key="outputs", path="top_k"),
    _flag("save_vectors", bool, "--save-vectors", key="outputs", path="vectors"),
    _flag("save_logits", bool, "--save-logits", key="outputs", path="logits"),
    _flag("name", str),
    _flag("shard", int),
    _flag("on_bad_prompt", str),
    _flag("dtype", str),
    _flag("device", str),
    _flag("device_map", str),
    _flag("attention", str),
    _flag("trust_remote_code", bool, "--trust-remote-code"),
)


def of_text(flag: Flag, text: str, where: str) -> Any:
    """What a text (of a variable) says, as the option's kind. InputError if it is none."""
    kinds = {int: "a whole number", float: "a number", bool: "true or false"}
    try:
        if flag.kind is bool:
            return {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}[
                text.lower()
            ]
        return [text] if flag.repeats else flag.kind(text)
    except (ValueError, KeyError):
        raise InputError(f"{where} is {text!r}; expected {kinds[flag.kind]}") from None
