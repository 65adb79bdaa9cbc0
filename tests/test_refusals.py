"""Models that are refused when they are handed over, gradients that are when they are asked for, and numbers that are none: with
what was found, what was expected and what to do, and before anything has run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from families import WIDTH, blocks_of, loaded, tiny, tiny_tokenizer
from oracle import CLOSE, error
from torch import Tensor, nn

import patchscopes as ps
from patchscopes.core.errors import RefusedError, VectorError

IDS = torch.tensor([[1, 5, 6, 7]])


def counting(hf: nn.Module) -> list[int]:
    """Grows with every pass of the model: its embedding runs in each, compiled or not."""
    calls: list[int] = []
    embedding = hf.get_input_embeddings()
    forward = type(embedding).forward

    def counted(self: nn.Module, *args: Any) -> Tensor:
        calls.append(1)
        return forward(self, *args)  # type: ignore[arg-type]

    embedding.forward = MethodType(counted, embedding)
    return calls


def refused(hf: nn.Module, words: str, *more: str) -> None:
    """Loading is refused in these words, and nothing ran."""
    calls = counting(hf)
    with pytest.raises(RefusedError, match=words) as caught:
        ps.load((hf, tiny_tokenizer()))
    assert not calls
    for said in more:
        assert said in str(caught.value)


def hooks_called(call: Callable[[Tensor], Any], module: nn.Module) -> int:
    """How often a hook that is put on now fires."""
    seen: list[int] = []
    handle = module.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        call(IDS)
    handle.remove()
    return len(seen)


# ----------------------------------------------------------------------------------------------------------------------- compiled


def test_compiled_code_ignores_hooks_which_is_why_it_is_refused() -> None:
    """If this fails, a new torch has changed it, and compiled models might be read."""
    torch._dynamo.reset()
    hf = tiny("llama")
    compiled = torch.compile(hf, backend="eager")
    compiled(IDS)
    assert hooks_called(compiled, hf.model.layers[2]) == 0 and hooks_called(hf, hf.model.layers[2]) == 1
    hf.compile(backend="eager")
    hf(IDS)
    assert hooks_called(hf, hf.model.layers[2]) == 0


def test_of_torch_compile_the_model_inside_is_used() -> None:
    torch._dynamo.reset()
    hf = tiny("llama")
    compiled = torch.compile(hf, backend="eager")
    compiled(IDS)
    model = ps.load((compiled, tiny_tokenizer()))
    assert model.hf is hf
    edit = ps.Edit("resid.2", -1, torch.ones(WIDTH))
    assert torch.equal(model.run("abc", edits=[edit]).logits, loaded("llama").run("abc", edits=[edit]).logits)


@pytest.mark.parametrize("what", ["model", "block", "inside a block", "wrapped block", "forward", "block's forward"])
def test_what_was_compiled_in_place_is_refused(what: str) -> None:
    hf = tiny("llama")
    block = hf.model.layers[2]
    if what == "model":
        hf.compile(backend="eager")
    elif what == "block":
        block.compile(backend="eager")
    elif what == "inside a block":
        block.mlp.compile(backend="eager")
    elif what == "wrapped block":
        hf.model.layers[2] = torch.compile(block, backend="eager")
    else:
        module = hf if what == "forward" else block
        module.forward = torch.compile(module.forward, backend="eager")
    where = {"model": "the module LlamaForCausalLM", "forward": "the module LlamaForCausalLM", "inside a block": r"layers\.2\.mlp"}
    refused(hf, rf"{where.get(what, r'model.layers.2')}.* is compiled \(", "silently ignores hooks", "load it anew")


@pytest.mark.parametrize("part", [lambda hf: hf, lambda hf: hf.model.layers[2]], ids=["model", "block"])
def test_a_model_that_is_compiled_after_it_was_loaded_is_refused(part: Callable[[nn.Module], nn.Module]) -> None:
    model = ps.load((tiny("llama"), tiny_tokenizer()))
    part(model.hf).compile(backend="eager")
    calls = counting(model.hf)
    for call in (
        lambda: model.run("abc", read="resid.2"),
        lambda: model.generate("abc"),
        lambda: ps.Patchscope("{x}", layer=1)(ps.Source(model, "abc", layer=1)),
    ):
        with pytest.raises(RefusedError, match=r"is compiled \(module.compile\(\)\)"):
            call()
    assert not calls


# ------------------------------------------------------------------------------------------------------------------------ kernels


@pytest.mark.parametrize("how", ["_use_kernels", "kernel_config"])
def test_a_kernelised_model_is_refused(how: str) -> None:
    hf = tiny("llama")
    setattr(hf, how, True)  # what set_use_kernels leaves on the model
    refused(hf, r"kernels were swapped into LlamaForCausalLM \(use_kernels\)", "Load it without use_kernels")


def test_a_layer_with_a_kernel_swapped_in_is_refused() -> None:
    hf = tiny("llama")
    norm = hf.model.layers[1].input_layernorm

    def kernel(self: nn.Module, x: Tensor) -> Tensor:
        return x

    norm.kernel_layer_name = "RMSNorm"  # what the decorator of the package kernels leaves on the class,
    norm.forward = MethodType(kernel, norm)  # and kernelize on the instance
    refused(hf, r"a kernel was swapped into model.layers.1.input_layernorm \(LlamaRMSNorm\) \(RMSNorm\)", "without calling kernelize")


def test_layers_that_could_have_a_kernel_and_have_none_are_read() -> None:
    hf = tiny("llama")
    for block in hf.model.layers:
        block.input_layernorm.kernel_layer_name = "RMSNorm"
    hf._use_kernels = False  # what set_use_kernels(False) leaves
    ps.load((hf, tiny_tokenizer()))


# -------------------------------------------------------------------------------------------------------------------- distributed


@pytest.mark.parametrize(("name", "words"), [("_tp_size", "tensor-parallel"), ("_fsdp_size", "fully sharded")])
def test_shards_are_refused(name: str, words: str) -> None:
    hf = tiny("llama")
    setattr(hf, name, 2)
    refused(hf, f"LlamaForCausalLM is {words}, over 2 processes", "wait for the same pass", "device_map")
    setattr(hf, name, 1)  # one process holds all of it
    ps.load((hf, tiny_tokenizer()))


@pytest.fixture
def one_process(tmp_path: Path):
    """A group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_parameters_that_are_shards_are_refused(one_process: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    hf = tiny("llama")
    linear = hf.model.layers[1].mlp.up_proj
    linear.weight = nn.Parameter(distribute_tensor(linear.weight.data, init_device_mesh("cpu", (1,)), [Shard(0)]))
    refused(hf, r"model.layers.1.mlp.up_proj.weight of LlamaForCausalLM is a shard \(DTensor\)", "in one process")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_wrapped_models_are_refused(one_process: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    hf = tiny("llama")
    fully_shard(hf.model.layers[1], mesh=init_device_mesh("cpu", (1,)))
    refused(hf, r"model.layers.1 \(FSDP\w+\) is wrapped for several devices or processes \(FSDPModule\)", "in one process")
    with pytest.raises(RefusedError, match=r"\(DistributedDataParallel\).*Or give the model inside, model.module"):
        ps.load((nn.parallel.DistributedDataParallel(tiny("llama").requires_grad_(True)), tiny_tokenizer()))


# --------------------------------------------------------------------------------------------------------------------------- meta


def test_a_model_without_numbers_is_refused() -> None:
    refused(tiny("llama").to("meta"), "model.embed_tokens.weight of LlamaForCausalLM is on the device meta", "from_pretrained")
    hf = tiny("llama")
    hf.model.layers[3].mlp.to("meta")
    refused(hf, r"model.layers.3.mlp.\w+.weight of LlamaForCausalLM is on the device meta", "no accelerate hook")


def test_weights_that_accelerate_brings_are_not_missed(tmp_path: Path) -> None:
    import accelerate

    hf = tiny("llama")
    want = hf(IDS).logits
    accelerate.disk_offload(hf, tmp_path, execution_device=torch.device("cpu"))
    assert next(hf.parameters()).is_meta
    model = ps.load((hf, tiny_tokenizer()))
    assert error(model.run(model.tokens(IDS)).logits, want) <= CLOSE
