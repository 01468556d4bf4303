"""What the commands share: typed errors as one line and an exit status, and sizes for people."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import typer
from rich.console import Console

from megamoe_ep.errors import ArgumentError, MegaMoEError

WIDTH = 120  # columns of what is written to a file or a pipe


def console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=WIDTH)


@contextlib.contextmanager
def errors_end_the_command(rank: int | None = None) -> Iterator[None]:
    """Writes an error of this package to stderr and exits: status 2 for a bad argument, else 1."""
    try:
        yield
    except MegaMoEError as error:
        who = "" if rank is None else f"rank {rank}: "
        print(f"{who}{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        raise typer.Exit(2 if isinstance(error, ArgumentError) else 1) from error


def check_plot(plot: Path) -> None:
    """Raises ArgumentError unless a picture can be written to ``plot``, as ``--plot`` names it."""
    if plot.suffix != ".png" or not plot.parent.is_dir():
        raise ArgumentError(
            f"--plot must be a file name that ends in .png, in a folder that exists; got '{plot}'."
        )
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ArgumentError(
            f"--plot needs matplotlib: pip install 'megamoe_ep[plot]' ({error})."
        ) from error


def bytes_text(nbytes: float) -> str:
    """A size with three digits and a unit, powers of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.3g} {unit}"
        nbytes /= 1024
    return f"{nbytes:.3g} TiB"
