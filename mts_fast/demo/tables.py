"""Tables for the terminal; where it is too narrow for one, a line for every value."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

# width for measuring a table: the console's own would cut it
UNLIMITED = 1000


def print_table(
    console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    """Rows of one name and some numbers, which are never cut."""
    table = Table(title=Text(title))
    table.add_column(Text(columns[0]))
    for i, name in enumerate(columns[1:], start=1):
        widest = max(len(text) for text in (name, *(row[i] for row in rows)))
        table.add_column(Text(name), justify="right", min_width=widest)
    for row in rows:
        table.add_row(*map(Text, row))
    least = console.measure(table, options=console.options.update(width=UNLIMITED)).minimum
    if least <= console.width:
        console.print(table)
        return
    console.print(title, markup=False)
    for first, *numbers in rows:
        console.print(first, markup=False)
        for name, number in zip(columns[1:], numbers, strict=True):
            if number:
                console.print(f"  {name}", markup=False)
                console.print(f"    {number}", markup=False)


def plus_minus(console: Console) -> str:
    """The sign where the console's encoding has it."""
    try:
        "±".encode(console.encoding)
    except (LookupError, UnicodeEncodeError):
        return "+-"
    return "±"
