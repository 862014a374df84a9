"""Rich tables of what the commands found."""

from __future__ import annotations

import math
import os
import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .byte_size import format_bytes
from .row_kind import RAW

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .doctor import Diagnosis
    from .fidelity import Snr
    from .ladder import Rung
    from .plan import Plan
    from .probe_report import ProbeReport

YES, NO = "[green]yes[/]", "[red]no[/]"


def make_console(*, stderr: bool = False) -> Console:
    """A console that does not squeeze tables into 80 columns when its output is piped."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else 150
    return Console(stderr=stderr, width=width, highlight=False)


def print_plan(plan: Plan, console: Console, *, source: str = "") -> None:
    """The plan as a table, with free memory and fits per device."""
    row = f"{plan.taps} taps x {plan.n_embd}" if plan.taps > 1 else f"{plan.width} values"
    table = _table(f"{plan.cap:,} {plan.rows} rows of {row}{f' ({source})' if source else ''}")
    _columns(table, "dtype", "bytes a row", "bytes in all", "size", "of f32")
    if plan.budget is not None:
        _columns(table, None, f"rows in\n{format_bytes(plan.budget)}")
    _columns(table, None, *(f"{device.name}\n{format_bytes(device.memory_free)} free" for device in plan.devices))
    f32 = 4 * plan.width
    for entry in plan.dtypes:
        cells = [entry.dtype.value, f"{entry.row_bytes:,}", f"{entry.ring_bytes:,}", format_bytes(entry.ring_bytes)]
        cells.append(f"{entry.row_bytes / f32:.1%}")
        if entry.max_cap is not None:
            cells.append(f"{entry.max_cap:,}")
        for device in plan.devices:
            fit = device.dtypes[entry.dtype]
            if not fit.supported:
                cells.append("[dim]not supported[/]")
            elif fit.fits:
                cells.append("[green]fits[/]")
            else:
                cells.append(f"[red]no[/], {fit.max_cap:,}\nrows do")
        table.add_row(*cells)
    console.print(table)
    if plan.ladder is not None:
        from .ladder import SOURCE, TAU

        where = plan.ladder.device or f"a budget of {format_bytes(plan.budget or 0)}"
        print_ladder(plan.ladder.sizes, plan.ladder.chosen, console, title=f"Ladder of auto, on {where}")
        console.print(f"auto: {escape(plan.ladder.reason)}", soft_wrap=True)
        if plan.ladder.waiting:
            beside = f"at most {plan.ladder.waiting} raw ones that wait to be fused (a micro-batch; 128 where taps are taken together)"
            console.print(f"[dim]Fused rows: with {beside}.[/]", soft_wrap=True)
        console.print(f"[dim]Change of tau against raw f32 ({TAU:.3f}): {SOURCE}.[/]", soft_wrap=True)
    _print_notes(plan.notes, console)


def print_ladder(sizes: Mapping[Rung, int], chosen: Rung | None, console: Console, *, title: str) -> None:
    """Rungs with their bytes and what they cost; the chosen one marked."""
    from .ladder import REFERENCE

    table = _table(title)
    table.add_column("rows")
    table.add_column("dtype")
    _columns(table, None, "bytes", "size", "change of tau")
    table.add_column("")
    for rung, size in sizes.items():
        mark = "[green]chosen[/]" if rung == chosen else ""
        cost = "not measured" if rung.cost is None else str(rung.cost) if rung != REFERENCE else "reference"
        table.add_row(rung.rows, rung.dtype.value, f"{size:,}", format_bytes(size), escape(cost), mark)
    console.print(table)


def print_doctor(diagnosis: Diagnosis, console: Console) -> None:
    """Versions, devices and what they support, and what is wrong."""
    table = _table("Versions")
    table.add_column("component")
    table.add_column("version")
    for name, version in diagnosis.versions.items():
        table.add_row(name, escape(version or "not found"))
    console.print(table)

    if diagnosis.devices:
        console.print(f"Backends: {', '.join(diagnosis.backends)}\n")
        table = _table("Devices")
        for name in ("device", "description", "type"):
            table.add_column(name)
        table.add_column("free", justify="right")
        table.add_column("total", justify="right")
        table.add_column("F32 self-test")
        for device in diagnosis.devices:
            test = (
                "[green]rows come back exact[/]" if device.self_test is None else f"[red]{escape(device.self_test)}[/]"
            )
            memory = [format_bytes(device.memory_free), format_bytes(device.memory_total)]
            table.add_row(device.name, escape(device.description), device.type, *memory, test)
        console.print(table)

        table = _table("Feature dtypes")
        table.add_column("dtype")
        for device in diagnosis.devices:
            table.add_column(f"{device.name}\ncapture")
            table.add_column("\nread")
            table.add_column("\nby")
        for dtype in diagnosis.devices[0].dtypes:
            cells = []
            for device in diagnosis.devices:
                support = device.dtypes[dtype]
                by = "own kernels" if device.own[dtype] else "ggml"
                cells += [YES if support.capture else NO, YES if support.read else NO, by]
            default = " [dim](default)[/]" if dtype.value == diagnosis.default_dtype else ""
            table.add_row(f"{dtype.value}{default}", *cells)
        console.print(table)

    for problem in diagnosis.problems:
        console.print(f"[red]problem:[/] {escape(problem)}")
    if not diagnosis.problems:
        console.print("[green]No problems found.[/]")


def print_probe(report: ProbeReport, console: Console) -> None:
    """The probe's tables: memory and fidelity, speed, and the features per tap."""
    info = report.model
    layers = ", ".join(map(str, report.layers))
    console.print(
        f"[bold]{escape(info.name)}[/] "
        f"({escape(info.arch)}, {info.n_layer} blocks x {info.n_embd}, context {info.n_ctx_train:,})\n"
        f"taps {layers}; {report.rows:,} {report.row_kind} rows of {report.width:,} values from {len(report.runs)} runs; "
        f"mirrors on {report.device.name} ({escape(report.device.description)})\n"
    )

    table = _table("Memory and signal-to-noise of whole rows (dB)")
    _columns(
        table, "dtype", "bytes a row", f"at {info.n_ctx_train:,} tokens", "of f32", "median", "5 %\nbelow", "clamped"
    )
    for d in report.dtypes:
        share = f"{d.row_bytes / (4 * report.width):.1%}"
        cells = [d.dtype.value, f"{d.row_bytes:,}", format_bytes(d.context_bytes), share]
        table.add_row(*cells, _snr(d.snr), _db(d.snr.p5), f"{sum(d.clamped):,}")
    console.print(table)

    if report.row_kind == RAW:
        table = _table("Signal-to-noise per tap (dB, median)")
        _columns(table, "dtype", *(f"tap {tap.layer}" for tap in report.taps))
        for d in report.dtypes:
            table.add_row(d.dtype.value, *(_db(snr.median) for snr in d.tap_snr))
        console.print(table)

    table = _table("Time in the mirror per row, median (GB/s: F32 row + stored row)")
    stored = "capture\nprefill, us" if report.row_kind == RAW else "stored\nus"
    _columns(table, "dtype", stored, "\nGB/s", "capture\ndecode, us", "\nGB/s", "read\nus", "\nGB/s")
    for d in report.dtypes:
        cells = [d.dtype.value]
        for speed in (d.prefill, d.decode, d.read):
            cells += [f"{speed.us_per_row:.3g}", f"{speed.gb_per_s:.2f}"] if speed.rows else ["-", "-"]
        table.add_row(*cells)
    console.print(table)

    table = _table("Features as the model computes them" if report.row_kind == RAW else "Rows as the draft fuses them")
    numbers = (
        "largest |x|",
        "F16\noverflows",
        "NaN",
        "infinite",
        "strongest\nchannel",
        "its part of\nthe energy",
        "crest",
    )
    _columns(table, "tap", *numbers)
    for tap in report.taps:
        over = f"[red]{tap.over_f16:,}[/]" if tap.over_f16 else "0"
        name = "fused" if tap.layer is None else str(tap.layer)
        cells = [name, f"{tap.abs_max:,.1f}", over, f"{tap.nan:,}", f"{tap.inf:,}"]
        table.add_row(*cells, str(tap.top_channel), f"{tap.top_channel_energy:.1%}", f"{tap.crest:.2f}")
    console.print(table)
    _print_notes(report.notes, console)


def print_header(path: str, header: dict[str, Any], console: Console) -> None:
    """A snapshot's header, one entry a line."""
    table = _table(escape(path))
    table.add_column("entry")
    table.add_column("value")
    for key, value in header.items():
        table.add_row(escape(str(key)), escape(str(value)))
    console.print(table)


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", header_style="")


def _columns(table: Table, label: str | None, *numbers: str) -> None:
    """A column of labels (unless None), then columns of numbers; on a narrow terminal they fold and lose nothing."""
    if label is not None:
        table.add_column(label, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", overflow="fold")


def _print_notes(notes: tuple[str, ...], console: Console) -> None:
    for note in notes:
        console.print(f"[yellow]note:[/] {escape(note)}")


def _db(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else "∞"


def _snr(snr: Snr) -> str:
    return "∞ (exact)" if snr.exact else _db(snr.median)
