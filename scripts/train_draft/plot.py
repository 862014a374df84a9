"""The course of a training: loss, and accuracy of each drafted position."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import InputError
from .work_files import write_whole

_GRID = "#d9dee4"


def check_plot() -> None:
    """
    Raises:
        InputError: matplotlib is missing.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError("--plot needs matplotlib: pip install matplotlib") from error


def plot_history(history: list[dict[str, Any]], path: Path) -> None:
    """Draw ``Progress.history`` into a .png, .svg or .pdf file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    seconds = [entry["seconds"] for entry in history]
    left.plot(seconds, [entry["loss"] for entry in history], color="#2563a8")
    left.set(xlabel="seconds", ylabel="loss, weighted mean over positions")
    n = len(history[0]["accuracy"]) if history else 0
    for k in range(n):
        shade = 0.9 - 0.7 * k / max(n - 1, 1)
        right.plot(
            seconds, [100 * entry["accuracy"][k] for entry in history], color=(0.1, 0.3, 0.6, shade), label=str(k + 1)
        )
    right.set(xlabel="seconds", ylabel="right, %", ylim=(0, 100))
    right.legend(title="position", frameon=False, ncols=2)
    for axes in (left, right):
        axes.grid(color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    kind = path.suffix.lower().lstrip(".")
    if kind not in ("png", "svg", "pdf"):
        raise InputError(f"cannot plot to {path}: use a name that ends in .png, .svg or .pdf")
    write_whole(path, lambda file: figure.savefig(file, format=kind))
