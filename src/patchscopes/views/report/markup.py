"""HTML that is safe by how it is made: text is escaped, unless it was made here."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from patchscopes.model.tokens import visible

EMPTY = ("br", "rect", "col", "meta")


class Markup(str):
    """Text that is HTML already."""


def el(tag: str, *children: object, **attributes: object) -> Markup:
    """An element. Children that are no Markup are shown as text; attributes that are None are left out. cls is class, a_b is a-b."""
    names = {"cls": "class", "for_": "for"}
    own = "".join(
        f' {names.get(key, key.replace("_", "-"))}="{html.escape(shown(str(value)))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if tag in EMPTY:
        return Markup(f"<{tag}{own}>" if tag != "rect" else f"<{tag}{own}/>")
    return Markup(f"<{tag}{own}>{join(*children)}</{tag}>")


def join(*children: object) -> Markup:
    """Several, one behind the other."""
    return Markup(
        "".join(one if isinstance(one, Markup) else html.escape(shown(str(one))) for one in children if one is not None)
    )


def said(text: str | None) -> Markup:
    """What a model or a prompt says: on one line, its direction its own."""
    return el("bdi", (text or "").replace("\n", "↵").replace("\t", "⇥"))


def shown(text: str) -> str:
    """Text with its control characters made visible, those that turn lines around among them; its lines stay lines."""
    lines = [" ".join(map(visible, line.split(" "))) for line in text.split("\n")]
    return re.sub(r"[\ud800-\udfff]", "\ufffd", "\n".join(lines))


def table(
    headings: Sequence[object],
    rows: Sequence[Sequence[object]],
    *,
    caption: str,
    numbers: tuple[int, ...] = (),
    **attributes: object,
) -> Markup:
    """A table that scrolls sideways where it is too wide. numbers: columns set right."""
    kinds = ["n" if k in numbers else None for k in range(len(headings))]
    head = el("tr", *(el("th", h, scope="col", cls=kind) for h, kind in zip(headings, kinds, strict=True)))
    body = [el("tr", *(el("td", cell, cls=kind) for cell, kind in zip(row, kinds, strict=True))) for row in rows]
    whole = el("table", el("caption", caption), el("thead", head), el("tbody", *body), **attributes)
    return el("div", whole, cls="wide", tabindex="0", role="region", aria_label=caption)


def fill(template: str, parts: dict[str, str]) -> str:
    """Put parts into `{{name}}`, each once: what stands in a part is left as it is."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)
