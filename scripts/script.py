"""How a script starts and ends."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import typer

from ggml_mirror import GgmlMirrorError


def run(main: Callable[..., Any]) -> None:
    """``main`` as a command line. Exit code 2, and a line that says why, where it was not possible as asked."""
    try:
        typer.run(main)
    except GgmlMirrorError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
