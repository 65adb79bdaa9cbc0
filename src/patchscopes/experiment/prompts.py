"""The prompts of an experiment, read from where they are: inline, CSV, TSV, JSONL, Parquet, or a folder of Hugging Face datasets.

Rows are counted from 1, the header not. Nothing here knows a model: whether a prompt can be read by one is said later (`looks`).
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from patchscopes.core.errors import InputError, nearest
from patchscopes.experiment import grammar
from patchscopes.experiment.dataset_folder import dataset_files, is_dataset, read_dataset
from patchscopes.experiment.lens_folder import lens_files
from patchscopes.experiment.spec import Experiment
from patchscopes.experiment.spec_tables import PromptFile, PromptSpec, Scalar, VectorFile

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
_INTEGER = re.compile(r"-?(0|[1-9]\d{0,17})")
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")

Column = list[Any]


@dataclass(frozen=True)
class Prompted:
    """A prompt as it was asked for.

    text, ids  one of them: text, or token ids taken as they are
    at         where to read it, as in `Experiment.at`
    chat       put the text into the model's chat template
    labels     what is known of it
    origin     where it stands, for messages: "prompts.csv row 7"
    """

    text: str | None
    ids: tuple[int, ...] | None = None
    at: int | str | tuple[int | str, ...] = -1
    chat: bool = False
    labels: Mapping[str, Scalar] = field(default_factory=dict)
    origin: str = ""


def read_prompts(experiment: Experiment) -> list[Prompted]:
    """The prompts of an experiment without parts (see `Experiment.split`), in order. InputError names file, row and column."""
    if isinstance(experiment.prompts, VectorFile) or experiment.prompts is None:
        raise InputError(f"{experiment.name!r} reads vectors, which are no prompts; see `looks`")
    if isinstance(experiment.prompts, PromptFile):
        return _of_file(experiment.prompts, experiment.at, experiment.seed)
    return [_inline(one, f"prompts[{k}]", experiment.at) for k, one in enumerate(experiment.prompts)]


def _inline(one: PromptSpec, origin: str, at: int | str | tuple[int | str, ...]) -> Prompted:
    return Prompted(one.text, one.ids, at if one.at is None else one.at, one.chat, one.labels, origin)


def _of_file(source: PromptFile, at: int | str | tuple[int | str, ...], seed: int) -> list[Prompted]:
    path = Path(source.file)
    columns = _read(path, source.split)
    for key, name in (
        ("column", source.column),
        ("at_column", source.at_column),
        *(("labels", label) for label in source.labels),
    ):
        if name is not None and name not in columns:
            raise InputError(f"{path.name!r} has no column {name!r} ({key}). {nearest(name, columns)} It has: {_some(columns)}")
    texts = columns[source.column]
    if not texts:
        raise InputError(f"{str(path)!r} has no rows; expected a prompt in each")
    rows = list(range(len(texts)))[: source.limit]
    if source.sample is not None and source.sample < len(rows):
        rows = sorted(random.Random(seed).sample(rows, source.sample))
    places = [None] * len(texts) if source.at_column is None else [_whole(place) for place in columns[source.at_column]]
    plain = path.suffix.lower() in (".csv", ".tsv")  # there everything is text
    labels_of = {label: _typed(columns[label]) if plain else columns[label] for label in source.labels}
    found, wrong = [], []
    for row in rows:
        origin = f"{path.name} row {row + 1}"
        text = texts[row]
        if not isinstance(text, str) or not text.strip():
            what = "nothing" if text is None else "no text" if not isinstance(text, str) else "empty text"
            wrong.append(f"{origin} has {what} in the column {source.column!r}")
            continue
        try:
            own = at if places[row] in (None, "") else grammar.position(places[row])
        except InputError as e:
            wrong.append(f"{origin}, column {source.at_column!r}: {e}")
            continue
        labels = {label: column[row] for label, column in labels_of.items()}
        for label, value in labels.items():
            if not isinstance(value, (str, int, float, bool, type(None))):
                wrong.append(f"{origin}, column {label!r}: a {type(value).__name__} cannot be a label; expected text or a number")
        found.append(Prompted(text, None, own, source.chat, labels, origin))
    if wrong:
        raise InputError(several(wrong, f"{len(wrong)} rows of {str(path)!r} are no prompts"))
    return found


def _whole(place: Any) -> Any:
    """An index that became a float because its column has gaps, as an index again; a gap as None."""
    if isinstance(place, float):
        return None if math.isnan(place) else int(place) if place.is_integer() else place
    return place


def several(wrong: Sequence[str], what: str) -> str:
    """One message for many mistakes: the only one, or the first five and how many there are."""
    if len(wrong) == 1:
        return wrong[0]
    more = [f"… and {len(wrong) - 5} more"] if len(wrong) > 5 else []
    return "\n".join([f"{what}:", *(f"  {line}" for line in wrong[:5]), *(f"  {line}" for line in more)])


def _some(columns: Mapping[str, object]) -> str:
    names = list(columns)
    return ", ".join(map(repr, names[:20])) + (f", … ({len(names)} columns)" if len(names) > 20 else "")


# ----------------------------------------------------------------------------------------------------------------------------- files


def _read(path: Path, split: str | None) -> dict[str, Column]:
    """The columns of a file, by name."""
    if path.is_dir():
        return read_dataset(path, split)
    if not path.exists():
        raise InputError(f"there is no file {str(path)!r}; expected prompts in {', '.join(SUFFIXES)} or a dataset folder")
    if not path.is_file():
        raise InputError(f"{str(path)!r} is no plain file; expected prompts in {', '.join(SUFFIXES)} or a dataset folder")
    if split is not None:
        raise InputError(f"{path.name!r} is a single file and has no split {split!r}; splits are of dataset folders")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(f"{path.name!r} has the suffix {suffix!r}; expected {', '.join(SUFFIXES)}, or a folder of a dataset")
    try:
        if path.stat().st_size == 0:
            raise InputError(f"{str(path)!r} is empty; expected prompts")
        if suffix in (".jsonl", ".ndjson"):
            return _jsonl(path)
        return _parquet(path) if suffix == ".parquet" else _csv(path, "\t" if suffix == ".tsv" else ",")
    except UnicodeDecodeError as e:
        raise InputError(f"{str(path)!r} is not UTF-8 text: byte {e.start} cannot be read") from None
    except OSError as e:
        raise InputError(f"{str(path)!r} could not be read: {e.strerror or e}") from None


def _csv(path: Path, separator: str) -> dict[str, Column]:
    import polars as pl

    try:
        table = pl.read_csv(path, separator=separator, infer_schema=False)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as e:
        raise InputError(f"{str(path)!r} could not be read as {path.suffix[1:].upper()}: {str(e).splitlines()[0]}") from None
    return table.to_dict(as_series=False)


def _typed(values: Column) -> Column:
    """Texts as the numbers or truth values that they all spell; as texts if one does not. "007" is a text: it would not come back."""
    some = [value for value in values if value is not None]
    if some and all(_INTEGER.fullmatch(value) for value in some):
        return [None if value is None else int(value) for value in values]
    if some and all(_NUMBER.fullmatch(value) and math.isfinite(float(value)) for value in some):
        return [None if value is None else float(value) for value in values]
    if some and all(value.lower() in ("true", "false") for value in some):
        return [None if value is None else value.lower() == "true" for value in values]
    return values


def _parquet(path: Path) -> dict[str, Column]:
    import polars as pl

    try:
        return pl.read_parquet(path).to_dict(as_series=False)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as e:
        raise InputError(f"{str(path)!r} could not be read as Parquet: {str(e).splitlines()[0]}") from None


def _jsonl(path: Path) -> dict[str, Column]:
    rows: list[dict[str, Any]] = []
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as e:
                reason = e.msg if isinstance(e, json.JSONDecodeError) else "nested too deep"
                raise InputError(f"{str(path)!r} is not valid JSON in line {number}: {reason}") from None
            if not isinstance(row, dict):
                raise InputError(
                    f'{str(path)!r} holds a {type(row).__name__} in line {number}; expected an object such as {{"prompt": …}}'
                )
            rows.append(row)
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}


# --------------------------------------------------------------------------------------------------------------------------- content


def content(path: Path) -> str:
    """A hash of what a file holds: "sha256:…"; of a dataset folder, of its tables; of a lens folder, of its lens. InputError if it
    is not there."""
    digest = hashlib.sha256()
    try:
        if path.is_dir() and is_dataset(path):
            for split, files in dataset_files(path).items():
                digest.update(json.dumps([split, len(files)]).encode())
                for file in files:
                    digest.update(bytes.fromhex(_hash(file)))
        elif path.is_dir():
            for file in lens_files(path):
                digest.update(file.name.encode() + bytes.fromhex(_hash(file)))
        else:
            return f"sha256:{_hash(path)}"
    except OSError as e:
        raise InputError(f"{str(path)!r} could not be read: {e.strerror or e}") from None
    return f"sha256:{digest.hexdigest()}"


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
