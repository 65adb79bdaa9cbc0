"""What an executor is: something that has workers do tasks and tells what they say. All state is in the run folder, none in it.

    Here        this process                                            (`here`)
    Processes   processes of this machine, one a device                 (`processes`)
    OnRay       actors of a Ray cluster                                 (`on_ray`)

Any of them may lose a worker: its task is given to another one; a task that three workers died of is given up.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from patchscopes.runs.tasks import Done, Job, Stopped, Task

DEATHS = 3  # workers that a task may cost, and times that a worker may die before it is ready


@dataclass(frozen=True)
class Ready:
    """A worker has loaded its models. about: conditions, models, machine (see `Worker.about`)."""

    worker: str
    about: dict[str, Any]


@dataclass(frozen=True)
class Working:
    """A worker has done a share of a shard."""

    worker: str
    shard: int
    share: float
    what: str


@dataclass(frozen=True)
class Finished:
    """A worker has done a task."""

    worker: str
    done: Done


@dataclass(frozen=True)
class Told:
    """A worker has something to say: that it runs less at a time for want of memory; or something is to be said of it."""

    worker: str
    message: str
    kind: Literal["memory", "note"] = "memory"


@dataclass(frozen=True)
class Lost:
    """A worker has died. task: what it was at; it is tried again elsewhere, unless `given_up`."""

    worker: str
    reason: str
    task: Task | None = None
    given_up: bool = False


Message = Ready | Working | Finished | Told | Lost
Hear = Callable[[Message], None]


class Stop:
    """Whether work is to end. asked: after the shards under way; now: at once. signal: the number of the one that asked, if one did."""

    def __init__(self) -> None:
        self.asked = self.now = False
        self.signal: int | None = None

    def __call__(self, signal: int | None = None) -> None:
        """Ask; the second time, at once."""
        self.now, self.asked, self.signal = self.asked, True, signal or self.signal


class Queue:
    """Tasks that wait for a worker, and how many workers each has cost."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.waiting = deque(tasks)
        self._deaths: Counter[Task] = Counter()

    def lost(self, worker: str, reason: str, task: Task | None, hear: Hear) -> None:
        """A worker died, at `task` if it had one. The task waits again, behind the others, until it has cost too many."""
        if task is None:
            return hear(Lost(worker, reason))
        self._deaths[task] += 1
        given_up = self._deaths[task] >= DEATHS
        if not given_up:
            self.waiting.append(task)
        hear(Lost(worker, reason, task, given_up))


class Executor(Protocol):
    """Has tasks done."""

    @property
    def name(self) -> str:
        """How events call it."""
        ...

    @property
    def device(self) -> str:
        """The kind of device that its workers have: "cpu", "cuda", …"""
        ...

    @property
    def workers(self) -> int:
        """How many at most."""
        ...

    def run(self, job: Job, tasks: Sequence[Task], hear: Hear, stop: Stop) -> None:
        """Have `tasks` done, in about their order; return when they are, or when `stop` says so. What `hear` raises ends the work."""
        ...


def check_stop(stop: Stop) -> None:
    """Stopped, if work is to end at once."""
    if stop.now:
        raise Stopped
