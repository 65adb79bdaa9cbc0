"""Contestants that are other libraries: each a process in an environment of its own, asked line by line.

The process loads the model once and then takes its turns, so that repetitions of all contestants interleave; it measures its own
seconds. A library that is not installed, does not load or does not answer is a finding, told in the report, and not an error.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from patchscopes.bench.models import Subject
from patchscopes.bench.work import Answer, Work

PEERS = {"nnsight": "nnsight", "transformer_lens": "transformer-lens", "interp_engine": "interp-engine"}  # name -> package
PROGRAMS = Path(__file__).parent / "peers"
ENVIRONMENT = Path(".venv-peers")  # what `make bench-peers` makes
PATIENCE = 1200  # seconds for one answer
LOOK = "import importlib.metadata as m, sys; print(m.version(sys.argv[1]))"


class PeerError(Exception):
    """A peer that is not there, or that failed; the message says which."""


def find_python(package: str, given: Path | None) -> Path:
    """A Python that has `package`: the given one, else `.venv-peers`, else this one. PeerError if none has."""
    places = [given] if given is not None else [ENVIRONMENT / "bin" / "python", Path(sys.executable)]
    for python in places:
        if python.exists() and subprocess.run([python, "-c", LOOK, package], capture_output=True).returncode == 0:
            return python
    raise PeerError(f"not installed in {' or '.join(map(str, places))}; make bench-peers installs it")


class Peer:
    """A library in its own process. `folder`: the model, saved; `python`: of the environment."""

    comparable, sampled = True, False

    def __init__(self, name: str, subject: Subject, folder: Path, python: Path, *, program: Path | None = None):
        self.name, self.subject = name, subject
        self._exchange = tempfile.TemporaryDirectory(prefix="patchscopes-bench-")
        self._talk = Path(self._exchange.name, "stderr")
        with self._talk.open("w") as stderr:
            self._process = subprocess.Popen(
                [python, program or PROGRAMS / f"with_{name}.py"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                bufsize=1,
                env=_environment(torch.get_num_threads()),
            )
        try:
            loaded = self._ask(
                do="load",
                model=str(folder),
                blocks=subject.engine.anatomy.blocks_path,
                device=str(subject.device),
                threads=torch.get_num_threads(),
            )
        except PeerError:
            self.close()
            raise
        self.versions: dict[str, str] = loaded["versions"]
        self._variants: dict[str, list[str]] = loaded["variants"]

    def variants(self, tokens: int) -> list[str]:
        """Its ways of writing the grid."""
        return self._variants["1" if tokens == 1 else "many"]

    def run(self, work: Work, variant: str) -> tuple[Answer, float]:
        """The answer, and seconds measured in the process. PeerError if it failed."""
        out = Path(self._exchange.name, "answer.safetensors")
        seconds = self._ask(do="run", work=self._written(work), variant=variant, out=str(out))["seconds"]
        found = load_file(out)
        said = [work.cut(row) for row in found["said"].tolist()]
        return Answer(list(range(len(work.layers))), found["logits"], said), seconds

    def flops(self, work: Work, variant: str) -> int | None:
        """As torch's counter sees them in the process; None if it could not be counted."""
        try:
            return self._ask(do="flops", work=self._written(work), variant=variant)["flops"]
        except PeerError:  # attention that cannot be switched, say: the times stand without
            return None

    def close(self) -> None:
        """End the process."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        self._exchange.cleanup()

    def _written(self, work: Work) -> str:
        path = str(Path(self._exchange.name, "work.safetensors"))
        save_file(
            {
                "target": work.target.cpu().contiguous(),
                "vectors": work.vectors.cpu().contiguous(),
                "layers": torch.tensor(work.layers),
                "position": torch.tensor(work.position),
                "tokens": torch.tensor(work.tokens),
            },
            path,
        )
        return path

    def _ask(self, **asked: Any) -> dict[str, Any]:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(asked) + "\n")
            process.stdin.flush()
        except BrokenPipeError:  # it has ended; what it said last is in the message below
            pass
        ready, _, _ = select.select([process.stdout], [], [], PATIENCE)
        line = process.stdout.readline() if ready else ""
        if not line:
            why = "ended" if ready else f"gave no answer in {PATIENCE} s"
            raise PeerError(f"its process {why}: {self._last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def _last_words(self) -> str:
        lines = self._talk.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"


def _environment(threads: int) -> dict[str, str]:
    """As many threads as here, nothing from a network, and this project's path not handed on."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    return {**kept, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
