"""Hooks that always come off, and blocks that step aside.

Values are replaced by forward (pre-)hooks that return new tensors; nothing is written into the model's own. A block's hidden
state is its first argument, and its output, or the first entry of its output. Batch is axis −3 of it and position axis −2, in
every model (some carry streams in front).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Change = Callable[[Tensor], Tensor | None]  # gets a value, returns its replacement, or None to leave it


class Handle:
    """What `on_input` and `on_output` return: a hook that `hooked` takes off again."""

    def __init__(self, put: Callable[[], Any]):
        self._put = put
        self._handle: Any = None

    def put(self) -> None:
        """Put the hook on."""
        self._handle = self._put()

    def remove(self) -> None:
        """Take the hook off."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


class _Off:
    def __init__(self, remove: Callable[[], Any]):
        self.remove = remove


def of_context(context: Callable[[], AbstractContextManager]) -> Handle:
    """A hook, not yet on, that is in the context while it is on."""

    def put() -> Any:
        stack = ExitStack()
        stack.enter_context(context())
        return _Off(stack.close)

    return Handle(put)


def all_of(*handles: Handle) -> Handle:
    """Several hooks as one."""

    def put() -> Any:
        with ExitStack() as stack:
            for handle in handles:
                handle.put()
                stack.callback(handle.remove)
            return _Off(stack.pop_all().close)

    return Handle(put)


def on_functions(module: nn.Module, call: Callable[[Any, tuple, dict], Any]) -> Handle:
    """A hook, not yet on, through which all torch functions that the module's forward calls go: `call(function, args, kwargs)`."""

    class Listening(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            return call(func, args, kwargs or {})

    def put() -> Any:
        saved, forward = module.__dict__.get("forward"), module.forward  # accelerate keeps a wrapper in that very slot

        def listening(*args: Any, **kwargs: Any) -> Any:
            with Listening():
                return forward(*args, **kwargs)

        def remove() -> None:
            if saved is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = saved

        module.forward = listening
        return _Off(remove)

    return Handle(put)


def on_input(module: nn.Module, change: Change) -> Handle:
    """A hook, not yet on, that passes the module's first argument through `change`."""

    def hook(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        new = change(args[0])
        return None if new is None else ((new, *args[1:]), kwargs)

    return Handle(lambda: module.register_forward_pre_hook(hook, with_kwargs=True))


def on_arguments(module: nn.Module, change: Callable[[tuple, dict], tuple[tuple, dict] | None]) -> Handle:
    """A hook, not yet on, that passes all arguments of the module through `change`."""
    return Handle(lambda: module.register_forward_pre_hook(lambda _m, args, kw: change(args, kw), with_kwargs=True))


def on_output(module: nn.Module, change: Change) -> Handle:
    """A hook, not yet on, that passes the module's output, or the first entry of a tuple, through `change`."""

    def hook(_module: nn.Module, _args: tuple, out: Any) -> Any:
        value = first_tensor(out)
        new = None if value is None else change(value)
        if new is None:
            return None
        return type(out)([new, *out[1:]]) if isinstance(out, (tuple, list)) else new

    return Handle(lambda: module.register_forward_hook(hook))


def first_input(args: tuple, kwargs: dict) -> Tensor | None:
    """What a module reads: its first argument, or the one called hidden_states, or else the first tensor given by name."""
    if args:
        return args[0] if isinstance(args[0], Tensor) else None
    named = kwargs.get("hidden_states", next((v for v in kwargs.values() if isinstance(v, Tensor)), None))
    return named if isinstance(named, Tensor) else None


def on_read(module: nn.Module, change: Change) -> Handle:
    """A hook, not yet on, that passes what the module reads (see `first_input`) through `change`."""

    def hook(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        value = first_input(args, kwargs)
        new = None if value is None else change(value)
        if new is None:
            return None
        if args:
            return (new, *args[1:]), kwargs
        name = next(k for k, v in kwargs.items() if v is value)
        return args, {**kwargs, name: new}

    return Handle(lambda: module.register_forward_pre_hook(hook, with_kwargs=True))


def first_tensor(out: Any) -> Tensor | None:
    """A tensor, or the first entry of a tuple or list if that is one."""
    if isinstance(out, (tuple, list)) and out:
        out = out[0]
    return out if isinstance(out, Tensor) else None


@contextmanager
def hooked(hooks: Iterable[Handle]) -> Iterator[None]:
    """The hooks are on inside the block, in the order given, and off after it, the last first, whatever happens."""
    hooks = list(hooks)
    try:
        for hook in hooks:
            hook.put()
        yield
    finally:
        for hook in reversed(hooks):  # two that wrap one forward unwrap it in this order only
            hook.remove()


@contextmanager
def bypassing(blocks: Sequence[nn.Module], rest: tuple | None, fill: Callable[[dict, int], None] | None = None) -> Iterator[None]:
    """Inside, `blocks` return their input; everything else of the model runs as ever, and hooks on them still fire.

    rest  what such blocks return after the hidden state, if they return a tuple
    fill  called with the dict of shared keys and values that some models (Gemma-3n, Gemma-4) hand from block to block, and the
          number of rows: puts in what a bypassed block would have left there
    """
    saved = [(block, block.__dict__.get("forward")) for block in blocks]  # accelerate keeps a wrapper in that very slot

    def stub(x: Tensor, *_args: Any, shared_kv_states: dict | None = None, **_kwargs: Any) -> Any:
        if shared_kv_states is not None and fill is not None:
            fill(shared_kv_states, x.shape[-3])
        return x if rest is None else (x, *rest)

    try:
        for block, _ in saved:
            block.forward = stub
        yield
    finally:
        for block, forward in saved:
            if forward is not None:
                block.forward = forward
            else:
                block.__dict__.pop("forward", None)


def map_tensors(change: Callable[[tuple, Tensor], Tensor], tree: Any, path: tuple = ()) -> Any:
    """Apply change(path, tensor) to every tensor of nested tuples, lists and dicts; other objects, caches too, stay as they are."""
    if torch.is_tensor(tree):
        return change(path, tree)
    if isinstance(tree, (tuple, list)):
        return type(tree)(map_tensors(change, x, (*path, i)) for i, x in enumerate(tree))
    if type(tree) is dict:
        return {key: map_tensors(change, x, (*path, key)) for key, x in tree.items()}
    return tree
