"""The probe's picture: memory at the model's full context against signal-to-noise, one point per dtype."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ArgumentError
from .output import check_writable, write_atomically

if TYPE_CHECKING:
    from .probe_report import ProbeReport

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels

_FORMATS = (".png", ".svg", ".pdf")
_INK, _GRID, _POINT, _EXACT = "#1f2933", "#d9dee4", "#2563a8", "#b4471f"

# Where a label may stand around its point, in order of preference: distance in points, then angle in degrees.
_DISTANCES = (10, 26, 42, 58)
_ANGLES = (0, 180, 90, 270, 30, 150, 330, 210, 60, 120, 300, 240)


def check_plot(path: str | Path) -> None:
    """Raise ArgumentError if :func:`write_plot` could not write ``path``: format, place, or no matplotlib."""
    if Path(path).suffix.lower() not in _FORMATS:
        raise ArgumentError(f"cannot plot to {path}: use a name that ends in {', '.join(_FORMATS)}")
    check_writable(path)
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ArgumentError("--plot needs matplotlib: pip install matplotlib") from error


def write_plot(report: ProbeReport, path: str | Path) -> None:
    """Draw ``report`` into a PNG, SVG or PDF file."""
    figure = draw(report)
    kind = Path(path).suffix.lower().lstrip(".")
    write_atomically(path, lambda file: figure.savefig(file, format=kind))


def draw(report: ProbeReport) -> Any:
    """The picture as a matplotlib figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    info = report.model
    unit, scale = _unit(max(d.context_bytes for d in report.dtypes))
    lossy = [d for d in report.dtypes if math.isfinite(d.snr.median)]
    exact = [d for d in report.dtypes if not math.isfinite(d.snr.median)]

    axes.set_xscale("log")
    axes.set_axisbelow(True)
    axes.grid(color=_GRID, linewidth=0.8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    xs = [d.context_bytes / scale for d in lossy]
    ys = [d.snr.median for d in lossy]
    lows = [d.snr.p5 for d in lossy]
    axes.vlines(xs, lows, ys, color=_POINT, alpha=0.35, linewidth=5, capstyle="round", zorder=2)
    axes.scatter(xs, ys, s=46, color=_POINT, edgecolor="white", linewidth=1, zorder=3)
    for d in exact:
        axes.axvline(d.context_bytes / scale, color=_EXACT, linestyle=(0, (5, 3)), linewidth=1.6, zorder=2)

    all_x = [d.context_bytes / scale for d in report.dtypes]
    axes.set_xlim(min(all_x) / 1.6, max(all_x) * 1.25)
    if ys:
        axes.set_ylim(min(0.0, *lows), max(ys) * 1.15)
    axes.set_xlabel(f"memory at the full context of {info.n_ctx_train:,} tokens ({unit}, log scale)", color=_INK)
    axes.set_ylabel("signal-to-noise of a row (dB)", color=_INK)
    taps = ", ".join(map(str, report.layers))
    axes.set_title(f"Feature mirror of {info.name}", loc="left", color=_INK, fontsize=13, fontweight="bold", pad=24)
    subtitle = (
        f"{report.width:,} values a {report.row_kind} row, taps {taps}; {report.rows:,} rows; "
        "dot: median, bar: down to the 5th percentile"
    )
    axes.text(0, 1.02, subtitle, transform=axes.transAxes, color=_INK, fontsize=8.5, va="bottom")

    _set_ticks(axes, sorted(set(all_x)))
    for d in exact:
        axes.annotate(
            f"{d.dtype}: exact",
            (d.context_bytes / scale, 0.03),
            xycoords=("data", "axes fraction"),
            xytext=(-7, 0),
            textcoords="offset points",
            rotation=90,
            ha="right",
            va="bottom",
            color=_EXACT,
            fontsize=10,
        )
    _label(axes, [(x, y, f"{d.dtype}  {y:.1f} dB") for x, y, d in zip(xs, ys, lossy, strict=True)], lows)
    return figure


def _unit(most: int) -> tuple[str, int]:
    return ("GiB", 1024**3) if most >= 1024**3 / 10 else ("MiB", 1024**2)


def _set_ticks(axes: Any, values: list[float]) -> None:
    # The sizes themselves, thinned so that neighbours stay legible on the log axis.
    ticks: list[float] = []
    for value in values:
        if not ticks or value / ticks[-1] > 1.17:
            ticks.append(value)
    axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    axes.set_xticks([], minor=True)


def _label(axes: Any, labels: list[tuple[float, float, str]], lows: list[float]) -> None:
    """Put each label where it covers no point, bar or other label; a thin line leads to those that had to move away."""
    from matplotlib.text import Text

    figure = axes.figure
    figure.canvas.draw()  # the layout has to be known before boxes can be compared
    renderer = figure.canvas.get_renderer()
    taken: list[Box] = []
    for (x, y, _), low in zip(labels, lows, strict=True):
        across, top = axes.transData.transform((x, y))
        bottom = axes.transData.transform((x, low))[1]
        taken.append((across - 8, bottom - 8, across + 8, top + 8))
    frame = axes.get_window_extent(renderer)
    for x, y, text in sorted(labels, key=lambda label: -label[1]):
        best: tuple[float, Any, Box] | None = None
        for rank, (distance, angle) in enumerate(product(_DISTANCES, _ANGLES)):
            note = _note(axes, x, y, text, distance, angle)
            note.update_positions(renderer)
            extent = Text.get_window_extent(note, renderer)  # the words alone, without the line
            box = (extent.x0 - 2, extent.y0 - 1, extent.x1 + 2, extent.y1 + 1)
            outside = box[0] < frame.x0 or box[1] < frame.y0 or box[2] > frame.x1 or box[3] > frame.y1
            cost = rank + 10 * sum(_overlap(box, other) for other in taken) + 1e6 * outside
            if best is None or cost < best[0]:
                if best is not None:
                    best[1].remove()
                best = (cost, note, box)
            else:
                note.remove()
        if best is not None:
            taken.append(best[2])


def _note(axes: Any, x: float, y: float, text: str, distance: float, angle: float) -> Any:
    dx, dy = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    return axes.annotate(
        text,
        (x, y),
        xytext=(distance * dx, distance * dy),
        textcoords="offset points",
        ha="left" if dx > 0.1 else "right" if dx < -0.1 else "center",
        va="center" if abs(dy) < 0.1 else "bottom" if dy > 0 else "top",
        fontsize=9.5,
        color=_INK,
        zorder=4,
        arrowprops={"arrowstyle": "-", "color": _POINT, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 3}
        if distance > _DISTANCES[0]
        else None,
    )


def _overlap(a: Box, b: Box) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0
