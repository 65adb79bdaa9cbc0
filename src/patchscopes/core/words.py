"""Whether words stand in a text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable


def names(text: str, aliases: str | Iterable[str]) -> bool:
    """Whether one of the aliases stands in the text as whole words, in any case. Aliases of one character count only if they are the
    whole text or stand as a capital word of their own."""
    some = [aliases] if isinstance(aliases, str) else list(aliases)
    return any(_named(text, alias) for alias in some)


def plain(text: str) -> str:
    """The text in one form of Unicode (NFKC), without space around it."""
    return unicodedata.normalize("NFKC", text).strip()


def _named(text: str, alias: str) -> bool:
    alias = plain(alias)
    if not alias:
        return False
    flags = re.IGNORECASE if len(alias) > 1 else 0
    words = r"\s+".join(re.escape(word) for word in alias.split())
    return re.search(rf"(?<!\w){words}(?!\w)", plain(text), flags) is not None
