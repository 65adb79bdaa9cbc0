"""How many rows fit: what is free on a device, what a row takes, and what to do when it was too much.

The first chunk of rows is sized by a formula that errs on the large side; while it runs its live bytes are counted, which gives the
bytes of a row; later chunks are sized by that. Out of memory: half as many rows, and twice as many again after some that went well.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from patchscopes.core.errors import ResourceError

SHARE = 0.5  # of the free memory, for the rows that run at a time: allocators fragment, and others use the machine too
SUCCESSES = 4  # chunks that went well before twice as many rows are tried again
UNKNOWN = 8 * 2**30  # bytes that are taken to be free where nothing tells
Tell = Callable[[str], None]


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated: of the GPU, or of this process's share of it, with what torch holds and does not use; of the
    machine, or of its control group."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device)
        left = int(total * torch.cuda.get_per_process_memory_fraction(device)) - reserved
        return max(0, min(free, left)) + reserved - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    found = [n for n in (_available(), _left_in_group()) if n is not None]
    return min(found) if found else UNKNOWN


def _available(file: Path = Path("/proc/meminfo")) -> int | None:
    if not file.exists():  # not Linux
        return None
    lines = dict(line.split(":", 1) for line in file.read_text().splitlines() if ":" in line)
    return int(lines["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in lines else None


def _left_in_group(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Control groups, version 2: containers and batch systems limit memory there."""
    limit, used = folder / "memory.max", folder / "memory.current"
    if not limit.exists() or not used.exists() or limit.read_text().strip() == "max":
        return None
    return max(0, int(limit.read_text()) - int(used.read_text()))


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA's error, Python's, and what torch raises where the CPU gives no more."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


class peak_bytes(TorchDispatchMode):
    """Counts the bytes of tensors made inside that are alive at a time: `now`, and `most`. Views count once; on any device."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and look at what came out."""
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor, known)
        return out

    def _count(self, tensor: Tensor, known: set[int]) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in known or key in self._seen:
            return
        size = storage.nbytes()
        self.now += size
        self.most = max(self.most, self.now)

        def gone() -> None:
            self.now -= size
            self._seen.pop(key, None)

        self._seen[key] = weakref.finalize(storage, gone)


class Room:
    """How many rows run at a time on one device.

    estimate  bytes of one row, by a formula
    at_most   rows, whatever fits
    tell      hears of every change for want of memory
    """

    def __init__(self, device: torch.device, estimate: float, *, at_most: int, tell: Tell):
        self.device, self.estimate, self.at_most, self.tell = device, estimate, at_most, tell
        self._measured: float | None = None  # bytes of one row
        self._limit, self._successes = at_most, 0

    @property
    def row_bytes(self) -> float:
        """Of one row, as well as it is known."""
        return self._measured or self.estimate

    def rows(self, present: int = 0) -> int:
        """As many as fit now, one at least; `present` of them hold their memory already."""
        free = free_bytes(self.device) + present * self.row_bytes
        return max(1, min(self._limit, int(SHARE * free / self.row_bytes)))

    @contextmanager
    def running(self, rows: int, *, more: bool, later: float = 0.0) -> Iterator[None]:
        """`rows` run inside. If `more` are to follow, and it was not done yet, what they take is measured; `later`: bytes that a row
        will take on top of that."""
        if more and self._measured is None:
            with peak_bytes() as counted:
                yield
            self._measured = max(counted.most / rows + later, 1.0)
        else:
            yield
        self._successes += 1
        if self._successes >= SUCCESSES and self._limit < self.at_most:
            self._limit, self._successes = min(2 * self._limit, self.at_most), 0

    def failed(self, rows: int, error: BaseException) -> None:
        """`rows` were too many: half of them next time. ResourceError if it was one."""
        free = free_bytes(self.device)
        if rows == 1:
            raise ResourceError(
                f"out of memory on {self.device} with a single row, after halving from {self.at_most}: it needs about "
                f"{_amount(self.row_bytes)}, and {_amount(free)} are free. Give a shorter prompt or a smaller max_new_tokens, free "
                f"memory, or load the model in a smaller number format or on another device. ({_first_line(error)})"
            ) from error
        self._limit, self._successes = rows // 2, 0
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.tell(f"out of memory on {self.device} with {rows} rows at a time ({_amount(free)} free): going on with {rows // 2}")


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _amount(n_bytes: int | float) -> str:
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.1f} MiB"
