"""Time snapshots and restores of a mirror beside copies of as many bytes between the device and pinned host memory.

    python scripts/bench_snapshot.py --device CUDA0 --json snapshot.json --plot snapshot.png

In each round these run one after the other, the first of them another one each time. Printed are medians of rounds; a share is the median
of the shares within each round, of the copy in the same direction. GB/s count storage bytes once.

    snapshot    FeatureMirror.snapshot(): bytes of live rows in an array, header and checks included. The snapshot before it is gone, so
                that its memory is used again
    restore     FeatureMirror.restore() of that snapshot
    of array    the same of rows in an array of numpy's, as from a file: through staging
    pinned      ggml_backend_tensor_get, _set of as many bytes, in one copy, with memory of the device's host buffer type
    pageable    the same with an array of numpy's, written before
    first       the first snapshot of the mirror: memory is pinned, or its pages come from the system

On a host device there is nothing to pin; both are copies between ordinary memory then. Rows either lie in a row in the ring ("plain") or
around its end ("wrapped"). Every snapshot is compared with the rows that were restored.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import cffi
import llama_cpp
import numpy as np
import numpy.typing as npt
import typer
from ggml_library import open_ggml
from machine import describe
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from script import run as run_script

from ggml_mirror import Device, FeatureDtype, FeatureMirror, Snapshot, __version__, find_device, row_bytes
from ggml_mirror._native import ggml_versions
from ggml_mirror.byte_size import parse_bytes
from ggml_mirror.output import check_writable, write_atomically, write_json
from ggml_mirror.row_kind import FUSED, RAW

OPERATIONS = ("snapshot", "restore", "of array")
COPIES = {"snapshot": "pinned out", "restore": "pinned in", "of array": "pinned in"}
RARE = {"pageable out": 3, "pageable in": 3, "of array": 5}  # rounds in which they run, at most
I8 = 24  # enum ggml_type

# ------------------------------------------------------------------------------------------- ggml, the bare minimum

ffi = cffi.FFI()
ffi.cdef("""
    struct ggml_init_params { size_t mem_size; void * mem_buffer; bool no_alloc; };
    struct ggml_context * ggml_init(struct ggml_init_params params);
    void ggml_free(struct ggml_context * ctx);
    struct ggml_tensor * ggml_new_tensor_1d(struct ggml_context * ctx, int type, int64_t ne0);
    void * ggml_backend_dev_by_name(const char * name);
    void * ggml_backend_dev_buffer_type(void * device);
    void * ggml_backend_dev_host_buffer_type(void * device);
    void * ggml_backend_buft_alloc_buffer(void * type, size_t size);
    void ggml_backend_buffer_free(void * buffer);
    void * ggml_backend_buffer_get_base(void * buffer);
    void * ggml_backend_buffer_get_type(void * buffer);
    int ggml_backend_tensor_alloc(void * buffer, struct ggml_tensor * tensor, void * address);
    void ggml_backend_tensor_set(struct ggml_tensor * tensor, const void * data, size_t offset, size_t size);
    void ggml_backend_tensor_get(const struct ggml_tensor * tensor, void * data, size_t offset, size_t size);
""")

ggml = open_ggml(ffi)


class Memory:
    """As many bytes of the device, of pinned host memory, and of an array."""

    def __init__(self, device: str, n_bytes: int) -> None:
        handle = ggml.ggml_backend_dev_by_name(device.encode())
        self.n_bytes, self._buffers = n_bytes, []
        self._ctx = ggml.ggml_init({"mem_size": 1 << 12, "mem_buffer": ffi.NULL, "no_alloc": True})
        self.tensor = ggml.ggml_new_tensor_1d(self._ctx, I8, n_bytes)
        buffer = self._allocate(ggml.ggml_backend_dev_buffer_type(handle))
        ggml.ggml_backend_tensor_alloc(buffer, self.tensor, ggml.ggml_backend_buffer_get_base(buffer))
        self._array = np.ones(n_bytes, np.uint8)
        self.pageable = self.host = ffi.cast("char *", self._array.ctypes.data)
        host_type = ggml.ggml_backend_dev_host_buffer_type(handle)
        self.pinned = host_type != ffi.NULL
        if self.pinned:
            buffer = self._allocate(host_type)
            self.pinned = ggml.ggml_backend_buffer_get_type(buffer) == host_type
            self.host = ffi.cast("char *", ggml.ggml_backend_buffer_get_base(buffer))
        self.put(self.host)

    def _allocate(self, kind: Any) -> Any:
        buffer = ggml.ggml_backend_buft_alloc_buffer(kind, self.n_bytes)
        if buffer == ffi.NULL:
            raise SystemExit(f"no {self.n_bytes} bytes; lower --rows")
        self._buffers.append(buffer)
        return buffer

    def put(self, host: Any) -> None:
        ggml.ggml_backend_tensor_set(self.tensor, host, 0, self.n_bytes)

    def get(self, host: Any) -> None:
        ggml.ggml_backend_tensor_get(self.tensor, host, 0, self.n_bytes)

    def close(self) -> None:
        for buffer in self._buffers:
            ggml.ggml_backend_buffer_free(buffer)
        ggml.ggml_free(self._ctx)


# -------------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Case:
    """One dtype, kind of rows and place in the ring. Times are microseconds by round; copies are of one snapshot, or restore."""

    dtype: str
    kind: str
    place: str
    n_rows: int
    width: int
    cap: int
    n_bytes: int
    pinned: bool
    first_us: float
    us: dict[str, list[float]]
    save_copies: int
    load_copies: int
    unpinned: str
    same: bool

    def median_us(self, operation: str) -> float:
        return median(self.us[operation])

    def gb_per_s(self, operation: str) -> float:
        return 1e-3 * self.n_bytes / self.median_us(operation)

    def share(self, operation: str) -> float:
        """Of the pinned copy's bandwidth in the same round."""
        copies = self.us[COPIES[operation]]
        return median(copy / own for copy, own in zip(copies, self.us[operation], strict=False))

    def to_json(self) -> dict[str, Any]:
        shown = {name: {"median_us": self.median_us(name), "gb_per_s": self.gb_per_s(name)} for name in self.us}
        for name in OPERATIONS:
            shown[name]["of_pinned_copy"] = self.share(name)
        return {**asdict(self), "figures": shown}


@contextmanager
def filled(
    device: Device, dtype: FeatureDtype, kind: str, place: str, values: Any, ring: int
) -> Iterator[FeatureMirror]:
    """A mirror that holds the values as rows; its ring has ``ring`` bytes at least, and room for half as many rows more."""
    n_rows, width = values.shape
    taps = 5 if kind == RAW else 1
    cap = max(n_rows * 3 // 2, -(-ring // row_bytes(dtype, width)))
    with FeatureMirror(taps=taps, n_embd=width // taps, cap=cap, dtype=dtype, device=device.name, rows=kind) as m:
        m.write_rows(start=0 if place == "plain" else cap - n_rows // 2, rows=values)
        m.reset_stats()
        yield m


def _us(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return 1e6 * (time.perf_counter() - start)


def measure(m: FeatureMirror, place: str, n_rows: int, rounds: int) -> Case:
    n_bytes = n_rows * m.row_nbytes
    memory = Memory(m.device.name, n_bytes)
    held: list[Snapshot] = []

    def take() -> None:
        held.clear()  # its memory goes back before the next is taken
        held.append(m.snapshot())

    first = _us(take)
    moved = m.transfers()
    plain = replace(held[0], rows=held[0].rows.copy())
    work: dict[str, Callable[[], object]] = {
        "snapshot": take,
        "restore": lambda: m.restore(held[0]),
        "of array": lambda: m.restore(plain),
        "pinned out": lambda: memory.get(memory.host),
        "pinned in": lambda: memory.put(memory.host),
        "pageable out": lambda: memory.get(memory.pageable),
        "pageable in": lambda: memory.put(memory.pageable),
    }
    m.restore(plain)  # pins its staging
    us: dict[str, list[float]] = {name: [] for name in work}
    names = list(work)
    for i in range(-1, rounds):
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            if i < RARE.get(name, rounds):
                took = _us(work[name])
                if i >= 0:
                    us[name].append(took)
    take()
    after = m.transfers()
    memory.close()
    return Case(
        *(m.dtype.value, m.rows, place, n_rows, m.width, m.cap, n_bytes, memory.pinned, first, us),
        save_copies=moved.save_copies,
        load_copies=after.load_copies // after.load_calls,
        unpinned=after.unpinned,
        same=bool(np.array_equal(held[0].rows, plain.rows)),
    )


# ----------------------------------------------------------------------------------------------------------- goals


@dataclass(frozen=True)
class Goal:
    what: str
    wanted: float
    reached: float
    at_most: bool = False

    @property
    def met(self) -> bool:
        return self.reached <= self.wanted if self.at_most else self.reached >= self.wanted


def goals(cases: list[Case]) -> list[Goal]:
    """Of raw rows of 25,600 on a device with pinned memory: bandwidth, copies, and how much faster q8_0 is than f32."""
    found = []
    shown = [c for c in cases if c.pinned and c.width == 25600]
    for c in shown:
        of = f"{c.dtype}, {c.place}"
        for operation in ("snapshot", "restore"):
            found.append(Goal(f"{operation} of {of}: share of a pinned copy's bandwidth", 0.7, c.share(operation)))
        found.append(Goal(f"{of}: copies", 2, max(c.save_copies, c.load_copies), at_most=True))
    for place, operation in product(("plain", "wrapped"), ("snapshot", "restore")):
        f32, q8_0 = (next((c for c in shown if (c.dtype, c.place) == (d, place)), None) for d in ("f32", "q8_0"))
        if f32 and q8_0:
            ratio = f32.median_us(operation) / q8_0.median_us(operation)
            found.append(Goal(f"{operation}, {place}: q8_0 as fast as f32, times", 3.3, ratio))
    return found


# ---------------------------------------------------------------------------------------------------------- output


def result_table(cases: list[Case], markdown: bool) -> Table:
    table = Table(box=box.MARKDOWN if markdown else box.SIMPLE_HEAD)
    for name in (
        *("rows", "dtype", "place", "MB", "copies", "first ms"),
        *(text for operation in OPERATIONS for text in (f"{operation} ms", "GB/s", "of pinned")),
        *("pinned out, in GB/s", "pageable out, in GB/s"),
    ):
        table.add_column(name, justify="left" if name in ("rows", "dtype", "place") else "right", no_wrap=True)
    for c in cases:
        figures = [
            (f"{1e-3 * c.median_us(name):.2f}", f"{c.gb_per_s(name):.1f}", f"{c.share(name):.0%}")
            for name in OPERATIONS
        ]
        table.add_row(
            *(f"{c.n_rows:,} {c.kind}", c.dtype, c.place, f"{1e-6 * c.n_bytes:,.1f}"),
            *(f"{c.save_copies}, {c.load_copies}", f"{1e-3 * c.first_us:.1f}"),
            *(text for figure in figures for text in figure),
            *(f"{c.gb_per_s(f'{kind} out'):.1f}, {c.gb_per_s(f'{kind} in'):.1f}" for kind in ("pinned", "pageable")),
        )
    return table


def speedup_table(cases: list[Case], markdown: bool) -> Table:
    """How many times as fast as f32 rows of the same kind and place."""
    table = Table(box=box.MARKDOWN if markdown else box.SIMPLE_HEAD)
    for name in ("rows", "dtype", "place", "bytes of f32", *(f"{name}, x f32" for name in OPERATIONS)):
        table.add_column(name, justify="left" if name in ("rows", "dtype", "place") else "right", no_wrap=True)
    f32 = {(c.kind, c.place): c for c in cases if c.dtype == "f32"}
    for c in cases:
        if (base := f32.get((c.kind, c.place))) is not None and c is not base:
            ratios = [base.median_us(name) / c.median_us(name) for name in OPERATIONS]
            table.add_row(
                c.kind, c.dtype, c.place, f"1 / {base.n_bytes / c.n_bytes:.2f}", *(f"{r:.2f}" for r in ratios)
            )
    return table


def plot(cases: list[Case], title: str, path: Path) -> None:
    """GB/s of storage bytes by dtype, of the kind of rows that is widest, where they do not wrap."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width = max(c.width for c in cases)
    shown = [c for c in cases if c.width == width and c.place == cases[0].place]
    figure = Figure(figsize=(9, 6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{shown[0].n_rows:,} rows of {width:,}, {title}")
    panels = {
        "snapshot": {"snapshot": "#2563a8", "pinned out": "#6b7280", "pageable out": "#c9a227"},
        "restore": {"restore": "#2563a8", "of array": "#8fb3d9", "pinned in": "#6b7280", "pageable in": "#c9a227"},
    }
    for axes, (panel, variants) in zip(figure.subplots(2, 1), panels.items(), strict=True):
        for i, (name, colour) in enumerate(variants.items()):
            places = [x + (i - 1.5) * 0.18 for x in range(len(shown))]
            axes.bar(places, [c.gb_per_s(name) for c in shown], 0.17, label=name, color=colour)
        axes.set_xticks(range(len(shown)), [c.dtype for c in shown])
        axes.set_ylabel(f"{panel}, GB/s of storage")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, ncols=4, fontsize="small", loc="lower right", bbox_to_anchor=(1, 1))
    write_atomically(path, lambda file: figure.savefig(file, format=path.suffix.lstrip(".") or "png"))


# ---------------------------------------------------------------------------------------------------- command line


def main(
    rows: Annotated[int, typer.Option(help="Rows in a snapshot.", min=2)] = 8192,
    width: Annotated[int, typer.Option(help="Values per raw row, of five taps; a fused row has a fifth.")] = 25600,
    ring: Annotated[str, typer.Option(help="Bytes of the ring at least, such as 4GiB.")] = "0",
    dtypes: Annotated[str, typer.Option(help="Comma-separated.")] = "f32,f16,bf16,q8_0,q4_0",
    kinds: Annotated[str, typer.Option(help="Comma-separated: raw, fused.")] = "raw,fused",
    places: Annotated[str, typer.Option(help="Comma-separated: plain, wrapped.")] = "plain,wrapped",
    device: Annotated[str, typer.Option(help="cpu, auto, or a ggml device name such as CUDA0.")] = "cpu",
    repeat: Annotated[int, typer.Option(help="Rounds.", min=3)] = 11,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every figure to this file.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw a picture (.png, .svg, .pdf).")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Tables as Markdown.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with status 1 if a goal is missed.")] = False,
) -> None:
    """Time snapshots and restores of a mirror beside copies of as many bytes to and from pinned host memory."""
    for file in filter(None, (json_file, plot_file)):
        check_writable(file)
    found = find_device(device)
    wanted = [FeatureDtype.parse(name) for name in dtypes.split(",")]
    if width % 5 or not set(kinds.split(",")) <= {RAW, FUSED} or not set(places.split(",")) <= {"plain", "wrapped"}:
        raise typer.BadParameter("--width is a multiple of 5, --kinds raw or fused, --places plain or wrapped")
    values: npt.NDArray[np.float32] = np.random.default_rng(0).standard_normal((rows, width), np.float32)
    chosen = list(product(kinds.split(","), places.split(","), wanted))
    cases: list[Case] = []
    console = Console(width=None if Console().is_terminal else 240)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for kind, place, dtype in progress.track(chosen, description="measuring"):
            part = values if kind == RAW else values[:, : width // 5]
            with filled(found, dtype, kind, place, part, parse_bytes(ring)) as m:
                cases.append(measure(m, place, rows, repeat))

    name = describe(0) if found.is_host else f"{found.name}: {found.description}"
    console.print(f"{name}; medians of {repeat} rounds; host memory {'pinned' if cases[0].pinned else 'not pinned'}")
    console.print(result_table(cases, markdown))
    console.print(speedup_table(cases, markdown))
    for why in sorted({c.unpinned for c in cases if c.unpinned}):
        console.print(f"not all memory was pinned: {why}")
    reached = goals(cases)
    for goal in reached:
        verdict = "[green]PASS" if goal.met else "[red]FAIL"
        sign = "at most" if goal.at_most else "at least"
        console.print(f"{verdict}[/] {goal.what}: {goal.reached:.2f}, goal {sign} {goal.wanted:g}")
    same = all(c.same for c in cases)
    if not same:
        console.print("[red]FAIL[/] a snapshot differs from what was restored")
    if json_file:
        versions = ggml_versions()
        report = {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "device": found.name,
            "device_description": found.description,
            "machine": describe(0),
            "ggml_mirror": __version__,
            "ggml": f"{versions.loaded} ({versions.loaded_commit})",
            "llama_cpp": llama_cpp.__version__,
            "cases": [c.to_json() for c in cases],
            "goals": [{**asdict(goal), "met": goal.met} for goal in reached],
        }
        write_json(report, str(json_file))
    if plot_file:
        plot(cases, name, plot_file)
    if not same or (strict and not all(goal.met for goal in reached)):
        raise typer.Exit(1)


if __name__ == "__main__":
    run_script(main)
