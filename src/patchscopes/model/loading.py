"""Load a model: bundled, from a local folder, from the Hugging Face hub or its cache, an adapter on its base, or what you have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.utils.hub import cached_file

from patchscopes import organisms
from patchscopes.core.errors import InputError, NotAvailableError, RefusedError, nearest
from patchscopes.engine.refuse import refuse_unreadable, uncompiled
from patchscopes.model.files import bundled_names, place_of
from patchscopes.model.model import Model
from patchscopes.model.outline import Outline
from patchscopes.organisms.lora import merge


def load(
    model: str | Path | tuple[torch.nn.Module, Any],
    *,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    device_map: str | dict | None = None,
    quantization: Any = None,
    attention: str | None = None,
    trust_remote_code: bool = False,
) -> Model:
    """A model ready for reading and patching, its abilities measured (`model.capabilities`).

    model         the name of a bundled model ("atlas"), a folder, a Hugging Face id, the folder or id of a PEFT adapter (its base is
                  loaded below it), or (hf_model, tokenizer), which is put into evaluation mode; of torch.compile(hf_model) the
                  hf_model is used, which hooks work on
    dtype         None: float32 on a CPU, as the checkpoint says elsewhere; or "auto", "bfloat16", torch.float16, …
    device        None: a GPU if there is one. Not together with device_map, which is transformers' own, as is `quantization`
                  (a quantization_config) and `attention` (attn_implementation)

    NotAvailableError if there is no such model or tokenizer; RefusedError if it is no decoder, or one that
    hooks cannot see into or one process cannot run: compiled in place, with kernels swapped in, sharded, without numbers.
    """
    if device is not None:
        require_device(device)
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise InputError(
            f"unknown dtype {dtype!r}; expected 'auto', 'float32', 'bfloat16', 'float16', 'float64' or a torch.dtype"
        )
    if isinstance(model, tuple):
        given = {
            "dtype": dtype,
            "device_map": device_map,
            "quantization": quantization,
            "attention": attention,
            "revision": revision,
        }
        if asked := [name for name, value in given.items() if value is not None]:
            raise InputError(
                f"{', '.join(asked)} cannot be chosen for a model that is already loaded; load it so, or give its name or folder"
            )
        hf, tokenizer = model
        hf = uncompiled(hf)
        unwrapped: Any = getattr(hf, "get_base_model", lambda: hf)()  # peft's wrapper comes off; the adapter stays in the layers
        unwrapped = uncompiled(unwrapped)
        refuse_unreadable(unwrapped)
        if device is not None:
            unwrapped.to(device)
        return Model(unwrapped, tokenizer, name=getattr(unwrapped.config, "_name_or_path", "") or type(unwrapped).__name__)
    loaded = {
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "device": None if device is None else str(device),
        "device_map": device_map,
        "quantization": quantization,
        "attention": attention,
        "trust_remote_code": trust_remote_code,
    }
    name = str(model)
    where, hub = place_of(name, revision)
    local = not hub
    target = device if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    if device is not None and device_map is not None:
        raise InputError(f"device={str(device)!r} and device_map={device_map!r} were both given; expected one of them")
    if dtype is None:
        dtype = torch.float32 if str(target).startswith("cpu") and device_map is None else "auto"
    options = {
        "dtype": dtype,
        "device_map": device_map,
        "quantization_config": quantization,
        "attn_implementation": attention,
        "trust_remote_code": trust_remote_code,
    }
    options = {key: value for key, value in options.items() if value is not None}
    base = _adapter_base(where, hub)
    hf = _load_weights(base or where, name, {**options, **({} if base else hub)})
    if base is not None and name in organisms.bundled() and quantization is None:
        merge(hf, Path(where))  # ours: needs no peft
    elif base is not None:
        hf = _with_adapter(hf, where, base, hub)
    if device_map is None and quantization is None:
        hf = hf.to(target)
    tokenizer = _load_tokenizer(where, base, name, {**hub, "trust_remote_code": trust_remote_code})
    hf.eval().requires_grad_(False)
    commit = None if local else _commit(where, base is not None, hub) or revision
    return Model(hf, tokenizer, name=name, revision=commit, loaded=loaded)


def outline(name: str, *, revision: str | None = None, dtype: str = "auto", trust_remote_code: bool = False) -> Outline:
    """The model without its weights, for planning: config and tokenizer only. Errors as for `load`."""
    where, hub = place_of(name, revision)
    base = _adapter_base(where, hub)
    try:
        config = AutoConfig.from_pretrained(base or where, **({} if base else hub), trust_remote_code=trust_remote_code)
        wanted = getattr(config, "dtype", None) if dtype == "auto" else getattr(torch, dtype)
        with torch.device("meta"):
            auto: Any = _auto_class(config)
            hf = auto.from_config(config, dtype=wanted or torch.float32, trust_remote_code=trust_remote_code).eval()
    except (OSError, ValueError) as e:
        raise NotAvailableError(
            f"no model {name!r}: {_first_line(e)} Expected a folder, a Hugging Face id, or {bundled_names()}"
        ) from e
    tokenizer = _load_tokenizer(where, base, name, {**hub, "trust_remote_code": trust_remote_code})
    return Outline(hf, tokenizer, name=name, revision=revision)


def require_device(device: str | torch.device) -> None:
    """InputError if torch knows no such kind of device, NotAvailableError if this machine has none."""
    try:
        wanted = torch.device(device)
    except RuntimeError:  # torch's message lists thirty kinds, most of them for its authors
        raise InputError(f"unknown device {device!r}; expected cpu, cuda, cuda:0, mps, …") from None
    if wanted.type == "cpu":
        return
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    count = torch.accelerator.device_count() if here is not None else 0
    if here is None or here.type != wanted.type or (wanted.index or 0) >= count:
        found = "cpu" if here is None else ", ".join(["cpu", *(f"{here.type}:{i}" for i in range(count))])
        raise NotAvailableError(f"no device {str(device)!r} here; found {found}. See `patchscopes doctor`.")


def _file(where: str, file: str, hub: dict[str, Any]) -> Path | None:
    """A file of a folder or of a repository of the hub, from the cache if it is there; None if there is none."""
    try:
        found = cached_file(where, file, **hub, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError):  # no such repository, or no way to it: loading the weights says so
        return None
    return None if found is None else Path(found)


def _commit(where: str, adapter: bool, hub: dict[str, Any]) -> str | None:
    """The commit that a revision of a repository stands for: its files lie in snapshots/COMMIT of the cache."""
    file = _file(where, "adapter_config.json" if adapter else "config.json", hub)
    return file.parent.name if file is not None and file.parent.parent.name == "snapshots" else None


def _adapter_base(where: str, hub: dict[str, Any]) -> str | None:
    """The base model of a PEFT adapter; None if `where` holds none."""
    file = _file(where, "adapter_config.json", hub)
    if file is None:
        return None
    base = json.loads(file.read_text()).get("base_model_name_or_path")
    if not base:
        raise NotAvailableError(
            f"the adapter {where} does not name its base model (base_model_name_or_path in adapter_config.json)"
        )
    return str(organisms.bundled().get(base, base))


def _load_weights(where: str, name: str, options: dict[str, Any]) -> Any:
    hub = {key: options[key] for key in ("revision", "trust_remote_code") if key in options}
    try:
        config = AutoConfig.from_pretrained(where, **hub)
        auto = _auto_class(config)
        if type(config) not in auto._model_mapping and not hasattr(config, "auto_map"):
            raise RefusedError(
                f"{name} has no decoder stack: its config is a {type(config).__name__} ({config.model_type}), which transformers knows no "
                "causal language model for (an encoder or a vision model?). patchscopes reads decoders."
            )
        loaded: Any = auto.from_pretrained(where, **options, output_loading_info=True)
        hf, report = loaded
        if missing := sorted(report["missing_keys"]):
            some = ", ".join(missing[:3])
            raise NotAvailableError(
                f"the weights of {name!r} are incomplete: {len(missing)} tensors are missing ({some}, …) and would be random"
            )
        return hf
    except OSError as e:
        reason = _first_line(e)
        raise NotAvailableError(
            f"no model {name!r}: {reason} Expected a folder, a Hugging Face id that is cached or can be downloaded, or {bundled_names()}. "
            + (nearest(name, organisms.bundled()) if organisms.bundled() else "")
        ) from e
    except (ValueError, ImportError, SafetensorError) as e:
        raise NotAvailableError(f"the model {name!r} could not be loaded: {' '.join(str(e).split())}") from e


def _auto_class(config: Any) -> Any:
    """How transformers loads the language model of such a config, with its encoder or its vision model where it has one."""
    if getattr(config, "is_encoder_decoder", False) and type(config) in AutoModelForSeq2SeqLM._model_mapping:
        return AutoModelForSeq2SeqLM
    if "vision_config" in getattr(config, "sub_configs", {}) and type(config) in AutoModelForImageTextToText._model_mapping:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def _with_adapter(hf: Any, adapter: str, base: str, hub: dict[str, Any]) -> Any:
    try:
        from peft import PeftModel
    except ImportError as e:
        raise NotAvailableError("an adapter needs the package peft; install it with: pip install 'patchscopes[peft]'") from e
    try:
        return PeftModel.from_pretrained(hf, adapter, **hub).get_base_model()
    except (OSError, ValueError, RuntimeError, SafetensorError) as e:  # weights missing, broken, or of other widths
        raise NotAvailableError(f"the adapter {adapter} could not be put onto its base {base}: {_first_line(e)}") from e


def _load_tokenizer(where: str, base: str | None, name: str, options: dict[str, Any]) -> Any:
    reasons = []
    for place in dict.fromkeys(p for p in (where, base) if p):
        try:
            trust = {"trust_remote_code": options["trust_remote_code"]}
            return AutoTokenizer.from_pretrained(place, **(options if place == where else trust))
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            ImportError,
        ) as e:  # whatever a missing file makes transformers raise
            reasons.append(_first_line(e))
    raise NotAvailableError(
        f"no tokenizer for {name!r}: {'; '.join(reasons)}. Expected tokenizer.json beside the weights; or give load((hf_model, tokenizer))."
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


transformers.utils.logging.disable_progress_bar()
