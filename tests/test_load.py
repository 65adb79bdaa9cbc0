"""Loading: from a folder, a pair, the hub's cache, an adapter; what is refused and why; what a loaded model says of itself; and that
the user's own model is left as it was."""

from __future__ import annotations

import importlib.metadata
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import pytest
import torch
import transformers
from families import CONFIGS, loaded, tiny, tiny_tokenizer
from oracle import CLOSE, error
from safetensors.torch import load_file
from torch import Tensor, nn

import patchscopes as ps
from patchscopes.core.errors import InputError, NotAvailableError, PatchscopesError, RefusedError, SiteError
from patchscopes.engine.check import MEANING
from patchscopes.engine.engine import Engine
from patchscopes.engine.tolerance import tolerance
from patchscopes.model import checked as remembered
from patchscopes.model import model as model_module

TEXT = "the cat sat on"
GPU = torch.cuda.is_available()


def logits_of(hf: nn.Module, text: str = TEXT) -> Tensor:
    with torch.no_grad():
        return hf(torch.tensor([tiny_tokenizer()(text)["input_ids"]])).logits


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models go where this says, and defaults are those of a machine without one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its tokenizer, as `save_pretrained` writes them. Read-only."""
    where = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny("llama").save_pretrained(where)
    tiny_tokenizer().save_pretrained(where)
    return where


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> tuple[Path, nn.Module]:
    """A LoRA adapter on the tiny Llama, with weights that are not zero, and peft's own model of it."""
    model = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(folder),
        peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    ).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # peft begins with zeros, which change nothing
            parameter.data.normal_(0, 0.2, generator=generator)
    where = tmp_path_factory.mktemp("adapters") / "tiny-lora"
    model.save_pretrained(where)
    return where, model


@pytest.fixture(scope="module")
def rwkv() -> ps.Model:
    """A recurrent model that takes no cache, and whose first block does more than add."""
    config = transformers.RwkvConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=3, context_length=64, bos_token_id=1, eos_token_id=2
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf = transformers.RwkvForCausalLM(config).eval()
        for parameter in hf.parameters():
            if parameter.ndim >= 2:
                parameter.data.normal_(0, 0.15)
    return ps.load((hf, tiny_tokenizer()))


class TestFolder:
    @pytest.mark.parametrize("kind", [str, Path])
    def test_a_folder(self, folder: Path, kind: type) -> None:
        model = ps.load(kind(folder))
        assert torch.equal(model.run(TEXT).logits, logits_of(tiny("llama")))
        assert model.name == str(folder) and model.revision is None
        assert (model.n_layers, model.d_model, model.vocab, model.context) == (5, 64, 97, 128)
        assert model.dtype == torch.float32 and model.device.type == "cpu"
        assert model.end_ids == {2}
        assert not model.hf.training and not any(p.requires_grad for p in model.hf.parameters())

    def test_its_tokenizer_is_the_one_beside_it(self, folder: Path) -> None:
        tokens = ps.load(folder).tokens(TEXT)
        assert tokens.strings == ("<s>", *TEXT) and list(tokens.ids) == tiny_tokenizer()(TEXT)["input_ids"]

    def test_a_folder_in_the_home_folder(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(folder.parent))
        assert ps.load("~/tiny-llama").n_layers == 5

    @pytest.mark.parametrize(
        ("dtype", "want"),
        [
            (None, torch.float32),
            ("auto", torch.bfloat16),
            ("bfloat16", torch.bfloat16),
            (torch.float16, torch.float16),
            ("float64", torch.float64),
        ],
    )
    def test_number_formats(self, tmp_path: Path, dtype: Any, want: torch.dtype) -> None:
        """The checkpoint is in bfloat16; on a CPU float32 is the default all the same."""
        tiny("llama", dtype=torch.bfloat16).save_pretrained(tmp_path)
        tiny_tokenizer().save_pretrained(tmp_path)
        model = ps.load(tmp_path, dtype=dtype)
        assert model.dtype == want and {p.dtype for p in model.hf.parameters()} == {want}
        exact = tiny("llama")
        exact.load_state_dict(tiny("llama", dtype=torch.bfloat16).state_dict())
        reference = logits_of(exact)
        assert error(model.run(TEXT).logits.double(), reference.double()) < (
            5e-2 if want in (torch.bfloat16, torch.float16) else 1e-5
        )
        assert model.run(TEXT, read=["resid.2"])["resid.2"].dtype == want

    @pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
    def test_device_maps(self, folder: Path, device_map: Any) -> None:
        model = ps.load(folder, device_map=device_map)
        assert model.device.type == "cpu" and error(model.run(TEXT).logits, logits_of(tiny("llama"))) < CLOSE

    def test_attention_is_transformers_own(self, folder: Path) -> None:
        eager = ps.load(folder, attention="eager")
        assert eager.provenance()["attention"] == "eager" != ps.load(folder).provenance()["attention"]
        assert error(eager.run(TEXT).logits, logits_of(tiny("llama"))) < CLOSE

    def test_a_quantization_config_reaches_transformers(self, folder: Path) -> None:
        with pytest.raises(NotAvailableError, match=r"could not be loaded.*BITNET does require the model to be pre-quantized"):
            ps.load(folder, quantization=transformers.BitNetQuantConfig())


class TestPair:
    def test_what_you_have(self) -> None:
        hf, tokenizer = tiny("llama"), tiny_tokenizer()
        model = ps.load((hf, tokenizer))
        assert model.hf is hf and model.tokenizer is tokenizer
        assert model.name == "LlamaForCausalLM" and model.capabilities.route == "stairs"
        assert torch.equal(model.run(TEXT).logits, logits_of(hf))

    def test_its_name_is_where_it_came_from(self, folder: Path) -> None:
        hf = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert ps.load((hf, tiny_tokenizer())).name == str(folder)

    def test_weights_of_eight_bits(self) -> None:
        """Quantised as bitsandbytes does it: linear layers that hold integers and a scale a row, and compute in float32."""

        class Int8(nn.Module):
            def __init__(self, linear: nn.Linear):
                super().__init__()
                scale = linear.weight.abs().amax(1, keepdim=True) / 127
                self.weight = nn.Parameter((linear.weight / scale).round().to(torch.int8), requires_grad=False)
                self.scale = nn.Buffer(scale)

            def forward(self, x: Tensor) -> Tensor:
                return x @ (self.weight * self.scale).T

        hf = tiny("llama")
        for name, module in list(hf.named_modules()):
            if isinstance(module, nn.Linear):
                hf.set_submodule(name, Int8(module))
        model = ps.load((hf, tiny_tokenizer()))
        assert torch.int8 in {p.dtype for p in hf.parameters()} and model.dtype == torch.float32
        assert all(ability.ok for ability in model.capabilities.abilities.values()), model.capabilities
        assert error(model.unembed(model.run(TEXT, read=["resid.5"])["resid.5"]), logits_of(hf)) < CLOSE
        assert error(logits_of(hf), logits_of(tiny("llama"))) > CLOSE  # it is another model
        assert model.weight_hash.startswith("sha256:") and model.weight_hash != loaded("llama").weight_hash

    def test_layers_on_disk(self, tmp_path: Path) -> None:
        """accelerate's wrappers stand where blocks are bypassed: they are kept and put back."""
        import accelerate

        hf = tiny("llama")
        parts = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", *(f"model.layers.{b}" for b in range(5))]
        places = {part: "disk" if part[-1] in "234" else "cpu" for part in parts}
        accelerate.dispatch_model(hf, places, main_device="cpu", offload_dir=tmp_path)
        wrappers = {name: module.__dict__.get("forward") for name, module in hf.named_modules()}
        assert {p.device.type for p in hf.parameters()} == {"cpu", "meta"} and any(wrappers.values())
        model = ps.load((hf, tiny_tokenizer()))
        assert model.capabilities.route == "stairs" and model.device.type == "cpu"
        assert torch.equal(model.run(TEXT).logits, logits_of(tiny("llama")))
        assert {name: module.__dict__.get("forward") for name, module in hf.named_modules()} == wrappers


class TestAdapter:
    def test_it_is_loaded_on_its_base(self, folder: Path, adapter: tuple[Path, nn.Module]) -> None:
        where, reference = adapter
        model = ps.load(where)
        assert model.name == str(where) and model.capabilities.route == "stairs"
        assert torch.equal(model.run(TEXT).logits, logits_of(reference))
        assert error(model.run(TEXT).logits, logits_of(tiny("llama"))) > 0.05
        assert model.tokens(TEXT).strings == ("<s>", *TEXT)  # the base's tokenizer: the adapter's folder has none
        assert model.weight_hash != ps.load(folder).weight_hash
        assert not any(p.requires_grad for p in model.hf.parameters())

    def test_a_pair_with_pefts_own_model(self, adapter: tuple[Path, nn.Module]) -> None:
        _, reference = adapter
        model = ps.load((reference, tiny_tokenizer()))
        assert torch.equal(model.run(TEXT).logits, logits_of(reference))
        same = [
            ps.Patchscope("ab {x}", max_new_tokens=3)(ps.Source(m, TEXT, layer=[1, 4]), controls=False).table
            for m in (model, ps.load(adapter[0]))
        ]
        assert same[0]["text"].equals(same[1]["text"])

    @pytest.fixture
    def broken(self, tmp_path: Path, adapter: tuple[Path, nn.Module]) -> tuple[Path, Callable[[Any], None]]:
        """A copy of the adapter, and a way to give it another base."""
        where = tmp_path / "broken"
        shutil.copytree(adapter[0], where)

        def on(base: Any) -> None:
            config = json.loads((where / "adapter_config.json").read_text())
            (where / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))

        return where, on

    def test_no_base_named(self, broken: tuple[Path, Callable[[Any], None]]) -> None:
        broken[1](None)
        with pytest.raises(NotAvailableError, match=r"broken does not name its base model \(base_model_name_or_path"):
            ps.load(broken[0])

    def test_the_base_is_not_here(self, broken: tuple[Path, Callable[[Any], None]]) -> None:
        broken[1]("nobody/no-such-base")
        with pytest.raises(NotAvailableError, match="broken"):
            ps.load(broken[0])

    def test_its_weights_are_missing(self, broken: tuple[Path, Callable[[Any], None]]) -> None:
        (broken[0] / "adapter_model.safetensors").unlink()
        with pytest.raises(NotAvailableError, match="broken"):
            ps.load(broken[0])

    def test_it_does_not_fit_its_base(self, broken: tuple[Path, Callable[[Any], None]], tmp_path: Path) -> None:
        narrow = transformers.LlamaConfig(**{**CONFIGS["llama"].to_dict(), "hidden_size": 32})
        transformers.LlamaForCausalLM(narrow).save_pretrained(tmp_path / "narrow")
        tiny_tokenizer().save_pretrained(tmp_path / "narrow")
        broken[1](str(tmp_path / "narrow"))
        with pytest.raises(NotAvailableError, match="narrow"):
            ps.load(broken[0])

    def test_without_peft(self, adapter: tuple[Path, nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "peft", None)
        with pytest.raises(NotAvailableError, match=r"needs the package peft.*pip install 'patchscopes\[peft\]'"):
            ps.load(adapter[0])


class TestHub:
    """Ids that are in the hub's cache, as huggingface_hub lays it out."""

    MAIN, OLD = "a" * 40, "b" * 40

    @pytest.fixture
    def put(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

        def put(repo: str, revision: str, commit: str) -> Path:
            root = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
            for part in ("refs", f"snapshots/{commit}"):
                (root / part).mkdir(parents=True, exist_ok=True)
            (root / "refs" / revision).write_text(commit)
            return root / "snapshots" / commit

        return put

    @pytest.fixture
    def hub(self, put: Callable[..., Path]) -> None:
        for seed, (revision, commit) in enumerate((("main", self.MAIN), ("old", self.OLD))):
            where = put("someone/tiny", revision, commit)
            tiny("llama", seed=seed).save_pretrained(where)
            tiny_tokenizer().save_pretrained(where)

    @pytest.mark.usefixtures("hub")
    @pytest.mark.parametrize(("revision", "seed"), [(None, 0), ("main", 0), ("old", 1), (OLD, 1)])
    def test_revisions(self, revision: str | None, seed: int) -> None:
        model = ps.load("someone/tiny", revision=revision)
        assert torch.equal(model.run(TEXT).logits, logits_of(tiny("llama", seed=seed)))
        assert model.name == "someone/tiny"

    @pytest.mark.usefixtures("hub")
    @pytest.mark.parametrize(("revision", "commit"), [(None, MAIN), ("old", OLD)])
    def test_the_revision_of_a_result_is_a_commit(self, revision: str | None, commit: str) -> None:
        """Branches move; what a result depends on is the commit."""
        assert ps.load("someone/tiny", revision=revision).provenance()["revision"] == commit

    @pytest.mark.usefixtures("hub")
    def test_an_unknown_revision(self) -> None:
        with pytest.raises(NotAvailableError, match="no model 'someone/tiny'"):
            ps.load("someone/tiny", revision="never")

    @pytest.mark.usefixtures("hub")
    @pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")
    def test_the_id_of_an_adapter(self, put: Callable[..., Path], adapter: tuple[Path, nn.Module]) -> None:
        where = put("someone/lora", "main", "c" * 40)
        shutil.copytree(adapter[0], where, dirs_exist_ok=True)
        model = ps.load("someone/lora")
        assert torch.equal(model.run(TEXT).logits, logits_of(adapter[1]))

    def test_an_unknown_id_offline(self, put: Callable[..., Path]) -> None:
        with pytest.raises(
            NotAvailableError, match=r"no model 'nobody/nothing'.*Hugging Face id that is cached or can be downloaded"
        ):
            ps.load("nobody/nothing")

    def test_a_name_that_is_almost_a_bundled_one(
        self, put: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, folder: Path
    ) -> None:
        monkeypatch.setattr("patchscopes.organisms.bundled", lambda: {"atlas": folder})
        with pytest.raises(NotAvailableError, match=r"bundled model: atlas\. Did you mean 'atlas'\?"):
            ps.load("altas")
        assert ps.load("atlas").name == "atlas"

    def test_code_from_a_repository(self, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Runs only if it is trusted."""
        where = tmp_path / "custom"
        shutil.copytree(folder, where)
        (where / "modeling_mine.py").write_text(
            "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
            "class MineConfig(LlamaConfig):\n    model_type = 'mine'\n\n\n"
            "class MineForCausalLM(LlamaForCausalLM):\n    config_class = MineConfig\n"
        )
        config = json.loads((where / "config.json").read_text()) | {"model_type": "mine", "architectures": ["MineForCausalLM"]}
        config["auto_map"] = {"AutoConfig": "modeling_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
        (where / "config.json").write_text(json.dumps(config))
        monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
        monkeypatch.setattr(sys, "path", [*sys.path])
        with pytest.raises(NotAvailableError, match="trust_remote_code=True"):
            ps.load(where)
        assert not (tmp_path / "modules").exists()
        model = ps.load(where, trust_remote_code=True)
        assert type(model.hf).__name__ == "MineForCausalLM"
        assert torch.equal(model.run(TEXT).logits, logits_of(tiny("llama")))


class TestErrors:
    def test_a_path_without_a_model(self, tmp_path: Path) -> None:
        for path in (tmp_path / "nothing", "./nothing", "/nothing/at/all"):
            with pytest.raises(
                NotAvailableError, match=r"nothing.*no such folder. Expected a folder with config.json and weights"
            ):
                ps.load(path)

    def test_a_folder_without_a_config(self, tmp_path: Path) -> None:
        with pytest.raises(NotAvailableError, match=r"found nothing; expected config.json and weights"):
            ps.load(tmp_path)
        (tmp_path / "notes.txt").touch()
        with pytest.raises(NotAvailableError, match=r"found notes.txt; expected config.json"):
            ps.load(tmp_path)

    @pytest.fixture
    def copy(self, tmp_path: Path, folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / "copy"))

    def test_no_tokenizer(self, copy: Path) -> None:
        for file in copy.glob("token*"):
            file.unlink()
        with pytest.raises(
            NotAvailableError, match=r"no tokenizer for '.*copy'.*Expected tokenizer.json.*load\(\(hf_model, tokenizer\)\)"
        ):
            ps.load(copy)

    def test_no_weights(self, copy: Path) -> None:
        (copy / "model.safetensors").unlink()
        with pytest.raises(NotAvailableError, match=r"copy.*model\.safetensors"):
            ps.load(copy)

    def test_half_of_the_weights(self, copy: Path) -> None:
        """A download that was interrupted."""
        content = (copy / "model.safetensors").read_bytes()
        (copy / "model.safetensors").write_bytes(content[: len(content) // 2])
        with pytest.raises(NotAvailableError, match="copy"):
            ps.load(copy)

    @pytest.mark.parametrize("config", ["{", '{"model_type": "zorg"}', "{}"])
    def test_a_config_that_means_nothing(self, copy: Path, config: str) -> None:
        (copy / "config.json").write_text(config)
        with pytest.raises(NotAvailableError, match="copy"):
            ps.load(copy)

    def test_an_encoder(self, tmp_path: Path) -> None:
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        config = transformers.BertConfig(
            vocab_size=97, initializer_range=0.3, **sizes
        )  # at 0.02 its tokens hardly see one another
        torch.manual_seed(0)
        transformers.BertForMaskedLM(config).save_pretrained(tmp_path)
        tiny_tokenizer().save_pretrained(tmp_path)
        with pytest.raises(
            RefusedError, match=r"no decoder stack found: in Bert\w+ early positions see later ones, so it is an encoder"
        ):
            ps.load(tmp_path)

    def test_a_vision_model(self, tmp_path: Path) -> None:
        config = transformers.ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32
        )
        transformers.ViTModel(config).save_pretrained(tmp_path)
        with pytest.raises(RefusedError, match=r"has no decoder stack: its config is a ViTConfig \(vit\)"):
            ps.load(tmp_path)

    def test_a_device_and_a_device_map(self, folder: Path) -> None:
        with pytest.raises(InputError, match="device='cpu' and device_map='auto' were both given; expected one of them"):
            ps.load(folder, device="cpu", device_map="auto")

    @pytest.mark.parametrize("what", [{"device": "nonsense"}, {"dtype": "floaty"}, {"attention": "nonsense"}])
    def test_options_that_mean_nothing(self, folder: Path, what: dict[str, str]) -> None:
        with pytest.raises(PatchscopesError, match=next(iter(what.values()))):
            ps.load(folder, **what)  # type: ignore[arg-type]

    @pytest.mark.skipif(GPU, reason="needs a machine without a GPU")
    @pytest.mark.parametrize("pair", [False, True])
    def test_a_gpu_that_is_not_there(self, folder: Path, pair: bool) -> None:
        with pytest.raises(PatchscopesError, match="cuda"):
            ps.load((tiny("llama"), tiny_tokenizer()) if pair else folder, device="cuda")


class TestTheUsersModel:
    """It is left as it was: every bit of it, and without a trace of hooks."""

    @staticmethod
    def traces(hf: nn.Module) -> dict[str, list]:
        """What a module carries beside its weights."""
        return {
            name: [
                *module._forward_hooks.values(),
                *module._forward_pre_hooks.values(),
                *module._forward_hooks_with_kwargs,
                *module._forward_pre_hooks_with_kwargs,
                *module._backward_hooks.values(),
                *(
                    key
                    for key in module.__dict__
                    if not key.startswith("_") and callable(module.__dict__[key]) and key == "forward"
                ),
            ]
            for name, module in hf.named_modules()
        }

    def use(self, model: ps.Model) -> None:
        value = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
        model.run([TEXT, "q"], read=["resid.*"], edits=[ps.Edit("resid.1", -1, value, "add_matched")])
        model.unembed(torch.randn(3, model.d_model))
        scope = ps.Patchscope("hello {x} is", layer=[0, 2], max_new_tokens=3)
        scope(ps.Source(model, [TEXT, "q"], layer=[1, model.n_layers]))

    @pytest.mark.parametrize("family", ["llama", "gpt2", "mamba"])  # routes: stairs, stairs with tuples, whole
    def test_after_loading_and_running(self, family: str) -> None:
        hf = tiny(family)
        hf.lm_head.requires_grad_(True)
        before = {name: tensor.clone() for name, tensor in hf.state_dict().items()}
        attributes = {name: set(module.__dict__) for name, module in hf.named_modules()}
        grads = {name: p.requires_grad for name, p in hf.named_parameters()}
        config, generation = hf.config.to_dict(), hf.generation_config.to_dict()
        model = ps.load((hf, tiny_tokenizer()))
        assert not any(self.traces(hf).values()), "after load"
        self.use(model)
        assert not any(self.traces(hf).values()), "after runs"
        after = hf.state_dict()
        assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
        assert {name: set(module.__dict__) for name, module in hf.named_modules()} == attributes
        assert {name: p.requires_grad for name, p in hf.named_parameters()} == grads and hf.lm_head.weight.grad is None
        assert (hf.config.to_dict(), hf.generation_config.to_dict()) == (config, generation)

    def test_after_a_run_that_failed(self) -> None:
        """Hooks of the user's own stay, and ours go, also when a pass breaks off."""
        hf = tiny("llama")
        model = ps.load((hf, tiny_tokenizer()))

        def stop(_module: nn.Module, _args: tuple) -> None:
            raise KeyboardInterrupt

        handle = hf.lm_head.register_forward_pre_hook(stop)
        for act in (
            lambda: model.run(TEXT, read=["resid.*", "mlp_out.2"]),
            lambda: model.unembed(torch.zeros(1, 64)),
            lambda: ps.Patchscope("{x} is", layer=3)(ps.Source(model, TEXT, layer=1)),
        ):
            with pytest.raises(KeyboardInterrupt):
                act()
            assert {name: kept for name, kept in self.traces(hf).items() if kept} == {"lm_head": [stop]}
        handle.remove()
        assert torch.equal(model.run(TEXT).logits, logits_of(hf))

    def test_the_users_own_hooks_are_obeyed(self) -> None:
        hf = tiny("llama")
        hf.model.layers[1].mlp.register_forward_hook(lambda _module, _args, out: 2 * out)
        model = ps.load((hf, tiny_tokenizer()))
        assert torch.equal(model.run(TEXT).logits, logits_of(hf)) and error(logits_of(hf), logits_of(tiny("llama"))) > CLOSE
        assert model.capabilities.route == "stairs"


class TestWhatItSays:
    def test_repr(self) -> None:
        assert repr(loaded("llama")) == (
            "Model('LlamaForCausalLM': LlamaForCausalLM, 5 layers, d_model 64, vocab 97, 0.2 million parameters, float32 on cpu)"
        )

    @pytest.fixture
    def hash_of(self) -> Callable[[nn.Module], str]:
        """The weight hash alone, without a load."""

        def hash_of(hf: nn.Module) -> str:
            model = object.__new__(ps.Model)
            model.hf = hf
            return model.weight_hash

        return hash_of

    def test_the_weight_hash_is_of_the_weights(self, hash_of: Callable[[nn.Module], str]) -> None:
        first = hash_of(tiny("llama"))
        assert first == hash_of(tiny("llama")) == loaded("llama").weight_hash
        assert first.startswith("sha256:") and len(first) == len("sha256:") + 64
        others = [hash_of(tiny("llama", seed=1)), hash_of(tiny("llama", dtype=torch.bfloat16)), hash_of(tiny("qwen3"))]
        assert len({first, *others}) == 4

    @pytest.mark.parametrize(
        "name", ["model.embed_tokens.weight", "model.layers.3.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"]
    )
    @pytest.mark.parametrize("entry", [0, -1, 7])
    def test_one_weight_changes_it(self, hash_of: Callable[[nn.Module], str], name: str, entry: int) -> None:
        hf = tiny("llama")
        flat = hf.get_parameter(name).data.view(-1)
        flat[entry] = torch.nextafter(flat[entry], torch.tensor(9.0))
        assert hash_of(hf) != loaded("llama").weight_hash

    def test_swapped_tensors_change_it(self, hash_of: Callable[[nn.Module], str]) -> None:
        hf = tiny("llama")
        a, b = (hf.get_parameter(f"model.layers.{b}.mlp.up_proj.weight") for b in (0, 1))
        a.data, b.data = b.data, a.data
        assert hash_of(hf) != loaded("llama").weight_hash

    def test_names_shapes_and_formats_count(self, hash_of: Callable[[nn.Module], str]) -> None:
        """Models whose bytes are the same, one after the other."""

        def of(**tensors: Tensor) -> str:
            return hash_of(
                nn.ParameterDict({name: nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()})
            )

        zeros = [
            of(a=torch.zeros(2, 3)),
            of(a=torch.zeros(3, 2)),
            of(b=torch.zeros(2, 3)),
            of(a=torch.zeros(2, 3, dtype=torch.int32)),
        ]
        assert len(set(zeros)) == 4
        assert of(a=torch.tensor([1.0, 2]), b=torch.tensor([3.0])) != of(a=torch.tensor([1.0]), b=torch.tensor([2.0, 3]))

    def test_of_big_models_samples_are_hashed_and_it_says_so(
        self, hash_of: Callable[[nn.Module], str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(model_module, "HASHED_WHOLE", 1000)
        first, hf = hash_of(tiny("llama")), tiny("llama")
        assert first.startswith("sampled-sha256:")
        hf.lm_head.weight.data.view(-1)[-1] += 1
        assert hash_of(hf) != first

    def test_weights_that_are_on_disk_count(self, hash_of: Callable[[nn.Module], str], tmp_path: Path) -> None:
        """Two models that differ in an offloaded layer alone are two models; or else the hash does not call itself one of all weights."""
        import accelerate

        found = []
        for k in (0, 1):
            hf = tiny("llama")
            hf.model.layers[3].mlp.up_proj.weight.data += k
            parts = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", *(f"model.layers.{b}" for b in range(5))]
            accelerate.dispatch_model(
                hf, {p: "disk" if p.endswith("3") else "cpu" for p in parts}, main_device="cpu", offload_dir=tmp_path / str(k)
            )
            found.append(hash_of(hf))
        assert found[0] != found[1] or not found[0].startswith("sha256:")

    def test_provenance(self, folder: Path) -> None:
        said = ps.load(folder).provenance()
        assert json.loads(json.dumps(said)) == said
        assert said["model"] == str(folder) and said["architecture"] == "LlamaForCausalLM"
        assert (said["n_layers"], said["d_model"], said["dtype"], said["device"], said["route"]) == (
            5,
            64,
            "float32",
            "cpu",
            "stairs",
        )
        assert said["weight_hash"] == loaded("llama").weight_hash and said["revision"] is None
        packages = ("patchscopes", "torch", "transformers", "tokenizers", "safetensors")
        assert said["versions"] == {name: importlib.metadata.version(name) for name in packages}

    @pytest.mark.parametrize(
        ("change", "fields"),
        [
            ({"dtype": "bfloat16"}, {"dtype", "weight_hash"}),
            ({"attention": "eager"}, {"attention"}),
            ({"device_map": "cpu"}, set()),
        ],
    )
    def test_provenance_varies_with_its_causes(self, folder: Path, change: dict[str, Any], fields: set[str]) -> None:
        plain, other = ps.load(folder).provenance(), ps.load(folder, **change).provenance()
        assert {key for key in plain if plain[key] != other[key]} == fields

    def test_provenance_of_another_architecture(self) -> None:
        llama, mamba = loaded("llama").provenance(), loaded("mamba").provenance()
        assert {key for key in llama if llama[key] != mamba[key]} >= {"model", "weight_hash", "architecture", "route"}


def test_what_rounding_allows_depends_on_how_the_device_multiplies() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert tolerance(torch.float32, cpu) == tolerance(torch.float32, gpu) == tolerance(torch.float64, gpu) == 1e-4
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("high", "medium"):
            torch.set_float32_matmul_precision(precision)
            assert tolerance(torch.float32, gpu) == tolerance(torch.float16, gpu) == 2e-2
            assert tolerance(torch.float32, cpu) == tolerance(torch.float64, gpu) == 1e-4
    finally:
        torch.set_float32_matmul_precision(before)


class TestRememberedCheck:
    """checked(engine, dtype, big=…): measured once for an architecture, its settings, versions and number format."""

    @pytest.fixture(autouse=True)
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("PATCHSCOPES_CACHE", str(tmp_path / "cache"))
        return tmp_path / "cache"

    @pytest.fixture
    def measured(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[list]:
        """The measurements made. Models that tests share are loaded before: each load is one, too."""
        for family in ("llama", "mamba"):
            loaded(family)
        calls: list = []
        real = remembered.check
        monkeypatch.setattr(remembered, "check", lambda engine, dtype: calls.append(dtype) or real(engine, dtype))
        yield calls

    def test_the_second_time_it_is_read(self, cache: Path, measured: list) -> None:
        engine = loaded("mamba").engine  # abilities that lack, with reasons
        first = remembered.checked(engine, torch.float32, big=1)
        (file,) = (cache / "checks").iterdir()  # nothing half-written beside it
        assert file.suffix == ".json" and json.loads(file.read_text())["abilities"].keys() == MEANING.keys()
        again = remembered.checked(engine, torch.float32, big=1)
        assert len(measured) == 1
        assert repr(again) == repr(first) and again.route == first.route == "whole"  # repr: nan is not equal to itself

    def test_it_is_read_for_other_weights_of_the_same_architecture(self, measured: list) -> None:
        for seed in (0, 1):
            remembered.checked(ps.load((tiny("llama", seed=seed), tiny_tokenizer())).engine, torch.float32, big=1)
        assert len(measured) == 2 + 1  # one for each load, whose models are small

    def test_what_is_not_a_number_comes_back_as_that(self, measured: list, rwkv: ps.Model) -> None:
        first, again = (remembered.checked(rwkv.engine, torch.float32, big=1).abilities["decoding"] for _ in range(2))
        assert len(measured) == 1 and math.isnan(first.error) and math.isnan(again.error) and again.reason == first.reason

    @pytest.mark.parametrize("cause", ["dtype", "architecture", "settings", "attention", "versions", "modules"])
    def test_another_cause_measures_again(
        self, cache: Path, measured: list, cause: str, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine = loaded("llama").engine
        remembered.checked(engine, torch.float32, big=1)
        if cause == "dtype":
            remembered.checked(engine, torch.bfloat16, big=1)
        elif cause == "versions":
            monkeypatch.setattr(remembered.transformers, "__version__", "5.99.0")
            remembered.checked(engine, torch.float32, big=1)
        else:
            hf = {
                "architecture": lambda: tiny("gpt2"),
                "settings": lambda: transformers.LlamaForCausalLM(self.other_config()),
                "attention": lambda: transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager"),
                "modules": lambda: tiny("llama"),
            }[cause]()
            if cause == "modules":
                hf.model.layers[2].mlp = nn.Sequential(hf.model.layers[2].mlp)
            remembered.checked(remembered.Engine(hf.eval()), torch.float32, big=1)
        assert len(measured) == len(list((cache / "checks").iterdir())) == 2

    @staticmethod
    def other_config() -> transformers.LlamaConfig:
        return transformers.LlamaConfig(**{**CONFIGS["llama"].to_dict(), "attention_bias": True})

    def test_small_models_are_measured_every_time(self, cache: Path, measured: list) -> None:
        for _ in range(2):
            remembered.checked(loaded("llama").engine, torch.float32)
        assert len(measured) == 2 and not cache.exists()

    def test_a_cache_that_cannot_be_written_is_done_without(self, cache: Path, measured: list) -> None:
        """Home folders of clusters can be read-only, and full."""
        cache.write_text("a file where the folder should be")
        found = remembered.checked(loaded("llama").engine, torch.float32, big=1)
        assert found.route == "stairs" and len(measured) == 1

    def test_where_it_lies(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert remembered.cache_folder() == cache
        monkeypatch.delenv("PATCHSCOPES_CACHE")
        monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
        assert remembered.cache_folder() == Path("/somewhere/patchscopes")
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", "/home/me")
        assert remembered.cache_folder() == Path("/home/me/.cache/patchscopes")


class TestAbilities:
    def test_a_llama_lacks_nothing(self) -> None:
        found = loaded("llama").capabilities
        assert found.abilities.keys() == MEANING.keys() and all(
            ability.ok and not ability.reason for ability in found.abilities.values()
        )
        assert (found.route, found.readout_route) == ("stairs", "stairs")
        for name in MEANING:
            found.require(name, "anything")

    def test_a_mamba_cannot_go_on_from_a_prefix(self) -> None:
        found = loaded("mamba").capabilities
        assert (found.route, found.readout_route) == ("whole", "whole")
        assert [name for name, ability in found.abilities.items() if not ability.ok] == [
            "stairs",
            "shared_prefix",
            "ragged",
            "gaps",
            "padded_steps",
        ]
        assert "of the largest logit, allowed 1e-04" in found.abilities["stairs"].reason

    def test_an_rwkv_runs_in_full(self, rwkv: ps.Model) -> None:
        found = rwkv.capabilities
        assert found.route == "hooks" and found.readout_route == "whole"
        reasons = {name: ability.reason for name, ability in found.abilities.items() if not ability.ok}
        assert reasons.keys() == {
            "stairs",
            "whole",
            "decoding",
            "left_padding",
            "padded_steps",
            "writers",
            "shared_prefix",
            "ragged",
            "gaps",
        }
        assert reasons["decoding"] == "RefusedError: the model takes no cache"
        assert reasons["writers"] == "one or two module outputs do not add up to what blocks [0] add"
        assert reasons["stairs"] == reasons["whole"] == "RefusedError: the model takes no cache"
        assert "of the largest logit" in reasons["left_padding"]

    def test_and_says_the_same_as_full_passes(self, rwkv: ps.Model) -> None:
        """Padding is not exact on it, so prompts run by themselves; a patch is a hook on the whole prompt."""
        both = rwkv.run([TEXT, "q"])
        for row, text in enumerate((TEXT, "q")):
            assert error(both.logits[row][both.mask[row]], logits_of(rwkv.hf, text)[0]) < CLOSE
        readings = ps.Patchscope("{x} is", layer=1, max_new_tokens=1)(
            ps.Source(rwkv, TEXT, layer=2), controls=False, keep_logits=True
        )
        value = rwkv.run(TEXT, read=["resid.2"])["resid.2"][0, -1]
        want = rwkv.run("x is", edits=[ps.Edit("resid.1", "x", value)]).logits[0, -1]
        assert readings.logits is not None and error(readings.logits[0], want) < CLOSE

    def test_a_site_it_has_not(self, rwkv: ps.Model) -> None:
        with pytest.raises(SiteError, match=r"attn_out\.0 is not on this model.*resid\.\*\) can be read and written"):
            rwkv.run(TEXT, read=["attn_out.0"])
        assert rwkv.run(TEXT, read=["attn_out.1"])["attn_out.1"].shape == (1, len(TEXT) + 1, 32)

    @pytest.mark.parametrize("name", ["stairs", "decoding", "writers"])
    def test_require_refuses_with_the_reason(self, rwkv: ps.Model, name: str) -> None:
        with pytest.raises(RefusedError) as caught:
            rwkv.capabilities.require(name, "a sweep")
        for words in (
            "a sweep is refused on this model",
            MEANING[name],
            rwkv.capabilities.abilities[name].reason,
            "patchscopes check",
        ):
            assert words in str(caught.value)

    def test_a_model_without_the_ability_to_decode_residuals_refuses_to(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = ps.load((tiny("llama"), tiny_tokenizer()))
        lacking = remembered.Ability(False, 0.5, "off by a half")
        monkeypatch.setitem(model.capabilities.abilities, "unembed", lacking)
        with pytest.raises(RefusedError, match=r"decoding a residual is refused on this model.*off by a half"):
            model.unembed(torch.zeros(1, 64))


def test_tensors_of_a_saved_checkpoint_are_not_touched(folder: Path, tmp_path: Path) -> None:
    """Weights are mapped from the file into memory: a write into them would be a write into the user's checkpoint."""
    where = Path(shutil.copytree(folder, tmp_path / "copy"))
    before = (where / "model.safetensors").read_bytes()
    model = ps.load(where)
    model.run(TEXT, edits=[ps.Edit("resid.0", 0, torch.ones(64), "add")])
    assert (where / "model.safetensors").read_bytes() == before
    assert all(
        torch.equal(tensor, model.hf.state_dict()[name]) for name, tensor in load_file(where / "model.safetensors").items()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "family", ["gpt2", "llama", "gpt_neox", "gemma2", "mixtral", "granite", "cohere", "falcon", "opt", "olmo2", "gptj"]
)
def test_writers_are_found_in_sixteen_bits(family: str, dtype: torch.dtype) -> None:
    """By the same bits, since rounding there hides what a fit leaves out."""
    coarse, fine = (Engine(tiny(family, dtype=d)).anatomy for d in (dtype, torch.float32))
    assert [[(w.path, w.scale) for w in some] for some in coarse.writers] == [
        [(w.path, w.scale) for w in some] for some in fine.writers
    ]
    assert coarse.carries == fine.carries == [1.0] * len(fine.writers)
