"""A run folder: the record of a run. Every interface is a reader of it.

    run.json                     schema_version, spec (resolved), status, counts, provenance, caveats; rewritten whole
    plan.parquet                 a row a cell, with its stable id (see `plan`)
    shards/part-SHARD.ATTEMPT-HASH.parquet     finished rows (see `ROWS`); HASH is that of the file's bytes
    tensors/part-SHARD.ATTEMPT-HASH.safetensors    vectors and logits, if they were asked for
    events.jsonl, events.d/      what happened (see `events`); detached workers write files of their own
    inputs/                      vectors, maps and edits that the spec names
    run.lock                     held by the process that works here

Nothing in a run folder is ever changed but `run.json`: pieces are added. A piece whose bytes do not give its hash is damaged; it is
left out, and its cells count as waiting. Of a cell that was tried again the last attempt counts.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import polars as pl

from patchscopes.core.errors import InputError, NotAvailableError, RefusedError, UnknownName, nearest
from patchscopes.core.files import content_hash, make_folder, told, write_json, write_whole
from patchscopes.runs.events import Event, read_events
from patchscopes.runs.lock import is_locked
from patchscopes.runs.old import from_readings, prompts_of_readings, rows_of_readings
from patchscopes.runs.schema import COORDINATES, ROWS

if TYPE_CHECKING:
    from patchscopes.scopes import Readings

SCHEMA_VERSION = 2  # 1 was what `Readings.save` writes: one table and its provenance
Status = Literal["planned", "running", "stopped", "partial", "done", "failed"]

PIECE = re.compile(r"part-(\d+)\.(\d+|merged)-([0-9a-f]{16})\.parquet")
EXPORTED = "table.parquet"  # what `export` writes instead of pieces
MERGED = -1  # the attempt of a piece that was put together of others
MANY = 128  # pieces, from which on they are put together when a run is done
TOGETHER, GROUP = 200_000, 20_000  # rows of such a piece, and of a group that can be skipped when one layer is read


@dataclass(frozen=True)
class Piece:
    """A file of finished rows: those of an attempt at a shard."""

    path: Path
    shard: int
    attempt: int
    hash: str

    @classmethod
    def at(cls, path: Path) -> Piece | None:
        """The piece that a file's name tells of."""
        match = PIECE.fullmatch(path.name)
        if match is None:
            return None
        return cls(path, int(match[1]), MERGED if match[2] == "merged" else int(match[2]), match[3])

    def is_whole(self) -> bool:
        """Whether the bytes are those that were written."""
        return content_hash(self.path.read_bytes()) == self.hash


class Run:
    """A run folder, finished or not. Use `open_run`. Reads only; it sees what is there at the time (see `refresh`)."""

    def __init__(self, path: Path):
        self.path = path
        self.record: dict[str, Any] = _read_record(path)

    def __repr__(self) -> str:
        done = self.counts
        return f"Run({self.id!r}: {self.name}, {self.status}, {done['ok']:,} of {self.cells:,} cells, {done['failed']:,} failed)"

    @property
    def id(self) -> str:
        """Four or more hexadecimal digits, the end of the folder's name."""
        return self.record["id"]

    @property
    def name(self) -> str:
        """How the experiment is called."""
        return self.record["name"]

    @property
    def status(self) -> Status:
        """planned, running, stopped (also if its process was killed), partial (some cells failed), done."""
        status = self.record["status"]
        if (parts := self.path / "events.d").exists():  # work without anyone who drives it, see `parts`
            if any(is_locked(lock) for lock in parts.glob("*.lock")):
                return "running"
            status = "running" if status == "planned" else status
        return "stopped" if status == "running" and not is_locked(self.path / "run.lock") else status

    @property
    def spec(self) -> dict[str, Any]:
        """The experiment, resolved: prompts inline, files in `inputs/`."""
        return self.record["spec"]

    @property
    def provenance(self) -> list[dict[str, Any]]:
        """What the rows hang on; the column `provenance` of the table counts it."""
        return self.record["provenance"]

    @property
    def caveats(self) -> list[str]:
        """What a reader must know."""
        broken = [f"{piece.path.name} is damaged; its cells are computed again by `resume`" for piece in self.damaged]
        return [*self.record["caveats"], *broken]

    @property
    def cells(self) -> int:
        """Planned cells, controls among them."""
        return self.record["cells"]

    @property
    def is_old(self) -> bool:
        """Whether the folder is of schema 1: one call of a scope, saved whole. It is read as it is, and nothing can be added to it."""
        return not (self.path / "run.json").exists()

    def refresh(self) -> Run:
        """The same folder as it is now."""
        return Run(self.path)

    # ------------------------------------------------------------------------------------------------------- reading

    @cached_property
    def _pieces(self) -> tuple[list[Piece], list[Piece]]:
        pieces = [piece for path in sorted((self.path / "shards").glob("*.parquet")) if (piece := Piece.at(path))]
        whole = [piece.is_whole() for piece in pieces]
        return [p for p, ok in zip(pieces, whole, strict=True) if ok], [p for p, ok in zip(pieces, whole, strict=True) if not ok]

    @property
    def pieces(self) -> list[Piece]:
        """Whole files of finished rows."""
        return self._pieces[0]

    @property
    def damaged(self) -> list[Piece]:
        """Files whose bytes are not those that were written."""
        return self._pieces[1]

    def scan(self) -> pl.LazyFrame:
        """The finished rows, to be filtered before they are read: columns `ROWS`."""
        if self.is_old:
            return rows_of_readings(self.path, self.record)
        if (exported := self.path / EXPORTED).exists():
            return pl.scan_parquet(exported, glob=False).select(*ROWS)
        if not self.pieces:
            return pl.LazyFrame(schema=ROWS)
        rows = pl.scan_parquet([piece.path for piece in self.pieces], glob=False)
        if len({piece.attempt for piece in self.pieces}) > 1 or self.pieces[0].attempt > 0:  # rows may be there twice
            rows = rows.sort("attempt", maintain_order=True).unique("cell", keep="last", maintain_order=True)
        return rows

    @cached_property
    def plan(self) -> pl.DataFrame:
        """A row a cell: columns `PLAN`."""
        if self.is_old:
            return self.scan().select(*COORDINATES).collect()
        return pl.read_parquet(self.path / "plan.parquet")

    def table(self, **where: Any) -> pl.DataFrame:
        """Finished rows in the order of the plan, with their prompts and the labels of these. `where`: column=value or a list of values,
        such as control="none", source_layer=[3, 4]."""
        rows = self.scan()
        for column, value in where.items():
            if column not in ROWS:
                raise UnknownName(f"unknown column {column!r}. {nearest(column, ROWS)}")
            rows = rows.filter(pl.col(column).is_in(value if isinstance(value, (list, tuple, range)) else [value]))
        order = ["part", "model", "scope", "prompt", "position", "source_layer", "target", "target_layer", "map", "draw"]
        prompts = self.prompts.drop("ids")
        return (
            rows.collect()
            .sort(order, maintain_order=True)
            .join(prompts, on=["part", "model", "prompt"], how="left", maintain_order="left")
        )

    @cached_property
    def prompts(self) -> pl.DataFrame:
        """part, model, prompt (its number), prompt_text, ids, and the labels that came with it as columns."""
        return prompts_of_readings(self.path, self.record) if self.is_old else pl.read_parquet(self.path / "prompts.parquet")

    @property
    def finished(self) -> pl.DataFrame:
        """cell, status and attempt of every finished row."""
        return self.scan().select("cell", "status", "attempt").collect()

    @property
    def counts(self) -> dict[str, int]:
        """Cells by what became of them: ok, failed, skipped (a control that cannot be), waiting."""
        found = dict(self.finished.group_by("status").len().iter_rows())
        counts = {status: found.get(status, 0) for status in ("ok", "failed", "skipped")}
        return {**counts, "waiting": self.cells - sum(counts.values())}

    def readings(self, part: str | None = None, *, model: str | None = None, scope: str | None = None) -> Readings:
        """The finished readings of one part, model and scope, as a call of the scope gives them. Only one of each: no need to say which."""
        from patchscopes.scopes import Readings
        from patchscopes.scopes.readings import SCHEMA

        looks = self.record["looks"]
        for name, value in (("part", part), ("model", model), ("scope", scope)):
            known = list(dict.fromkeys(look[name] for look in looks))  # of those that are left
            if value is None and len(known) > 1:
                raise InputError(f"several {name}s are there; choose one of {', '.join(map(repr, known))}: {name}=…")
            if value is not None and value not in known:
                raise UnknownName(f"no {name} {value!r} is there. {nearest(value, known)}")
            looks = [look for look in looks if look[name] == (known[0] if value is None else value)]
        (look,) = looks
        chosen = {name: look[name] for name in ("part", "model", "scope")}
        rows = self.table(**chosen, status="ok").select(list(SCHEMA))
        places = rows.select("prompt_text", "position").unique(maintain_order=True)
        sources = [{"text": text, "position": position} for text, position in places.iter_rows()]
        provenance = {**look["provenance"], "sources": sources, "run": {"id": self.id, "folder": str(self.path)}}
        return Readings(rows.cast(pl.Schema(SCHEMA)), provenance)

    def events(self) -> Iterator[Event]:
        """What happened, in order; that of detached workers after the others."""
        yield from read_events(self.path / "events.jsonl")
        for path in sorted((self.path / "events.d").glob("*.jsonl")):
            yield from read_events(path)


def _read_record(path: Path) -> dict[str, Any]:
    file = path / "run.json"
    if not file.exists() and (path / "readings.json").exists():
        file = path / "readings.json"
    if not file.exists():
        raise NotAvailableError(f"no run in {str(path)!r}: expected run.json, as `patchscopes sweep` writes it")
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        version = record["schema_version"] if file.name == "run.json" else record["format"]
    except (ValueError, KeyError, TypeError) as e:
        raise NotAvailableError(f"{str(file)!r} is no record of a run: {e or type(e).__name__}") from e
    if version > SCHEMA_VERSION:
        raise RefusedError(
            f"{str(path)!r} was written by a newer version (schema {version}; this one reads up to {SCHEMA_VERSION}). Update patchscopes"
        )
    return from_readings(path, record) if version == 1 else record


def write_piece(folder: Path, shard: int, attempt: int, rows: pl.DataFrame) -> Piece:
    """Add finished rows (columns `ROWS`). Whole or not at all."""
    buffer = io.BytesIO()
    rows.write_parquet(buffer, compression="zstd", statistics=True, row_group_size=GROUP)
    return put_piece(folder, shard, attempt, buffer.getvalue())


def put_piece(folder: Path, shard: int, attempt: int, content: bytes, *, tensors: bool = False) -> Piece:
    """The same with a file's bytes, as a worker sent them."""
    digest = content_hash(content)
    kind, suffix = ("tensors", "safetensors") if tensors else ("shards", "parquet")
    path = folder / kind / f"part-{shard:05d}.{'merged' if attempt == MERGED else attempt}-{digest}.{suffix}"
    make_folder(path.parent)
    write_whole(path, content)
    return Piece(path, shard, attempt, digest)


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Rewrite run.json."""
    write_json(folder / "run.json", record)


def write_table(path: Path, table: pl.DataFrame) -> None:
    """Write a table whole."""
    buffer = io.BytesIO()
    table.write_parquet(buffer, compression="zstd", statistics=True)
    write_whole(path, buffer.getvalue())


def compact(run: Run) -> None:
    """Put many small pieces together, rows of a layer beside each other, so that opening is quick. Killed half-way, rows are there
    twice for a while, which readers know."""
    small = [piece for piece in run.pieces if piece.attempt != MERGED]
    if len(small) < MANY:
        return
    group: list[Piece] = []
    rows = 0
    for piece in [*small, None]:
        if piece is not None:
            group.append(piece)
            rows += pl.scan_parquet(piece.path, glob=False).select(pl.len()).collect().item()
        if group and (piece is None or rows >= TOGETHER):
            together = pl.scan_parquet([one.path for one in group], glob=False).collect()
            together = together.sort("attempt", maintain_order=True).unique("cell", keep="last", maintain_order=True)
            write_piece(run.path, group[0].shard, MERGED, together.sort("source_layer", "prompt", maintain_order=True))
            for one in group:
                one.path.unlink()
            group, rows = [], 0


def set_aside(piece: Piece) -> Path:
    """Move a damaged piece out of the way, kept for a look."""
    away = make_folder(piece.path.parent / "damaged") / piece.path.name
    with told(away):
        piece.path.replace(away)
    return away


# ------------------------------------------------------------------------------------------------------------ finding


def run_folders(root: Path) -> list[Path]:
    """The run folders below `root`, the latest first."""
    if not root.is_dir():
        return []
    found = [path.parent for path in root.glob("*/run.json") if (path.parent / "plan.parquet").exists()]
    return sorted(found, key=lambda path: (path.name[:10], (path / "plan.parquet").stat().st_mtime_ns), reverse=True)


def find_run(which: str | Path, root: Path = Path("runs")) -> Path:
    """The folder that a path, an id, the beginning of an id or a name means; with several runs of a name the latest."""
    path = Path(which)
    if (path / "run.json").exists() or (path / "readings.json").exists():
        return path
    if path.name == "run.json" and path.exists():
        return path.parent
    folders = run_folders(root)
    by_id = [folder for folder in folders if folder.name.rpartition("_")[2].startswith(str(which))]
    if len(by_id) > 1:
        raise InputError(
            f"{str(which)!r} begins the ids of {len(by_id)} runs: {', '.join(f.name for f in by_id[:5])}; give more of it"
        )
    by_name = [folder for folder in folders if folder.name == str(which) or folder.name.split("_")[1:-1] == str(which).split("_")]
    if by_id or by_name:
        return (by_id or by_name)[0]
    known = [folder.name.rpartition("_")[2] for folder in folders]
    hint = nearest(str(which), known) if known else f"there are no runs in {str(root)!r}"
    raise NotAvailableError(f"no run {str(which)!r}: expected a run folder, or the id or name of a run in {str(root)!r}. {hint}")


def open_run(which: str | Path, *, runs: str | Path = "runs") -> Run:
    """Open a run, finished or not: by its folder, its id or the beginning of that, or its name. `runs`: where ids are looked for."""
    return Run(find_run(which, Path(runs)))


def columns(rows: Sequence[dict[str, Any]], schema: dict[str, Any]) -> pl.DataFrame:
    """Rows as a table; what a row lacks is null, NaN stays NaN."""
    return pl.DataFrame([{name: row.get(name) for name in schema} for row in rows], schema=schema)


def as_parquet(rows: Sequence[dict[str, Any]]) -> bytes:
    """Finished rows as a file: what workers send."""
    buffer = io.BytesIO()
    columns(rows, ROWS).write_parquet(buffer, compression="zstd", statistics=True)
    return buffer.getvalue()


def failed(error: str) -> dict[str, str]:
    """What the row of a reading says that could not be made."""
    return {"status": "failed", "error": error}


def skipped(why: str = "its reading failed") -> dict[str, str]:
    """What the row of a control says that there is not."""
    return {"status": "skipped", "error": why}
