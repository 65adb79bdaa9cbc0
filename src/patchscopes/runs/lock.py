"""One writer of a run folder at a time."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import portalocker

from patchscopes.core.errors import RefusedError
from patchscopes.core.files import told

TRIES, PAUSE = 5, 0.02  # before a lock is taken to be held; seconds between


class Lock:
    """One writer of a run folder at a time; let go by the system when the process ends, however it ends."""

    def __init__(self, path: Path, *, shared: bool = False):
        self.path, self.shared = path, shared
        self._file: Any = None

    def __enter__(self) -> Lock:
        """RefusedError if another process writes."""
        with told(self.path):
            self._file = open(self.path, "a+b")
        kind = portalocker.LockFlags.SHARED if self.shared else portalocker.LockFlags.EXCLUSIVE
        for left in reversed(range(TRIES)):
            try:
                portalocker.lock(self._file, kind | portalocker.LockFlags.NON_BLOCKING)
                break
            except portalocker.LockException as e:
                if left:  # `is_locked` holds locks for a moment
                    time.sleep(PAUSE)
                    continue
                self._file.close()
                raise RefusedError(
                    f"another process works on {str(self.path.parent)!r}; expected one at a time. Wait for it or stop it; `patchscopes "
                    "show` reads the folder meanwhile"
                ) from e
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock. Reads only."""
    if not path.exists():
        return False
    with open(path, "rb") as file:
        try:
            portalocker.lock(file, portalocker.LockFlags.SHARED | portalocker.LockFlags.NON_BLOCKING)
        except portalocker.LockException:
            return True
        return False
