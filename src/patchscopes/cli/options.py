"""Options that several commands take, and the loading of the model they name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from patchscopes.cli.terminal import waiting
from patchscopes.core.errors import UnknownName, nearest
from patchscopes.core.names import DTYPES

if TYPE_CHECKING:
    from patchscopes.model import Model

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
        return load(name, device=device, dtype=dtype)


def require_device(device: str) -> None:
    """InputError if torch knows no such kind of device, NotAvailableError if this machine has none."""
    from patchscopes.model.loading import require_device as require

    require(device)
