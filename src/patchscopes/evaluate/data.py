"""What experiments ask about: items, from the bundled model's own facts or from the public formats, told by what a file holds.

    the attribute TSVs of the Patchscopes paper     `attribute_tsv`
    relations of LRE (Hernandez et al. 2023)        `lre`
    PopQA (Mallen et al. 2023)                      `popqa`
    PersonaQA (Li et al. 2025)                      `personaqa`
    the lens items of jacobian-lens                 `lens_items`
    texts, one a line                               `texts`
    what the bundled model knows                    `planted`, and of invented people `personas`

What cannot be read is counted and told, never guessed.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from patchscopes.core.errors import InputError, NotAvailableError


@dataclass(frozen=True)
class Item:
    """A question about an entity: is `answers[0]` (or an alias behind it) the `relation` of `subject`?

    prompt, at   the sentence that mentions the subject, and where it is read, as experiments say it ("France#1")
    target       the relation in words, {x} in the subject's place: "The capital of {x} is"
    cluster      what hangs together: rows of one cluster are resampled together
    known        whether the data says that their model knows it; None: they do not say
    """

    relation: str
    subject: str
    answers: tuple[str, ...]
    prompt: str
    at: str
    target: str
    cluster: str
    known: bool | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """What is read through what: items of one key share their readings."""
        return (self.target, self.prompt, self.at)


@dataclass(frozen=True)
class Items:
    """Items of some data. stop: what ends an answer in it; notes: what was left out, and why."""

    name: str
    items: tuple[Item, ...]
    stop: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def relations(self) -> tuple[str, ...]:
        """In the order of the data."""
        return tuple(dict.fromkeys(item.relation for item in self.items))

    def of(self, relation: str) -> list[Item]:
        """The items of one relation."""
        return [item for item in self.items if item.relation == relation]


def items_of(path: Path | None) -> Items:
    """Questions about attributes from `path`, told by what it holds; None: the bundled model's facts. NotAvailableError if there is
    nothing, InputError if it is in none of the formats."""
    from patchscopes.evaluate import attribute_tsv, lre, personaqa, planted, popqa

    if path is None:
        return planted.items()
    if not path.exists():
        raise NotAvailableError(
            f"there is no file or folder {str(path)!r}; expected attribute TSVs, LRE relations, PopQA or PersonaQA"
        )
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    for reader in (attribute_tsv, lre, popqa, personaqa):
        if some := [file for file in files if reader.is_one(file)]:
            return reader.items(some)
    raise InputError(
        f"{str(path)!r} holds no data that is known here; expected attribute TSVs (columns prompt_target, prompt_source, …), LRE relations "
        "(JSON with prompt_templates and samples), PopQA (columns subj, prop, obj, possible_answers) or PersonaQA (JSON lines with "
        "variant, name, country, favorite_food, …)"
    )


def columns(file: Path) -> list[str]:
    """The column names of a .tsv or .csv file; of any other file, and where there are none, nothing."""
    if file.suffix not in (".tsv", ".csv"):
        return []
    # bytes that are no UTF-8 are an error where rows are read, not where it is only asked what a file holds
    with file.open(encoding="utf-8-sig", errors="replace", newline="") as stream:
        try:
            return next(csv.reader(stream, delimiter=_between(file)), [])
        except csv.Error:
            return []


def rows_of(file: Path) -> tuple[list[dict[str, str]], int]:
    """The rows of a .tsv or .csv file, and how many were left out since they have fewer or more cells than there are columns. InputError
    if it cannot be read."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            rows = list(csv.DictReader(stream, delimiter=_between(file)))
    except (UnicodeDecodeError, csv.Error) as e:
        raise InputError(f"{file.name} could not be read as a table: {e}; expected UTF-8 text with a line of columns") from None
    whole = [row for row in rows if None not in row and None not in row.values()]
    return whole, len(rows) - len(whole)


def _between(file: Path) -> str:
    return "\t" if file.suffix == ".tsv" else ","


def sampled(items: Sequence[Item], n: int | None, seed: int) -> list[Item]:
    """At most n items of each relation, those of one cluster together, drawn by the seed; in the order of the data."""
    if n is None:
        return list(items)
    chosen: set[int] = set()
    for relation in dict.fromkeys(item.relation for item in items):
        own = [k for k, item in enumerate(items) if item.relation == relation]
        clusters = list(dict.fromkeys(items[k].cluster for k in own))
        random.Random(f"{seed} {relation}").shuffle(clusters)
        of: dict[str, list[int]] = {}
        for k in own:
            of.setdefault(items[k].cluster, []).append(k)
        taken: list[int] = []
        for cluster in clusters:
            if len(taken) + len(of[cluster]) > n and taken:
                break
            taken += of[cluster][:n]
        chosen.update(taken)
    return [item for k, item in enumerate(items) if k in chosen]


def place(prompt: str, subject: str, before: int = 0) -> str | None:
    """Where the subject's first mention behind `before` other ones stands, as experiments say it; None if it is not there."""
    return f"{subject}#{before + 1}" if subject and prompt.count(subject) > before else None


def told(counts: Iterable[tuple[int, str]], of: int, name: str) -> tuple[str, ...]:
    """Notes about what was left out: (how many, why)."""
    return tuple(f"{n:,} of {of:,} rows of {name} were left out: {why}" for n, why in counts if n)
