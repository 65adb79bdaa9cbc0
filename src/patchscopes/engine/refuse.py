"""What cannot be read and patched exactly, said when the model is handed over and before anything runs.

    compiled      hooks that are put on later are silently not called (torch 2.13, measured: a pass calls none of them)
    kernels       `use_kernels=True` swaps forwards inside the blocks: what sites are measured by is no longer what runs
    distributed   each process holds a shard and waits for the others in every pass; how many rows run at a time is decided by
                  each process's own memory, so that the processes would part and wait for ever
    meta          parameters without numbers

Quantised weights can be read and patched, but no gradient passes through them: `refuse_quantised` says so when one is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import nn

from patchscopes.core.errors import RefusedError

WRAPPERS = ("FullyShardedDataParallel", "FSDPModule", "DistributedDataParallel", "DataParallel")


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that `torch.compile(model)` wraps, on which hooks work; any other model as it is."""
    return getattr(model, "_orig_mod", model)


def refuse_unreadable(model: nn.Module) -> None:
    """RefusedError, with the reason and the way out, for a model whose passes hooks cannot see, or that one process cannot run."""
    for says in (_compiled(model), _kernels(model), _distributed(model), _meta(model)):
        for found in says:
            raise RefusedError(found)


def refuse_compiled(modules: Iterable[nn.Module]) -> None:
    """RefusedError if one of these modules was compiled in place. Quick: asked before every pass."""
    for module in modules:
        if module._compiled_call_impl is not None:
            raise RefusedError(_is_compiled("", module, "module.compile()"))


def _compiled(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        if type(module).__name__ == "OptimizedModule":
            yield _is_compiled(name, module, "torch.compile")
        elif module._compiled_call_impl is not None:
            yield _is_compiled(name, module, "module.compile()")
        elif hasattr(module.forward, "_torchdynamo_orig_callable") and next(module.children(), None) is not None:
            yield _is_compiled(name, module, "torch.compile of its forward")


def _is_compiled(name: str, module: nn.Module, how: str) -> str:
    return (
        f"{_place(name, module)} is compiled ({how}): compiled code silently ignores hooks that are put on later, so it can be neither "
        "read nor patched. Expected a model that is not compiled: load it anew, or give the one that torch.compile(model) was made of"
    )


def _kernels(model: nn.Module) -> Iterator[str]:
    way_out = "Load it without use_kernels and kernel_config"
    if getattr(model, "_use_kernels", False) or getattr(model, "kernel_config", None) is not None:
        yield (
            f"kernels were swapped into {type(model).__name__} (use_kernels): forwards inside its blocks are not those of its "
            f"architecture, and hooks may not see what they compute. {way_out}"
        )
    for name, module in model.named_modules():
        forward: Any = module.__dict__.get("forward")
        own = getattr(type(module), "forward", None)
        if hasattr(module, "kernel_layer_name") and isinstance(forward, MethodType) and forward.__func__ is not own:
            yield (
                f"a kernel was swapped into {_place(name, module)} ({module.kernel_layer_name}): its forward is not that of its "
                f"architecture, and hooks may not see what it computes. {way_out}, and without calling kernelize on it"
            )


def _distributed(model: nn.Module) -> Iterator[str]:
    reason = (
        "every pass would wait for the same pass of other processes, which choose by their own memory how many rows to run. Load the "
        'whole model in one process; device_map="auto" spreads it over several devices'
    )
    for name, module in model.named_modules():
        kind = next((c.__name__ for c in type(module).__mro__ if c.__name__ in WRAPPERS), None)
        if kind is not None:
            inner = ". Or give the model inside, model.module" if kind.endswith("DataParallel") and kind[0] == "D" else ""
            yield f"{_place(name, module)} is wrapped for several devices or processes ({kind}): {reason}{inner}"
    for what, of in (("tensor-parallel", "_tp_size"), ("fully sharded", "_fsdp_size")):
        if (size := getattr(model, of, None) or 1) > 1:
            yield f"{type(model).__name__} is {what}, over {size} processes: {reason}"
    for name, parameter in model.named_parameters():
        if any(c.__name__ == "DTensor" for c in type(parameter).__mro__):
            yield f"{name} of {type(model).__name__} is a shard (DTensor) of a weight that is spread over processes: {reason}"


def _meta(model: nn.Module) -> Iterator[str]:
    offloaded = [
        name for name, module in model.named_modules() if hasattr(module, "_hf_hook")
    ]  # accelerate brings them when needed
    for name, parameter in model.named_parameters():
        if parameter.is_meta and not any(name.startswith(f"{above}." if above else "") for above in offloaded):
            yield (
                f"{name} of {type(model).__name__} is on the device meta: it has a shape and no numbers, and nothing would bring them "
                "(no accelerate hook). Load the weights: from_pretrained, or to_empty and load_state_dict"
            )


def _place(name: str, module: nn.Module) -> str:
    return f"{name} ({type(module).__name__})" if name else f"the module {type(module).__name__}"


# ----------------------------------------------------------------------------------------------------------------------- quantised


def refuse_quantised(model: nn.Module) -> None:
    """RefusedError if weights are not numbers that gradients pass through."""
    if (what := _quantised(model)) is not None:
        raise RefusedError(f"gradients are refused on this model: {what}; load it in float32, bfloat16 or float16")


def _quantised(model: nn.Module) -> str | None:
    """What transformers says of a quantised model, or what its weights and layers are; None if they are plain numbers."""
    config = getattr(model, "config", None)
    settings: Any = getattr(config, "quantization_config", None)
    method: Any = getattr(model, "quantization_method", None)
    if method is None and settings is not None:
        method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    marked = getattr(model, "is_quantized", False) or getattr(config, "_is_quantized", False)
    if settings is not None or method is not None or marked or getattr(model, "hf_quantizer", None) is not None:
        return f"its weights are quantised ({getattr(method, 'value', method) or type(settings).__name__})"
    for name, module in model.named_modules():
        if type(module).__module__.startswith(("torch.ao.nn.", "torchao.", "bitsandbytes.")):
            return f"its weights are quantised ({name} is a {type(module).__module__.split('.nn.')[0]} {type(module).__name__})"
        if (packed := module._buffers.get("qweight")) is not None:  # GPTQ and AWQ keep weights in buffers of whole numbers
            return f"its weights are quantised ({name}.qweight, {_format(packed.dtype)})"
    for name, p in model.named_parameters():
        if type(p).__module__.startswith("torchao"):  # they call themselves bfloat16
            return f"its weights are quantised ({name} is a {type(p).__name__})"
        if not p.is_floating_point() and p.numel() > 1:
            return f"{name} holds whole numbers ({_format(p.dtype)})"
        if p.is_floating_point() and p.dtype.itemsize < 2:
            return f"its weights are quantised ({name}, {_format(p.dtype)})"
    return None


def _format(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
