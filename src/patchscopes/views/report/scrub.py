"""What a report does not tell: where on a disk things lie, and secrets that got into a command, a name or an error."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

GONE = "(removed)"
TOKENS = re.compile(r"\b(?:hf_|sk-|ghp_|gho_|github_pat_|glpat-|xox[abp]-|AKIA|AIza)[\w-]{12,}|(?i:(?<=bearer ))[\w.~+/-]{8,}=*")
NAMED = re.compile(
    r"(?i)(?<![a-z])((?:(?:api|access|auth|hf)[_-]?)?(?:key|token|secret|password|passwd))\s*[=:]\s*[^\s&\"',]{6,}"
)
OPTION = re.compile(r"(?i)(--[\w-]*(?:key|token|secret|password|passwd))[=\s]+(?!-)\S+")
LOGIN = re.compile(r"(?<=://)[^/\s@]+:[^/\s@]+(?=@)")
NAME = r"[^\s'\"<>|,;:()\[\]{}\\/]+"
START = r"(?:file://)?(?:~\w*|[A-Za-z]:)?[/\\]"
WHOLE = re.compile(rf"{START}[^\n'\"]*[/\\][^\n'\"]*")  # a text that is a path, spaces and all
QUOTED = re.compile(rf"(['\"])({START}[^'\"\n]*[/\\][^'\"\n]*)\1")
BARE = re.compile(rf"(?<![\w/\\.]){START}{NAME}(?:[/\\]+{NAME})+[/\\]?")


def scrub(value: Any) -> Any:
    """A copy of a document, of whose texts only the last name of every path is left, and no secret that looks like one."""
    if isinstance(value, dict):
        return {scrub(key): scrub(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [scrub(item) for item in value]
    return _clean(value) if isinstance(value, str) else value


def _clean(text: str) -> str:
    home = str(Path.home())
    text = TOKENS.sub(GONE, LOGIN.sub(GONE, text))
    text = OPTION.sub(lambda match: f"{match[1]} {GONE}", text)
    text = NAMED.sub(lambda match: f"{match[1]}={GONE}", text)
    if WHOLE.fullmatch(text) and ": " not in text:
        return _last(text)
    text = QUOTED.sub(lambda match: match[1] + _last(match[2]) + match[1], text)
    text = BARE.sub(lambda match: _last(match[0]), text)
    return text.replace(home, "~") if len(home) > 1 else text


def _last(path: str) -> str:
    return next((part for part in reversed(re.split(r"[/\\]+", path)) if part), "/")
