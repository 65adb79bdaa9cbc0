"""Measuring: time with the device waited for, FLOPs, token-blocks and bytes counted, the peak of memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from patchscopes.engine.engine import Engine
from patchscopes.engine.memory import peak_bytes as counted_peak

T = TypeVar("T")
GATHERS = ("embedding", "index_select", "gather", "index")  # read some rows of a table, not all of it


def timed(run: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """What `run` returns and the seconds it took, the work that it left on a GPU included."""
    _wait(device)
    start = time.perf_counter()
    result = run()
    _wait(device)
    return result, time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ------------------------------------------------------------------------------------------------------------------ FLOPs


@contextmanager
def eager_attention(model: Any) -> Iterator[None]:
    """Attention as matmuls inside, which the counter sees. Eager attention is counted as full rectangles of queries × keys."""
    before = getattr(model.config, "_attn_implementation", None)
    if before == "eager" or not hasattr(model, "set_attn_implementation"):
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def counted_flops(run: Callable[[], T], model: Any) -> tuple[T, int]:
    """What `run` returns and the FLOPs it executed on `model`, by torch's counter, attention run eagerly."""
    with eager_attention(model), FlopCounterMode(display=False) as counter:
        result = run()
    return result, counter.get_total_flops()


@contextmanager
def token_blocks(engine: Engine) -> Iterator[list[int]]:
    """Rows × positions of every block that runs, one entry a call: exact on every device and kernel.

    Counted at what mixes positions inside a block, which a bypassed block does not call. Empty where that could not be found.
    """
    width = engine.config.get_text_config(decoder=True).hidden_size
    calls: list[int] = []

    def note(_module: nn.Module, _args: tuple, out: Any) -> None:
        calls.append((out[0] if isinstance(out, tuple) else out).numel() // width)

    handles = [writers[0].module.register_forward_hook(note) for writers in engine.anatomy.writers if writers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


# ------------------------------------------------------------------------------------------------------------------ bytes


@dataclass
class Traffic:
    """Bytes. weights: read from parameters, once for each operator that uses one. moved: inputs and outputs of all operators that
    are no views, as if nothing stayed in a cache."""

    weights: int = 0
    moved: int = 0


class _Counting(TorchDispatchMode):
    def __init__(self, model: nn.Module, traffic: Traffic):
        super().__init__()
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.traffic = traffic

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if getattr(func, "is_view", False):
            return out
        gathers = func.overloadpacket.__name__ in GATHERS
        results = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        written = sum(_size(t) for t in results)
        for t in tree_leaves((args, kwargs or {})):
            if not isinstance(t, Tensor):
                continue
            size = written if gathers else _size(t)
            self.traffic.moved += size
            if not gathers and t.untyped_storage().data_ptr() in self.weights:
                self.traffic.weights += size
        self.traffic.moved += written
        return out


def _size(t: Tensor) -> int:
    return min(t.numel() * t.element_size(), t.untyped_storage().nbytes())  # an expanded tensor is read once


def counted_bytes(run: Callable[[], T], model: nn.Module) -> tuple[T, Traffic]:
    """What `run` returns and the bytes that its operators read and wrote."""
    traffic = Traffic()
    with _Counting(model, traffic):
        result = run()
    return result, traffic


# ----------------------------------------------------------------------------------------------------------------- memory


def peak_bytes(run: Callable[[], T], device: torch.device) -> tuple[T, int]:
    """What `run` returns, and the most bytes of tensors that were alive beyond those before it.

    On CUDA by the allocator; elsewhere, where there are no such statistics, by following every storage that an operator makes.
    Scratch memory inside kernels is not seen there.
    """
    if device.type == "cuda":
        _wait(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = run()
        _wait(device)
        return result, torch.cuda.max_memory_allocated(device) - before
    with counted_peak() as counted:
        result = run()
    return result, counted.most
