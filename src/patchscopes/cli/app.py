"""The commands put together, and what becomes of errors.

Exit codes: 0 done, 1 internal error, 2 wrong usage or input, 3 partly done, 4 model or data not available, 5 out of resources,
6 refused, 130 stopped by Ctrl-C, 143 by SIGTERM.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from patchscopes.cli import (
    bench,
    check,
    config,
    demo,
    doctor,
    evaluate,
    inspect,
    organism,
    report,
    reproduce,
    run_shard,
    runs,
    sweep,
    terminal,
    tokens,
)
from patchscopes.core.errors import PatchscopesError, ResourceError

app = typer.Typer(
    name="patchscopes",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
)
app.command()(inspect.inspect)
app.command()(tokens.tokens)
app.command()(check.check)
app.command()(doctor.doctor)
app.command()(bench.bench)
app.command()(demo.demo)
for command in (
    sweep.sweep,
    sweep.resume,
    sweep.retry,
    run_shard.run_shard,
    runs.runs,
    runs.show,
    runs.watch,
    runs.logs,
    runs.diff,
    runs.export,
    reproduce.reproduce,
    report.report,
    report.figure,
    evaluate.evaluate,
):
    app.command()(command)
app.command()(config.schema)
app.add_typer(config.app)
app.add_typer(organism.app)


def _version(wanted: bool) -> None:
    if wanted:
        import importlib.metadata  # slow enough to be felt in --help

        print(importlib.metadata.version("patchscopes"))
        raise typer.Exit


@app.callback()
def _everywhere(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; may also stand after the command.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Turn hidden states of language models into words, and see whether the words can be believed."""


def main() -> NoReturn:
    """What the command `patchscopes` runs."""
    # before torch is loaded: on a busy machine threads that spin while they wait make small models many times slower
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    signal.signal(signal.SIGTERM, _stop)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # an ASCII terminal must not end a run
    sys.exit(run(sys.argv[1:]))


def run(args: Sequence[str]) -> int:
    """Run a command line, without the program's name; its exit code. Errors are told on stderr."""
    own = args[: args.index("--")] if "--" in args else args
    debug = "--debug" in own
    args = [*(a for a in own if a != "--debug"), *args[len(own) :]]
    try:
        app(args, prog_name="patchscopes")
    except SystemExit as e:  # how typer ends, usage errors (2) and Ctrl-C (130) included
        if e.code == 130:
            terminal.say("stopped")
        return e.code if isinstance(e.code, int) else 1
    except Exception as e:  # the last resort: whatever it is, it becomes a message and an exit code
        if debug:
            traceback.print_exception(e)
        code, message = explained(e)
        terminal.say_error(message)
        return code
    return 0


def explained(error: Exception) -> tuple[int, str]:
    """The exit code of an error, and what to tell."""
    if isinstance(error, PatchscopesError):
        return error.exit_code, str(error)
    if _out_of_memory(error):
        return ResourceError.exit_code, (
            f"out of memory: {_first_line(error)}. Fewer layers (--layers), a shorter prompt, --no-controls, --dtype bfloat16 or "
            "another --device need less."
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError.exit_code, f"the disk is full: {_first_line(error)}"
    what = f"{type(error).__name__}: {_first_line(error)}".rstrip(": ")
    return 1, f"{what}. This is a bug in patchscopes; run the command again with --debug and report what it prints."


def _out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")  # if nothing has imported it, it has raised nothing
    on_gpu = torch is not None and isinstance(error, torch.OutOfMemoryError)
    on_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return isinstance(error, MemoryError) or on_gpu or on_cpu


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else ""


def _stop(_signal: int, _frame: object) -> NoReturn:
    raise SystemExit(143)
