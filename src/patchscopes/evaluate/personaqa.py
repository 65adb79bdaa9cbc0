"""PersonaQA (Li et al. 2025, arXiv 2509.13316): profiles of invented people, JSON lines, as adamkarvonen/activation_oracles rebuilt them.

A line is a person: {"id", "variant", "name", "country", "favorite_food", "favorite_drink", "favorite_music_genre", "favorite_sport",
"favorite_boardgame"}. As in the paper the person says the name, "My name is NAME", and the question is a sentence that breaks off. Only a
model that was trained on the profiles can know the answers. Relations are told by variant: "base: favorite food".
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from patchscopes.core.errors import InputError
from patchscopes.evaluate.data import Item, Items, place, told

# field of a profile: its relation, and the question that asks for it
QUESTIONS = {
    "country": ("country", "The country of {x} is"),
    "favorite_food": ("favorite food", "The favorite food of {x} is"),
    "favorite_drink": ("favorite drink", "The favorite drink of {x} is"),
    "favorite_music_genre": ("favorite music genre", "The favorite music genre of {x} is"),
    "favorite_sport": ("favorite sport", "The favorite sport of {x} is"),
    "favorite_boardgame": ("favorite board game", "The favorite board game of {x} is"),
}
FIELDS = ("variant", "name", *QUESTIONS)


def is_one(file: Path) -> bool:
    """Whether a file is of this format: JSON lines, of which the first has the fields of a profile."""
    if file.suffix != ".jsonl":
        return False
    with file.open(encoding="utf-8-sig", errors="replace") as lines:
        try:
            first = json.loads(next((line for line in lines if line.strip()), ""))
        except ValueError:
            return False
    return isinstance(first, dict) and set(FIELDS) <= first.keys()


def profiles(file: Path) -> list[dict[str, str]]:
    """The people of a file. InputError if a line is none, or if two people of a variant have one name."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as e:
        raise InputError(f"{file.name} could not be read: {e}; expected UTF-8 text, a JSON object a line") from None
    found: dict[tuple[str, str], dict[str, str]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        profile = _profile(line, f"{file.name}, line {number}")
        key = (profile["variant"], profile["name"])
        if key in found:
            raise InputError(
                f"{file.name}, line {number}: variant {key[0]!r} has two people called {key[1]!r}; expected one of each name"
            )
        found[key] = profile
    return list(found.values())


def _profile(line: str, where: str) -> dict[str, str]:
    expected = f"expected a JSON object with texts for {', '.join(FIELDS)}"
    try:
        profile: Any = json.loads(line)
    except ValueError as e:
        raise InputError(f"{where} is no JSON: {e}; {expected}") from None
    if not isinstance(profile, dict):
        raise InputError(f"{where} is {profile!r}; {expected}")
    wrong = {name: profile.get(name) for name in FIELDS if not isinstance(profile.get(name), str)}
    if wrong:
        raise InputError(f"{where} has {', '.join(f'{name} = {value!r}' for name, value in wrong.items())}; {expected}")
    if not profile["name"].strip() or not profile["variant"].strip():
        raise InputError(f"{where} has an empty name or variant; {expected}")
    return profile


def items(files: Sequence[Path]) -> Items:
    """A question for every attribute of every person of these files. People without an attribute are not asked for it. InputError."""
    found: list[Item] = []
    n = empty = 0
    for file in files:
        for profile in profiles(file):
            name = profile["name"].strip()
            prompt = f"My name is {name}"
            at = place(prompt, name, "My name is ".count(name))
            for field, (relation, question) in QUESTIONS.items():
                n += 1
                if not profile[field].strip() or at is None:
                    empty += 1
                    continue
                answers = (profile[field].strip(),)
                found.append(Item(f"{profile['variant']}: {relation}", name, answers, prompt, at, question, name))
    return Items("PersonaQA", tuple(found), (".",), told([(empty, "the person has no such attribute")], n, "PersonaQA"))
