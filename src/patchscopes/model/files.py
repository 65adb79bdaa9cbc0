"""Where a model's files are, and a hash of them. Nothing is loaded, torch neither."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from patchscopes import organisms
from patchscopes.core.errors import NotAvailableError

HASHED = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja")  # files that a model is made of
SAMPLED = 2**30  # bytes of a file above which only samples of it are hashed
SAMPLES, SAMPLE = 1024, 2**14  # how many, and their bytes


def place_of(name: str, revision: str | None = None) -> tuple[str, dict[str, Any]]:
    """Where a model's files are: (folder, {}), or (repository, {"revision": …}) on the hub. NotAvailableError if a folder has none."""
    bundled = organisms.bundled()
    folder = bundled.get(name, Path(name).expanduser())
    if name in bundled or folder.exists() or name.startswith((".", "/", "~")):
        _require_model_files(folder, name)
        return str(folder), {}
    return name, {"revision": revision}


def fingerprint(name: str, revision: str | None = None) -> str:
    """A hash of a model's files, without loading them: settings, tokenizer, and of the weights all bytes, or, above a gigabyte, the
    headers and samples of every tensor. NotAvailableError if they are not here."""
    digest = hashlib.blake2b(digest_size=8)
    folder = _folder_of(name, revision)
    while folder is not None:
        for path in sorted(p for p in folder.iterdir() if p.suffix in HASHED):
            digest.update(path.name.encode())
            digest.update(_sample(path))
        adapter = folder / "adapter_config.json"
        base = json.loads(adapter.read_text()).get("base_model_name_or_path") if adapter.exists() else None
        folder = _folder_of(base, None) if base else None
    return digest.hexdigest()


def _folder_of(name: str, revision: str | None) -> Path:
    where, hub = place_of(name, revision)
    if not hub:
        return Path(where)
    from huggingface_hub import try_to_load_from_cache

    for marker in ("config.json", "adapter_config.json"):
        found = try_to_load_from_cache(name, marker, revision=revision)
        if isinstance(found, str):
            return Path(found).parent
    raise NotAvailableError(
        f"no files of the model {name!r} here; expected its folder, or its repository in the cache of the hub"
    )


def _sample(path: Path) -> bytes:
    """A file's bytes, or of a big one its size, its beginning (where safetensors keep their header), its end, and pieces between."""
    size = path.stat().st_size
    if size <= SAMPLED:
        return path.read_bytes()
    parts = [str(size).encode()]
    with path.open("rb") as file:
        for k in range(SAMPLES):
            file.seek((size - SAMPLE) * k // (SAMPLES - 1))
            parts.append(file.read(SAMPLE))
    return b"".join(parts)


def _require_model_files(folder: Path, name: str) -> None:
    if not folder.is_dir():
        raise NotAvailableError(
            f"no model at {name!r}: no such folder. Expected a folder with config.json and weights, a Hugging Face id, or {bundled_names()}"
        )
    if not (folder / "config.json").exists() and not (folder / "adapter_config.json").exists():
        files = ", ".join(sorted(f.name for f in folder.iterdir())[:8]) or "nothing"
        raise NotAvailableError(
            f"no model in {name!r}: found {files}; expected config.json and weights in Hugging Face format (or adapter_config.json)"
        )


def bundled_names() -> str:
    """What to say of the models that come with the package."""
    return "a bundled model: " + (", ".join(organisms.bundled()) or "none in this installation")
