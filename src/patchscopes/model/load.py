"""Load a model: bundled, from a local folder, from the Hugging Face hub or its cache, an adapter on its base, or what you have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from patchscopes import organisms
from patchscopes.core.errors import InputError, NotAvailableError, RefusedError, nearest
from patchscopes.model.model import Model


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
                  loaded below it), or (hf_model, tokenizer)
    dtype         None: float32 on a CPU, as the checkpoint says elsewhere; or "auto", "bfloat16", torch.float16, …
    device        None: a GPU if there is one. Not together with device_map, which is transformers' own, as is `quantization`
                  (a quantization_config) and `attention` (attn_implementation)

    NotAvailableError if there is no such model or tokenizer; RefusedError if it is no decoder.
    """
    if isinstance(model, tuple):
        hf, tokenizer = model
        if device is not None:
            hf = hf.to(device)
        return Model(hf, tokenizer, name=getattr(hf.config, "_name_or_path", "") or type(hf).__name__)
    name, bundled = str(model), organisms.bundled()
    folder = bundled.get(name, Path(name))
    local = name in bundled or folder.exists() or name.startswith((".", "/", "~"))
    if local:
        _require_model_files(folder, name)
    where = str(folder) if local else name
    target = device if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    if device is not None and device_map is not None:
        raise InputError(f"device={str(device)!r} and device_map={device_map!r} were both given; expected one of them")
    if dtype is None:
        dtype = torch.float32 if str(target).startswith("cpu") and device_map is None else "auto"
    hub: dict[str, Any] = {} if local else {"revision": revision}
    options = {
        "dtype": dtype,
        "device_map": device_map,
        "quantization_config": quantization,
        "attn_implementation": attention,
        "trust_remote_code": trust_remote_code,
    }
    options = {key: value for key, value in options.items() if value is not None}
    base, adapter = _adapter_base(folder) if local else (None, None)
    hf = _load_weights(base or where, name, {**options, **({} if base else hub)})
    if adapter is not None:
        hf = _with_adapter(hf, adapter)
    if device_map is None and quantization is None:
        hf = hf.to(target)
    tokenizer = _load_tokenizer(where, base, name, {**hub, "trust_remote_code": trust_remote_code})
    hf.eval().requires_grad_(False)
    return Model(hf, tokenizer, name=name, revision=getattr(hf.config, "_commit_hash", None) or revision)


def _require_model_files(folder: Path, name: str) -> None:
    if not folder.is_dir():
        raise NotAvailableError(
            f"no model at {name!r}: no such folder. Expected a folder with config.json and weights, a Hugging Face id, or {_bundled()}"
        )
    if not (folder / "config.json").exists() and not (folder / "adapter_config.json").exists():
        files = ", ".join(sorted(f.name for f in folder.iterdir())[:8]) or "nothing"
        raise NotAvailableError(
            f"no model in {name!r}: found {files}; expected config.json and weights in Hugging Face format (or adapter_config.json)"
        )


def _bundled() -> str:
    return "a bundled model: " + (", ".join(organisms.bundled()) or "none in this installation")


def _adapter_base(folder: Path) -> tuple[str | None, Path | None]:
    """(base model, folder of the adapter) if `folder` holds a PEFT adapter."""
    path = folder / "adapter_config.json"
    if not path.exists():
        return None, None
    base = json.loads(path.read_text()).get("base_model_name_or_path")
    if not base:
        raise NotAvailableError(
            f"the adapter {folder} does not name its base model (base_model_name_or_path in adapter_config.json)"
        )
    return str(organisms.bundled().get(base, base)), folder


def _load_weights(where: str, name: str, options: dict[str, Any]) -> Any:
    hub = {key: options[key] for key in ("revision", "trust_remote_code") if key in options}
    try:
        config = AutoConfig.from_pretrained(where, **hub)
        if type(config) not in AutoModelForCausalLM._model_mapping and not hasattr(config, "auto_map"):
            raise RefusedError(
                f"{name} has no decoder stack: its config is a {type(config).__name__} ({config.model_type}), which transformers knows no "
                "causal language model for (an encoder or a vision model?). patchscopes reads decoders."
            )
        return AutoModelForCausalLM.from_pretrained(where, **options)
    except OSError as e:
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise NotAvailableError(
            f"no model {name!r}: {reason} Expected a folder, a Hugging Face id that is cached or can be downloaded, or {_bundled()}. "
            + (nearest(name, organisms.bundled()) if organisms.bundled() else "")
        ) from e
    except (ValueError, ImportError) as e:
        raise NotAvailableError(f"the model {name!r} could not be loaded: {e}") from e


def _with_adapter(hf: Any, folder: Path) -> Any:
    try:
        from peft import PeftModel
    except ImportError as e:
        raise NotAvailableError("an adapter needs the package peft; install it with: pip install 'patchscopes[peft]'") from e
    return PeftModel.from_pretrained(hf, str(folder)).get_base_model()


def _load_tokenizer(where: str, base: str | None, name: str, options: dict[str, Any]) -> Any:
    reasons = []
    for place in dict.fromkeys(p for p in (where, base) if p):
        try:
            return AutoTokenizer.from_pretrained(place, **(options if place == where else {}))
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            ImportError,
        ) as e:  # whatever a missing file makes transformers raise
            reasons.append(str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__)
    raise NotAvailableError(
        f"no tokenizer for {name!r}: {'; '.join(reasons)}. Expected tokenizer.json beside the weights; or give load((hf_model, tokenizer))."
    )


transformers.utils.logging.disable_progress_bar()
