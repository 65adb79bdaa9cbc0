"""Models that are refused when they are handed over, gradients that are when they are asked for, and numbers that are none: with
what was found, what was expected and what to do, and before anything has run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from families import WIDTH, blocks_of, loaded, tiny, tiny_tokenizer
from oracle import CLOSE, error
from torch import Tensor, nn
from transformers import AwqConfig

import patchscopes as ps
from patchscopes.core.errors import RefusedError, VectorError
from patchscopes.engine.refuse import refuse_quantised

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


@torch.no_grad()
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
    where = {
        "model": "the module LlamaForCausalLM",
        "forward": "the module LlamaForCausalLM",
        "inside a block": r"layers\.2\.mlp",
    }
    how = {
        "wrapped block": "torch.compile",
        "forward": "torch.compile of its forward",
        "block's forward": "torch.compile of its forward",
    }
    refused(
        hf,
        rf"{where.get(what, r'model.layers.2')}.* is compiled \({how.get(what, 'module.compile')}(\(\))?\)",
        "silently ignores hooks",
        "load it anew",
    )


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
    refused(
        hf, r"a kernel was swapped into model.layers.1.input_layernorm \(LlamaRMSNorm\) \(RMSNorm\)", "without calling kernelize"
    )


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


# ----------------------------------------------------------------------------------------------------------------------- gradients


class MapLike(torch.Tensor):
    """A tensor that calls itself float32 and holds something else, as torchao's do."""


MapLike.__module__ = "torchao.quantization"


class Linear4bit(nn.Module):
    """Of bitsandbytes, by its name."""


Linear4bit.__module__ = "bitsandbytes.nn.modules"


def _parameter(value: Tensor) -> Callable[[nn.Module], None]:
    def put(hf: nn.Module) -> None:
        blocks_of(hf, "llama")[1].mlp.register_parameter("extra", nn.Parameter(value, requires_grad=False))

    return put


def _config(value: object) -> Callable[[nn.Module], None]:
    return lambda hf: setattr(hf.config, "quantization_config", value)


def _buffer(hf: nn.Module) -> None:
    blocks_of(hf, "llama")[1].mlp.register_buffer("qweight", torch.ones(4, 4, dtype=torch.int32))


QUANTISED: dict[str, tuple[Callable[[nn.Module], None], str]] = {
    "config as a dict": (_config({"quant_method": "fp8"}), r"\(fp8\)"),
    "config as an object": (_config(AwqConfig()), r"\(awq\)"),
    "what the quantizer sets": (lambda hf: setattr(hf, "quantization_method", "gptq"), r"\(gptq\)"),
    "the quantizer": (lambda hf: setattr(hf, "hf_quantizer", object()), "weights are quantised"),
    "its flag": (lambda hf: setattr(hf, "is_quantized", True), "weights are quantised"),
    "its flag on a part": (lambda hf: setattr(hf.config, "_is_quantized", True), "weights are quantised"),
    "bytes": (_parameter(torch.ones(8, 1, dtype=torch.uint8)), r"layers.1.mlp.extra holds whole numbers \(uint8\)"),
    "eight-bit floats": (_parameter(torch.ones(4).to(torch.float8_e4m3fn)), r"layers.1.mlp.extra, float8_e4m3fn"),
    "torchao": (_parameter(torch.ones(4).as_subclass(MapLike)), r"layers.1.mlp.extra is a MapLike"),
    "bitsandbytes": (lambda hf: hf.model.layers[1].mlp.add_module("extra", Linear4bit()), "is a bitsandbytes Linear4bit"),
    "packed buffers": (_buffer, r"layers.1.mlp.qweight, int32"),
}


@pytest.mark.parametrize("how", QUANTISED)
def test_gradients_of_quantised_models_are_refused(how: str) -> None:
    """Reading and patching them is not."""
    change, words = QUANTISED[how]
    model = ps.load((tiny("llama"), tiny_tokenizer()))
    model.hf.config = copy.deepcopy(model.hf.config)  # models of a family share theirs
    change(model.hf)
    calls = counting(model.hf)
    for call in (
        lambda: model.gradients("abc", lambda run: run.logits.sum(), wrt="resid.1"),
        lambda: model.jvp("abc", "resid.1", torch.ones(WIDTH)),
    ):
        with pytest.raises(RefusedError, match=words) as caught:
            call()
        assert "gradients are refused" in str(caught.value) and "load it in float32" in str(caught.value)
    assert not calls
    assert model.run("abc", read="resid.1").logits.isfinite().all() and calls


def test_dynamically_quantised_layers_are_recognised() -> None:
    """Their weights are no parameters."""

    class Linear(nn.Module):
        """As torch names its own; those that it makes itself warn that they are to go."""

    Linear.__module__ = "torch.ao.nn.quantized.dynamic.modules.linear"

    with pytest.raises(RefusedError, match=r"0 is a torch.ao Linear"):
        refuse_quantised(nn.Sequential(Linear()))


# ----------------------------------------------------------------------------------------------------- numbers, formats, own hooks


NAN = float("nan")
WITH_NAN = [
    (lambda: ps.Edit("resid.1", 0, torch.ones(WIDTH), "add", amount=NAN), r"resid\.1 has the amount nan"),
    (lambda: ps.Edit("resid.1", 0, write="scale", amount=float("inf")), r"resid\.1 has the amount inf"),
    (lambda: ps.coordinates.Subspace.spanned_by(torch.tensor([1.0, NAN])), "a direction has 1 of 2 entries that are not finite"),
    (lambda: ps.coordinates.Subspace(torch.tensor([[1.0, NAN]])), "the basis of 'subspace' has 1 of 2"),
    (
        lambda: ps.coordinates.Dictionary(torch.ones(2, 3), torch.tensor([0, NAN]), torch.ones(2, 3), torch.ones(3)),
        "the encoder_bias of the dictionary 'dictionary' has 1 of 2",
    ),
    (lambda: ps.maps.Affine(torch.full((2, 3), NAN)), "the weight of the map 'affine' has 6 of 6"),
    (lambda: ps.maps.Affine(torch.ones(2, 3), torch.tensor([1, NAN])), "the bias of the map 'affine' has 1 of 2"),
    (lambda: ps.maps.Scale(NAN), "alpha is nan; expected a finite number"),
    (lambda: loaded("llama").jvp("abc", "resid.1", torch.full((WIDTH,), NAN)), r"tangent at resid\.1 has 64 of 64"),
    (lambda: ps.Source.of_vectors(loaded("llama"), torch.full((2, WIDTH), NAN), layer=1), "the vector has 128 of 128"),
]


@pytest.mark.parametrize(("make", "words"), WITH_NAN, ids=[words[:24] for _, words in WITH_NAN])
def test_what_is_no_number_is_refused_before_anything_runs(make: Callable[[], Any], words: str) -> None:
    passes: list[int] = []
    handle = loaded("llama").hf.register_forward_hook(lambda *_: passes.append(1))
    try:
        with pytest.raises(VectorError, match=words):
            make()
    finally:
        handle.remove()
    assert not passes


def test_a_map_that_makes_no_numbers_is_refused_before_the_target_runs() -> None:
    class Root:
        name = "root"

        def __call__(self, h: Tensor) -> Tensor:
            return h.sqrt()

    model, passes = loaded("llama"), list[int]()
    handle = model.hf.register_forward_hook(lambda *_: passes.append(1))
    try:
        with pytest.raises(
            VectorError, match=r"what the map 'root' makes of the state at layer 2, position 0 of 'vector 0' has 64 of 64"
        ):
            ps.Patchscope("{x}", layer=1, map=Root())(ps.Source.of_vectors(model, -torch.ones(WIDTH), layer=2))
    finally:
        handle.remove()
    assert not passes


def test_a_value_in_the_format_of_its_site_is_taken() -> None:
    """Mamba keeps its residual stream in float32; what is read there can be written there, and so can a vector in the weights' own."""
    model = ps.load((tiny("mamba", dtype=torch.bfloat16), tiny_tokenizer()))
    run = model.run("abc", read=["resid.2", "attn_out.1", "delta.1"])
    assert model.dtype == torch.bfloat16 and run["resid.2"].dtype == torch.float32
    for site in ("resid.2", "attn_out.1", "delta.1"):
        same = model.run("abc", edits=[ps.Edit(site, None, run[site][0])])
        assert torch.equal(same.logits, run.logits), site
    value = torch.ones(WIDTH)
    both = [model.run("abc", edits=[ps.Edit("resid.2", 1, v)]).logits for v in (value, value.bfloat16())]
    assert torch.equal(*both) and not torch.equal(both[0], run.logits)
    with pytest.raises(VectorError, match="float64 on cpu"):
        model.run("abc", edits=[ps.Edit("resid.2", 1, value.double())])
    with pytest.raises(VectorError, match=r"float32 on cpu, but .* computes in bfloat16"):
        model.run("abc", edits=[ps.Edit("resid.0", 1, value)])  # the embeddings are not in float32


def test_a_router_in_float32_is_written_in_float32() -> None:
    """As models keep it whose other weights are in sixteen bits."""
    hf = tiny("mixtral", dtype=torch.bfloat16)
    for block in hf.model.layers:
        block.mlp.gate.float()
        block.mlp.gate.register_forward_pre_hook(lambda _module, args: (args[0].float(),))
    model = ps.load((hf, tiny_tokenizer()))
    run = model.run("abc", read="router.1")
    assert run["router.1"].dtype == torch.float32 and model.dtype == torch.bfloat16
    same = model.run("abc", edits=[ps.Edit("router.1", None, run["router.1"][0])])
    assert torch.equal(same.logits, run.logits)


def test_ones_own_hooks_stay_and_are_seen() -> None:
    hf, seen = tiny("llama"), list[int]()
    block = hf.model.layers[1]

    def shift(_module: nn.Module, _args: tuple, out: Tensor) -> Tensor:
        seen.append(out.shape[1])
        return out + 1

    handle = block.register_forward_hook(shift)
    want = hf(IDS).logits
    model = ps.load((hf, tiny_tokenizer()))
    assert error(model.run(model.tokens(IDS)).logits, want) <= CLOSE
    plain = loaded("llama")
    moved = plain.run("abc", edits=[ps.Edit("resid.2", None, torch.ones(WIDTH), "add"), ps.Edit("resid.3", 1, torch.ones(WIDTH))])
    assert error(model.run("abc", edits=[ps.Edit("resid.3", 1, torch.ones(WIDTH))]).logits, moved.logits) <= CLOSE
    model.generate("abc", max_new_tokens=2)
    assert list(block._forward_hooks.values()) == [shift]
    handle.remove()
    assert error(model.run("abc").logits, plain.run("abc").logits) <= CLOSE
