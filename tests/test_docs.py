"""Every example of the README and the documentation runs as written."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def write_files(page: Path, folder: Path) -> None:
    """Blocks with a name behind their language (```toml capitals.toml) are files that the page's examples find."""
    for name, text in re.findall(r"^```\w+ (\S+)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        (folder / name).write_text(text, encoding="utf-8")


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_python_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_files(page, tmp_path)
    namespace: dict = {}
    for code in blocks(page, "python"):
        exec(compile(code, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "console")], ids=lambda p: p.name)
def test_commands_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from patchscopes.cli import main

    monkeypatch.chdir(tmp_path)
    write_files(page, tmp_path)
    for line in filter(None, "\n".join(blocks(page, "console")).splitlines()):
        assert line.startswith("$ patchscopes "), f"{page.name}: a console block shows commands only, not {line!r}"
        monkeypatch.setattr("sys.argv", shlex.split(line.removeprefix("$ ")))
        try:
            main()
        except SystemExit as stop:
            assert stop.code in (0, None), f"{line} ended with {stop.code}: {capsys.readouterr().err}"


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if not link.startswith("http"):
                assert (page.parent / link).exists(), f"{page.name} links to {link}, which is not there"
