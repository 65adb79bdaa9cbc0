"""Work on Ray: a real cluster of three nodes on this machine; actors and nodes that die; what travels, and what does not listen."""

import os
import shutil
import signal
import sys
import time
from pathlib import Path

import fake_workers
import pytest
import torch
from polars.testing import assert_frame_equal
from safetensors.torch import save_file

from patchscopes.core.errors import InputError, NotAvailableError, RefusedError, ResourceError
from patchscopes.runs.executor import DEATHS, Finished, Lost, Ready, Stop, Told
from patchscopes.runs.here import Here
from patchscopes.runs.recording import sweep
from patchscopes.runs.tasks import Job, Task

for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH"):
    os.environ.pop(name, None)
os.environ.update(
    RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0123456789abcdef" * 4, RAY_USAGE_STATS_ENABLED="0"
)  # Ray reads it when imported

ray = pytest.importorskip("ray", reason="Ray is an extra: pip install 'patchscopes[ray]'")
ray.cloudpickle.register_pickle_by_value(fake_workers)  # a module of the tests, which nodes do not have
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
]  # Ray leaves sockets and processes to be closed by the system

EXPERIMENT = {
    "name": "countries",
    "prompts": ["Yesterday we talked about France", "A picture of Paris", "She lives in Rome", "I went to Japan"],
    "scope": "The capital of {x} is",
    "shard": 3,
}


class Nodes:
    """A cluster: a head without CPUs, and nodes with one each, which come and go."""

    def __init__(self, count):
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.nodes = [self.add() for _ in range(count)]
        self.cluster.wait_for_nodes()

    def add(self):
        return self.cluster.add_node(num_cpus=1)

    def remove_any(self):
        self.cluster.remove_node(self.nodes.pop())

    def connect(self):
        ray.init(address=self.cluster.address, log_to_driver=False, logging_level="ERROR")

    def shut_down(self):
        ray.shutdown()
        self.cluster.shutdown()


@pytest.fixture(scope="module")
def two_nodes():
    try:
        nodes = Nodes(2)
        nodes.connect()
    except (RuntimeError, OSError, ConnectionError, TimeoutError) as e:  # sockets, shared memory: Ray's needs, not ours
        pytest.skip(f"Ray starts no nodes here: {type(e).__name__}: {e}")
    yield nodes
    nodes.shut_down()


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    made = sweep(EXPERIMENT, runs=tmp_path_factory.mktemp("here"), executor=Here("cpu"))
    assert made.record["shards"] >= 8
    return made.table()


@pytest.fixture
def place(tmp_path):
    folder = tmp_path / "läufe 走る $HOME 'x'"
    folder.mkdir()
    return folder


def same(table, other):
    assert_frame_equal(table, other, check_exact=False, rel_tol=0, abs_tol=1e-4)


def on_ray(make, **more):
    executor = OnRay_(**more)
    executor.make = make
    return executor


def OnRay_(**more):
    from patchscopes.runs.on_ray import OnRay

    return OnRay(**more)


def run(executor, folder, count, *, stop=None, hear=lambda message: None):
    heard = []

    def both(message):
        heard.append(message)
        hear(message)

    executor.run(Job({}, str(folder)), [Task(shard, 0, (0,)) for shard in range(count)], both, stop or Stop())
    return heard


def finished(heard):
    return sorted(message.done.task.shard for message in heard if isinstance(message, Finished))


def processes(heard):
    return {int(message.done.rows) for message in heard if isinstance(message, Finished)}


def ended(pids):
    end = time.monotonic() + 30
    while (left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]) and time.monotonic() < end:
        time.sleep(0.1)
    return not left


# ------------------------------------------------------------------------------------------------ the same, whoever does it


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_actors_gives_the_same_table(two_nodes, workers, place, reference):
    events = []
    made = sweep(EXPERIMENT, runs=place, executor=OnRay_(workers=workers), listeners=[events.append])
    assert made.status == "done"
    same(made.table(), reference)
    assert len({e["worker"] for e in events if e["kind"] == "shard"}) == workers


def test_killed_actors_and_nodes_that_go_and_come_change_nothing(place, reference):
    ray.shutdown()
    nodes = Nodes(2)
    try:
        nodes.connect()
        events, shards = [], 0

        def listen(event):
            nonlocal shards
            events.append(event)
            if event["kind"] == "shard":
                shards += 1
                if shards == 1:
                    os.kill(worker_process(), signal.SIGKILL)
                if shards == 4:
                    nodes.remove_any()
                if shards == 5:
                    nodes.nodes.append(nodes.add())

        made = sweep(EXPERIMENT, runs=place, executor=OnRay_(), listeners=[listen])
        assert made.status == "done"
        lost = [e for e in events if e["kind"] == "worker" and e["state"] == "lost"]
        assert len(lost) >= 2 and not any(e["given_up"] for e in lost)
        same(made.table(), reference)
    finally:
        nodes.shut_down()


def worker_process():
    """Of some actor of ours. Ray calls their processes after the class."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            told = entry.read_bytes()
        except OSError:
            continue
        if told.startswith(b"ray::Actor"):
            return int(entry.parent.name)
    raise AssertionError("no actor runs")


@pytest.fixture(scope="module")
def small(request):
    """A node for two workers."""
    ray.shutdown()
    nodes = Nodes(2)
    nodes.connect()
    yield nodes
    nodes.shut_down()


# ----------------------------------------------------------------------------------------------------------- what travels


def test_actors_need_no_shared_folder(small, place):
    """The run folder is not there while the actors are set up; inputs are vectors in a file."""
    vectors = place / "v.safetensors"
    save_file({"vectors": torch.randn(3, 192, generator=torch.Generator().manual_seed(0))}, vectors)
    experiment = {**EXPERIMENT, "prompts": {"vectors": str(vectors)}, "layers": [2, 3], "shard": 2}
    wanted = sweep(experiment, runs=place / "a", executor=Here("cpu"))
    hidden = place / "hidden"

    class Hiding(type(OnRay_())):
        """Puts the run's inputs where nobody looks for them as soon as they have been sent."""

        def _actor(self, cluster):
            for folder in (place / "b").glob("*/inputs"):
                shutil.move(folder, hidden)
            vectors.unlink(missing_ok=True)
            return super()._actor(cluster)

    made = sweep(experiment, runs=place / "b", executor=Hiding(workers=1))
    assert made.status == "done" and any(hidden.iterdir())
    same(made.table(), wanted.table())


# ------------------------------------------------------------------------------------------------------ deaths and errors


def test_a_task_that_kills_actors_is_given_up(small, place):
    heard = run(on_ray(fake_workers.deadly, workers=1), place, 5)
    assert finished(heard) == [0, 1, 3, 4]
    lost = [message for message in heard if isinstance(message, Lost)]
    assert [(m.task.shard, m.given_up) for m in lost] == [(2, False)] * (DEATHS - 1) + [(2, True)]


def test_actors_that_never_get_ready_end_the_run(small, place):
    with pytest.raises(ResourceError, match="every worker died before it was ready"):
        run(on_ray(fake_workers.dying, workers=1), place, 2)


def test_errors_arrive_as_they_are(small, place):
    with pytest.raises(NotAvailableError, match="there is no such model"):
        run(on_ray(fake_workers.unable), place, 2)
    with pytest.raises(ValueError, match="that is wrong") as caught:
        run(on_ray(fake_workers.wrong), place, 2)
    assert "fake_workers.py" in str(caught.value.__cause__)


# ---------------------------------------------------------------------------------------------------- room, and stopping


def test_more_workers_than_room_are_told_of_and_do_not_block(small, place):
    heard = run(on_ray(fake_workers.steady, workers=5), place, 8)
    assert finished(heard) == list(range(8))
    assert sum(isinstance(message, Ready) for message in heard) == 2
    told = [message for message in heard if isinstance(message, Told)]
    assert [m.kind for m in told] == ["note"] and "2 can work now" in told[0].message


def test_workers_fill_the_cluster_unless_a_number_is_given(small):
    assert OnRay_().workers == 2
    assert OnRay_(cpus=0.5).workers == 4
    assert OnRay_(cpus=2).workers == 1  # that waits for a larger node
    assert OnRay_(workers=7).workers == 7
    assert OnRay_().device == "cpu" and OnRay_(gpus=2).device == "cuda"
    with pytest.raises(InputError):
        OnRay_(cpus=0)


def test_asked_to_stop_it_ends_after_the_tasks_under_way(small, place):
    stop = Stop()
    heard = run(on_ray(fake_workers.steady), place, 50, stop=stop, hear=lambda m: stop() if isinstance(m, Finished) else None)
    assert 1 <= len(finished(heard)) <= 3
    assert ended(processes(heard))


def test_told_to_stop_it_ends_at_once_and_leaves_no_process(small, place):
    stop, begun = Stop(), []

    def hear(message):
        if not isinstance(message, Ready):
            begun.append((time.monotonic(), worker_process()))
            stop()
            stop()

    heard = run(on_ray(fake_workers.slow, workers=1), place, 2, stop=stop, hear=hear)
    assert time.monotonic() - begun[0][0] < 15 and not finished(heard)
    assert ended([begun[0][1]])


# ------------------------------------------------------------------------------------------------- a cluster of one's own


def test_without_ray_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(NotAvailableError, match=r"pip install 'patchscopes\[ray\]'"):
        _ = OnRay_().workers


def test_a_cluster_that_is_not_there(small):
    ray.shutdown()
    with pytest.raises(NotAvailableError, match="no Ray cluster to work on at"):
        _ = OnRay_(address="127.0.0.1:1").workers


def test_ray_of_its_own_is_shut_down_has_no_dashboard_asks_for_a_token_and_leaves_signals_alone(place, monkeypatch):
    ray.shutdown()
    monkeypatch.setenv("HOME", str(place))
    before = signal.getsignal(signal.SIGTERM)
    executor = on_ray(fake_workers.steady, address="local", workers=1)
    seen = []

    def hear(message):
        if isinstance(message, Ready):
            seen.append((ray._private.worker._global_node.webui_url, ray.is_initialized(), signal.getsignal(signal.SIGTERM)))

    heard = run(executor, place, 2, hear=hear)
    assert finished(heard) == [0, 1]
    assert seen == [("", True, before)]
    assert os.environ["RAY_AUTH_MODE"] == "token" and os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert not ray.is_initialized()
    assert ended(processes(heard))


def test_nothing_that_fits_on_a_cluster_of_its_own_is_refused(place):
    ray.shutdown()
    with pytest.raises(RefusedError, match="no room for a worker of 1 CPUs and 64 GPUs each"):
        run(on_ray(fake_workers.steady, address="local", gpus=64), place, 1)
    assert not ray.is_initialized()
