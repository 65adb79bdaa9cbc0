"""Folders that Hugging Face datasets saved to disk (`save_to_disk`): Arrow streams, listed in state.json; splits are folders.

    DatasetDict   dataset_dict.json {"splits": ["train", …]}, and a folder for each split
    Dataset       state.json {"_data_files": [{"filename": "data-00000-of-00002.arrow"}, …]}, dataset_info.json, and the files

The package `datasets` is not needed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from patchscopes.core.errors import InputError, nearest


def is_dataset(folder: Path) -> bool:
    """Whether a folder looks like one."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def dataset_files(folder: Path) -> dict[str, list[Path]]:
    """Split -> Arrow files, in order; a dataset without splits has the split "". InputError if the folder holds none."""
    if not is_dataset(folder):
        raise InputError(
            f"the folder {str(folder)!r} is no dataset: expected state.json or dataset_dict.json, as save_to_disk of datasets writes them"
        )
    if not (folder / "dataset_dict.json").is_file():
        return {"": _files(folder)}
    splits = _json(folder / "dataset_dict.json").get("splits")
    if not isinstance(splits, list) or not splits or not all(isinstance(split, str) for split in splits):
        raise InputError(f"{str(folder / 'dataset_dict.json')!r} names no splits")
    return {split: _files(_inside(folder, split)) for split in splits}


def read_dataset(folder: Path, split: str | None) -> dict[str, list[Any]]:
    """The columns of a dataset, or of one split of it, by name."""
    import polars as pl

    found = dataset_files(folder)
    if "" in found:
        if split is not None:
            raise InputError(f"{str(folder)!r} is a dataset without splits; expected no split, but found split = {split!r}")
        split = ""
    elif split is None and len(found) == 1:
        split = next(iter(found))
    elif split is None:
        raise InputError(
            f"{str(folder)!r} has the splits {', '.join(map(repr, found))}; choose one: split = {next(iter(found))!r}"
        )
    elif split not in found:
        raise InputError(f"{str(folder)!r} has no split {split!r}; it has {', '.join(map(repr, found))}. {nearest(split, found)}")
    tables = []
    for file in found[split]:
        try:
            tables.append(pl.read_ipc_stream(file))
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as e:
            raise InputError(f"{str(file)!r} could not be read as an Arrow stream: {str(e).splitlines()[0]}") from None
    return pl.concat(tables, how="vertical_relaxed").to_dict(as_series=False)


def _files(folder: Path) -> list[Path]:
    state = _json(folder / "state.json")
    listed = state.get("_data_files")
    if not isinstance(listed, list) or not all(
        isinstance(file, dict) and isinstance(file.get("filename"), str) for file in listed
    ):
        raise InputError(f"{str(folder / 'state.json')!r} lists no data files")
    if state.get("_indices_data_files"):
        raise InputError(
            f"{str(folder)!r} is a selection of a dataset whose rows are in another order; save it after dataset.flatten_indices()"
        )
    if not listed:
        raise InputError(f"the dataset {str(folder)!r} has no rows; expected some prompts")
    files = [_inside(folder, file["filename"]) for file in listed]
    for file in files:
        if not file.is_file():
            raise InputError(f"the dataset {str(folder)!r} lacks its file {file.name!r}; copy the folder again")
    return files


def _inside(folder: Path, name: str) -> Path:
    """A file or folder directly in `folder`: a dataset cannot name what lies elsewhere."""
    if Path(name).name != name or name in ("..", "."):
        raise InputError(f"the dataset {str(folder)!r} names {name!r}, which is not in it")
    return folder / name


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"the dataset {str(path.parent)!r} lacks its file {path.name!r}; copy the folder again") from None
    except (OSError, ValueError) as e:
        raise InputError(f"{str(path)!r} could not be read: {e}") from None
    if not isinstance(found, dict):
        raise InputError(f"{str(path)!r} holds no object")
    return found
