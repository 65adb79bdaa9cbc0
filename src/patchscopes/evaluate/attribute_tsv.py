"""The attribute TSVs that the Patchscopes paper published: facts of LRE, contexts of WikiText-103, one file a relation.

Columns used: prompt_target ("The official currency of x"), object, subject, is_correct_baseline (of GPT-J), prompt_source,
position_source and source_cropped_toks (GPT-2's tokens up to the subject's last). They are read with a CSV parser, since fields hold line
ends. Positions are recomputed from the text, so that any tokenizer will do: the subject's mention at which the cropped tokens end.

The paper's own counts come out with its own filters, which differ from task to task (`paper_prompts`).
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from patchscopes.core.errors import InputError
from patchscopes.evaluate.data import Item, Items, columns, place, rows_of, told

COLUMNS = ("prompt_target", "object", "subject", "is_correct_baseline", "prompt_source", "source_cropped_toks")
# The twelve tasks of the paper's table 1, which have 15 prompts or more and a probe that learns anything.
TASKS = (
    "fruit_inside_color",
    "fruit_outside_color",
    "object_superclass",
    "substance_phase",
    "task_done_by_tool",
    "company_ceo",
    "country_currency",
    "food_from_country",
    "person_plays_position_in_sport",
    "person_plays_pro_sport",
    "product_by_company",
    "star_constellation",
)
UNFILTERED = ("fruit_inside_color", "task_done_by_tool")  # whose counts in the paper hold only with empty and broken prompts
DROPPED = {
    "object_superclass": "Swainson ’ s hawk and the prairie",
    "star_constellation": "service",
}  # whose counts hold only without


@dataclass(frozen=True)
class Row:
    """A row of a file, as it stands there."""

    relation: str
    target: str
    subject: str
    object: str
    prompt: str
    cropped: str
    correct: bool

    @property
    def usable(self) -> bool:
        """A prompt that is there and on one line."""
        return bool(self.prompt) and "\n" not in self.prompt

    @property
    def at(self) -> str | None:
        """The subject's mention at which the cropped tokens end; None if they end elsewhere."""
        if not self.prompt.startswith(self.cropped) or not self.cropped.rstrip().endswith(self.subject):
            return None
        return place(self.prompt, self.subject, self.cropped.count(self.subject) - 1)


def is_one(file: Path) -> bool:
    """Whether a file is of this format, by its suffix and columns."""
    return file.suffix == ".tsv" and {"prompt_target", "prompt_source"} <= set(columns(file))


def rows(file: Path) -> tuple[list[Row], int]:
    """The rows of a file, and how many were corrupt. InputError if a column is missing or the file cannot be read."""
    there = columns(file)
    if missing := [name for name in COLUMNS if name not in there]:
        raise InputError(f"{file.name} has no column {', '.join(missing)}; it has {', '.join(there)}")
    found: list[Row] = []
    whole, corrupt = rows_of(file)
    for row in whole:
        try:
            found.append(_row(file.stem, row))
        except (ValueError, SyntaxError, TypeError):
            corrupt += 1
    return found, corrupt


def _row(relation: str, row: dict[str, str]) -> Row:
    target, subject, answer = row["prompt_target"], row["subject"], row["object"]
    if not target.endswith(" x") or not subject or not answer or row["is_correct_baseline"] not in ("True", "False"):
        raise ValueError(relation)
    prompt = row["prompt_source"]
    cropped = "".join(ast.literal_eval(row["source_cropped_toks"])) if row["source_cropped_toks"] else ""
    return Row(relation, f"{target[:-1]}{{x}}", subject, answer, prompt, cropped, row["is_correct_baseline"] == "True")


def paper_prompts(some: Sequence[Row]) -> tuple[int, int]:
    """(source prompts, classes) of one file as the paper counts them: distinct prompts of rows that GPT-J gets right, less the empty and
    broken ones but for two tasks, and less two texts."""
    kept = [
        row
        for row in some
        if row.correct
        and (row.usable or row.relation in UNFILTERED)
        and (row.relation not in DROPPED or DROPPED[row.relation] not in row.prompt)
    ]
    return len({row.prompt for row in kept}), len({row.object for row in kept})


def items(files: Sequence[Path]) -> Items:
    """The questions of these files."""
    found: list[Item] = []
    notes: Counter[str] = Counter()
    n = 0
    for file in files:
        some, corrupt = rows(file)
        n += len(some) + corrupt
        notes["they are corrupt"] += corrupt
        for row in some:
            if not row.usable:
                notes["their prompt is empty or has a line end"] += 1
            elif (at := row.at) is None:
                notes["the subject does not stand where their tokens end"] += 1
            else:
                # one subject stands in several samples, files and contexts; they are one entity
                found.append(Item(row.relation, row.subject, (row.object,), row.prompt, at, row.target, row.subject, row.correct))
    return Items("attribute TSVs", tuple(found), (), told([(k, why) for why, k in notes.items()], n, "the attribute TSVs"))
