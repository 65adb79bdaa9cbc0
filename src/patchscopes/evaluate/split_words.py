"""Words as other tokens than they are: what detokenisation is tested with, since the whole word is known to the letter.

    split     a word of one token, cut into 2 to `most` tokens of the vocabulary: " Aristotle" as " Ar" "istotle"
    typo      a word of one token with two neighbouring letters swapped, in whatever tokens that gives
    natural   a word or name that the tokenizer itself gives in several tokens

Kaplan et al. 2025, "From Tokens to Words: On the Inner Lexicon of LLMs", section 4: words of more than three letters, cut into 2 to 5
pieces at random, typos, and words of several tokens. A tokenizer would join the pieces of a split word again, so forms are token
ids. They stand behind a text, as words do: "behind" is where their leading space comes from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

Kind = Literal["split", "typo", "natural"]
KINDS: tuple[Kind, ...] = ("split", "typo", "natural")
SHORTEST = 4  # letters of a word that is split


@dataclass(frozen=True)
class Form:
    """A word in one form. before: ids of the text that it stands behind; ids: its own, at least two; whole: the word's one token."""

    word: str
    kind: Kind
    before: tuple[int, ...]
    ids: tuple[int, ...]
    whole: int | None

    @property
    def prompt(self) -> tuple[int, ...]:
        """Ids of the text up to the word's last token, where it is read."""
        return (*self.before, *self.ids)

    @property
    def alone(self) -> tuple[int, ...]:
        """The same without the word's other tokens: what its last one tells by itself."""
        return (*self.before, self.ids[-1])


def form_of(tokenizer: Any, behind: str, word: str, kind: Kind, rng: Random, most: int = 5) -> Form | None:
    """The word in a form of `kind`; None where there is none: it is one token or several, too short, or nothing can be cut or swapped."""
    before = _ids(tokenizer, behind)
    own = ids_behind(tokenizer, behind, word)
    if own is None or (len(own) > 1) != (kind == "natural"):
        return None
    if kind == "natural":
        return Form(word, kind, before, own, None)
    if len(word) < SHORTEST:
        return None
    if kind == "split":
        some = cuts(tokenizer, own[0], most)
        sizes = sorted({len(ids) for ids in some})
        size = rng.choice(sizes) if sizes else 0  # drawn first: of many pieces there are the most cuts
        return Form(word, kind, before, rng.choice([ids for ids in some if len(ids) == size]), own[0]) if some else None
    places = [k for k in range(1, len(word) - 1) if word[k] != word[k + 1] and word[k : k + 2].isalpha()]
    rng.shuffle(places)
    for k in places:
        ids = ids_behind(tokenizer, behind, word[:k] + word[k + 1] + word[k] + word[k + 2 :])
        if ids is not None and len(ids) > 1:
            return Form(word, kind, before, ids, own[0])
    return None


def ids_behind(tokenizer: Any, behind: str, word: str) -> tuple[int, ...] | None:
    """The tokens of a word where it follows a text; None if the two share a token."""
    before, both = _ids(tokenizer, behind), _ids(tokenizer, f"{behind} {word}")
    return both[len(before) :] if both[: len(before)] == before else None


def cuts(tokenizer: Any, token: int, most: int) -> list[tuple[int, ...]]:
    """Every way to cut a token into 2 to `most` tokens whose texts make up its own, in order. The space in front stays with the first
    piece: cut off by itself it would leave the whole word behind."""
    vocab: dict[str, int] = tokenizer.get_vocab()
    special = set(tokenizer.all_special_ids)
    text = str(tokenizer.convert_ids_to_tokens(token))

    def parts(rest: str, n: int) -> list[tuple[int, ...]]:
        found = [(vocab[rest],)] if rest in vocab and vocab[rest] not in special else []
        if n > 1:
            heads = [rest[:k] for k in range(1, len(rest)) if rest[:k] in vocab and vocab[rest[:k]] not in special]
            found += [(vocab[head], *tail) for head in heads for tail in parts(rest[len(head) :], n - 1)]
        return found

    return [ids for ids in parts(text, most) if len(ids) > 1 and _says(tokenizer, ids, token)]


def _says(tokenizer: Any, ids: Sequence[int], token: int) -> bool:
    def text(some: Sequence[int]) -> str:
        return tokenizer.decode(list(some), clean_up_tokenization_spaces=False)

    return text(ids) == text([token]) and bool(text(ids[:1]).strip())


def _ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text)["input_ids"])
