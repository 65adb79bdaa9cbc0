"""Talking to a terminal: data on stdout, talk on stderr, and a progress bar only where someone sees it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.text import Text

from patchscopes.core.plain import plain

WIDE = 150  # columns of a table where no terminal says how many there are

Progress = Callable[[int, int, str], None]  # (done, of, what)


def data() -> Console:
    """Where results go."""
    console = Console(highlight=False)
    if "COLUMNS" not in os.environ and not any(s is not None and s.isatty() for s in (sys.stdin, sys.stdout, sys.stderr)):
        console.width = max(console.width, WIDE)
    return console


def talk() -> Console:
    """Where everything else goes."""
    return Console(stderr=True, highlight=False)


def say(message: str) -> None:
    """Tell something on stderr."""
    talk().print(Text(message, style="dim"), soft_wrap=True)


def say_warning(message: str) -> None:
    """Tell what needs attention."""
    talk().print(Text.assemble(("warning: ", "bold yellow"), message), soft_wrap=True)


def say_error(message: str) -> None:
    """Tell what went wrong."""
    talk().print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)


def print_json(document: Any) -> None:
    """One JSON document on stdout. What is no number (NaN, infinity) is null."""
    ascii_only = (sys.stdout.encoding or "").lower().replace("-", "") != "utf8"
    print(json.dumps(plain(document), ensure_ascii=ascii_only, allow_nan=False, indent=1))


def amount(n_bytes: float) -> str:
    """Bytes in words: "1.5 GiB"."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.0f} {unit}" if unit == "bytes" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f} TiB"


def duration(seconds: float) -> str:
    """Seconds in words: "1 h 05 min"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """A spinner on stderr while something without a known length runs; nothing where stderr is no terminal."""
    console = talk()
    if not console.is_terminal:
        yield
        return
    with console.status(Text(what)):
        yield


@contextmanager
def progress() -> Iterator[Progress]:
    """A callback (done, of, what) that draws a bar for each `what` on stderr, with the time left; nothing where nobody looks."""
    console = talk()
    if not console.is_terminal:
        yield lambda done, of, what: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bars(*columns, console=console, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def report(done: int, of: int, what: str) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=of)
            bars.update(tasks[what], completed=done, total=of)

        yield report
