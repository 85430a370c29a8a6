"""What commands print: tables, values as one would type them, notes on stderr."""

import os
from collections.abc import Iterable
from typing import Any

import click

from dsjax.config import show


def as_typed(value: Any) -> str:
    if isinstance(value, float) and value != 0:
        value = float(f"{value:.6g}")
        return f"{value:g}" if value < 1e-3 or value >= 1e6 else str(value)
    if isinstance(value, tuple) and value and not isinstance(value[0], str):
        return ",".join(map(show, value))  # whole, however long
    return show(value)


def note(text: str) -> None:
    click.echo(f"dsjax: {text}", err=True)


def print_table(head: list[str] | None, rows: list[tuple], right: Iterable[int] = (), widths: tuple[int, ...] = ()):
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 120  # a pipe has no edge at 80
    lines = [*rows, *zip(*(name.split("\n") for name in head))] if head else rows
    widest = [max(map(len, column)) for column in zip(*lines)]
    gap = 2 if head is None or sum(widest) + 2 * len(widest) <= console.width else 1
    table = Table(box=None, show_header=head is not None, padding=(0, gap, 0, 0), pad_edge=False)
    for i in range(len(rows[0])):
        table.add_column(
            head[i] if head else "",
            justify="right" if i in right else "left",
            min_width=widths[i] if i < len(widths) else None,
            no_wrap=i < 2 or head is not None,
            overflow="fold",
        )
    for row in rows:
        table.add_row(*map(Text, row))
    with console.capture() as text:
        console.print(table)
    click.echo("\n".join(line.rstrip() for line in text.get().splitlines()))
