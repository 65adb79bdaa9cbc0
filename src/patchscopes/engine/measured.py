"""What an engine measures of its model by running a few tokens, once its blocks are found.

* The number of a prompt's first position, where the model has a table of them.
* The axes of batch and position in a block's hidden state.
* Batch axes: which axis of every other argument of a block counts rows, seen by running two rows and three.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from patchscopes.engine.hooks import Handle, hooked, map_tensors, on_arguments

if TYPE_CHECKING:
    from torch import Tensor, nn

    from patchscopes.engine.engine import Engine


def execution_device(model: nn.Module) -> torch.device:
    """Where inputs go: accelerate's hook on the model knows it when parameters are offloaded ("meta")."""
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    device = next((d for hook in hooks if (d := getattr(hook, "execution_device", None)) is not None), None)
    if device is not None:
        return torch.device(f"cuda:{device}" if isinstance(device, int) else device)
    return next(p.device for p in model.parameters())


@torch.no_grad()
def first_position(engine: Engine) -> int:
    """The number that the model itself gives to a prompt's first position: 0, but 2 in RoBERTa (its padding id, and one)."""
    if not engine.anatomy.takes_positions:
        return 0
    config = engine.config.get_text_config(decoder=True)
    pad = getattr(config, "pad_token_id", None)
    ids = torch.arange(1, 7, device=engine.device).remainder(config.vocab_size)
    ids = ids[ids != (-1 if pad is None else pad)].unsqueeze(0)
    own, best = engine.own_logits(ids), (float("inf"), 0)
    for first in dict.fromkeys((0, 1, 2, 1 + pad if isinstance(pad, int) and pad >= 0 else 0)):
        engine.first_position = first
        try:
            off = float((engine.forward(ids) - own).abs().max() / own.abs().max())
        except (IndexError, RuntimeError):  # beyond the table of positions
            continue
        if off < 1e-6:
            return first
        best = min(best, (off, first))
    return best[1]


@torch.no_grad()
def layout(engine: Engine) -> tuple[int, int]:
    """The axes of batch and position in what the first block gets: −3 and −2 nearly everywhere."""
    shapes: list[torch.Size] = []
    look = on_arguments(engine.blocks[0], lambda args, _kw: shapes.append(args[0].shape))
    for rows, length in ((1, 1), (2, 3)):
        with hooked([look]):
            engine.forward(torch.zeros(rows, length, dtype=torch.long, device=engine.device))
    one, other = shapes
    axes = [next((k - len(one) for k, x in enumerate(one) if x == 1 and other[k] == size), None) for size in (2, 3)]
    return (axes[0], axes[1]) if axes[0] is not None and axes[1] is not None else (-3, -2)


def batch_axes(engine: Engine) -> dict[tuple, tuple[int, int]] | None:
    """(block, path of an argument) -> (batch axis, entries a row); None where they could not be measured."""
    for prefix in (2, 0):  # Mamba-1 refuses a mask longer than the chunk
        try:
            return _axes({n: _argument_shapes(engine, n, prefix) for n in (2, 3)})
        except (
            RuntimeError,
            ValueError,
            TypeError,
            LookupError,
            AttributeError,
        ):  # a model may object in its own way; then without a prefix
            continue
    return None


@torch.no_grad()
def _argument_shapes(engine: Engine, n: int, prefix: int) -> dict[tuple, torch.Size]:
    """Shapes of all tensors that blocks get beside the hidden state, for n rows with a prefix and a padded row: masks that are
    not needed are left out by the library, and would not be seen."""
    shapes: dict[tuple, torch.Size] = {}

    def note(block: int) -> Handle:
        def look(args: tuple, kwargs: dict) -> None:
            def put(path: tuple, t: Tensor) -> Tensor:
                shapes[block, *path] = t.shape
                return t

            map_tensors(put, (args[1:], dict(kwargs)))

        return on_arguments(engine.blocks[block], look)

    ids = torch.arange(1, 6, device=engine.device).remainder(engine.vocab).repeat(n, 1)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    cache = engine.new_cache() if prefix else None
    if cache is not None:
        engine.forward(ids[:, :prefix], cache=cache, mask=mask[:, :prefix])
    with hooked(note(b) for b in range(engine.n_layers)):
        engine.forward(ids[:, prefix:], offset=prefix, cache=cache, mask=mask)
    return shapes


def _axes(argument_shapes: dict[int, dict[tuple, torch.Size]]) -> dict[tuple, tuple[int, int]]:
    """Batch axis and entries a row of every argument, from the shapes that 2 and 3 rows have; more than one where heads are fused in."""
    found = {}
    for path, shape in argument_shapes[2].items():
        for axis, (a, b) in enumerate(zip(shape, argument_shapes[3].get(path, shape), strict=False)):
            if a != b:
                found[path] = (axis, a // 2)
    return found
