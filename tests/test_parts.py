"""Parts of a run that nobody drives: run-shard, and jobs of Slurm."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
from polars.testing import assert_frame_equal

from patchscopes.cli.app import run as command_line
from patchscopes.core.errors import InputError, NotAvailableError, RefusedError, UnknownName
from patchscopes.runs.executor import Stop
from patchscopes.runs.executors import executor_from
from patchscopes.runs.folder import open_run
from patchscopes.runs.here import Here
from patchscopes.runs.on_slurm import Part, submit
from patchscopes.runs.parts import commands, part_of, work_part
from patchscopes.runs.processes import Processes
from patchscopes.runs.recording import resume, sweep
from patchscopes.runs.work import Worker

EXPERIMENT = {
    "name": "countries",
    "prompts": ["Yesterday we talked about France", "A picture of Paris", "She lives in Rome", "I went to Japan"],
    "scope": "The capital of {x} is",
    "shard": 3,
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return sweep(EXPERIMENT, runs=tmp_path_factory.mktemp("here"), executor=Here("cpu")).table()


@pytest.fixture
def planned(tmp_path):
    folder = tmp_path / "läufe 走る $HOME 'x'"
    folder.mkdir()
    made = sweep(EXPERIMENT, runs=folder, executor=Processes(1, devices=["cpu"]), work=False)
    assert made.status == "planned" and made.counts["waiting"] == made.cells
    return made


def same(run, table):
    assert_frame_equal(run.table(), table, check_exact=False, rel_tol=0, abs_tol=1e-4)


def test_parts_make_the_run_and_the_last_one_ends_it(planned, reference):
    first = work_part(planned.path, 1, 3, device="cpu")
    assert first.status == "stopped" and 0 < first.counts["ok"] < first.cells
    assert sweep(EXPERIMENT, runs=planned.path.parent, executor=Processes(1, devices=["cpu"]), work=False).id == planned.id
    work_part(planned.path, 3, 3, device="cpu")
    events = []
    done = work_part(planned.path, 2, 3, device="cpu", listeners=[events.append])
    assert done.status == "done" and done.record["status"] == "done"
    assert done.record["counts"]["ok"] == done.cells
    assert done.provenance[0]["machines"] and done.provenance[0]["models"]["atlas"]
    assert events[0]["kind"] == "started" and events[-1]["kind"] == "done"
    assert events[-2]["kind"] == "progress" and events[-2]["done"] == events[-2]["cells"]
    assert {p.name for p in (planned.path / "events.d").glob("*.jsonl")} == {f"part-{k}-of-3.jsonl" for k in (1, 2, 3)}
    same(done, reference)


def test_a_part_that_was_stopped_is_gone_on_with_by_itself_or_by_resume(planned, reference):
    stop = Stop()
    left = work_part(planned.path, 1, 2, device="cpu", stop=stop, listeners=[lambda e: stop() if e["kind"] == "shard" else None])
    assert left.status == "stopped"
    finished = left.counts["ok"]
    left = work_part(planned.path, 1, 2, device="cpu")
    assert left.counts["ok"] > finished
    done = resume(planned.path, executor=Here("cpu"))
    assert done.status == "done"
    same(done, reference)


def test_while_a_part_works_it_shows_and_only_other_parts_work_beside_it(planned):
    seen, stop = [], Stop()

    def listen(event):
        if event["kind"] == "shard" and not seen:
            seen.append(open_run(planned.path).status)
            for other in (lambda: resume(planned.path), lambda: work_part(planned.path, 1, 2)):
                with pytest.raises(RefusedError, match="another process works on"):
                    other()
            seen.append(work_part(planned.path, 2, 2, device="cpu").status)
            stop()

    work_part(planned.path, 1, 2, device="cpu", stop=stop, listeners=[listen])
    assert seen == ["running", "running"]
    assert open_run(planned.path).status == "stopped"


def test_other_conditions_are_refused(planned):
    def other(job, device, threads):
        worker = Worker.of(job, device)
        worker.conditions["versions"]["torch"] = "1.0"
        return worker

    with pytest.raises(RefusedError, match=r"versions.torch was .* and is 1\.0"):
        work_part(planned.path, 1, 2, device="cpu", make=other)
    assert open_run(planned.path).counts["ok"] == 0


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "1/0", "-1/2"])
def test_parts_that_cannot_be(text):
    with pytest.raises(InputError, match="expected K/N"):
        part_of(text)


# ----------------------------------------------------------------------------------------------------------------- commands


def test_the_command_does_a_part(planned, reference, capsys):
    assert command_line(["run-shard", str(planned.path), "1/2", "--device", "cpu", "--json"]) == 0
    kinds = [json.loads(line)["kind"] for line in capsys.readouterr().out.splitlines()]
    assert kinds[0] == "started" and kinds[-1] == "done"
    assert command_line(["run-shard", str(planned.path), "2/2", "--device", "cpu", "--quiet"]) == 0
    same(open_run(planned.path), reference)
    assert command_line(["run-shard", str(planned.path), "3/2"]) == 2


def test_commands_for_other_schedulers_survive_any_folder_name(planned):
    lines = commands(planned.path, 2, more=["--device", "cpu"])
    assert [shlex.split(line)[1:] for line in lines] == [
        ["run-shard", str(planned.path), f"{k}/2", "--device", "cpu"] for k in (1, 2)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_a_part_after_the_shard_under_way(planned, number):
    line = shlex.split(commands(planned.path, 1, more=["--device", "cpu", "--json"])[0])
    code = "from patchscopes.cli import main; main()"
    process = subprocess.Popen([sys.executable, "-c", code, *line[1:]], stdout=subprocess.PIPE, text=True)
    while json.loads(process.stdout.readline())["kind"] != "shard":
        assert process.poll() is None
    os.kill(process.pid, number)
    rest = [json.loads(text)["kind"] for text in process.stdout]
    assert process.wait() == 143 and rest[-1] == "stopped" and "failed" not in rest
    process.stdout.close()
    left = open_run(planned.path)
    assert left.status == "stopped" and left.counts["ok"] > 0 and left.counts["waiting"] > 0


# -------------------------------------------------------------------------------------------------------------------- Slurm


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # submitit leaves its processes' files to the garbage collector
def test_jobs_make_the_run(planned, reference):
    pytest.importorskip("submitit", reason="submitit is an extra: pip install 'patchscopes[slurm]'")
    assert len(set(submit(planned.path, 2, cluster="local", time=10))) == 2
    end = time.monotonic() + 180
    while open_run(planned.path).record["status"] != "done" and time.monotonic() < end:
        time.sleep(0.2)
    same(open_run(planned.path), reference)


def test_a_job_out_of_time_asks_for_another_turn():
    pytest.importorskip("submitit", reason="submitit is an extra: pip install 'patchscopes[slurm]'")
    again = Part("runs/x", 1, 2, failed=True).checkpoint()
    assert again.function == Part("runs/x", 1, 2, failed=False)


def test_without_slurm_or_submitit_it_says_what_to_do(planned, monkeypatch):
    pytest.importorskip("submitit", reason="submitit is an extra: pip install 'patchscopes[slurm]'")
    with pytest.raises(InputError, match="expected 1 or more"):
        submit(planned.path, 0)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(NotAvailableError, match="there is no Slurm on this machine"):
        submit(planned.path, 1)
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(NotAvailableError, match=r"pip install 'patchscopes\[slurm\]'"):
        submit(planned.path, 1)


# -------------------------------------------------------------------------------------------------------- executors by name


def test_executors_by_name():
    assert executor_from("here", device="cpu").name == "here"
    assert executor_from("local", workers=3, device="cpu").workers == 3
    assert executor_from("local", device="cuda:0, cuda:1").workers == 2
    assert executor_from("ray", workers=4, gpus=1).device == "cuda"
    with pytest.raises(UnknownName, match="Did you mean 'local'"):
        executor_from("locl")
    with pytest.raises(InputError, match=r"the executor 'here' takes no workers; found 2\. local and ray take it"):
        executor_from("here", workers=2)
    with pytest.raises(InputError, match="the executor 'ray' takes no device"):
        executor_from("ray", device="cuda")
