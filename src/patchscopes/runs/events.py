"""The event stream of a run: what happened, in order. Terminal, JSON lines, web page and callbacks are its readers.

An event is a dict with `seq` (strictly increasing in a file), `time` (UTC, of the wall clock, which may jump: order by `seq`),
`kind`, and what belongs to the kind:

    planned   cells, shards, cached          a run is ready to work
    started   shards, cells, workers         work begins (again)
    worker    worker, device, state          a worker is ready, was lost, or has gone
    shard     shard, worker, cells, failed, seconds     finished rows have been recorded
    progress  done, cells, failed, rate, eta (low, high), what      now and then
    failed    cell, error                    one cell could not be read
    memory    message                        less ran at a time for want of memory
    note      message
    stopped, done                            the end of this work; done, cells, failed
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from patchscopes.core.files import told

Event = dict[str, Any]
Listener = Callable[[Event], None]


class EventLog:
    """Appends events to a file and hands them to listeners. `kept=False` for those that only live listeners need."""

    def __init__(self, path: Path, listeners: tuple[Listener, ...] = ()):
        self.path, self.listeners = path, listeners
        last = _mend(path)
        self.seq = last
        with told(path):
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 — closed by close()

    def tell(self, kind: str, *, kept: bool = True, **more: Any) -> Event:
        """Add an event; listeners hear it at once."""
        self.seq += 1
        event = {"seq": self.seq, "time": now(), "kind": kind, **more}
        if kept:
            with told(self.path):
                self._file.write(json.dumps(event, ensure_ascii=False) + "\n")
                self._file.flush()
        for listener in self.listeners:
            listener(event)
        return event

    def close(self) -> None:
        """Let the file go, on disk."""
        with told(self.path), self._file as file:
            file.flush()
            os.fsync(file.fileno())


def read_events(path: Path) -> Iterator[Event]:
    """The events of a file, also while it is written; a torn last line is left out."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield json.loads(line)


def now() -> str:
    """UTC, to the millisecond."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def _mend(path: Path) -> int:
    """Cut off a line that a killed process left unfinished; the last `seq`."""
    if not path.exists():
        return 0
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) != len(content):
        with told(path), open(path, "r+b") as file:
            file.truncate(len(whole))
    lines = whole.splitlines()
    return json.loads(lines[-1])["seq"] if lines else 0
