"""Writing where the user said: what goes wrong there is the user's business, not ours."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from patchscopes.core.errors import InputError, ResourceError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside, what the system says about files is told of `path`: ResourceError if the disk is full, else InputError."""
    try:
        yield
    except OSError as e:
        reason = e.strerror or str(e)
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                f"the disk is full: {str(path)!r} could not be written ({reason}). Free some space, or give another place."
            ) from e
        raise InputError(f"{str(path)!r} could not be written: {reason}. Give another place.") from e


def make_folder(folder: Path) -> Path:
    """The folder, made if need be; before a long run, so that its result has a place to go."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder
