"""Files: written aside and renamed, so that they are there whole or not at all; and what is told when they cannot be."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from patchscopes.core.errors import InputError, ResourceError

ASIDE = ".tmp"  # suffix of files that are not whole yet


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all, whatever happens. ResourceError if the disk is full."""
    aside = path.with_name(f".{path.name}.{os.getpid()}{ASIDE}")
    with told(path):
        try:
            with open(aside, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        except OSError:
            aside.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def write_json(path: Path, document: Any) -> None:
    """The same with JSON. NaN stays NaN."""
    write_whole(path, (json.dumps(document, ensure_ascii=False, indent=1) + "\n").encode())


def make_folder(path: Path) -> Path:
    """The folder, made with those above it if need be; before a long run, so that its result has a place to go."""
    with told(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def content_hash(content: bytes) -> str:
    """16 hexadecimal digits."""
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def _sync_folder(folder: Path) -> None:
    """Make a rename last; systems whose folders cannot be synchronised need it not."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Inside, what the system says about files is told of `path`: ResourceError if the disk is full, else InputError."""
    try:
        yield
    except OSError as e:
        reason = e.strerror or str(e)
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ResourceError(
                f"the disk is full: {str(path)!r} could not be written ({reason}). What was finished before is safe; free some space "
                "and resume"
            ) from e
        raise InputError(f"{str(path)!r} could not be written: {reason}. Give another folder, or make this one writable") from e
