"""Executors: any number of workers gives the same table, and none of them that dies takes anything with it."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import fake_workers
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from patchscopes.core.errors import InputError, NotAvailableError, ResourceError
from patchscopes.runs.executor import DEATHS, Finished, Lost, Ready, Stop
from patchscopes.runs.folder import open_run
from patchscopes.runs.here import Here
from patchscopes.runs.processes import Processes
from patchscopes.runs.recording import resume, sweep
from patchscopes.runs.tasks import Job, Task
from patchscopes.runs.work import Worker

EXPERIMENT = {
    "name": "countries",
    "prompts": ["Yesterday we talked about France", "A picture of Paris", "She lives in Rome", "I went to Japan"],
    "scope": "The capital of {x} is",
    "shard": 3,
}


def processes(make, workers=1, **more):
    executor = Processes(workers, devices=["cpu"], threads=1, **more)
    executor.make = make
    return executor


def tasks(count):
    return [Task(shard, 0, (0,)) for shard in range(count)]


def run(executor, folder, count, *, stop=None, hear=lambda message: None):
    """What was heard."""
    heard = []

    def both(message):
        heard.append(message)
        hear(message)

    executor.run(Job({}, str(folder)), tasks(count), both, stop or Stop())
    return heard


def finished(heard):
    return [message.done.task.shard for message in heard if isinstance(message, Finished)]


def same(table, other):
    """Texts to the letter, numbers but for rounding, which depends on what was read together before."""
    assert_frame_equal(table, other, check_exact=False, rel_tol=0, abs_tol=1e-4)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    made = sweep(EXPERIMENT, runs=tmp_path_factory.mktemp("here"), executor=Here("cpu"))
    assert made.record["shards"] >= 8
    return made.table()


@pytest.fixture
def place(tmp_path):
    """A folder that paths are often broken by."""
    folder = tmp_path / "läufe 走る $HOME 'x'"
    folder.mkdir()
    return folder


# ------------------------------------------------------------------------------------------------ the same, whoever does it


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 4])
def test_any_number_of_processes_gives_the_same_table(workers, place, reference):
    made = sweep(EXPERIMENT, runs=place, executor=Processes(workers, devices=["cpu"], threads=1))
    assert made.status == "done"
    same(made.table(), reference)


@pytest.mark.slow
def test_two_processes_one_killed_in_the_middle_give_the_same_table(place, reference):
    events = []

    def listen(event):
        events.append(event)
        if sum(e["kind"] == "shard" for e in events) == 2 and event["kind"] == "shard":
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    made = sweep(EXPERIMENT, runs=place, executor=Processes(2, devices=["cpu"], threads=1), listeners=[listen])
    assert made.status == "done"
    assert any(e["kind"] == "worker" and e["state"] == "lost" and "SIGKILL" in e["message"] for e in events)
    same(made.table(), reference)
    assert not multiprocessing.active_children()


def test_tasks_are_given_out_to_whoever_is_free(place):
    heard = run(processes(fake_workers.steady, 2), place, 12)
    assert sorted(finished(heard)) == list(range(12))
    assert len({message.done.rows for message in heard if isinstance(message, Finished)}) == 2  # processes
    assert [type(m) for m in heard].count(Ready) == 2


def test_no_more_processes_than_tasks(place):
    heard = run(processes(fake_workers.steady, 4), place, 1)
    assert [type(m) for m in heard] == [Ready, Finished]


def test_numbers_of_workers():
    assert Processes(3, devices=["cpu"]).workers == 3
    assert Processes(devices=["cuda:0", "cuda:1"]).devices == ["cuda:0", "cuda:1"]
    assert Processes(3, devices=["cuda:0", "cuda:1"]).devices == ["cuda:0", "cuda:1", "cuda:0"]
    assert Processes(devices=["cuda:0"]).device == "cuda"
    assert Processes(devices=["cpu"]).threads >= 1
    with pytest.raises(InputError, match="expected 1 or more"):
        Processes(0)
    with pytest.raises(InputError, match="expected one or more"):
        Processes(devices=[])


# ------------------------------------------------------------------------------------------------------- workers that die


def test_a_task_that_kills_workers_is_given_up_and_the_others_are_done(place):
    heard = run(processes(fake_workers.deadly, 1), place, 5)
    assert sorted(finished(heard)) == [0, 1, 3, 4]
    lost = [message for message in heard if isinstance(message, Lost)]
    assert [(m.task.shard, m.given_up) for m in lost] == [(2, False)] * (DEATHS - 1) + [(2, True)]


class GivesUp:
    """Does everything in this process but one shard, as if workers had died of it."""

    name, device, workers = "gives up", "cpu", 1

    def run(self, job, tasks, hear, stop):
        worker = Worker.of(job, "cpu")
        hear(Ready("w", worker.about))
        for task in tasks:
            hear(Lost("w", "SIGSEGV", task, True) if task.shard == 1 else Finished("w", worker.do(task)))


def test_cells_of_a_task_that_is_given_up_have_failed_and_can_be_tried_again(place, reference):
    events = []
    made = sweep(EXPERIMENT, runs=place, executor=GivesUp(), listeners=[events.append])
    assert made.status == "partial"
    bad = made.table(status="failed")
    assert set(bad["error"]) == {f"given up: {DEATHS} workers died at it, the last of SIGSEGV"}
    assert bad["control"].unique().to_list() == ["none"]
    assert made.counts["waiting"] == 0 and made.counts["failed"] == len(bad) == 3
    assert [e["given_up"] for e in events if e["kind"] == "worker" and e["state"] == "lost"] == [True]
    again = resume(made.path, failed=True)
    assert again.status == "done"
    same(again.table().drop("attempt"), reference.drop("attempt"))


def test_a_worker_whose_device_is_lost_is_started_again(place):
    heard = run(processes(fake_workers.loses_its_device), place, 2)
    assert sorted(finished(heard)) == [0, 1]
    assert [m.reason for m in heard if isinstance(m, Lost)] == ["the device is lost: a CUDA error"] * 2


def test_a_worker_that_dies_before_it_is_ready_is_started_again(place):
    heard = run(processes(fake_workers.first_dies), place, 2)
    assert sorted(finished(heard)) == [0, 1]
    assert [m.task for m in heard if isinstance(m, Lost)] == [None]


def test_workers_that_never_get_ready_end_the_run(place):
    with pytest.raises(ResourceError, match="every worker died before it was ready, the last of SIGKILL"):
        run(processes(fake_workers.dying), place, 2)
    assert not multiprocessing.active_children()


# ---------------------------------------------------------------------------------------------------------------- errors


def test_errors_of_setting_up_arrive_as_they_are(place):
    with pytest.raises(NotAvailableError, match="there is no such model"):
        run(processes(fake_workers.unable), place, 2)
    with pytest.raises(KeyError) as caught:
        run(processes(fake_workers.broken), place, 2)
    assert "in broken" in str(caught.value.__cause__)


def test_errors_of_tasks_that_are_no_matter_of_cells_arrive_with_their_traceback(place):
    with pytest.raises(ValueError, match="that is wrong") as caught:
        run(processes(fake_workers.wrong), place, 2)
    assert "fake_workers.py" in str(caught.value.__cause__)
    assert not multiprocessing.active_children()


def test_what_the_listener_raises_ends_the_workers(place):
    def hear(message):
        raise ResourceError("the disk is full")

    with pytest.raises(ResourceError, match="disk"):
        run(processes(fake_workers.slow, 2), place, 4, hear=hear)
    assert not multiprocessing.active_children()


# -------------------------------------------------------------------------------------------------------------- stopping


def test_asked_to_stop_it_ends_after_the_tasks_under_way(place):
    stop = Stop()
    heard = run(processes(fake_workers.steady), place, 50, stop=stop, hear=lambda m: stop() if isinstance(m, Ready) else None)
    assert len(finished(heard)) <= 1
    assert not multiprocessing.active_children()


def test_told_to_stop_it_ends_at_once(place):
    stop = Stop()
    begun = []

    def hear(message):
        if not isinstance(message, Ready):
            begun.append(time.monotonic())
            stop()
            stop()

    heard = run(processes(fake_workers.slow), place, 2, stop=stop, hear=hear)
    assert time.monotonic() - begun[0] < 10 and not finished(heard)
    assert not multiprocessing.active_children()


SCRIPT = """
    import sys
    sys.path.insert(0, {tests!r})
    import fake_workers
    from patchscopes.runs.executor import Stop, Ready
    from patchscopes.runs.processes import Processes
    from patchscopes.runs.tasks import Job, Task
    {guard}
        executor = Processes(2, devices=["cpu"], threads=1)
        executor.make = fake_workers.slow
        hear = lambda m: print(type(m).__name__, flush=True)
        executor.run(Job({{}}, "."), [Task(k, 0, (0,)) for k in range(2)], hear, Stop())
"""


def script(place, guard):
    path = place / "script.py"
    path.write_text(textwrap.dedent(SCRIPT.format(tests=str(Path(__file__).parent), guard=guard)))
    return [sys.executable, str(path)]


def children(pid):
    found = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        found.setdefault(int(fields[1]), []).append(int(entry.parent.name))
    below, todo = [], [pid]
    while todo:
        some = found.get(todo.pop(), [])
        below += some
        todo += some
    return below


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
def test_no_worker_outlives_a_process_that_is_killed(place):
    process = subprocess.Popen(script(place, 'if __name__ == "__main__":'), stdout=subprocess.PIPE, text=True)
    while process.stdout.readline().strip() != "Working":  # both work or load
        assert process.poll() is None
    below = children(process.pid)
    assert len(below) >= 2
    process.kill()
    process.wait()
    process.stdout.close()
    end = time.monotonic() + 30
    while (left := [pid for pid in below if Path(f"/proc/{pid}").exists()]) and time.monotonic() < end:
        time.sleep(0.1)
    assert not left


def test_a_script_without_a_guard_is_told_of_it(place):
    told = subprocess.run(script(place, "if True:"), capture_output=True, text=True, timeout=120)
    assert told.returncode == 1 and 'must stand under if __name__ == "__main__":' in told.stderr


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
def test_a_sweep_that_was_killed_with_its_processes_is_gone_on_with(place, reference):
    code = textwrap.dedent(f"""
        import json, sys
        from patchscopes.runs.recording import sweep
        from patchscopes.runs.processes import Processes
        if __name__ == "__main__":
            executor = Processes(2, devices=["cpu"], threads=1)
            sweep({EXPERIMENT!r}, runs=sys.argv[1], executor=executor, listeners=[lambda e: print(json.dumps(e), flush=True)])
    """)
    path = place / "sweep.py"
    path.write_text(code)
    process = subprocess.Popen([sys.executable, str(path), str(place / "runs")], stdout=subprocess.PIPE, text=True)
    while json.loads(process.stdout.readline())["kind"] != "shard":
        assert process.poll() is None
    process.kill()
    process.wait()
    process.stdout.close()
    left = open_run(next((place / "runs").iterdir()))
    assert left.status == "stopped" and left.counts["ok"] > 0
    again = resume(left.path, executor=Here("cpu"))
    assert again.status == "done"
    same(again.table(), reference)
    assert again.table()["cell"].n_unique() == again.cells == again.table().select(pl.len()).item()
