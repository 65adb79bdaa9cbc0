"""`patchscopes tokens`: which position is my word?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchscopes.cli.options import Json, ModelName, load_model
from patchscopes.cli.terminal import data, print_json, say

if TYPE_CHECKING:
    from patchscopes.model import Tokens


def tokens(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Any text.", show_default=False)],
    model: ModelName = "atlas",
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the model's chat template, as a user's turn.")
    ] = False,
    find: Annotated[str | None, typer.Option(help="Say which tokens this piece of the text is.", show_default=False)] = None,
    json: Json = False,
) -> None:
    """Show the tokens of PROMPT: positions, ids, characters, bytes."""
    words = load_model(model).tokens(prompt, chat=chat)
    places = [] if find is None else occurrences(words, find)
    rows = [row(words, i) for i in range(len(words))]
    for note in words.notes:
        say(f"note: {note}")
    if json:
        found = {} if find is None else {"find": {"text": find, "occurrences": places}}
        print_json({"prompt": words.text, "model": model, "tokens": rows, **found, "notes": list(words.notes)})
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from patchscopes.model.tokens import visible

    marked = {i for place in places for i in range(place["first"], place["last"] + 1)}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading, side in (
        ("position", "right"),
        ("from end", "right"),
        ("id", "right"),
        ("token", "left"),
        ("characters", "right"),
        ("bytes", "left"),
    ):
        table.add_column(heading, justify=side, overflow="fold")  # type: ignore[arg-type]
    table.add_column("special")
    for r in rows:
        span = "" if r["start"] == r["stop"] else f"{r['start']}:{r['stop']}"
        cells = (r["position"], r["from_end"], r["id"], visible(r["token"]), span, r["bytes"], "special" if r["special"] else "")
        style = "bold green" if r["position"] in marked else "dim" if r["special"] else ""
        table.add_row(*(Text(str(c), style=style) for c in cells))
    console = data()
    console.print(table)
    for n, place in enumerate(places, 1):
        which = f"{find}#{n}" if len(places) > 1 else find
        span = f"token {place['last']}" if place["first"] == place["last"] else f"tokens {place['first']} to {place['last']}"
        console.print(Text(f"{which!r} is {span}: its position is {place['last']}"))


def row(words: Tokens, i: int) -> dict[str, Any]:
    """What there is to say of one token. start, stop: its characters; bytes: the UTF-8 of the text it covers."""
    start, stop = words.offsets[i]
    return {
        "position": i,
        "from_end": i - len(words),
        "id": words.ids[i],
        "token": words.strings[i],
        "start": start,
        "stop": stop,
        "bytes": words.text[start:stop].encode().hex(" "),
        "special": words.special[i],
    }


def occurrences(words: Tokens, piece: str) -> list[dict[str, int]]:
    """First and last token of every occurrence of `piece`. PositionError if there is none."""
    count = sum(words.text.startswith(piece, i) for i in range(len(words.text))) if piece else 0
    spans = [words.find(piece, occurrence=n + 1) for n in range(count)] or [words.find(piece)]
    return [{"first": span.first, "last": span.last} for span in spans]
