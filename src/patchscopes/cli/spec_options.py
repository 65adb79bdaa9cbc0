"""The keys of an experiment as options of a command, and the experiment that a command line asks for.

    @app.command()
    @with_experiment_options
    def sweep(file: Annotated[Path | None, typer.Argument()] = None, **flags: Any) -> None:
        experiment = experiment_from(file, **flags)

The command gets the options of `flags.FLAGS` beside its own; those that were not given are None. Nothing heavy is imported before
`experiment_from` is called.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchscopes.cli.flags import FLAGS, Flag
from patchscopes.cli.settings import gather

if TYPE_CHECKING:
    from patchscopes.experiment.spec import Experiment


def experiment_from(file: Path | None, **flags: Any) -> Experiment:
    """What was asked for by configuration, experiment file, environment and flags together (see `settings`). InputError says what is
    wrong, and where it was said."""
    from patchscopes.experiment.spec import Experiment

    found = gather(file, flags)
    return Experiment.said(found.filled(), found.origin)


def with_experiment_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command, whose `**flags` become options."""
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.kind is not p.VAR_KEYWORD]

    @functools.wraps(command)
    def call(**given: Any) -> None:
        command(**given)

    parameters = [*(p.replace(kind=p.KEYWORD_ONLY) for p in own), *map(_parameter, FLAGS)]
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    return call


def _parameter(flag: Flag) -> inspect.Parameter:
    metavar = "<str>" if flag.repeats else None  # typer would say <list[str]>
    option = typer.Option(*flag.declared, help=flag.help, show_default=False, metavar=metavar)
    return inspect.Parameter(
        flag.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[flag.kind | None, option]
    )
