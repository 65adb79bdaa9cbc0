"""The lens items of jacobian-lens (anthropics/jacobian-lens): JSON with items {name, prompt, intermediates, target}, concepts that a model
may hold in mind between a prompt and its answer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from patchscopes.core.errors import InputError


@dataclass(frozen=True)
class LensItem:
    """prompt: what the model reads; intermediates: what it may think of; target: what it should say, where there is one."""

    name: str
    prompt: str
    intermediates: tuple[str, ...]
    target: str | None


def lens_items(file: Path) -> tuple[list[LensItem], int]:
    """The items of a file, and how many were corrupt. InputError if it is no such file."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        some = document["items"]
        if not isinstance(some, list):
            raise TypeError("items")
    except (ValueError, KeyError, TypeError) as e:
        raise InputError(
            f"{file.name} holds no lens items: expected JSON with a list `items` of name, prompt, intermediates"
        ) from e
    found = []
    for item in some:
        try:
            prompt, between, target = item["prompt"], item.get("intermediates", []), item.get("target")
            if not isinstance(prompt, str) or not prompt.strip() or not isinstance(target, str | None):
                continue
            if not isinstance(between, list) or not all(isinstance(one, str) and one.strip() for one in between):
                continue
            found.append(LensItem(str(item.get("name", "")), prompt, tuple(between), target))
        except (KeyError, TypeError, AttributeError):
            continue
    return found, len(some) - len(found)
