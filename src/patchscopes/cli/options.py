"""Options that several commands take, and the loading of the model they name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from patchscopes.cli.terminal import waiting
from patchscopes.core.errors import InputError, NotAvailableError, UnknownName, nearest

if TYPE_CHECKING:
    from patchscopes.model import Model

DTYPES = ("auto", "float32", "float64", "bfloat16", "float16")

ModelName = Annotated[str, typer.Option("--model", "-m", help="A bundled model, a folder, or a Hugging Face id.")]
Device = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1, mps. Default: a GPU if there is one.", show_default=False)
]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", help=f"{', '.join(DTYPES)}. Default: float32 on a CPU, else the checkpoint's.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead.")]


def load_model(name: str, device: str | None = None, dtype: str | None = None) -> Model:
    """The model, loaded without a word from the libraries below."""
    if dtype is not None and dtype not in DTYPES:
        raise UnknownName(f"unknown dtype {dtype!r}. {nearest(dtype, DTYPES)}")
    with waiting(f"loading {name}"):
        import transformers

        from patchscopes.model import load

        transformers.utils.logging.set_verbosity_error()
        if device is not None:
            require_device(device)
        return load(name, device=device, dtype=dtype)


def require_device(device: str) -> None:
    """InputError if torch knows no such kind of device, NotAvailableError if this machine has none."""
    import torch

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
        raise NotAvailableError(f"no device {device!r} here; found {found}. See `patchscopes doctor`.")
