"""Questions of two hops: r2(r1(e1)) is e3, by way of e2 = r1(e1). Where they come from, how they are asked, which of them tell something.

"The capital of the country of Mount Everest is": e1 Mount Everest, r1 "the country of {}", e2 Nepal, r2 "The capital of {}", e3 Kathmandu.
A model is asked five things, greedily (Biran et al. 2024, section 3):

    first hop            r1(e1) is         → e2        knows the first fact
    second hop           r2(e2) is         → e3        knows the second
    composition          r2(r1(e1)) is     → e3        answers the question
    entity shortcut      r2(e1) is         → e3        could answer without the first hop
    relation shortcut    r2(r1) is         → e3        could answer without the entity

The published relation shortcut is r2(r1("")) without its last four letters, which is no sentence ("The capital of the country "); here the
preposition goes with the entity: "The capital of the country is".
"""

from __future__ import annotations

import ast
import csv
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchscopes.core.errors import InputError, NotAvailableError
from patchscopes.evaluate import scoring

if TYPE_CHECKING:
    from patchscopes.evaluate.frame import Asked
    from patchscopes.experiment.spec import Experiment
    from patchscopes.runs import Run

SINGLE_HOPS = ("prompt1", "prompt2")  # of two-hop items whose hops are asked apart, one JSON object a line
COLUMNS = ("e1_label", "e2_label", "e3_label", "e2_aliases", "e3_aliases", "r1_template", "r2_template")


@dataclass(frozen=True)
class Question:
    """r1, r2: templates with a slot "{}"; e2, e3: all their names, the first as it is asked with."""

    e1: str
    e2: tuple[str, ...]
    e3: tuple[str, ...]
    r1: str
    r2: str

    @property
    def phrase(self) -> str:
        """r1(e1): what the first hop is about."""
        return self.r1.replace("{}", self.e1)

    @property
    def text(self) -> str:
        """The question."""
        return f"{self.r2.replace('{}', self.phrase)} is"

    @property
    def second(self) -> str | None:
        """π2, the words in front of the phrase; None if the second relation does not end in its slot."""
        before, _, after = self.r2.partition("{}")
        return before.rstrip() if before.strip() and not after.strip() else None

    @property
    def prompts(self) -> dict[str, str]:
        """What is asked, by filter."""
        first = self.phrase[:1].upper() + self.phrase[1:] if self.r2[:1].isupper() else self.phrase
        return {
            "first_hop": f"{first} is",
            "second_hop": f"{self.r2.replace('{}', self.e2[0])} is",
            "composition": self.text,
            "entity_shortcut": f"{self.r2.replace('{}', self.e1)} is",
            "relation_shortcut": f"{self.r2.replace('{}', bare(self.r1))} is",
        }

    def answers(self, what: str) -> tuple[str, ...]:
        """What is right for a filter."""
        return self.e2 if what == "first_hop" else self.e3

    @property
    def gives_away(self) -> bool:
        """Whether the entity's name already says the bridge or the answer."""
        return scoring.names(self.e1, (*self.e2, *self.e3))


@dataclass(frozen=True)
class Questions:
    """Of some data. stop: what ends an answer in it; notes: what was left out, and why."""

    name: str
    items: tuple[Question, ...]
    stop: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def bare(relation: str) -> str:
    """A relation without its entity: "the country of {}" → "the country", "the company that produced {}" → "the company"."""
    words = relation.partition("{}")[0].strip()
    return re.sub(r"\s+(?:(?:that|who|which)\b.*|of|in|by|for|to|at|from)$", "", words)


# ------------------------------------------------------------------------------------------------------------------------------ data


def questions_of(path: Path | None) -> Questions:
    """The questions of a two-hop CSV in the public format of Hopping Too Late; None: those of the bundled model that its training
    held out. NotAvailableError if there is no file, InputError if it is in another format."""
    return _planted() if path is None else _of_csv(path)


def ending_in_slot(data: Questions) -> Questions:
    """Those whose second relation ends in its slot, so that the first hop's phrase is the last thing before " is"; the others are counted
    in a note. InputError if none does."""
    items = tuple(one for one in data.items if one.second is not None)
    if not items:
        raise InputError(f"{data.name} has no question whose second relation ends in its slot")
    if items == data.items:
        return data
    note = f"{len(data.items) - len(items):,} questions were left out: their second relation does not end in its slot"
    return replace(data, items=items, notes=(*data.notes, note))


def _planted() -> Questions:
    from patchscopes.organisms.atlas.facts import world

    found = [
        Question(hop.entity, (hop.bridge,), (hop.object,), f"the {hop.first.noun} of {{}}", f"The {hop.second.noun} of {{}}")
        for hop in world().two_hops
        if hop.held_out
    ]
    return Questions("the two-hop facts of atlas that training held out", tuple(found), (".",))


def _of_csv(path: Path) -> Questions:
    if not path.is_file():
        raise NotAvailableError(f"there is no file {str(path)!r}; expected two-hop questions as CSV")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            if first.lstrip().startswith("{"):
                raise InputError(_no_csv(path.name, first))
            file.seek(0)
            rows = csv.DictReader(file)
            missing = [name for name in COLUMNS if name not in (rows.fieldnames or ())]
            if missing:
                raise InputError(
                    f"{path.name} has no column {', '.join(missing)}; expected two-hop questions with {', '.join(COLUMNS)}"
                )
            read = [_question(row) for row in rows]
    except (UnicodeDecodeError, csv.Error) as e:
        raise InputError(f"{path.name} could not be read as CSV: {e}") from None
    found = [one for one in read if isinstance(one, Question)]
    if not found:
        raise InputError(f"{path.name} has no row that can be used; {len(read):,} were read")
    reasons = [one for one in read if isinstance(one, str)]
    notes = tuple(
        f"{reasons.count(why):,} of {len(read):,} rows of {path.name} were left out: {why}" for why in dict.fromkeys(reasons)
    )
    return Questions(path.name, tuple(dict.fromkeys(found)), ("\n",), notes)


def _no_csv(name: str, line: str) -> str:
    """What to say of JSON lines. Items that ask both hops apart ("Ann was born in the country of", "The largest city in India is") do not
    say how the first one is named inside the second ("the country that Ann was born in"), and it is not guessed."""
    expected = f"expected a CSV of two-hop questions with {', '.join(COLUMNS)}"
    if all(f'"{field}"' in line for field in SINGLE_HOPS):
        return (
            f"{name} asks its two hops apart ({', '.join(SINGLE_HOPS)}) and does not say how they are put together; {expected}: "
            'r1_template a noun phrase such as "the birth country of {}", r2_template what goes around it, such as "The largest city in {}"'
        )
    return f"{name} holds JSON; {expected}"


def _question(row: Mapping[str, Any]) -> Question | str:
    """A row as a question, or what is wrong with it. Nothing is guessed."""
    values = {name: value for name in COLUMNS if isinstance(value := row.get(name), str) and value.strip()}
    if len(values) < len(COLUMNS) or None in row:
        return "a cell is missing"
    if any(values[name].count("{}") != 1 for name in ("r1_template", "r2_template")):
        return "a template has not exactly one {}"
    names = {}
    for entity in ("e2", "e3"):
        try:
            aliases = ast.literal_eval(values[f"{entity}_aliases"])
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return "aliases are no list"
        if not isinstance(aliases, (list, tuple)) or not all(isinstance(alias, str) for alias in aliases):
            return "aliases are no list"
        label = values[f"{entity}_label"]
        names[entity] = (label, *dict.fromkeys(alias for alias in aliases if len(alias) > 1 and alias != label))
    found = Question(values["e1_label"], names["e2"], names["e3"], values["r1_template"], values["r2_template"])
    said = row.get("source_prompt")
    return found if said in (None, "", found.text) else "its prompt is not that of its templates"


# -------------------------------------------------------------------------------------------------------------------------- settings


def at_least(name: str, value: float | None, least: float) -> None:
    """InputError if a setting that was given is below `least`."""
    if value is not None and value < least:
        raise InputError(f"the setting {name} is {value}; expected {least} or more")


def some_of(name: str, values: Sequence[str], known: Sequence[str]) -> None:
    """InputError if a setting has none of the known values, or another."""
    if unknown := [value for value in values if value not in known]:
        raise InputError(f"unknown {name} {', '.join(unknown)}; expected some of {', '.join(known)}")
    if not values:
        raise InputError(f"the setting {name} is empty; expected some of {', '.join(known)}")


# ---------------------------------------------------------------------------------------------------------------------------- asking


def right(text: str | None, answers: Sequence[str], test: str = "paper") -> bool:
    """Whether an answer stands in the text: anywhere, in any case ("paper"), or as whole words ("words")."""
    if not text:
        return False
    if test == "words":
        return scoring.names(text, answers)
    return any(len(answer) > 1 and answer.lower() in text.lower() for answer in answers)


def asking(asked: Asked, name: str, texts: Sequence[str], *, tokens: int, stop: Sequence[str]) -> Experiment:
    """What the model says after each text, unpatched: its last state is written onto itself."""
    from patchscopes.experiment.spec import Experiment

    return Experiment.model_validate(
        {
            "name": name,
            "model": dict(asked.model) if not isinstance(asked.model, str) else asked.model,
            "prompts": list(dict.fromkeys(texts)),
            "layers": -1,
            "scope": {"preset": "back-patch", "layer": -1, "tokens": tokens},
            "stop": list(stop),
            "controls": False,
            "seed": asked.seed,
            "on_bad_prompt": "skip",
        }
    )


def said(run: Run) -> dict[str, str]:
    """Prompt → what was said, of a run that `asking` asked for."""
    return dict(run.table(status="ok").select("prompt_text", "text").iter_rows())


@dataclass(frozen=True)
class Outcome:
    """A question and which of the filters it passed; None: it could not be asked."""

    question: Question
    passed: Mapping[str, bool | None]

    @property
    def knows(self) -> bool:
        """Both hops are known."""
        return bool(self.passed["first_hop"] and self.passed["second_hop"])

    @property
    def shortcut(self) -> bool:
        """One of the shortcuts gives the answer."""
        return bool(self.passed["entity_shortcut"] or self.passed["relation_shortcut"])

    @property
    def studied(self) -> bool:
        """Both hops known, no shortcut, and the name gives nothing away."""
        return self.knows and not self.shortcut and not self.question.gives_away


def filtered(questions: Sequence[Question], texts: Mapping[str, str], test: str) -> list[Outcome]:
    """Which filters each question passes, given what the model said after each prompt."""
    found = []
    for question in questions:
        passed = {
            what: right(texts[prompt], question.answers(what), test) if prompt in texts else None
            for what, prompt in question.prompts.items()
        }
        found.append(Outcome(question, passed))
    return found


def funnel(outcomes: Sequence[Outcome]) -> tuple[tuple[str, int], ...]:
    """How many questions are left after each filter, in order."""
    left = list(outcomes)
    found = [("asked", len(left))]
    for name, keep in (
        ("first hop known", lambda o: o.passed["first_hop"]),
        ("second hop known, too", lambda o: o.passed["second_hop"]),
        ("no entity shortcut", lambda o: not o.passed["entity_shortcut"]),
        ("no relation shortcut", lambda o: not o.passed["relation_shortcut"]),
        ("name gives nothing away", lambda o: not o.question.gives_away),
    ):
        left = [one for one in left if keep(one)]
        found.append((name, len(left)))
    found.append(("of these: question answered", sum(bool(o.passed["composition"]) for o in left)))
    found.append(("of these: question failed", sum(not o.passed["composition"] for o in left)))
    return tuple(found)


def strangers(questions: Sequence[Question], seed: int = 0, read: Sequence[bool] | None = None) -> list[Question | None]:
    """For every question another of them, whose state can be held against the question's answer (a shuffled control); None where there
    is none. It has the same second relation, so that its bridge is of the same kind, and neither its entity nor a name of its bridge or
    answer contains a name of the question's. read: which of them the model can read at all; only these have a stranger and are one.
    Which one it is hangs on the seed and the two texts alone."""

    def drawn(question: Question, other: Question) -> bytes:
        return hashlib.sha256(f"{seed} stranger {question.text} {other.text}".encode()).digest()

    of_second: dict[str, list[Question]] = {}
    for k, one in enumerate(questions):
        if read is None or read[k]:
            of_second.setdefault(one.r2, []).append(one)
    found: list[Question | None] = []
    for k, question in enumerate(questions):
        others = [one for one in of_second.get(question.r2, ()) if _strange(question, one)] if read is None or read[k] else []
        found.append(min(others, key=lambda one: drawn(question, one)) if others else None)
    return found


def lacking(n: int, of: int) -> str | None:
    """What must be told where `n` of so many questions have no stranger."""
    told = (
        f"for {n:,} of {of:,} questions no other question of the same second relation, with another bridge and another answer, was there; "
        "the figures of another question's state are without them"
    )
    return told if n else None


def _strange(question: Question, other: Question) -> bool:
    mine = [name.lower() for name in (*question.e2, *question.e3)]
    theirs = [name.lower() for name in (other.e1, *other.e2, *other.e3)]
    return not any(name == own or (len(name) > 1 and name in own) for name in mine for own in theirs)


# --------------------------------------------------------------------------------------------------------------------- descriptions


def classify(text: str, question: Question) -> str:
    """Which entity a description names first: "e1", "e2", "e3" or "other". Of each name a: ": a ", ": a,", ": a.", ": a:", "a: " in any
    case, in the order e1, e2, e3, as in the published code; the end of the text counts as the end of a name."""
    low = f"{text} ".lower()
    for which, names in (("e1", (question.e1,)), ("e2", question.e2), ("e3", question.e3)):
        for name in (name.lower() for name in names if len(name) > 1):
            if any(mark in low for mark in (f": {name} ", f": {name},", f": {name}.", f": {name}:", f"{name}: ")):
                return which
    return "other"
