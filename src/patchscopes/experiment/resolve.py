"""A spec as it is recorded: prompts inline, and vectors, maps and edits as files of the run folder, so that the folder alone says what
was asked, on any machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from patchscopes.core.files import content_hash, make_folder, write_whole
from patchscopes.experiment.documents import each_path
from patchscopes.experiment.lens_folder import lens_files
from patchscopes.experiment.prompts import read_prompts
from patchscopes.experiment.spec import Experiment
from patchscopes.experiment.spec_tables import PromptFile

INPUTS = "inputs"


def resolved(experiment: Experiment) -> Experiment:
    """The experiment with the prompts of its files inline. InputError if they cannot be read."""
    document = experiment.document()
    if not experiment.parts:
        return Experiment.said(_inline(document, experiment), experiment.name)
    parts = [_inline(part, whole) for part, whole in zip(document["parts"], experiment.split(), strict=True)]
    return Experiment.said({**document, "prompts": None, "parts": parts}, experiment.name)


def _inline(document: dict[str, Any], whole: Experiment) -> dict[str, Any]:
    if not isinstance(whole.prompts, PromptFile):
        return {**document, "prompts": whole.document()["prompts"]}
    prompts = [
        {"text": one.text, "ids": one.ids, "at": one.at, "chat": one.chat, "labels": dict(one.labels)}
        for one in read_prompts(whole)
    ]
    return {**document, "prompts": prompts}


def with_inputs(experiment: Experiment, folder: Path) -> dict[str, Any]:
    """The document of a resolved experiment whose files have been copied into `folder`/inputs; paths in it are seen from `folder`."""

    def copied(path: str, _table: dict[str, Any]) -> str:
        if Path(path).is_dir():
            return _copied_folder(Path(path), folder)
        bytes_ = Path(path).read_bytes()
        target = make_folder(folder / INPUTS) / f"{Path(path).stem}-{content_hash(bytes_)}{Path(path).suffix}"
        if not target.exists():
            write_whole(target, bytes_)
        return f"{INPUTS}/{target.name}"

    return each_path(experiment.document(), copied)


def _copied_folder(source: Path, folder: Path) -> str:
    """A tuned lens in a folder: its files, and the name that the digest of all of them gives."""
    files = {file.name: file.read_bytes() for file in lens_files(source)}
    target = folder / INPUTS / f"{source.name}-{content_hash(b''.join(files.values()))}"
    make_folder(target)
    for name, bytes_ in files.items():
        if not (target / name).exists():
            write_whole(target / name, bytes_)
    return f"{INPUTS}/{target.name}"
