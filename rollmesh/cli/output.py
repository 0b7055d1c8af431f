"""How results are printed: JSON for programs, tables for people."""

import time
from collections.abc import Iterable, Mapping

import typer
from pydantic_core import to_json
from rich.console import Console
from rich.table import Table
from rich.text import Text


def print_json(value: object) -> None:
    """`value` (models, dataclasses, plain values) as one line of JSON; NaN is null."""
    typer.echo(to_json(value, inf_nan_mode="null").decode())


def print_table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """A table; cells are taken literally and folded rather than cut."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)


def print_fields(fields: Mapping[str, str]) -> None:
    """Names and values, one a line; empty values are left out."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in fields.items():
        if value:
            table.add_row(name, Text(value))
    Console().print(table)


def local_time(seconds: float) -> str:
    """Unix seconds as date and time of this place."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def duration(seconds: float) -> str:
    """Seconds as 8s, 12m, 3h or 2d: nearly."""
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f}{unit}"
    return f"{seconds:.0f}s"


def one_line(text: str) -> str:
    """`text` from elsewhere without line breaks, nor anything else that steers a terminal."""
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
