"""The command line: `patchscopes COMMAND …`, one module a command.

stdout is data, stderr is talk. Torch and what needs it are imported inside the commands, so that --help answers at once.
"""

from patchscopes.cli.app import main

__all__ = ["main"]
