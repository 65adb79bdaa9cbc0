"""Runs on a GPU: the same table as on the CPU, in this process and in processes, and what happens when memory is short."""

import polars as pl
import pytest
import torch

from patchscopes.runs import open_run, resume, sweep
from patchscopes.runs.processes import Processes

if not torch.cuda.is_available():
    pytest.skip("needs a GPU that torch can use (CUDA)", allow_module_level=True)

EXPERIMENT = {
    "name": "gpu",
    "prompts": ["Yesterday we talked about France", "We looked at a picture of Paris", "She lives in Rome"],
    "layers": "0:9:2",
    "scope": ["describe", "The capital of {x} is"],
    "tokens": 6,
    "shard": 3,
}
WHERE = ["part", "scope", "prompt", "position", "source_layer", "target_layer", "control"]


def on(device: str, **more) -> dict:
    return {**EXPERIMENT, "model": [{"name": "atlas", "device": device, "dtype": "float32"}], **more}


@pytest.fixture(scope="module")
def cpu(tmp_path_factory):
    return sweep(on("cpu"), runs=tmp_path_factory.mktemp("cpu")).table().sort(WHERE)


@pytest.fixture(scope="module", autouse=True)
def exact():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def assert_same(one: pl.DataFrame, two: pl.DataFrame) -> None:
    one, two = one.sort(WHERE), two.sort(WHERE)
    columns = [*WHERE, "status", "text", "next_token_id"]
    assert one.select(columns).equals(two.select(columns), null_equal=True)
    for name in ("logprob", "surprisal", "norm_ratio", "bits_over_nothing", "bits_over_others"):
        assert (one[name] - two[name]).abs().max() < 1e-2, name


def test_the_table_is_that_of_the_cpu(tmp_path, cpu):
    run = sweep(on("cuda"), runs=tmp_path)
    assert run.status == "done"
    assert run.provenance[0]["conditions"]["device"] == "cuda"
    assert run.provenance[0]["machines"][0]["devices"] == [
        torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())
    ]
    assert_same(run.table(), cpu)


def test_processes_give_the_same_table(tmp_path, cpu):
    """Two processes that share the card, planned without weights."""
    experiment = {**EXPERIMENT, "model": [{"name": "atlas", "dtype": "float32"}]}
    run = sweep(experiment, runs=tmp_path, executor=Processes(devices=["cuda:0", "cuda:0"]))
    assert run.status == "done" and len({e["worker"] for e in run.events() if e["kind"] == "shard"}) == 2
    assert_same(run.table(), cpu)
    assert open_run(run.path).provenance[0]["conditions"]["device"] == "cuda"


def test_a_run_of_the_cpu_is_not_gone_on_with_on_the_gpu_silently(tmp_path):
    from patchscopes.core.errors import RefusedError
    from patchscopes.runs import Stop

    stop = Stop()
    listeners = [lambda event: stop() if event["kind"] == "shard" and not stop.asked else None]
    experiment = {**EXPERIMENT, "model": [{"name": "atlas", "dtype": "float32"}]}
    from patchscopes.runs import Here

    run = sweep(experiment, runs=tmp_path, executor=Here("cpu"), stop=stop, listeners=listeners)
    assert run.status == "stopped"
    with pytest.raises(RefusedError, match="device was cpu and is cuda"):
        resume(run.path, executor=Here("cuda"))
    assert resume(run.path, executor=Here("cuda"), on_change="mark").status == "done"


def test_little_memory(tmp_path, cpu):
    """Nearly all of the card is taken: fewer rows at a time, the same table."""
    free, _ = torch.cuda.mem_get_info()
    ballast = torch.empty(max(free - 2**29, 1), dtype=torch.uint8, device="cuda")
    try:
        run = sweep(on("cuda", shard=30), runs=tmp_path)
    finally:
        del ballast
        torch.cuda.empty_cache()
    assert run.status == "done"
    assert_same(run.table(), cpu)
