"""What target prompts left in their unpatched runs, kept by explicit choice, since weights may change under a user's hands."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor


class Store:
    """The latest runs, up to `max_bytes` of their tensors. A single larger one is not kept."""

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self._kept: OrderedDict[tuple, tuple[Any, int]] = OrderedDict()

    def get(self, key: tuple, run: Callable[[], Any]) -> Any:
        """What `run` returned when it was asked for under this key before, or returns now. Tensors in keys count by their contents."""
        plain = tuple((tuple(k.shape), bytes(k.cpu().numpy())) if isinstance(k, Tensor) else k for k in key)
        if plain in self._kept:
            self._kept.move_to_end(plain)
            return self._kept[plain][0]
        found = run()
        self._kept[plain] = (found, tensor_bytes(found))
        while sum(size for _, size in self._kept.values()) > self.max_bytes:
            self._kept.popitem(last=False)
        return found


def tensor_bytes(*values: Any) -> int:
    """Bytes of all storages in `values`: in containers, objects of this project and caches of transformers."""
    seen: dict[int, int] = {}
    for tensor in _tensors(list(values), set()):
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


def _tensors(value: Any, visited: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif id(value) not in visited and value is not None and not isinstance(value, (str, bytes, int, float)):
        visited.add(id(value))
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else None
        if inner is None:
            inner = (
                vars(value).values() if type(value).__module__.startswith(("patchscopes.", "transformers.cache_utils")) else ()
            )
        for item in list(inner):
            yield from _tensors(item, visited)
