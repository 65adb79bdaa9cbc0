"""Work on a Ray cluster: an actor a device, which holds the models. Only Ray Core is used.

Everything a worker needs travels to it, the run's inputs included, and rows come back as bytes: nodes need this package, the models (or a
way to download them) and no shared folder. Nodes may come and go: workers start where there is room, a task whose actor or node dies is
given to another worker.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from patchscopes.core.errors import InputError, NotAvailableError, RefusedError, ResourceError
from patchscopes.experiment.resolve import INPUTS
from patchscopes.runs.executor import DEATHS, Finished, Hear, Queue, Ready, Stop, Told
from patchscopes.runs.ray_actor import Actor
from patchscopes.runs.remote import Failure, MakeWorker, make_worker
from patchscopes.runs.tasks import Job, Task

POLL = 0.2  # seconds between two looks at `stop`
ASK = 0.5  # between two questions for progress
GROW = 5.0  # between two looks for new nodes
GRACE = 1.0  # for workers to stop by themselves
TRAVELS = ("HF_HUB_OFFLINE", "PATCHSCOPES_NO_HOST")  # environment variables that hold for workers too


class OnRay:
    """An actor a device.

    address  of the cluster, as `ray.init` takes it: "host:port", "auto" for one that runs on this machine, "local" for one that is started
             for this work and ends with it; None: RAY_ADDRESS, or "local"
    workers  how many; default: as many as there is room for, more when nodes join
    gpus     that each takes: 0, a part of one, or several for a model that is spread over them; default: 1 if the cluster has any
    cpus     that each takes
    threads  of each; default: as many as CPUs
    """

    name = "ray"
    make: MakeWorker = staticmethod(make_worker)  # how a worker is made, in its actor; a function of a module

    def __init__(
        self,
        address: str | None = None,
        workers: int | None = None,
        gpus: float | None = None,
        cpus: float = 1,
        threads: int | None = None,
    ):
        if (workers is not None and workers < 1) or (gpus or 0) < 0 or cpus < 0 or not (cpus or gpus):
            raise InputError(
                f"found {workers} workers of {gpus} GPUs and {cpus} CPUs; expected 1 worker or more, each with a part of a GPU or a CPU"
            )
        self.address, self.asked_workers, self.asked_gpus, self.cpus = address, workers, gpus, cpus
        self.threads = threads or max(1, int(cpus))
        self.asked = "cuda" if gpus else None
        self._ours = False

    @property
    def gpus(self) -> float:
        """That each worker takes."""
        if self.asked_gpus is None:
            self.asked_gpus = float(any(node["Resources"].get("GPU") for node in _nodes(self._connect())))
        return self.asked_gpus

    @property
    def device(self) -> str:
        """The kind of device."""
        return "cuda" if self.gpus else "cpu"

    @property
    def workers(self) -> int:
        """How many at most, as far as is known now."""
        return self.asked_workers or max(1, self._room())

    def run(self, job: Job, tasks: Sequence[Task], hear: Hear, stop: Stop) -> None:
        """See `Executor`. NotAvailableError without Ray or its cluster, RefusedError if nothing fits on a cluster of one's own;
        ResourceError if all workers die before they are ready; else as with `Processes`."""
        ray = self._connect()
        queue = Queue(tasks)
        crew: list[_Member] = []
        try:
            self._tell_of_room(min(self.workers, len(tasks)), hear)
            inputs = {path.name: path.read_bytes() for path in Path(job.folder, INPUTS).glob("*")}
            sent = ray.put((job.document, inputs))
            looked = 0.0
            while not stop.now and ((queue.waiting and not stop.asked) or any(member.task for member in crew)):
                if time.monotonic() - looked > GROW and not stop.asked:
                    looked = time.monotonic()
                    for k in range(len(crew), min(self.workers, len(tasks))):
                        crew.append(_Member(ray, f"ray {k + 1}", self._actor(ray), (sent, self.make, self.device, self.threads)))
                for member in crew:
                    member.serve(queue, idle=stop.asked)
                waited = [ref for member in crew for ref in member.waited]
                if not waited:
                    raise ResourceError(f"every worker died before it was ready, the last with: {crew[-1].reason}")
                ready = set(ray.wait(waited, num_returns=1, timeout=POLL)[0])
                for member in crew:
                    member.listen(ready, queue, hear)
        finally:
            _end(ray, crew)
            if self._ours:
                ray.shutdown()
                self._ours = False

    def _connect(self) -> Any:
        """Ray, connected. Telemetry and dashboard are off where they are ours to decide; a cluster that is started here asks for a token,
        as Ray does by default."""
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        try:
            import ray
            import ray.exceptions
        except ImportError as e:
            raise NotAvailableError("Ray is not installed. Get it with: pip install 'patchscopes[ray]'") from e
        if ray.is_initialized():
            return ray
        where = self.address or os.environ.get("RAY_ADDRESS") or "local"
        quiet: Any = {"log_to_driver": False, "logging_level": "ERROR"}
        if where == "local":
            quiet["include_dashboard"] = False
        main = threading.current_thread() is threading.main_thread()
        before = signal.getsignal(signal.SIGTERM) if main else None
        try:
            _require_listener(where)
            ray.init(address=where, **quiet)
            self._ours = where == "local"
        except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as e:
            raise NotAvailableError(
                f"there is no Ray cluster to work on at {where}: {_first_line(e)}. Expected one that `ray start` started with the same "
                "versions of Ray and Python and, if it asks for one, its token (RAY_AUTH_MODE=token, ~/.ray/auth_token)"
            ) from e
        finally:
            if before is not None:  # Ray puts its own in place
                signal.signal(signal.SIGTERM, before)
        return ray

    def _actor(self, ray: Any) -> Any:
        needs = {"num_cpus": self.cpus, "num_gpus": self.gpus}
        return ray.remote(Actor).options(**needs, max_concurrency=2, max_restarts=0, scheduling_strategy="SPREAD")

    def _room(self) -> int:
        """Workers that the cluster has room for, were it empty."""
        needs = {name: n for name, n in (("CPU", self.cpus), ("GPU", self.gpus)) if n}
        nodes = _nodes(self._connect())
        return sum(min(int(node["Resources"].get(name, 0) / n + 1e-9) for name, n in needs.items()) for node in nodes)

    def _tell_of_room(self, wanted: int, hear: Hear) -> None:
        room = self._room()
        each = f"{self.cpus:g} CPUs and {self.gpus:g} GPUs each"
        if room == 0 and self._ours:
            raise RefusedError(
                f"this machine has no room for a worker of {each}; expected fewer (--gpus, --cpus), or a cluster (--address)"
            )
        if room < wanted:
            now = f"{room} can work now" if room else "none can work now"
            hear(Told(self.name, f"{wanted} workers of {each} were asked for; {now}, others as nodes join the cluster", "note"))


class _Member:
    """A place for a worker: its actor, which is replaced when it dies, and its task."""

    def __init__(self, ray: Any, name: str, actor: Any, start: tuple[Any, ...]):
        self.ray, self.name, self.reason = ray, name, ""
        self.task: Task | None = None
        self.actor: Any = None
        self.said: Any = None  # what it answers to: begin, do
        self._heard: Any = None  # and to: heard
        self._actor, self._start = actor, start
        self._ready, self._unready_deaths, self._asked = False, 0, 0.0
        self._begin()

    @property
    def waited(self) -> list[Any]:
        """What is to be answered."""
        return [ref for ref in (self.said, self._heard) if ref is not None]

    def serve(self, queue: Queue, *, idle: bool) -> None:
        """Give the worker a task if it waits for one, ask it for progress; replace it if it died. idle: no more tasks."""
        if queue.waiting and not idle:
            if self.actor is None and self._unready_deaths < DEATHS:
                self._begin()
            elif self.actor is not None and self._ready and self.task is None:
                self.task = queue.waiting.popleft()
                self.said = self.actor.do.remote(self.task)
        if self.actor is not None and self.task is not None and self._heard is None and time.monotonic() - self._asked > ASK:
            self._asked = time.monotonic()
            self._heard = self.actor.heard.remote()

    def listen(self, ready: set[Any], queue: Queue, hear: Hear) -> None:
        """Hear what the worker answered, or that it died."""
        try:
            if self._heard in ready:
                messages = self.ray.get(self._heard)
                self._heard = None
                for message in messages:
                    hear(message)
            if self.said in ready:
                message = self.ray.get(self.said)
                self.said = None
                self._hear(message, queue, hear)
        except self.ray.exceptions.RayTaskError as e:  # not the worker's own: those are sent as a `Failure`
            raise RuntimeError(f"a worker on Ray could not work: {e}") from e
        except self.ray.exceptions.RayError as e:  # the actor or its node has died, or does not answer
            self._lose(_first_line(e), queue, hear)

    def end(self) -> None:
        """Kill the actor: it holds nothing that is not told."""
        if self.actor is not None:
            self.ray.kill(self.actor)
        self.actor = self.said = self._heard = None

    def _hear(self, message: Any, queue: Queue, hear: Hear) -> None:
        match message:
            case Ready():
                self._ready, self._unready_deaths = True, 0
            case Finished():
                self.task = None
            case Failure():
                if not self._ready or not message.loses_worker:
                    raise message.as_error()
                return self._lose(message.told, queue, hear)
        hear(message)

    def _begin(self) -> None:
        self._ready, self.task = False, None
        environment = {name: os.environ[name] for name in TRAVELS if name in os.environ}
        self.actor = self._actor.remote(self.name, environment, *self._start)
        self.said = self.actor.begin.remote()

    def _lose(self, reason: str, queue: Queue, hear: Hear) -> None:
        if not self._ready:
            self._unready_deaths += 1
        self.reason, task, self.task = reason, self.task, None
        self.end()
        queue.lost(self.name, reason, task, hear)


def _end(ray: Any, crew: Sequence[_Member]) -> None:
    """Have those at work stop between two batches, if they can in a moment; then end all."""
    busy = [member for member in crew if member.task is not None and member.actor is not None]
    for member in busy:
        member.actor.cancel.remote()
    if working := [member.said for member in busy if member.said is not None]:
        ray.wait(working, num_returns=len(working), timeout=GRACE)
    for member in crew:
        member.end()


def _require_listener(address: str) -> None:
    """OSError if nobody listens at host:port; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "://" not in address:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()


def _nodes(ray: Any) -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _first_line(error: BaseException) -> str:
    """What an error says; of a dead actor also why it died, which stands in another line."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # Ray colours some
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    told = [line for k, line in enumerate(lines) if k == 0 or line.startswith(("The actor ", "ModuleNotFoundError"))]
    return " ".join(told)[:300].rstrip(".") or type(error).__name__
