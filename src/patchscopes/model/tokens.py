"""The tokens of a prompt, and positions in it.

A position is an index of a real token (padding never counts; negative from the end), or a piece of the text: the last token of its
only occurrence. Pieces of text are found by character offsets, never by tokenizing the piece.
"""

from __future__ import annotations

import itertools
import operator
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchscopes.core.errors import NotAvailableError, PositionError, PromptError
from patchscopes.core.positions import Position, Span


@dataclass(frozen=True)
class Tokens:
    """A prompt as the model sees it.

    text     what was given, or the chat template's rendering of it
    ids      token ids, those that the tokenizer adds (BOS) among them
    strings  how to show each token: its text; pieces of one character as "é(1/2)", "é(2/2)"
    offsets  characters [start, stop) of `text` that each token covers; (0, 0) for added tokens
    special  which tokens the tokenizer or a template added
    notes    what a user should know about this tokenization; `notes_at` adds what matters to who reads at a position
    """

    text: str
    ids: tuple[int, ...]
    strings: tuple[str, ...]
    offsets: tuple[tuple[int, int], ...]
    special: tuple[bool, ...]
    notes: tuple[str, ...] = ()
    first_word_note: str = ""
    images: tuple[Span, ...] = ()  # runs of the tokens that stand for an image

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tensor(self) -> Tensor:
        """The ids, [1, pos]."""
        return torch.tensor([self.ids])

    def find(self, piece: str, *, occurrence: int | None = None) -> Span:
        """The tokens that `piece` of the text touches.

        PositionError if it is absent, or there more than once and no `occurrence` (from 1) is given.
        """
        starts = [i for i in range(len(self.text)) if self.text.startswith(piece, i)] if piece else []
        if not starts:
            raise PositionError(f"position {piece!r} does not occur in the prompt {self.text!r}. Its tokens: {self._listing()}")
        if occurrence is None and len(starts) > 1:
            places = "; ".join(f"#{n} is token {self._span(s, s + len(piece)).last}" for n, s in enumerate(starts, 1))
            raise PositionError(
                f"position {piece!r} occurs {len(starts)} times in the prompt {self.text!r}: {places}. "
                f"Give a longer piece, an index, or {piece + '#1'!r} for the first."
            )
        if occurrence is not None and not 1 <= occurrence <= len(starts):
            raise PositionError(
                f"occurrence {occurrence} of {piece!r}: it occurs {len(starts)} times in {self.text!r}; they count from 1"
            )
        start = starts[(occurrence or 1) - 1]
        return self._span(start, start + len(piece))

    def position(self, where: Position) -> int:
        """Index from 0 of a position given as an index or a piece of text ("Wales"; "Wales#2" for the second).

        PositionError if there is none.
        """
        if isinstance(where, Span):
            return self.position(where.last)
        if isinstance(where, str):
            if where not in self.text and (match := re.fullmatch(r"(.+)#(\d+)", where, re.DOTALL)):
                return self.find(match[1], occurrence=int(match[2])).last
            return self.find(where).last
        try:
            index = operator.index(where)
        except TypeError:
            raise PositionError(f"{where!r} is not a position; expected an index or a piece of the prompt's text") from None
        if not -len(self) <= index < len(self):
            raise PositionError(
                f"position {index} is out of range: the prompt {self.text!r} has {len(self)} tokens, 0 to {len(self) - 1} (-1 is the last)"
            )
        return index % len(self)

    def first(self, where: Position) -> int:
        """Index of the first token of a piece of text or a span; of an index the same as `position`."""
        if isinstance(where, Span):
            return self.position(where.first)
        if isinstance(where, str):
            match = None if where in self.text else re.fullmatch(r"(.+)#(\d+)", where, re.DOTALL)
            return (self.find(match[1], occurrence=int(match[2])) if match else self.find(where)).first
        return self.position(where)

    def notes_at(self, position: int) -> tuple[str, ...]:
        """`notes`, and whether the first word, if it is read there, is other tokens than it would be inside a text."""
        word = self.text.split(maxsplit=1)[0] if self.text.split() else ""
        inside = self.offsets[position][1] <= self.text.find(word) + len(word) and not self.special[position]
        return (*self.notes, self.first_word_note) if self.first_word_note and inside else self.notes

    def upto(self, position: int) -> str:
        """The text that the token at `position` has seen: from the start to its own end."""
        return self.text[: max(stop for _, stop in self.offsets[: self.position(position) + 1])]

    def _span(self, start: int, stop: int) -> Span:
        while (
            start < stop - 1 and self.text[start].isspace()
        ):  # a leading space belongs to the word for most tokenizers, to none for some
            start += 1
        touched = [i for i, (a, b) in enumerate(self.offsets) if a < stop and b > start]
        if not touched:
            raise PositionError(f"no token covers {self.text[start:stop]!r} in {self.text!r}. Its tokens: {self._listing()}")
        return Span(touched[0], touched[-1])

    def _listing(self) -> str:
        return " ".join(f"{i}:{s!r}" for i, s in enumerate(self.strings))


def of_ids(tokenizer: Any, ids: Sequence[int], image_ids: frozenset[int] = frozenset()) -> Tokens:
    """Tokens of ids that something else made (a processor): text and offsets by decoding; runs of `image_ids` are images."""
    ids, known = [int(i) for i in ids], set(tokenizer.all_special_ids)
    if not ids:
        raise PromptError("the prompt has no token ids; expected some")
    text = _decode(tokenizer, [i for i in ids if i not in known])
    runs = [list(run) for marked, run in itertools.groupby(range(len(ids)), lambda k: ids[k] in image_ids) if marked]
    return Tokens(
        text,
        tuple(ids),
        tuple(show_ids(tokenizer, ids)),
        tuple(_offsets_by_decoding(tokenizer, ids)),
        tuple(i in known for i in ids),
        images=tuple(Span(run[0], run[-1]) for run in runs),
    )


def as_tokens(ids: tuple[int, ...]) -> Tokens:
    """Ids that no text was read for, where only running them matters."""
    none = tuple((0, 0) for _ in ids)
    return Tokens("", ids, tuple("" for _ in ids), none, tuple(False for _ in ids))


def decoder_prompt(tokenizer: Any, text: str, start: int) -> Tokens:
    """A prompt of an encoder–decoder's decoder: the id that starts it, then the tokens of `text`, which may be empty."""
    if not text:
        return Tokens("", (start,), tuple(show_ids(tokenizer, [start])), ((0, 0),), (True,))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast)
    ids = list(encoded["input_ids"])
    offsets = encoded["offset_mapping"] if tokenizer.is_fast else _offsets_by_decoding(tokenizer, ids)
    known, ids = set(tokenizer.all_special_ids), [start, *ids]
    return Tokens(
        text,
        tuple(ids),
        tuple(show_ids(tokenizer, ids)),
        ((0, 0), *((int(a), int(b)) for a, b in offsets)),
        (True, *(i in known for i in ids[1:])),
    )


def tokenize(tokenizer: Any, text: str, *, chat: bool = False) -> Tokens:
    """The tokens of `text`; with `chat`, of a user's turn in the model's chat template. PromptError if there are none."""
    if not text.strip():
        raise PromptError(f"the prompt {text!r} is empty; expected some text")
    if not text.isascii() and (broken := [c for c in text if "\ud800" <= c <= "\udfff"]):
        raise PromptError(f"the prompt {text!r} is not Unicode text: it holds {broken[0]!r}, half a character; expected UTF-8")
    notes = []
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise NotAvailableError("this tokenizer has no chat template; give the prompt as plain text, or a tokenizer with one")
        text = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
    elif text != text.rstrip(" "):
        notes.append(
            "the prompt ends in a space: most tokenizers put the space in front of the next word, so this one changes what comes next"
        )
    if tokenizer.is_fast:
        encoded = tokenizer(text, add_special_tokens=not chat, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], [(int(a), int(b)) for a, b in encoded["offset_mapping"]]
    else:
        ids = tokenizer(text, add_special_tokens=not chat)["input_ids"]
        offsets = _offsets_by_decoding(tokenizer, ids)
    known = set(tokenizer.all_special_ids)
    special = [i in known for i in ids]
    first_word = "" if chat else _first_word_note(tokenizer, text, [i for i in ids if i not in known])
    return Tokens(text, tuple(ids), tuple(show_ids(tokenizer, ids)), tuple(offsets), tuple(special), tuple(notes), first_word)


def show_ids(tokenizer: Any, ids: list[int] | tuple[int, ...]) -> list[str]:
    """How to show each token; pieces of one character are grouped, so that no replacement character appears."""
    shown: list[str] = []
    i = 0
    while i < len(ids):
        j = i + 1
        piece = _decode(tokenizer, ids[i:j])
        if str(tokenizer.convert_ids_to_tokens(int(ids[i]))).startswith("\u2581") and not piece.startswith(" "):
            piece = " " + piece  # SentencePiece drops the space of a piece that is decoded alone
        while "\ufffd" in piece and j < len(ids) and j < i + 8:
            longer = _decode(tokenizer, ids[i : j + 1])
            j += 1
            piece = longer
        if "\ufffd" in piece:
            j, piece = i + 1, "".join(tokenizer.convert_ids_to_tokens([ids[i]]))
        shown += [piece] if j == i + 1 else [f"{piece}({k}/{j - i})" for k in range(1, j - i + 1)]
        i = j
    return shown


def visible(text: str) -> str:
    """Text with its spaces, line ends and control characters made visible, for tables."""
    marks = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"}
    return "".join(
        marks.get(
            c,
            c
            if unicodedata.category(c) not in ("Zl", "Zp") and (unicodedata.category(c)[0] != "C" or c == "\u200d")
            else f"\\x{ord(c):02x}",
        )
        for c in text
    )


def _first_word_note(tokenizer: Any, text: str, ids: list[int]) -> str:
    """A note if the first word would be other tokens inside a text, where a space precedes it; "" if not."""
    inside = tokenizer(" " + text, add_special_tokens=False)["input_ids"]
    if text[:1].isspace() or not ids or ids in (inside[: len(ids)], inside[-len(ids) :]):
        return ""
    word = text.split(maxsplit=1)[0]
    alone, within = (tokenizer(w, add_special_tokens=False)["input_ids"] for w in (word, " " + word))
    if alone == within:
        return ""
    here, there = (" ".join(map(repr, show_ids(tokenizer, x))) for x in (alone, within))
    return f"{word!r} has no leading space here, so it is {here}; inside a text it is {there}, which the model may know better"


def _decode(tokenizer: Any, ids: list[int] | tuple[int, ...]) -> str:
    return tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)


def _offsets_by_decoding(tokenizer: Any, ids: list[int]) -> list[tuple[int, int]]:
    """For tokenizers that give no offsets: where the decoded text of the first tokens ends."""
    special = set(tokenizer.all_special_ids)
    ends, plain = [], []
    for i in ids:
        if i in special:
            ends.append(None)
            continue
        plain.append(i)
        ends.append(len(_decode(tokenizer, plain).rstrip("\ufffd")))
    offsets, start = [], 0
    for end in ends:
        offsets.append((0, 0) if end is None else (start, end))
        start = start if end is None else end
    return offsets
