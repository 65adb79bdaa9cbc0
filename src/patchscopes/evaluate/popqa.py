"""PopQA (Mallen et al. 2023, AlexTMallen/adaptive-retrieval): questions about long-tail entities with all accepted answers.

Columns used: subj, prop, obj, question, possible_answers (a JSON list), s_wiki_title, s_pop. It has no descriptions: what a description
is held against here are the accepted answers of all the entity's questions.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from patchscopes.evaluate.data import Item, Items, told
from patchscopes.evaluate.planted import mention

COLUMNS = ("subj", "prop", "obj", "question", "possible_answers", "s_pop")


@dataclass(frozen=True)
class Row:
    """A question."""

    subject: str
    relation: str
    answers: tuple[str, ...]
    question: str
    popularity: int


def is_one(file: Path) -> bool:
    """Whether a file is of this format, by its columns."""
    if file.suffix not in (".tsv", ".csv"):
        return False
    with file.open(encoding="utf-8", newline="") as stream:
        return set(COLUMNS) <= set(next(csv.reader(stream, delimiter="\t" if file.suffix == ".tsv" else ","), []))


def rows(file: Path) -> tuple[list[Row], int]:
    """The rows of a file, and how many were corrupt."""
    found: list[Row] = []
    corrupt = 0
    with file.open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream, delimiter="\t" if file.suffix == ".tsv" else ","):
            try:
                answers = tuple(dict.fromkeys([row["obj"], *json.loads(row["possible_answers"])]))
                if not row["subj"] or not row["obj"] or not all(isinstance(a, str) for a in answers):
                    raise ValueError
                found.append(Row(row["subj"], row["prop"], answers, row["question"], int(float(row["s_pop"]))))
            except (ValueError, TypeError, KeyError):
                corrupt += 1
    return found, corrupt


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
