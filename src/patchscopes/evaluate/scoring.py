"""Whether a text says what it should: the tests of the papers, and stricter ones beside them.

The paper's test for attributes deletes all spaces and looks for the object anywhere (Ghandeharioun et al. 2024, published code), so that
words join ("Won" is in "wonder", "leo" in "the Leopard") and case counts. `names` looks for whole words in any case.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from patchscopes.core.words import names as names
from patchscopes.core.words import plain


def contains(text: str, answer: str) -> bool:
    """The paper's test: the answer is a substring of the text, spaces deleted from both, case counting."""
    return bool(answer.strip()) and "".join(answer.split()) in "".join(text.split())


def begins_with(text: str, answer: str) -> bool:
    """Whether the text begins with the answer as whole words."""
    text = text.strip()
    return text.startswith(answer) and not text[len(answer) : len(answer) + 1].isalnum()


def echo_free(aliases: Iterable[str], source: str) -> list[str]:
    """The aliases that the source does not already say: repeating its words is no reading."""
    return [alias for alias in aliases if not names(source, alias)]


def rouge_l(text: str, reference: str) -> float:
    """RougeL, F1: twice the longest common subsequence of words over the words of both (Lin 2004). Words are of letters and
    digits, case does not count."""
    a, b = _words(text), _words(reference)
    if not a or not b:
        return 0.0
    row = [0] * (len(b) + 1)
    for x in a:
        before = 0
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], before + 1 if x == y else max(row[j], row[j - 1])
    return 2 * row[-1] / (len(a) + len(b))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", plain(text).lower())
