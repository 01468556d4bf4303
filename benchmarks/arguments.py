"""What the benchmarks' command lines have in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any


def list_of(kind: type, allowed: Sequence[str] | None = None) -> Callable[[str], list[Any]]:
    """Parses "a,b,c" into a list of ``kind``, of ``allowed`` values where there are such."""

    def parse(text: str) -> list[Any]:
        try:
            values = [kind(part) for part in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"must be numbers with commas between; got {text!r}."
            ) from None
        if allowed is not None and not set(values) <= set(allowed):
            raise argparse.ArgumentTypeError(f"must be of {', '.join(allowed)}; got {text!r}.")
        return values

    return parse
