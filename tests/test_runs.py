"""Runs that survive: the same table as the scope's own call, whatever happens in between."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import polars as pl
import pytest
import torch
from safetensors import safe_open

import patchscopes as ps
from patchscopes.core.errors import InputError, NotAvailableError, RefusedError, ResourceError
from patchscopes.runs import Stop, open_run, resume, sweep
from patchscopes.runs import conditions as conditions_module
from patchscopes.runs.compare import diff, export, reproduce
from patchscopes.runs.events import EventLog, read_events
from patchscopes.runs.folder import MERGED, compact, find_run, put_piece, write_piece
from patchscopes.runs.lock import Lock
from patchscopes.runs.pace import Pace
from patchscopes.runs.schema import COORDINATES, ROWS
from patchscopes.scopes.readings import SCHEMA

PROMPTS = ["Yesterday we talked about France", "We looked at a picture of Paris", "She lives in Rome"]
EXPERIMENT = {
    "name": "little",
    "prompts": PROMPTS,
    "layers": "0:9:2",
    "scope": ["describe", "The capital of {x} is"],
    "tokens": 6,
    "shard": 3,
}
COORDINATE_NAMES = [name for name in COORDINATES if name != "cell"]
TEXTS = ["cell", *COORDINATE_NAMES, "status", "text", "next_token", "next_token_id", "n_tokens", "verdict"]
NUMBERS = [name for name, kind in ROWS.items() if kind == pl.Float64]


@pytest.fixture(scope="module")
def atlas():
    return ps.load("atlas")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, atlas):
    """A finished run of EXPERIMENT that nothing disturbed. Read only."""
    return sweep(EXPERIMENT, runs=tmp_path_factory.mktemp("whole"), models={"atlas": atlas})


def assert_same(one: pl.DataFrame, two: pl.DataFrame, tolerance: float = 1e-3) -> None:
    """Equal texts, numbers within a tolerance, null and NaN kept apart."""
    one, two = one.sort("cell"), two.sort("cell")
    assert one.select(TEXTS).equals(two.select(TEXTS), null_equal=True)
    for name in NUMBERS:
        a, b = one[name], two[name]
        assert (a.is_null() == b.is_null()).all(), name
        assert (a.is_nan().fill_null(False) == b.is_nan().fill_null(False)).all(), name
        gap = (a - b).abs().fill_nan(None).max()
        assert gap is None or gap <= tolerance, (name, gap)


def events_of(run, kind):
    return [event for event in run.events() if event["kind"] == kind]


def stopping_after(n: int, stop: Stop):
    """A listener that asks for a stop after n shards."""
    seen = []

    def listener(event):
        if event["kind"] == "shard":
            seen.append(event)
            if len(seen) == n:
                stop()

    return listener


# --------------------------------------------------------------------------------------------------------- the same table


def test_a_run_gives_the_table_of_the_scope_itself(whole, atlas):
    """The oracle: one call of the scope on all sources; the run read the same cells three at a time."""
    source = ps.Source(atlas, PROMPTS, position=-1, layer=[0, 2, 4, 6, 8])
    described = ps.scopes.describe(stop=(",", "\n"), max_new_tokens=6)
    extracted = ps.scopes.extract("The capital of {x} is", max_new_tokens=6)
    from patchscopes.scopes.named import named

    for name, scope in (("describe", named("describe")), ("The capital of {x} is", named("The capital of {x} is"))):
        from dataclasses import replace

        expected = replace(scope, max_new_tokens=6)(source).table
        got = whole.readings(scope=name).table
        keys = ["prompt", "source_layer", "control"]
        expected, got = expected.sort(keys), got.sort(keys)
        texts = [n for n, kind in SCHEMA.items() if kind != pl.Float64]
        assert got.select(texts).equals(expected.select(texts), null_equal=True)
        for number in (n for n, kind in SCHEMA.items() if kind == pl.Float64):
            gap = (got[number] - expected[number]).abs().max()
            assert gap is None or gap < 1e-3, number
            assert (got[number].is_null() == expected[number].is_null()).all()
    assert described.max_new_tokens == extracted.max_new_tokens == 6


def test_the_plan_is_the_table_before_it_is_work(whole):
    assert whole.plan["cell"].n_unique() == len(whole.plan) == whole.cells == 3 * 5 * 2 * 6
    assert set(whole.finished["cell"]) == set(whole.plan["cell"])
    assert whole.status == "done" and whole.counts == {"ok": 180, "failed": 0, "skipped": 0, "waiting": 0}
    assert whole.plan.group_by("shard").agg(pl.col("control").eq("none").sum())["control"].max() == 3
    assert set(whole.plan.group_by("shard").agg(pl.col("look").n_unique())["look"]) == {1}
    assert not list(whole.path.rglob("*.tmp"))


def test_sampled_draws_do_not_hang_on_shards(tmp_path, atlas):
    sampled = {**EXPERIMENT, "temperature": 1.0, "draws": 3, "layers": [4], "scope": "describe"}
    tables = [
        sweep({**sampled, "shard": shard}, runs=tmp_path / str(shard), models={"atlas": atlas}).table() for shard in (1, 2, 9)
    ]
    assert tables[0].filter(control="none")["text"].n_unique() > 3
    for other in tables[1:]:
        assert_same(tables[0], other)


def test_ids_are_of_the_content(tmp_path, atlas, whole):
    """A cell has the same id in a wider sweep, and another one as soon as anything of it is another."""
    little = {"name": "x", "prompts": PROMPTS[::-1], "layers": [2], "tokens": 6, "controls": False}
    plain = set(sweep(little, runs=tmp_path / "a", models={"atlas": atlas}).plan["cell"])
    wider = set(sweep({**little, "layers": [2, 4]}, runs=tmp_path / "b", models={"atlas": atlas}).plan["cell"])
    assert plain < wider
    for k, change in enumerate(
        ({"tokens": 5}, {"map": [{"scale": 2.0}]}, {"target_layer": 3}, {"at": 1}, {"stop": ["x"]}, {"controls": True})
    ):
        other = set(sweep({**little, **change}, runs=tmp_path / f"c{k}", models={"atlas": atlas}).plan["cell"])
        assert not plain & other, change


def test_company_hangs_on_content(tmp_path, atlas):
    """With controls the other sources are of the cell: the order of the prompts changes nothing."""
    some = {**EXPERIMENT, "scope": "describe", "layers": [4]}
    one = sweep(some, runs=tmp_path / "a", models={"atlas": atlas}).table()
    two = sweep({**some, "prompts": PROMPTS[::-1]}, runs=tmp_path / "b", models={"atlas": atlas}).table()
    drop = [name for name in COORDINATE_NAMES if name != "prompt"]
    assert one.sort("cell").select("cell", *drop, "text").equals(two.sort("cell").select("cell", *drop, "text"))
    assert (one.sort("cell")["bits_over_others"] - two.sort("cell")["bits_over_others"]).abs().max() < 1e-3


# --------------------------------------------------------------------------------------------------------- stop and resume


def test_stop_and_resume_lose_nothing_and_compute_nothing_twice(tmp_path, atlas, whole):
    stop = Stop()
    run = sweep(EXPERIMENT, runs=tmp_path, models={"atlas": atlas}, stop=stop, listeners=[stopping_after(2, stop)])
    assert run.status == "stopped" and run.counts["ok"] == 36 and run.counts["waiting"] == 144
    before = {piece.path.name for piece in run.pieces}
    again = resume(run.path, models={"atlas": atlas})
    assert again.status == "done" and before < {piece.path.name for piece in again.pieces}
    assert sum(event["cells"] for event in events_of(again, "shard")) == again.cells
    assert_same(again.table(), whole.table())
    assert [event["seq"] for event in again.events()] == sorted({event["seq"] for event in again.events()})


def test_resuming_a_finished_run_does_nothing(tmp_path, atlas):
    run = sweep({**EXPERIMENT, "layers": [0]}, runs=tmp_path, models={"atlas": atlas})
    pieces = {piece.path: piece.path.stat().st_mtime_ns for piece in run.pieces}
    again = resume(run.path, models={"atlas": atlas})
    assert {piece.path: piece.path.stat().st_mtime_ns for piece in again.pieces} == pieces


def test_the_same_question_is_answered_at_once(tmp_path):
    """Without torch, in another process."""
    experiment = {**EXPERIMENT, "layers": [0], "controls": False}
    run = sweep(experiment, runs=tmp_path)
    code = (
        "import sys, json; from patchscopes.runs import sweep; heard = [];"
        f"run = sweep(json.loads({json.dumps(experiment)!r}), runs={str(tmp_path)!r}, listeners=[heard.append]);"
        "print(json.dumps([run.id, 'torch' in sys.modules, [e['kind'] for e in heard]]))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(out) == [run.id, False, ["cached"]]
    assert sweep(experiment, runs=tmp_path, new=True).id != run.id


def test_an_unfinished_run_is_gone_on_with_when_it_is_asked_for_again(tmp_path):
    stop = Stop()
    experiment = {**EXPERIMENT, "layers": [0, 4], "controls": False}
    first = sweep(experiment, runs=tmp_path, stop=stop, listeners=[stopping_after(1, stop)])
    again = sweep(experiment, runs=tmp_path)
    assert again.id == first.id and again.status == "done"
    assert sum(event["cells"] for event in events_of(again, "shard")) == again.cells


def test_cells_of_earlier_runs_are_taken_over(tmp_path):
    narrow = {**EXPERIMENT, "layers": [0, 2], "scope": "describe"}
    first = sweep(narrow, runs=tmp_path)
    wide = sweep({**narrow, "layers": [0, 2, 4]}, runs=tmp_path)
    assert events_of(wide, "planned")[0]["cached"] == first.cells
    assert sum(event["cells"] for event in events_of(wide, "shard")) == wide.cells - first.cells
    clean = sweep({**narrow, "layers": [0, 2, 4]}, runs=tmp_path / "clean")
    assert_same(wide.table(), clean.table())


def test_only_whole_readings_are_taken_over(tmp_path, monkeypatch):
    """A reading that failed left its controls behind: they are made again with it, and no row is there twice."""
    from patchscopes.engine import generate

    real = generate._Work._walk

    def walk(self, some, *, caching):
        if any(self.rows[k].site.index == 4 and self.rows[k].value is not None for k in some):
            raise torch.OutOfMemoryError("out of memory (injected)")
        return real(self, some, caching=caching)

    experiment = {**EXPERIMENT, "scope": "describe", "layers": [2, 4]}
    with monkeypatch.context() as injected:
        injected.setattr(generate._Work, "_walk", walk)
        first = sweep(experiment, runs=tmp_path)
    assert first.status == "partial" and first.counts["skipped"] == 15
    wide = sweep({**experiment, "layers": [2, 4, 6]}, runs=tmp_path)
    assert wide.counts == {"ok": 54, "failed": 0, "skipped": 0, "waiting": 0} and len(wide.table()) == 54
    assert events_of(wide, "planned")[0]["cached"] == 18


def test_changed_versions_are_not_mixed_silently(tmp_path, monkeypatch):
    stop = Stop()
    experiment = {**EXPERIMENT, "layers": [0, 4], "controls": False}
    run = sweep(experiment, runs=tmp_path, stop=stop, listeners=[stopping_after(1, stop)])
    real = conditions_module.versions
    monkeypatch.setattr(conditions_module, "versions", lambda: {**real(), "torch": "9.9.9"})
    with pytest.raises(RefusedError, match=r"versions.torch was .* and is 9.9.9"):
        resume(run.path)
    assert open_run(run.path).counts == run.counts
    marked = resume(run.path, on_change="mark")
    assert marked.status == "done" and sorted(marked.table()["provenance"].unique()) == [0, 1]
    assert any("versions.torch" in caveat for caveat in marked.caveats)
    assert [entry["conditions"]["versions"]["torch"] for entry in marked.provenance][1] == "9.9.9"


def test_a_new_run_under_new_conditions(tmp_path, monkeypatch):
    stop = Stop()
    experiment = {**EXPERIMENT, "layers": [0, 4], "controls": False}
    run = sweep(experiment, runs=tmp_path, stop=stop, listeners=[stopping_after(1, stop)])
    real = conditions_module.versions
    monkeypatch.setattr(conditions_module, "versions", lambda: {**real(), "torch": "9.9.9"})
    new = resume(run.path, on_change="new")
    assert new.id != run.id and new.status == "done" and open_run(run.path).status == "stopped"
    assert sum(event["cells"] for event in events_of(new, "shard")) == new.cells  # nothing was taken over


def test_changed_weights_are_never_marked(tmp_path, atlas):
    stop = Stop()
    experiment = {**EXPERIMENT, "layers": [0, 4], "controls": False}
    model = ps.load("atlas")
    run = sweep(experiment, runs=tmp_path, models={"atlas": model}, stop=stop, listeners=[stopping_after(1, stop)])
    with torch.no_grad():
        next(model.hf.parameters()).mul_(1.01)
    for how in ("refuse", "mark"):
        with pytest.raises(RefusedError, match=r"models.atlas.files"):
            resume(run.path, models={"atlas": model}, on_change=how)


# ----------------------------------------------------------------------------------------------------------------- faults

KILLED = """
import sys
from patchscopes.runs import sweep
import torch
torch.set_num_threads(1)
sweep({experiment!r}, runs={runs!r})
"""


@pytest.mark.slow
def test_twenty_kills_lose_nothing(tmp_path, whole):
    """kill -9 at twenty random moments, from start-up to the end; each time the same command goes on."""
    rng = random.Random(4)
    experiment = {**EXPERIMENT, "shard": 1}
    kills = 0
    command = [sys.executable, "-c", KILLED.format(experiment=experiment, runs=str(tmp_path))]
    sizes = []
    deadline = time.monotonic() + 400
    while kills < 20 and time.monotonic() < deadline:
        done = len(list(tmp_path.glob("*/shards/*.parquet")))
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if kills % 4 == 3:  # some while it starts, most while it works
            time.sleep(rng.uniform(0.0, 2.0))
        else:
            while len(list(tmp_path.glob("*/shards/*.parquet"))) <= done and process.poll() is None:
                time.sleep(0.005)
            time.sleep(rng.uniform(0.0, 0.12))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        sizes.append(len(list(tmp_path.glob("*/shards/*.parquet"))))
    last = subprocess.run(command, capture_output=True, text=True)
    assert last.returncode == 0, last.stderr
    (folder,) = {path.parent for path in tmp_path.glob("*/run.json")}
    run = open_run(folder)
    assert kills >= 15 and sizes == sorted(sizes)
    rows = pl.concat([pl.read_parquet(piece.path) for piece in run.pieces])
    assert run.damaged == [] and rows["cell"].n_unique() == len(rows) == run.cells == whole.cells  # none twice, none lost
    assert_same(run.table(), _without_shards(whole.table(), run.table()))


def _without_shards(expected: pl.DataFrame, got: pl.DataFrame) -> pl.DataFrame:
    """The expected rows under the ids of the other run: a model given as an object has another key than one that was loaded."""
    ids = got.select("cell", *COORDINATE_NAMES)
    return expected.drop("cell").join(ids, on=COORDINATE_NAMES, nulls_equal=True).select(expected.columns)


@pytest.mark.parametrize("how", ["cut", "flip", "empty"])
def test_a_damaged_shard_is_found_and_computed_again(tmp_path, atlas, whole, how):
    run = sweep(EXPERIMENT, runs=tmp_path, models={"atlas": atlas})
    piece = run.pieces[3]
    content = bytearray(piece.path.read_bytes())
    if how == "flip":
        content[len(content) // 2] ^= 0x10
    piece.path.write_bytes({"cut": content[: len(content) // 2], "flip": content, "empty": b""}[how])
    hurt = open_run(run.path)
    assert len(hurt.damaged) == 1 and hurt.counts["waiting"] == 18 and any("damaged" in caveat for caveat in hurt.caveats)
    assert len(hurt.table()) == run.cells - 18  # readable meanwhile
    mended = resume(run.path, models={"atlas": atlas})
    assert mended.counts["ok"] == run.cells and mended.damaged == []
    assert sum(event["cells"] for event in events_of(mended, "shard")) == run.cells + 18
    assert_same(mended.table(), whole.table())


def test_a_second_process_refuses(tmp_path, atlas):
    stop = Stop()
    run = sweep(EXPERIMENT, runs=tmp_path, models={"atlas": atlas}, stop=stop, listeners=[stopping_after(1, stop)])
    code = f"from patchscopes.runs import resume; resume({str(run.path)!r})"
    with Lock(run.path / "run.lock"):
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert other.returncode != 0 and "another process works on" in other.stderr
    assert resume(run.path, models={"atlas": atlas}).status == "done"


def test_out_of_memory_in_the_middle(tmp_path, atlas, whole, monkeypatch):
    """The engine halves; the run says so, and its table is the same."""
    from patchscopes.engine import generate

    real = generate._Work._walk

    def walk(self, some, *, caching):
        if len(some) > 4:
            raise torch.OutOfMemoryError("out of memory (injected)")
        return real(self, some, caching=caching)

    monkeypatch.setattr(generate._Work, "_walk", walk)
    run = sweep(EXPERIMENT, runs=tmp_path, models={"atlas": atlas})
    assert run.status == "done" and events_of(run, "memory")
    assert_same(run.table(), whole.table())


def test_a_cell_that_never_fits_fails_alone(tmp_path, atlas, monkeypatch):
    from patchscopes.engine import generate

    real = generate._Work._walk

    def walk(self, some, *, caching):
        if any(self.rows[k].site.index == 4 and self.rows[k].value is not None for k in some):
            raise torch.OutOfMemoryError("out of memory (injected)")
        return real(self, some, caching=caching)

    experiment = {**EXPERIMENT, "controls": False, "scope": "describe"}
    monkeypatch.setattr(generate._Work, "_walk", walk)
    run = sweep(experiment, runs=tmp_path, models={"atlas": atlas})
    failed = run.table(status="failed")
    assert run.status == "partial" and set(failed["source_layer"]) == {4} and len(failed) == 3
    assert all("out of memory" in error and "free" in error for error in failed["error"])
    assert run.counts["ok"] == run.cells - 3
    monkeypatch.undo()
    mended = resume(run.path, models={"atlas": atlas}, failed=True)
    assert mended.status == "done" and mended.counts["ok"] == run.cells
    assert set(mended.table(source_layer=4)["attempt"]) == {1}
    assert sum(event["cells"] for event in events_of(mended, "shard")) == run.cells + 3


def test_one_cell_that_is_not_a_number(tmp_path):
    """A token whose embedding is NaN: its cells fail, and where they are other sources they are left out."""
    model = ps.load("atlas")
    bad = model.tokens(PROMPTS[1]).ids[-1]
    with torch.no_grad():
        embedding = model.hf.get_input_embeddings().weight
        before = embedding[bad].clone()
        embedding[bad] = float("nan")
    if model.hf.get_output_embeddings().weight is embedding:  # tied: the head must stay sound
        head = embedding.detach().clone()
        head[bad] = before
        model.hf.get_output_embeddings().weight = torch.nn.Parameter(head, requires_grad=False)
    run = sweep({**EXPERIMENT, "scope": "describe"}, runs=tmp_path, models={"atlas": model})
    failed = run.table(status="failed")
    assert run.status == "partial" and set(failed["prompt_text"]) == {PROMPTS[1]} and len(failed) == 5
    assert all("not finite" in error for error in failed["error"])
    good = run.table(control="none", status="ok")
    assert len(good) == 10 and good["bits_over_others"].is_finite().all()
    skipped = run.table(status="skipped")
    assert set(skipped["prompt_text"]) == {PROMPTS[1]} and len(skipped) == 25


def test_a_full_disk(tmp_path, atlas, whole, monkeypatch):
    real, written = os.fsync, []

    def fsync(handle):
        if len(written) > 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(handle)
        return real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(ResourceError, match=r"disk is full.*What was finished before is safe"):
        sweep(EXPERIMENT, runs=tmp_path, models={"atlas": atlas})
    monkeypatch.undo()
    (folder,) = {path.parent for path in tmp_path.glob("*/run.json")}
    run = open_run(folder)
    assert run.status == "stopped" and not run.damaged and not list(folder.rglob("*.tmp"))
    finished = run.counts["ok"]
    done = resume(folder, models={"atlas": atlas})
    assert sum(event["cells"] for event in list(events_of(done, "shard"))[-(10 - finished // 18) :]) == run.cells - finished
    assert_same(done.table(), whole.table())


def test_a_clock_that_goes_backwards(tmp_path, atlas, whole, monkeypatch):
    from patchscopes.runs import events

    ticks = iter(range(10**6, 0, -1))
    monkeypatch.setattr(events, "now", lambda: f"2026-01-01T00:00:{next(ticks)}")
    monkeypatch.setattr(time, "time", lambda: float(next(ticks)))
    stop = Stop()
    run = sweep(EXPERIMENT, runs=tmp_path, models={"atlas": atlas}, stop=stop, listeners=[stopping_after(3, stop)])
    done = resume(run.path, models={"atlas": atlas})
    heard = list(done.events())
    assert [e["seq"] for e in heard] == sorted(e["seq"] for e in heard) and done.status == "done"
    assert [e["time"] for e in heard] != sorted(e["time"] for e in heard)
    assert_same(done.table(), whole.table())


def test_a_folder_of_the_older_schema(tmp_path, atlas):
    readings = ps.scopes.describe(max_new_tokens=6)(ps.Source(atlas, PROMPTS, layer=[2, 4]))
    folder = readings.save(tmp_path / "old")
    run = open_run(folder)
    assert run.status == "done" and run.counts["ok"] == run.cells == 36 and run.is_old
    back = run.readings().table
    assert back.sort(back.columns[:9]).equals(readings.table.sort(back.columns[:9]), null_equal=True)
    for act in (lambda: resume(folder), lambda: reproduce(run)):
        with pytest.raises(RefusedError, match="older version"):
            act()


def test_a_folder_of_a_newer_schema(tmp_path, whole):
    copy = shutil.copytree(whole.path, tmp_path / "newer")
    record = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps({**record, "schema_version": 99}))
    with pytest.raises(RefusedError, match="newer version"):
        open_run(copy)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_record_that_is_none(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(NotAvailableError, match="is no record of a run"):
        open_run(tmp_path)


def test_paths_with_spaces_and_other_letters(tmp_path, atlas, whole):
    run = sweep({**EXPERIMENT, "name": "Größe 大 x/y"}, runs=tmp_path / "ein Ordner 日本 é", models={"atlas": atlas})
    assert run.path.is_dir() and "/y" not in run.path.name
    assert_same(open_run(run.path).table(), whole.table().with_columns(part=pl.lit("Größe 大 x/y")))


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs Unix permissions")
def test_a_read_only_folder(tmp_path, whole):
    """As somebody who may not write there: a finished run opens, a sweep into it is refused with what to do."""
    copy = shutil.copytree(whole.path, tmp_path / "runs" / whole.path.name)
    for path in (tmp_path, tmp_path / "runs", copy, *copy.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    for path in (copy, copy / "shards", tmp_path / "runs"):
        path.chmod(0o555)
    code = f"""
import os, pathlib
from patchscopes.runs import open_run
from patchscopes.runs.lock import Lock
from patchscopes.core.files import make_folder
open_run({str(whole.path)!r}).table()  # whatever is imported late
if os.geteuid() == 0:
    os.setuid(65534)
run = open_run({str(copy)!r})
print(run.status, run.counts["ok"], len(run.table()))
for act in (lambda: make_folder(pathlib.Path({str(tmp_path / "runs" / "other")!r})), lambda: Lock(run.path / "new.lock").__enter__()):
    try:
        act()
    except Exception as e:
        print(type(e).__name__, "could not be written" in str(e))
"""
    for parent in tmp_path.parents:  # others must be able to get there
        if "pytest" in str(parent):
            parent.chmod(0o755)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.splitlines() == ["done 180 180", "InputError True", "InputError True"], result.stderr


def test_ctrl_c_once_ends_after_the_shard_and_twice_at_once(tmp_path, whole):
    experiment = {**EXPERIMENT, "shard": 1}
    command = [sys.executable, "-m", "patchscopes", "sweep", "--runs", str(tmp_path), "--json", str(tmp_path / "e.json")]
    (tmp_path / "e.json").write_text(json.dumps(experiment))
    for number, times, code in (
        (signal.SIGINT, 1, 130),
        (signal.SIGINT, 2, 130),
        (signal.SIGINT, 9, 130),
        (signal.SIGTERM, 1, 143),
    ):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            for line in process.stdout:
                if json.loads(line)["kind"] == "shard":
                    for _ in range(times):
                        process.send_signal(number)
                        time.sleep(0.02)
                    break
            rest = [json.loads(line) for line in process.stdout]
        assert process.returncode == code
        assert rest[-1]["kind"] == "stopped"
    assert subprocess.run(command, capture_output=True).returncode == 0
    (folder,) = {path.parent for path in tmp_path.glob("*/run.json")}
    run = open_run(folder)
    rows = pl.concat([pl.read_parquet(piece.path) for piece in run.pieces])
    assert rows["cell"].n_unique() == len(rows) == run.cells
    assert_same(run.table(), _without_shards(whole.table(), run.table()))


# ------------------------------------------------------------------------------------------------------- folder and reading


def test_outputs(tmp_path, atlas):
    kept = {"top_k": 3, "vectors": True, "logits": True}
    run = sweep({**EXPERIMENT, "scope": "describe", "layers": [2, 4], "outputs": kept}, runs=tmp_path, models={"atlas": atlas})
    table = run.table()
    assert table["top_ids"].list.len().unique().to_list() == [3]
    assert (table["top_ids"].list.first() == table["next_token_id"]).all()
    assert (table["top_logprobs"].list.first() - table["logprob"]).abs().max() < 1e-6
    states, logits = {}, {}
    for path in (run.path / "tensors").iterdir():
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["about"])
            for k, where in enumerate(about["vectors"]["states"]):
                states[where["prompt"], where["source_layer"]] = file.get_tensor("vectors")[k]
            logits.update(zip(about["logits"]["cells"], file.get_tensor("logits"), strict=True))
    read = atlas.run(PROMPTS, read=["resid.2", "resid.4"])
    for (prompt, layer), state in states.items():
        assert torch.allclose(state, read[f"resid.{layer}"][prompt, -1], atol=1e-4)
    assert len(states) == 6 and set(logits) == set(table["cell"])
    for cell, token in table.select("cell", "next_token_id").iter_rows():
        assert int(logits[cell].argmax()) == token


def test_labels_come_along(tmp_path, atlas):
    prompts = [{"text": text, "labels": {"answer": k, "text": "own"}} for k, text in enumerate(PROMPTS)]
    run = sweep({**EXPERIMENT, "prompts": prompts, "layers": [2], "scope": "describe"}, runs=tmp_path, models={"atlas": atlas})
    table = run.table(control="none")
    assert table["answer"].to_list() == [0, 1, 2] and set(table["label_text"]) == {"own"}
    assert table["prompt_text"].to_list() == PROMPTS


def test_nan_stays_nan_and_null_null(tmp_path, whole):
    copy = open_run(shutil.copytree(whole.path, tmp_path / "copy"))
    row = {name: None for name in ROWS} | {
        "cell": "0" * 16,
        "status": "ok",
        "logprob": float("nan"),
        "attempt": 0,
        "provenance": 0,
    }
    write_piece(copy.path, 99, 0, pl.DataFrame([row], schema=ROWS))
    got = open_run(copy.path).scan().filter(pl.col("cell") == "0" * 16).collect()
    assert got["logprob"].is_nan().all() and got["surprisal"].is_null().all()


def test_many_pieces_are_put_together(tmp_path, whole, monkeypatch):
    from patchscopes.runs import folder

    monkeypatch.setattr(folder, "MANY", 4)
    copy = open_run(shutil.copytree(whole.path, tmp_path / "copy"))
    compact(copy)
    together = open_run(copy.path)
    assert [piece.attempt for piece in together.pieces] == [MERGED]
    assert_same(together.table(), whole.table(), 0.0)
    put_piece(copy.path, 0, 0, whole.pieces[0].path.read_bytes())  # killed before the small ones were gone
    assert_same(open_run(copy.path).table(), whole.table(), 0.0)
    assert open_run(copy.path).counts["waiting"] == 0


def test_runs_are_found(tmp_path, whole):
    root = tmp_path / "runs"
    for name in ("2026-01-01_some-name_ab12", "2026-01-02_some-name_ab34", "2026-01-03_other_cd56"):
        shutil.copytree(whole.path, root / name)
    assert find_run("cd", root).name.endswith("cd56") and find_run("ab34", root).name.endswith("ab34")
    assert find_run("some-name", root).name == "2026-01-02_some-name_ab34"
    assert find_run(root / "2026-01-03_other_cd56").name == "2026-01-03_other_cd56"
    with pytest.raises(InputError, match="begins the ids of 2 runs"):
        find_run("ab", root)
    with pytest.raises(NotAvailableError, match=r"no run 'zz'"):
        find_run("zz", root)


def test_a_killed_writer_leaves_a_torn_line(tmp_path):
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    log.tell("note", message="one")
    log.close()
    path.write_bytes(path.read_bytes() + b'{"seq": 2, "kin')
    assert [event["seq"] for event in read_events(path)] == [1]
    log = EventLog(path)
    log.tell("note", message="two")
    log.close()
    assert [event["seq"] for event in read_events(path)] == [1, 2]


def test_provenance_varies_with_its_causes(whole, monkeypatch, tmp_path):
    (entry,) = whole.provenance
    assert entry["conditions"]["models"]["atlas"]["dtype"] == "float32"
    assert entry["models"]["atlas"]["weight_hash"].startswith("sha256:")
    assert entry["machines"][0]["cores"] == os.cpu_count()
    monkeypatch.setenv("PATCHSCOPES_NO_HOST", "1")
    half = ps.load("atlas", dtype="bfloat16")
    other = sweep({**EXPERIMENT, "layers": [2], "scope": "logit-lens", "tokens": None}, runs=tmp_path, models={"atlas": half})
    assert other.provenance[0]["machines"][0]["host"] is None
    assert other.provenance[0]["conditions"]["models"]["atlas"]["dtype"] == "bfloat16"
    assert other.provenance[0]["conditions"]["models"]["atlas"]["files"] != entry["conditions"]["models"]["atlas"]["files"]


# ---------------------------------------------------------------------------------------------- compare, export, estimate


def test_reproduce(tmp_path):
    run = sweep({**EXPERIMENT, "scope": "describe", "layers": [2, 4]}, runs=tmp_path)
    found = reproduce(run, sample=4, seed=1)
    assert found.compared == 24 and found.same == 24 and found.conditions == () and found.largest < 1e-3
    piece = run.pieces[0]
    rows = pl.read_parquet(piece.path).with_columns(
        text=pl.when(pl.col("control") == "none").then(pl.lit("something else")).otherwise("text"), logprob=pl.col("logprob") - 1
    )
    piece.path.unlink()
    write_piece(run.path, piece.shard, 0, rows)
    found = reproduce(open_run(run.path), sample=None)
    assert found.compared - found.same == len(rows) and found.largest == pytest.approx(1, abs=1e-3)
    assert set(found.changed["column"]) == {"text", "logprob"}


def test_an_exported_run_is_reproduced(tmp_path):
    run = sweep({**EXPERIMENT, "scope": "describe", "layers": [2, 4]}, runs=tmp_path)
    export(run, tmp_path / "out", ["parquet"])
    before = run.table()
    shutil.rmtree(run.path)
    assert_same(open_run(tmp_path / "out").table(), before, 0.0)
    found = reproduce(open_run(tmp_path / "out" / "run.json"), sample=3)
    assert found.compared == found.same == 18


def test_readings_of_one_look(whole):
    with pytest.raises(InputError, match="several scopes are there; choose one of 'describe'"):
        whole.readings()
    with pytest.raises(InputError, match=r"no scope 'descibe' is there. Did you mean 'describe'"):
        whole.readings(scope="descibe")
    assert len(whole.readings(scope="describe").readings) == 15


def test_diff(tmp_path, atlas, whole):
    other = sweep({**EXPERIMENT, "layers": [0, 2], "seed": 5}, runs=tmp_path, models={"atlas": atlas})
    found = diff(whole, other)
    assert found.compared == other.cells and found.only_before == whole.cells - other.cells and found.only_after == 0
    assert set(found.changed.filter(pl.col("column") == "text")["control"]) <= {"random", "other", "mean"}
    assert diff(whole, whole).same == whole.cells


def test_export(tmp_path, whole):
    paths = export(whole, tmp_path / "out", ["parquet", "csv", "jsonl"])
    assert {path.name for path in paths} == {"table.parquet", "table.csv", "table.jsonl", "run.json"}
    assert_same(pl.read_parquet(tmp_path / "out" / "table.parquet"), whole.table(), 0.0)
    assert len(pl.read_csv(tmp_path / "out" / "table.csv")) == whole.cells
    assert json.loads((tmp_path / "out" / "run.json").read_text())["id"] == whole.id


def test_pace_foresees_the_end_after_a_tenth():
    """Two looks that take turns, one ten times dearer a FLOP than the other; the first shard of each is slow."""
    clock = [0.0]
    costs = {k: 1e9 for k in range(200)}
    looks = {k: k % 2 for k in costs}
    speed = {0: 1e-9, 1: 1e-8}
    rng = random.Random(0)
    pace = Pace(costs, looks, clock=lambda: clock[0])
    pace.start()
    foreseen = None
    for k, cost in costs.items():
        seconds = cost * speed[looks[k]] * rng.uniform(0.8, 1.2) * (3 if k < 2 else 1)
        clock[0] += seconds
        pace.finished(k, seconds)
        if k == 19:
            foreseen = clock[0] + pace.eta()[0]
    assert foreseen == pytest.approx(clock[0], rel=0.2) and pace.share == pytest.approx(1.0)


def test_pace_of_several_workers():
    clock = [0.0]
    pace = Pace({k: 1.0 for k in range(100)}, {k: 0 for k in range(100)}, clock=lambda: clock[0])
    pace.start()
    for k in range(0, 20, 2):  # two at a time, a second each
        clock[0] += 1.0
        pace.finished(k, 1.0)
        pace.finished(k + 1, 1.0)
    assert pace.eta()[0] == pytest.approx(40, rel=0.1)


def test_a_plan_without_weights_is_the_plan(tmp_path):
    """Outlines give the ids that loaded models give, so that workers elsewhere compute the very cells that were planned."""
    from patchscopes.experiment.looks import looks
    from patchscopes.experiment.spec import Experiment
    from patchscopes.runs.conditions import conditions, files_of, keys, load_spec, outline_spec
    from patchscopes.runs.estimate import costs_of
    from patchscopes.runs.plan import plan, see

    experiment = Experiment.model_validate(EXPERIMENT)
    (spec,) = experiment.models()
    tables = []
    for model in (load_spec(spec, "cpu"), outline_spec(spec, "cpu")):
        found = conditions({spec.key: model}, {spec.key: files_of(spec)}, "cpu")
        seen = see(looks(experiment, {spec.key: model})[0], keys(found))
        tables.append((found, plan(seen, costs_of(seen))[0]))
    assert tables[0][0] == tables[1][0] and tables[0][1].equals(tables[1][1])


def test_an_estimate(tmp_path):
    from patchscopes.experiment.spec import Experiment
    from patchscopes.runs.estimate import estimate

    experiment = Experiment.model_validate(EXPERIMENT)
    probed = estimate(experiment)
    assert (probed.cells, probed.readings) == (180, 30) and probed.seconds[0] < probed.seconds[1] < probed.seconds[2]
    foreseen = estimate(experiment, probe=False, hardware="h100")
    assert (foreseen.cells, foreseen.shards, foreseen.cards_for_weights) == (180, 10, 1)
    assert estimate(experiment, probe=False).seconds is None
    assert not (tmp_path / "runs").exists()
    with pytest.raises(InputError, match="Did you mean 'h100'"):
        estimate(experiment, probe=False, hardware="h1000")
