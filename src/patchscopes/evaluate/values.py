"""Numbers and dates by value, however they are written.

"1,000", "1000", "1e3" and "a thousand" are one number; "12" and "twelve" too. Dates are read as ISO writes them (1998-05-03), with the
month as a word in either order (3 May 1998, May 3rd, 1998, May 1998, 3 May), as a year alone, and with slashes or dots where only one
reading is a date (13/5/1998). Of 3/5/1998 the year is known and the rest is not guessed. English words only. What has no single value
("1,5", "1.2.3", digits inside a word) is no number.
"""

from __future__ import annotations

import calendar
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal

from patchscopes.evaluate.scoring import names

UNITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen")
UNITS += ("fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
WORDS = {word: k for k, word in enumerate(UNITS)} | {word: 10 * k for k, word in enumerate(TENS, 2)}
SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
MONTHS = {name.lower(): k for k, name in enumerate(calendar.month_name) if k}
MONTHS |= {name.lower(): k for k, name in enumerate(calendar.month_abbr) if k} | {"sept": 9}

_WORD = "|".join(sorted((*WORDS, *SCALES), key=len, reverse=True))
_DIGITS = r"(?<![\w.,])(?:(?<!\w)[-−+])?(?:[1-9]\d{0,2}(?:,\d{3})+|0|[1-9]\d*)(?:\.\d+)?(?:e[-+]?\d{1,3})?(?![\w]|[.,]\d)"
_NUMBER = re.compile(
    rf"(?P<digits>{_DIGITS})(?:\s+(?P<scale>{'|'.join(SCALES)})\b)?"
    rf"|\b(?:a\s+(?=(?:{'|'.join(SCALES)})\b))?(?P<words>(?:{_WORD})(?:(?:\s+|-|\s+and\s+)(?:{_WORD}))*)\b",
    re.IGNORECASE,
)
_MONTH = rf"(?P<month>{'|'.join(sorted(MONTHS, key=len, reverse=True))})\b\.?"
_DAY, _YEAR = r"(?P<day>\d{1,2})(?:st|nd|rd|th)?", r"(?P<year>[12]\d{3})"
_FORMS = tuple(
    re.compile(rf"(?<![\w/.-]){form}(?![\w/-]|\.\d)", re.IGNORECASE)
    for form in (
        r"(?P<year>\d{4})-(?P<month>\d{1,2})-(?P<day>\d{1,2})(?:T[\d:.]+Z?)?",
        r"(?P<year>\d{4})/(?P<month>\d{1,2})/(?P<day>\d{1,2})",
        r"(?P<a>\d{1,2})(?P<mark>[/.])(?P<b>\d{1,2})(?P=mark)(?P<year>\d{4})",
        rf"{_DAY}\s+(?:of\s+)?{_MONTH},?\s+{_YEAR}",
        rf"{_MONTH}\s+{_DAY},?\s+{_YEAR}",
        rf"{_MONTH},?\s+(?:of\s+)?{_YEAR}",
        rf"{_DAY}\s+(?:of\s+)?{_MONTH}",
        rf"{_MONTH}\s+{_DAY}",
        r"(?P<year>\d{4})-(?P<month>\d{2})",
    )
)
_BARE_YEAR = re.compile(
    rf"(?<![\w.,/])(?<!\w[-−])(?<![-−+]){_YEAR}(?![\w/]|[.,]\d)|(?<=\d[-–−]){_YEAR}(?![\w/]|[.,]\d)".replace("?P<year>", "")
)


@dataclass(frozen=True)
class Date:
    """What a text says of a date; None: it does not say."""

    year: int | None = None
    month: int | None = None
    day: int | None = None


def numbers(text: str) -> tuple[Decimal, ...]:
    """The numbers of a text, in order, repeats included. Dates in figures alone (1998-05-03) are none, years and days beside a month
    are."""
    text = _plain(text)
    for form in _FORMS[:3]:
        text = form.sub(" ; ", text)
    found = []
    for one in _NUMBER.finditer(text):
        if one["digits"]:
            value = Decimal(one["digits"].replace(",", "").replace("−", "-"))
            found.append(value * SCALES[one["scale"].lower()] if one["scale"] else value)
        else:
            found.extend(_of_words(re.split(r"[\s-]+", one["words"].lower())))
    return tuple(found)


def dates(text: str) -> tuple[Date, ...]:
    """The dates of a text, the fullest forms first. What is no day of the calendar (31 February) is left out."""
    text, found = _plain(text), []
    for form in _FORMS:
        for one in form.finditer(text):
            date = _date(one.groupdict())
            if date is not None:
                found.append(date)
        text = form.sub(lambda one: ";" * len(one[0]), text)  # read once
    return tuple(found) + tuple(Date(int(year)) for year in (m[0] for m in _BARE_YEAR.finditer(text)))


def same_number(text: str, answer: str) -> bool:
    """Whether the text has the one number of the answer. False where the answer has none or several."""
    wanted = numbers(answer)
    return len(wanted) == 1 and wanted[0] in numbers(text)


def same_date(text: str, answer: str) -> bool:
    """Whether one date of the text has all parts that the answer's one date has: 3 May 1998 tells the year 1998; 1998 does not tell the
    day."""
    wanted = dates(answer)
    return len(wanted) == 1 and any(
        all(want is None or want == got for want, got in _parts(wanted[0], one)) for one in dates(text)
    )


def says(text: str, aliases: str | Iterable[str]) -> bool:
    """Whether a text says one of the aliases: as whole words, or, where an alias is nothing but a number or a date, by value."""
    some = [aliases] if isinstance(aliases, str) else list(aliases)
    return any(_says(text, alias) for alias in some)


def _says(text: str, alias: str) -> bool:
    number, date = _only_number(alias), _only_date(alias)  # a year alone is both
    if not number and not date:
        return names(text, alias)
    return (number and same_number(text, alias)) or (date and same_date(text, alias))


def _parts(wanted: Date, got: Date) -> Iterator[tuple[int | None, int | None]]:
    return zip((wanted.year, wanted.month, wanted.day), (got.year, got.month, got.day), strict=True)


def _only_number(alias: str) -> bool:
    return _NUMBER.fullmatch(_plain(alias)) is not None and len(numbers(alias)) == 1


def _only_date(alias: str) -> bool:
    text = _plain(alias)
    return any(form.fullmatch(text) for form in (*_FORMS, _BARE_YEAR))


def _date(parts: dict[str, str | None]) -> Date | None:
    year, a, b = (int(parts.get(name) or 0) for name in ("year", "a", "b"))
    if a:  # with slashes or dots: which is the month?
        readings = {(month, day) for month, day in ((a, b), (b, a)) if _is_day(year, month, day)}
        month, day = readings.pop() if len(readings) == 1 else (None, None) if readings else (0, 0)
        return None if month == 0 else Date(year, month, day)
    word = parts["month"] or ""
    month = int(word) if word.isdigit() else MONTHS[word.lower()]
    day = int(parts["day"] or 0) if parts.get("day") else None
    return Date(year or None, month, day) if _is_day(year, month, 1 if day is None else day) else None


def _is_day(year: int, month: int, day: int) -> bool:
    return 1 <= month <= 12 and 1 <= day <= calendar.monthrange(year or 2000, month)[1]  # without a year 29 February is one


def _of_words(words: list[str]) -> list[Decimal]:
    """Values of a row of number words: "two hundred and five" is one, "one two" are two."""
    found: list[int] = []
    total, part, last = 0, 0, None  # last: the word before, which tells what may follow it
    for word in (word for word in words if word != "and"):
        if word in SCALES:
            scale = SCALES[word]
            if scale == 100:
                part = (part or 1) * 100
            else:
                total, part = total + (part or 1) * scale, 0
        else:
            value = WORDS[word]
            follows = last is None or last in SCALES or (WORDS.get(last, 0) >= 20 and 0 < value < 10)
            if not follows:
                found.append(total + part)
                total = part = 0
            part += value
        last = word
    return [Decimal(value) for value in (*found, total + part)]


def _plain(text: str) -> str:
    text = re.sub(r"(?<=\d)[\u00a0\u2009\u202f](?=\d{3})", ",", text)  # spaces that group digits
    return unicodedata.normalize("NFKC", text).strip()
