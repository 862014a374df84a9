"""A budget as a Rich table."""

from __future__ import annotations

import os
from typing import Any

from rich.console import Console
from rich.markup import escape

from .budget import Budget, make_budget
from .byte_size import format_bytes
from .errors import UnsupportedError
from .ladder import Rung
from .report import _columns, _print_notes, _table, print_ladder


def print_budget(budget: Budget, console: Console) -> None:
    """Every part with its device and bytes, what each device has, and why the feature dtype is what it is.

    A budget that does not fit is shown as well; its error says what would.
    """
    table = _table("Memory, before it is allocated")
    table.add_column("part", overflow="fold")
    table.add_column("device", overflow="fold")
    _columns(table, None, "bytes", "size")
    table.add_column("", overflow="fold")
    for part in budget.parts:
        most = "at most; " if part.at_most and part.detail else "at most" if part.at_most else ""
        table.add_row(
            part.name, part.device, f"{part.bytes:,}", format_bytes(part.bytes), escape(f"{most}{part.detail}")
        )
    for device in budget.devices:
        table.add_section()
        free = f"of {format_bytes(device.total)}{f', {device.limit}' if device.limit else ''}"
        table.add_row("needed", device.name, f"{device.needed:,}", format_bytes(device.needed))
        table.add_row("free", device.name, f"{device.free:,}", format_bytes(device.free), escape(free))
        colour = "green" if device.free_after >= 0 else "yellow" if device.fits else "red"
        after = (f"[{colour}]{text}[/]" for text in (f"{device.free_after:,}", format_bytes(device.free_after)))
        table.add_row("free after", device.name, *after)
    console.print(table)
    if budget.reason:
        console.print(f"feature dtype auto: {escape(budget.reason)}")
        chosen = Rung(budget.rows, budget.dtype) if budget.dtype else None
        print_ladder(budget.ladder, chosen, console, title="Ladder of auto: draft and mirror")
    _print_notes(budget.notes, console)


def within_budget(model_path: str | os.PathLike[str], console: Console, **options: Any) -> dict[str, Any]:
    """Show the budget of what will be loaded, and hold to it.

    Args:
        options: as for :func:`make_budget`; see :func:`loading_options`.

    Returns:
        The options for ``DFlashLlama`` or ``Llama``, with the feature dtype and rows that were chosen.

    Raises:
        BudgetError: it does not fit; nothing was allocated.
        GgmlMirrorError: as :func:`make_budget`.
    """
    try:
        budget = make_budget(model_path, **options)
    except UnsupportedError as error:
        # With "auto" there is nothing to go by: the model itself will say so.
        console.print(f"[yellow]note:[/] no budget: {escape(str(error))}", soft_wrap=True)
        return options
    print_budget(budget, console)
    budget.require_fit()
    if budget.dtype is None:
        return options
    return {**options, "feature_dtype": budget.dtype, "feature_rows": budget.rows}
