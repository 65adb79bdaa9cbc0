"""PopQA (Mallen et al. 2023, AlexTMallen/adaptive-retrieval): questions about long-tail entities with all accepted answers.

Columns used: subj, prop, obj, question, possible_answers (a JSON list), s_wiki_title, s_pop. It has no descriptions: what a description
is held against here are the accepted answers of all the entity's questions.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from patchscopes.evaluate.data import Item, Items, columns, rows_of, told
from patchscopes.evaluate.planted import mention

COLUMNS = ("subj", "prop", "obj", "question", "possible_answers", "s_pop", "s_wiki_title")


@dataclass(frozen=True)
class Row:
    """A question. title: of the subject's page, which tells entities of one name apart."""

    subject: str
    title: str
    relation: str
    answers: tuple[str, ...]
    question: str
    popularity: int


def is_one(file: Path) -> bool:
    """Whether a file is of this format, by its columns."""
    return set(COLUMNS) <= set(columns(file))


def rows(file: Path) -> tuple[list[Row], int]:
    """The rows of a file, and how many were corrupt. InputError if the file cannot be read."""
    found: list[Row] = []
    whole, corrupt = rows_of(file)
    for row in whole:
        try:
            found.append(_row(row))
        except (ValueError, OverflowError):  # JSON, or a number, that is none; s_pop = inf
            corrupt += 1
    return found, corrupt


def _row(row: dict[str, str]) -> Row:
    answers = json.loads(row["possible_answers"])
    if not isinstance(answers, list) or not all(isinstance(one, str) for one in answers) or not row["subj"] or not row["obj"]:
        raise ValueError(f"no list of answers, no subject or no object: {row!r}")
    every = tuple(dict.fromkeys([row["obj"], *answers]))
    return Row(row["subj"], row["s_wiki_title"], row["prop"], every, row["question"], int(float(row["s_pop"])))


def items(files: Sequence[Path]) -> Items:
    """The questions of these files: "What is {x}'s occupation?" Those that do not name their subject are left out."""
    found: list[Item] = []
    notes: Counter[str] = Counter()
    n = 0
    for file in files:
        some, corrupt = rows(file)
        n += len(some) + corrupt
        notes["they are corrupt"] += corrupt
        for row in some:
            if row.question.count(row.subject) != 1:
                notes["their question does not name the subject once"] += 1
                continue
            prompt, at = mention(row.subject)
            target = f"Question: {row.question.replace(row.subject, '{x}')} Answer:"
            found.append(Item(row.relation, row.subject, row.answers, prompt, at, target, row.subject))
    return Items("PopQA", tuple(found), ("\n",), told([(k, why) for why, k in notes.items()], n, "PopQA"))
