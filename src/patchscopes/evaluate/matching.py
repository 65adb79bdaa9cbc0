"""Whether a text says an answer, by several tests beside one another.

No one test is right: a raw substring finds "Won" in "wonderful", whole words miss "New Yorkers". So both are reported, with a third by
value (numbers and dates, `values`), and with the echo guard: an alias that the source's own words say already is repeated, not read.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from patchscopes.evaluate.scoring import names
from patchscopes.evaluate.statistics import Estimate, rate
from patchscopes.evaluate.values import says


@dataclass(frozen=True)
class Match:
    """raw: some alias is a substring in any case. words: it stands as whole words. value: so, or by value if it is a number or a date.
    read: as value, of aliases that the source does not say. echo: value holds of such aliases only as the source says."""

    raw: bool
    words: bool
    value: bool
    read: bool
    echo: bool


def match(text: str, aliases: str | Iterable[str], source: str = "") -> Match:
    """source: the words that were read from, which may not count as a reading."""
    some = [aliases] if isinstance(aliases, str) else list(aliases)
    raw = any(alias.strip() and alias.strip().casefold() in text.casefold() for alias in some)
    value = says(text, some)
    read = says(text, [alias for alias in some if not says(source, alias)])
    return Match(raw, names(text, some), value, read, value and not read)


def match_rates(matches: Sequence[Match], clusters: Sequence[Hashable], *, seed: int = 0) -> dict[str, Estimate]:
    """The rate of each test."""
    return {
        test: rate([float(getattr(one, test)) for one in matches], clusters, seed=seed)
        for test in ("raw", "words", "value", "read", "echo")
    }
