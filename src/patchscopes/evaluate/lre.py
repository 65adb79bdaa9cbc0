"""Relations of LRE (Hernandez et al. 2023, evandez/relations): JSON files with name, prompt_templates and samples {subject, object}.

They have no contexts: the subject is read in one of the neutral sentences with which the bundled model was tested.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from patchscopes.core.errors import InputError
from patchscopes.evaluate.data import Item, Items, told
from patchscopes.evaluate.planted import mention


def is_one(file: Path) -> bool:
    """Whether a file is of this format."""
    if file.suffix != ".json":
        return False
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError):
        return False
    return isinstance(document, dict) and {"prompt_templates", "samples"} <= document.keys()


def relation(file: Path) -> tuple[dict[str, Any], list[tuple[str, str]], int]:
    """The document of a file, its (subject, object) pairs, and how many samples were corrupt. InputError if it has no lists of samples and
    templates."""
    document = json.loads(file.read_text(encoding="utf-8"))
    for name in ("samples", "prompt_templates"):
        if not isinstance(document[name], list):
            raise InputError(f"{file.name} has {name} = {document[name]!r}; expected a list")
    pairs, corrupt = [], 0
    for sample in document["samples"]:
        subject, answer = (sample.get("subject"), sample.get("object")) if isinstance(sample, dict) else (None, None)
        if isinstance(subject, str) and isinstance(answer, str) and subject.strip() and answer.strip():
            pairs.append((subject, answer))
        else:
            corrupt += 1
    return document, pairs, corrupt


def items(files: Sequence[Path]) -> Items:
    """The questions of these files, each relation in the words of its first template."""
    found: list[Item] = []
    notes: Counter[str] = Counter()
    n = 0
    for file in files:
        document, pairs, corrupt = relation(file)
        n += len(pairs) + corrupt
        notes["they have no subject or no object"] += corrupt
        templates = [text for text in document["prompt_templates"] if isinstance(text, str) and text.count("{}") == 1]
        if not templates:
            raise InputError(f"{file.name} has no template with one {{}}; found {document['prompt_templates']!r}")
        target = templates[0].replace("{}", "{x}").strip()
        for subject, answer in pairs:
            prompt, at = mention(subject)
            found.append(Item(file.stem, subject, (answer,), prompt, at, target, subject))
    return Items("LRE relations", tuple(found), (), told([(k, why) for why, k in notes.items()], n, "the LRE relations"))
