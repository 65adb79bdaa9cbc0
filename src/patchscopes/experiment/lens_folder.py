"""Folders that hold a tuned lens: as training leaves it (tuned_lens.safetensors), or in the public format (config.json and params.pt)."""

from __future__ import annotations

from pathlib import Path

from patchscopes.core.errors import InputError
from patchscopes.core.names import LENS_FILES


def is_lens(folder: Path) -> bool:
    """Whether a folder holds one."""
    return any(all((folder / name).is_file() for name in names) for names in LENS_FILES)


def lens_files(folder: Path) -> list[Path]:
    """The files that the lens is, and no others of the folder. InputError if it holds none."""
    for names in LENS_FILES:
        if all((folder / name).is_file() for name in names):
            return [folder / name for name in names]
    expected = ", or ".join(" and ".join(names) for names in LENS_FILES)
    raise InputError(f"the folder {str(folder)!r} holds no tuned lens and no dataset; expected {expected}")
