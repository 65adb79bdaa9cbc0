"""How many rows run at a time: what is counted, what is free, and what happens when memory runs out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from families import DEPTH, blocks_of, loaded, prompt, row_of, target
from oracle import CLOSE, error, random_patches, say

from patchscopes.core.errors import ResourceError
from patchscopes.engine import memory
from patchscopes.engine.generate import Decoding, Generated, Request, stream
from patchscopes.engine.memory import Room, free_bytes, is_out_of_memory, peak_bytes
from patchscopes.engine.score import Case, scores

CPU = torch.device("cpu")
LENGTH, STEPS = 9, 4


def test_bytes_that_live_at_a_time() -> None:
    with peak_bytes() as counted:
        a = torch.zeros(1000)
        b = a.view(10, 100)  # a view: the same bytes
        c = b + 1
        del c
        a.add_(1)  # in place: nothing new
        assert (counted.now, counted.most) == (4000, 8000)
        d = [a * k for k in range(3)]
        del d, a
        assert (counted.now, counted.most) == (4000, 16000)  # b still holds what a held
        del b
        assert counted.now == 0


def test_what_existed_before_is_not_counted() -> None:
    weights = torch.zeros(1000)
    with peak_bytes() as counted:
        part = weights[:10]
        weights.mul_(2)
    assert counted.most == 0 and len(part) == 10


def test_free_memory_is_what_the_machine_and_the_group_leave(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable:   50 kB\n")
    assert memory._available(tmp_path / "meminfo") == 51200
    assert memory._available(tmp_path / "none") is None
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("400\n")
    assert memory._left_in_group(tmp_path) == 600
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._left_in_group(tmp_path) is None
    assert memory._left_in_group(tmp_path / "none") is None
    assert free_bytes(CPU) > 0


def test_what_counts_as_out_of_memory() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried …")
    )
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_rows_are_measured_once_and_fit_into_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 100_000)
    room = Room(CPU, 10_000.0, at_most=64, tell=lambda _: None)
    assert room.rows() == 5  # half of what is free, by the estimate
    with room.running(5, more=True):
        kept = torch.zeros(5, 500)  # 2000 bytes a row
    assert room.rows() == 25 and len(kept) == 5
    with room.running(25, more=True):
        kept = torch.zeros(25, 5000)
    assert room.rows() == 25


def test_half_as_many_and_later_more_again() -> None:
    told: list[str] = []
    room = Room(CPU, 1.0, at_most=64, tell=told.append)
    assert room.rows() == 64
    room.failed(64, MemoryError())
    assert room.rows() == 32 and "64 rows" in told[0] and "32" in told[0]
    room.failed(32, MemoryError())
    assert room.rows() == 16
    for _ in range(memory.SUCCESSES):
        with room.running(16, more=False):
            pass
    assert room.rows() == 32
    with pytest.raises(ResourceError, match="single row"):
        room.failed(1, MemoryError())


@contextmanager
def no_room_for(family: str, rows: int, block: int = 2) -> Iterator[list[int]]:
    """A block that runs out of memory when it is given more than so many rows. Yields the numbers of rows that it was given."""
    seen: list[int] = []

    def refuse(_module: torch.nn.Module, args: tuple) -> None:
        seen.append(args[0].shape[0])
        if args[0].shape[0] > rows:
            raise torch.OutOfMemoryError(f"no room for {args[0].shape[0]} rows")

    handle = blocks_of(loaded(family).hf, family)[block].register_forward_pre_hook(refuse)
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize("steps", [1, STEPS])
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "bloom", "mamba"])
def test_out_of_memory_is_told_and_loses_nothing(family: str, steps: int) -> None:
    model, ids = loaded(family), prompt(LENGTH)
    places = [(f"resid.{k % (DEPTH + 1)}", LENGTH - 1) for k in range(11)]
    patches = random_patches(model.hf, family, ids, places, torch.Generator().manual_seed(1))
    requests = [Request(tuple(ids), row_of(patch)) for patch in patches]
    told: list[str] = []
    found: dict[int, Generated] = {}
    with no_room_for(family, 3) as seen:
        run = stream(model.engine, requests, Decoding(steps), route=model.capabilities.route, tell=told.append)
        for k, one in run:
            assert k not in found  # nothing runs twice that was handed over
            found[k] = one
    assert told and max(seen) > 3
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.hf.modules())
    for k, patch in enumerate(patches):
        want = say(model.hf, family, ids, patch, steps)
        assert error(found[k].logits, want.logits[0]) <= CLOSE
        assert found[k].tokens == want.tokens or min(want.leads) < 2 * CLOSE


def test_a_single_row_that_does_not_fit_is_an_error_that_says_so() -> None:
    model, ids = loaded("gpt2"), prompt(LENGTH)
    places = [(f"resid.{k % DEPTH}", LENGTH - 1) for k in range(4)]
    patches = random_patches(model.hf, "gpt2", ids, places, torch.Generator().manual_seed(1))
    requests = [Request(tuple(ids), row_of(patch)) for patch in patches]
    list(stream(model.engine, requests, Decoding(2)))
    told: list[str] = []
    with model.engine.remembering():
        list(stream(model.engine, requests, Decoding(2)))  # so that only rows run below
        with no_room_for("gpt2", 0, block=4), pytest.raises(ResourceError) as caught:
            list(stream(model.engine, requests, Decoding(2), tell=told.append))
    assert [("2" in told[0]), ("1" in told[1])] == [True, True]
    message = str(caught.value)
    assert "single row" in message and "halving from" in message and "are free" in message and "max_new_tokens" in message
    assert caught.value.exit_code == 5


def test_target_prompts_that_do_not_fit_together_run_apart() -> None:
    model, told = loaded("llama"), []
    prompts = [prompt(LENGTH, seed=t) for t in range(5)]
    requests = [Request(tuple(ids), row_of(None, last=LENGTH - 1)) for ids in prompts]
    want = dict(stream(model.engine, requests, Decoding(2)))
    with no_room_for("llama", 2):
        got = dict(stream(model.engine, requests, Decoding(2), tell=told.append, at_most=2))
    assert "5 target prompts" in told[0]
    assert all(got[k].tokens == want[k].tokens for k in range(5))
    with no_room_for("llama", 0), pytest.raises(ResourceError, match="target prompt of 9 tokens"):
        list(stream(model.engine, requests[:1], Decoding(2)))


def test_scores_survive_it_too() -> None:
    model, ids = loaded("llama"), prompt(LENGTH)
    places = [(f"resid.{k % DEPTH}", LENGTH - 1) for k in range(8)]
    patches = random_patches(model.hf, "llama", ids, places, torch.Generator().manual_seed(1))
    cases = [Case(tuple(ids), row_of(patch), prompt(3, seed=k % 2)) for k, patch in enumerate(patches)]
    want = dict(scores(model.engine, cases))
    told: list[str] = []
    with no_room_for("llama", 3):
        got = dict(scores(model.engine, cases, tell=told.append))
    assert told and all(error(got[k], want[k]) <= CLOSE for k in range(len(cases)))


def test_another_error_is_not_taken_for_it() -> None:
    model, ids = loaded("llama"), prompt(LENGTH)
    (patch,) = random_patches(model.hf, "llama", ids, [("resid.1", 3)], torch.Generator().manual_seed(1))
    handle = blocks_of(model.hf, "llama")[3].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
    try:
        with pytest.raises(RuntimeError, match="broken"):
            list(stream(model.engine, [Request(tuple(ids), row_of(patch))], Decoding(2)))
    finally:
        handle.remove()


def test_chunks_are_sized_by_what_the_first_one_took(monkeypatch: pytest.MonkeyPatch) -> None:
    """The formula is cautious; a measured chunk is followed by larger ones, none of which takes more than is free."""
    model, ids = loaded("llama"), target(prompt(LENGTH))
    patches = random_patches(
        model.hf,
        "llama",
        ids[0].tolist(),
        [(f"resid.{k % DEPTH}", LENGTH - 1) for k in range(60)],
        torch.Generator().manual_seed(1),
    )
    free = 100_000
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    sizes: list[int] = []

    def note(_module: torch.nn.Module, _args: tuple, out: torch.Tensor) -> None:
        if out.shape[1]:  # of prefix and base nothing is unembedded
            sizes.append(out.shape[0])

    handle = model.hf.lm_head.register_forward_hook(note)
    with peak_bytes() as counted:
        for _ in stream(model.engine, [Request(tuple(ids[0].tolist()), row_of(patch)) for patch in patches], Decoding(1)):
            pass
    handle.remove()
    assert sum(sizes) == 60 and 1 < sizes[0] < max(sizes) < 60
    assert counted.most < free
