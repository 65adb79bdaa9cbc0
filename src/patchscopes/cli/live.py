"""The event stream of a run for those who watch: a line that changes on a terminal, plain lines elsewhere, JSON lines with --json."""

from __future__ import annotations

import json as json_
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from patchscopes.cli.terminal import duration, say, say_warning, talk

EVERY = 30.0  # seconds between lines where nobody sees a bar

Event = dict[str, Any]


@contextmanager
def watching(*, json: bool = False, quiet: bool = False) -> Iterator[Callable[[Event], None]]:
    """A listener for a run's events."""
    if json:
        yield lambda event: print(json_.dumps(event, ensure_ascii=False), flush=True)
    elif quiet:
        yield lambda event: None
    elif talk().is_terminal:
        with _bar() as listener:
            yield listener
    else:
        yield _lines()


def progress_line(event: Event) -> str:
    """71 %  140,100/197,760  22.3 cells/s  43 min left (38 to 49 min)  failed 12"""
    parts = [f"{event['share']:.0%}", f"{event['done']:,}/{event['cells']:,}"]
    parts += [f"{event['rate']:,.1f} cells/s"] if event["rate"] else []
    if event["eta"] is not None:
        left, low, high = event["eta"]
        span = f" ({duration(low)} to {duration(high)})" if duration(low) != duration(high) else ""
        parts.append(f"{duration(left)} left{span}")
    parts += [f"failed {event['failed']:,}"] if event["failed"] else []
    return "  ".join(parts)


def _told(event: Event) -> None:
    """What is worth a line of its own."""
    match event["kind"]:
        case "cached":
            say(f"nothing to do: all {event['cells']:,} cells are in the run {event['run']} ({event['folder']})")
        case "planned":
            taken = f", {event['cached']:,} of them from earlier runs" if event["cached"] else ""
            say(f"run {event['run']}: {event['cells']:,} cells in {event['shards']:,} shards{taken}; {event['folder']}")
        case "started":
            many = f" by {event['workers']} workers" if event["workers"] > 1 else ""
            say(f"computing {event['cells']:,} cells in {event['shards']:,} shards{many}")
        case "worker" if event["state"] == "lost":
            more = "given up" if event.get("given_up") else "its shard is tried again"
            say_warning(f"worker {event['worker']} is lost ({event['message']}); {more}")
        case "failed":
            say_warning(f"cell {event['cell']} failed: {event['error']}")
        case "memory" | "stopping":
            say_warning(event["message"])
        case "note":
            say(event["message"])


def _lines() -> Callable[[Event], None]:
    last = time.monotonic()

    def listener(event: Event) -> None:
        nonlocal last
        if event["kind"] != "progress":
            _told(event)
        elif time.monotonic() - last >= EVERY:
            last = time.monotonic()
            say(progress_line(event))

    return listener


@contextmanager
def _bar() -> Iterator[Callable[[Event], None]]:
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=24))
    with Progress(*columns, console=talk(), transient=True) as bars:
        task = bars.add_task("starting", total=1.0)

        def listener(event: Event) -> None:
            if event["kind"] == "progress":
                bars.update(task, completed=event["share"], description=progress_line(event))
            else:
                _told(event)

        yield listener
