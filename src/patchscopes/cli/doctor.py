"""`patchscopes doctor`: the machine. Works where nothing else does: it imports little, and broken packages are findings."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

from patchscopes import organisms
from patchscopes.cli.options import Json
from patchscopes.cli.terminal import amount, data, print_json, say_warning, waiting

NEEDED = ("patchscopes", "torch", "transformers", "tokenizers", "safetensors", "polars", "rich", "typer", "matplotlib")
OPTIONAL = {
    "peft": ("models with LoRA and other adapters", "pip install 'patchscopes[peft]'"),
    "accelerate": ("models spread over several devices (device_map)", "pip install 'patchscopes[peft]'"),
}
TRANSFORMERS = ((5, 15), (6, 0))  # from, up to but not with; as pyproject.toml has it


def doctor(json: Json = False) -> None:
    """Look over this machine: versions, devices, memory, caches.

    Also the bundled models, the free disk, and what is missing with the command that brings it.
    """
    with waiting("looking around"):
        found = look()
    if json:
        print_json(found)
    else:
        show(found)


def look() -> dict[str, Any]:
    """Everything that is found."""
    versions = {name: _version(name) for name in (*NEEDED, *OPTIONAL)}
    torch, torch_problem = _try_import("torch")
    hub, _ = _try_import("huggingface_hub.constants")
    cache = Path(hub.HF_HUB_CACHE) if hub else None
    missing = {name: {"for": what, "install": command} for name, (what, command) in OPTIONAL.items() if versions[name] is None}
    return {
        "python": {"version": platform.python_version(), "path": sys.executable},
        "platform": platform.platform(),
        "versions": versions,
        "devices": _devices(torch) if torch else [],
        "cpu": {"cores": _cores(), **_memory()},
        "hugging_face": {
            "cache": str(cache) if cache else None,
            "cache_bytes": _size(cache) if cache else None,
            "offline": bool(hub.HF_HUB_OFFLINE) if hub else None,
        },
        "disk_free_bytes": shutil.disk_usage(Path.cwd()).free,
        "bundled_models": {name: str(folder) for name, folder in organisms.bundled().items()},
        "missing": missing,
        "problems": _problems(versions, torch, torch_problem),
    }


def _problems(versions: dict[str, str | None], torch: Any, torch_problem: str | None) -> list[str]:
    problems = [f"{name} is not installed; pip install patchscopes brings it" for name in NEEDED if versions[name] is None]
    if versions["torch"] is not None and torch_problem:
        problems.append(f"torch {versions['torch']} cannot be imported ({torch_problem}); install it anew: https://pytorch.org")
    if versions["transformers"] is not None:
        low, high = TRANSFORMERS
        here = tuple(int(part) if part.isdigit() else 0 for part in versions["transformers"].split(".")[:2])
        if not low <= here < high:
            problems.append(
                f"transformers {versions['transformers']} is not of the versions that patchscopes is made for; "
                f"pip install 'transformers>={low[0]}.{low[1]},<{high[0]}'"
            )
    if torch and not torch.cuda.is_available() and shutil.which("nvidia-smi"):
        problems.append(
            f"an NVIDIA driver is here, but torch {versions['torch']} sees no GPU; install torch for CUDA: https://pytorch.org"
        )
    if not organisms.bundled():
        problems.append("no bundled model is in this installation; train it with: patchscopes organism train atlas --out atlas")
    return problems


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # a finding
        return None


def _try_import(name: str) -> tuple[Any, str | None]:
    """(module, None), or (None, why not)."""
    try:
        return importlib.import_module(name), None
    except Exception as e:  # a broken installation raises anything (OSError for a missing library, …): a finding
        return None, f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else 'no message'}"


def _devices(torch: Any) -> list[dict[str, Any]]:
    """Accelerators, each with its memory where that is known."""
    found = []
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        found.append({"device": f"cuda:{i}", "name": torch.cuda.get_device_name(i), "memory_bytes": total, "free_bytes": free})
    if torch.backends.mps.is_available():
        found.append({"device": "mps", "name": platform.processor(), "memory_bytes": None, "free_bytes": None})
    return found


def _cores() -> int | None:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _memory() -> dict[str, int | None]:
    """RAM in bytes, and how much of it is available; None where the system does not say."""
    total = None
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines()) if meminfo.exists() else {}
    available = int(lines["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in lines else None
    return {"memory_bytes": total, "available_bytes": available}


def _size(folder: Path) -> int:
    """Bytes of the files in a folder, links not followed."""
    return sum(
        os.lstat(os.path.join(where, name)).st_size
        for where, _, names in os.walk(folder)
        for name in names
        if not os.path.islink(os.path.join(where, name))
    )


def show(found: dict[str, Any]) -> None:
    """The findings for a terminal; problems on stderr."""
    from rich.table import Table
    from rich.text import Text

    cpu, hub = found["cpu"], found["hugging_face"]
    memory = f"{amount(cpu['memory_bytes'])} RAM" if cpu["memory_bytes"] else "RAM unknown"
    if cpu["available_bytes"]:
        memory += f", {amount(cpu['available_bytes'])} available"
    lines = [
        ("python", f"{found['python']['version']}  {found['python']['path']}"),
        ("platform", found["platform"]),
        *((name, version or "not installed") for name, version in found["versions"].items() if name not in found["missing"]),
        ("cpu", f"{cpu['cores']} cores, {memory}"),
        *(
            (
                d["device"],
                d["name"] + (f", {amount(d['free_bytes'])} of {amount(d['memory_bytes'])} free" if d["memory_bytes"] else ""),
            )
            for d in found["devices"]
        ),
        *([("gpu", "none")] if not found["devices"] else []),
        ("disk", f"{amount(found['disk_free_bytes'])} free here"),
        ("model cache", f"{hub['cache']}, {amount(hub['cache_bytes'])}" if hub["cache"] else "unknown"),
        (
            "offline",
            {
                True: "yes (HF_HUB_OFFLINE): nothing is downloaded",
                False: "no: models are downloaded when asked for",
                None: "unknown",
            }[hub["offline"]],
        ),
        ("bundled models", ", ".join(found["bundled_models"]) or "none"),
        *((name, f"not installed; for {m['for']}: {m['install']}") for name, m in found["missing"].items()),
    ]
    table = Table.grid(padding=(0, 2))
    for name, value in lines:
        table.add_row(Text(name, style="bold"), Text(value, overflow="fold"))
    data().print(table, soft_wrap=True)
    for problem in found["problems"]:
        say_warning(problem)
