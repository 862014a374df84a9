"""Time capture and read of feature rows beside an F32 copy, stock ggml ops, and numpy through gguf.

    python scripts/bench_rows.py --json rows.json --plot rows.png
    python scripts/bench_rows.py --device CUDA0 --rows 16,512,8192 --ring 4GiB

Every variant works on the same rows, in buffers of the same ggml device, with the same number of threads. In each round
the variants run one after the other, the first of them another one each time, so that a disturbance of the machine hits
all alike. Inputs, ring and outputs move on with each call through memory that is larger than the caches, so that each
call meets cold memory. Printed are medians of rounds; a ratio is the median of the ratios within each round.

What is timed:

    capture   taps, one call each, from F32 tensors [n_embd, rows] into ring slots: as a target's graph gives them
    at once   the same tensors, all taps in one call (gm_mirror_write_taps; stock: one graph)
    write     whole rows, F32 [width, rows]
    read      rows back to F32, into a tensor that exists
    array     the same into a new numpy array, as FeatureMirror.read returns it: page faults included

    mirror    FeatureMirror, by its C functions as the eval callback calls them. Looks at each value: counts NaN,
              infinity and overflow, keeps the largest |x|
    checked   FeatureMirror(ggml_ops=True): the same by stock ggml ops, a graph that looks and one that stores
    stock     ggml_set_rows or ggml_get_rows alone: graphs and indices are ready before the clock starts, and no value
              is looked at. ggml's CPU backend runs these two ops on one thread, whatever the number of threads
    copy      ggml_cpy of as many F32 rows, contiguous: what storing F32 cannot beat
    gguf      gguf.quants.quantize or dequantize: numpy, one thread (host devices only)
    bounce    through host memory: rows to the host, ggml's reference conversion on one thread, rows to the device
              (other devices only): what implementations without device conversions do

"in library us" is the mirror's own stopwatch in operations of one call: from its lock to the device being done. A decoding loop calls the
library from native code, so what Python and cffi add to a call is no part of a step; the goals for 16 rows "at once" and "read" are
therefore judged by it, and all others by the clock around the call.

Threads that wait for each other suffer most from other work on the machine: what the CPUs did for others meanwhile is
printed, and should be near 0.
"""

from __future__ import annotations

import datetime
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Any

import cffi
import gguf
import llama_cpp
import numpy as np
import numpy.typing as npt
import typer
from ggml_library import open_ggml
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from script import run as run_script

from ggml_mirror import Device, FeatureDtype, FeatureMirror, __version__, find_device, row_bytes
from ggml_mirror._native import check, ggml_versions
from ggml_mirror._native import ffi as native_ffi
from ggml_mirror._native import lib as native
from ggml_mirror.byte_size import parse_bytes
from ggml_mirror.output import check_writable, write_atomically, write_json

OPERATIONS = ("capture", "at once", "write", "read", "array")
SINGLE_CALL = ("at once", "write", "read")  # of the library's, so that its stopwatch is that call's
GRAPH_SIZE = 8
MAX_STEPS = 64  # places through which a small batch of rows moves
MAX_SOURCE_BYTES = 4 << 30  # of inputs, and of outputs
SLOW = {"gguf": 6, "bounce": 3}  # rounds in which they run, at least
Rows = npt.NDArray[np.float32]

# ------------------------------------------------------------------------------------------- ggml, the bare minimum

ffi = cffi.FFI()
ffi.cdef("""
    struct ggml_init_params { size_t mem_size; void * mem_buffer; bool no_alloc; };
    struct ggml_context * ggml_init(struct ggml_init_params params);
    void ggml_free(struct ggml_context * ctx);
    size_t ggml_tensor_overhead(void);
    size_t ggml_graph_overhead_custom(size_t size, bool grads);
    struct ggml_tensor * ggml_new_tensor_2d(struct ggml_context * ctx, int type, int64_t ne0, int64_t ne1);
    struct ggml_tensor * ggml_view_2d(struct ggml_context *, struct ggml_tensor * a, int64_t, int64_t, size_t, size_t);
    struct ggml_tensor * ggml_set_rows(struct ggml_context *, struct ggml_tensor * ring, struct ggml_tensor * rows,
                                       struct ggml_tensor * indices);
    struct ggml_tensor * ggml_get_rows(struct ggml_context *, struct ggml_tensor * data, struct ggml_tensor * indices);
    struct ggml_tensor * ggml_cpy(struct ggml_context * ctx, struct ggml_tensor * a, struct ggml_tensor * b);
    struct ggml_cgraph * ggml_new_graph_custom(struct ggml_context * ctx, size_t size, bool grads);
    void ggml_build_forward_expand(struct ggml_cgraph * graph, struct ggml_tensor * tensor);
    void * ggml_backend_dev_by_name(const char * name);
    void * ggml_backend_dev_backend_reg(void * device);
    void * ggml_backend_reg_get_proc_address(void * reg, const char * name);
    void * ggml_backend_dev_init(void * device, const char * params);
    void ggml_backend_free(void * backend);
    void * ggml_backend_alloc_buffer(void * backend, size_t size);
    void ggml_backend_buffer_free(void * buffer);
    void * ggml_backend_buffer_get_base(void * buffer);
    int ggml_backend_tensor_alloc(void * buffer, struct ggml_tensor * tensor, void * address);
    void ggml_backend_tensor_set(struct ggml_tensor * tensor, const void * data, size_t offset, size_t size);
    void ggml_backend_tensor_get(const struct ggml_tensor * tensor, void * data, size_t offset, size_t size);
    void ggml_backend_tensor_set_2d(struct ggml_tensor * tensor, const void * data, size_t offset, size_t size,
                                    size_t n_copies, size_t stride_tensor, size_t stride_data);
    int ggml_backend_graph_compute(void * backend, struct ggml_cgraph * graph);
    size_t ggml_quantize_chunk(int type, const float * src, void * dst, int64_t start, int64_t nrows, int64_t n_per_row,
                               const float * imatrix);
    struct type_traits { const char * name; int64_t blck; int64_t blck_interleave; size_t size; bool is_quantized;
                         void (*to_float)(const void * x, float * y, int64_t k); };
    const struct type_traits * ggml_get_type_traits(int type);
""")
F32, I32, I64 = 0, 26, 27  # enum ggml_type
Tensor = Any

ggml = open_ggml(ffi)


class Arena:
    """Device memory in which tensors are placed by hand."""

    def __init__(self, backend: Any, n_bytes: int) -> None:
        self.buffer = ggml.ggml_backend_alloc_buffer(backend, n_bytes)
        if self.buffer == ffi.NULL:
            raise SystemExit(f"no {n_bytes} bytes on this device; lower --cap")
        self.base = ffi.cast("char *", ggml.ggml_backend_buffer_get_base(self.buffer))

    def place(self, tensor: Tensor, offset: int = 0) -> Tensor:
        if ggml.ggml_backend_tensor_alloc(self.buffer, tensor, self.base + offset) != 0:
            raise SystemExit("a tensor does not fit into its memory")
        return tensor

    def close(self) -> None:
        ggml.ggml_backend_buffer_free(self.buffer)


class Backend:
    """One device, its memory, and graphs of one op on it."""

    def __init__(self, device: str, n_threads: int) -> None:
        handle = ggml.ggml_backend_dev_by_name(device.encode())
        self.handle = ggml.ggml_backend_dev_init(handle, ffi.NULL)
        registry = ggml.ggml_backend_dev_backend_reg(handle)
        set_threads = ggml.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_set_n_threads")
        if set_threads != ffi.NULL:
            ffi.cast("void (*)(void *, int)", set_threads)(self.handle, n_threads)
        # Per step: a graph and at most three tensors for each tap, and for the three operations on whole rows.
        one = ggml.ggml_graph_overhead_custom(GRAPH_SIZE, False) + 4 * ggml.ggml_tensor_overhead()
        self.ctx = ggml.ggml_init({"mem_size": (MAX_STEPS + 1) * 140 * one, "mem_buffer": ffi.NULL, "no_alloc": True})
        self.arenas: list[Arena] = []

    def arena(self, n_bytes: int) -> Arena:
        self.arenas.append(Arena(self.handle, n_bytes))
        return self.arenas[-1]

    def tensor(self, arena: Arena, kind: int, ne0: int, ne1: int, offset: int = 0) -> Tensor:
        return arena.place(ggml.ggml_new_tensor_2d(self.ctx, kind, ne0, ne1), offset)

    def indices(self, kind: int, first: int, count: int) -> Tensor:
        values = np.arange(first, first + count, dtype=np.int64 if kind == I64 else np.int32)
        tensor = self.tensor(self.arena(values.nbytes), kind, count, 1)
        ggml.ggml_backend_tensor_set(tensor, ffi.from_buffer(values), 0, values.nbytes)
        return tensor

    def graph(self, *ops: Tensor) -> Any:
        # A graph counts its leaves too: ring, rows and indices of each op.
        graph = ggml.ggml_new_graph_custom(self.ctx, max(GRAPH_SIZE, 4 * len(ops)), False)
        for op in ops:
            ggml.ggml_build_forward_expand(graph, op)
        return graph

    def compute(self, *graphs: Any) -> None:
        for graph in graphs:
            if ggml.ggml_backend_graph_compute(self.handle, graph) != 0:
                raise SystemExit("the backend failed")

    def close(self) -> None:
        for arena in self.arenas:
            arena.close()
        ggml.ggml_free(self.ctx)
        ggml.ggml_backend_free(self.handle)


# -------------------------------------------------------------------------------------------------------- variants


@dataclass(frozen=True)
class Shape:
    """What is moved: ``rows`` rows at a time, of ``taps`` slices of ``n_embd``; ``cap`` is a multiple of rows."""

    taps: int
    n_embd: int
    rows: int
    cap: int

    @property
    def width(self) -> int:
        return self.taps * self.n_embd

    @property
    def row_bytes(self) -> int:
        return 4 * self.width

    @property
    def steps(self) -> int:
        return min(self.cap // self.rows, MAX_STEPS)

    def start(self, step: int) -> int:
        """The first position of a step: all over the ring."""
        return step * (self.cap // self.rows // self.steps) * self.rows

    @property
    def sources(self) -> int:
        """Places of inputs, and of outputs; steps take them in turn."""
        return max(1, min(self.steps, MAX_SOURCE_BYTES // (self.rows * self.row_bytes)))


class Bench:
    """The variants for one dtype and shape. ``calls[operation][variant](step)`` does the work of one round."""

    def __init__(self, shape: Shape, dtype: FeatureDtype, device: Device, n_threads: int, values: Rows) -> None:
        self.shape, self.dtype, self.on_device = shape, dtype, not device.is_host
        self.backend = Backend(device.name, n_threads)
        options: dict[str, Any] = {"taps": shape.taps, "n_embd": shape.n_embd, "cap": shape.cap, "dtype": dtype}
        self.mirror = FeatureMirror(**options, device=device.name, n_threads=n_threads)
        self.checked = FeatureMirror(**options, device=device.name, n_threads=n_threads, ggml_ops=True)
        self.calls: dict[str, dict[str, Callable[[int], object]]] = {name: {} for name in OPERATIONS}
        self._make_tensors(values)
        self._add_mirror("mirror", self.mirror)
        self._add_mirror("checked", self.checked)
        self._add_stock()
        self._add_copy()
        if device.is_host:
            self._add_gguf(values)
        else:
            self._add_bounce()

    def _make_tensors(self, values: Rows) -> None:
        s, b = self.shape, self.backend
        block = s.rows * s.row_bytes
        source, self.output = b.arena(s.sources * block), b.arena(s.sources * block)
        inputs = [b.tensor(source, F32, s.width, s.rows, i * block) for i in range(s.sources)]
        outputs = [b.tensor(self.output, F32, s.width, s.rows, i * block) for i in range(s.sources)]
        # The inputs' memory once more, as the taps of a target: tensors [n_embd, rows], one after the other.
        slices = [
            [b.tensor(source, F32, s.n_embd, s.rows, i * block + tap * block // s.taps) for tap in range(s.taps)]
            for i in range(s.sources)
        ]
        for tensor in inputs:
            ggml.ggml_backend_tensor_set(tensor, ffi.from_buffer(values), 0, block)
        self.inputs, self.outputs, self.slices = (
            [made[step % s.sources] for step in range(s.steps)] for made in (inputs, outputs, slices)
        )

    def _add_mirror(self, name: str, mirror: FeatureMirror) -> None:
        rows, start, handle = self.shape.rows, self.shape.start, mirror._open()
        inputs, outputs = [[_of_native(tensor) for tensor in tensors] for tensors in (self.inputs, self.outputs)]
        slices = [[_of_native(tensor) for tensor in tensors] for tensors in self.slices]
        taps = [native_ffi.new("struct ggml_tensor *[]", tensors) for tensors in slices]

        def capture(step: int) -> None:
            for tap, tensor in enumerate(slices[step]):
                check(native.gm_mirror_write_tensor(handle, tap, start(step), tensor))

        def at_once(step: int) -> None:
            check(native.gm_mirror_write_taps(handle, start(step), taps[step]))

        def write(step: int) -> None:
            check(native.gm_mirror_write_tensor(handle, -1, start(step), inputs[step]))

        def read(step: int) -> None:
            check(native.gm_mirror_read_tensor(handle, start(step), rows, outputs[step]))

        self.calls["capture"][name], self.calls["at once"][name] = capture, at_once
        self.calls["write"][name], self.calls["read"][name] = write, read
        self.calls["array"][name] = lambda step: mirror.read(start=start(step), count=rows)

    def _add_stock(self) -> None:
        s, b = self.shape, self.backend
        row, tap = row_bytes(self.dtype, s.width), row_bytes(self.dtype, s.n_embd)
        self.ring = ring = b.tensor(b.arena(s.cap * row), self.dtype.ggml_type, s.width, s.cap)
        views = [ggml.ggml_view_2d(b.ctx, ring, s.n_embd, s.cap, row, i * tap) for i in range(s.taps)]
        capture, at_once, write, read = [], [], [], []
        for step in range(s.steps):
            where, which = b.indices(I64, s.start(step), s.rows), b.indices(I32, s.start(step), s.rows)
            pairs = list(zip(views, self.slices[step], strict=True))
            capture.append([b.graph(ggml.ggml_set_rows(b.ctx, view, source, where)) for view, source in pairs])
            at_once.append(b.graph(*(ggml.ggml_set_rows(b.ctx, view, source, where) for view, source in pairs)))
            write.append(b.graph(ggml.ggml_set_rows(b.ctx, ring, self.inputs[step], where)))
            rows = ggml.ggml_get_rows(b.ctx, ring, which)
            read.append(b.graph(self.output.place(rows, step % s.sources * s.rows * s.row_bytes)))
        self.calls["capture"]["stock"] = lambda step: b.compute(*capture[step])
        self.calls["at once"]["stock"] = lambda step: b.compute(at_once[step])
        self.calls["write"]["stock"] = lambda step: b.compute(write[step])
        self.calls["read"]["stock"] = lambda step: b.compute(read[step])

    def _add_copy(self) -> None:
        b = self.backend
        pairs = zip(self.inputs, self.outputs, strict=True)
        graphs = [b.graph(ggml.ggml_cpy(b.ctx, source, to)) for source, to in pairs]
        for operation in "capture", "at once", "write", "read":
            self.calls[operation]["copy"] = lambda step: b.compute(graphs[step])

    def _add_bounce(self) -> None:
        s, kind = self.shape, self.dtype.ggml_type
        row, tap_row = row_bytes(self.dtype, s.width), row_bytes(self.dtype, s.n_embd)
        floats, stored = np.empty(s.rows * s.width, np.float32), np.empty(s.rows * row, np.uint8)
        host, bytes_ = ffi.from_buffer("float[]", floats), ffi.from_buffer("char[]", stored)
        to_float = ggml.ggml_get_type_traits(kind).to_float

        def capture(step: int) -> None:
            for tap, tensor in enumerate(self.slices[step]):
                ggml.ggml_backend_tensor_get(tensor, host, 0, s.rows * s.n_embd * 4)
                ggml.ggml_quantize_chunk(kind, host, bytes_, 0, s.rows, s.n_embd, ffi.NULL)
                at = s.start(step) * row + tap * tap_row
                ggml.ggml_backend_tensor_set_2d(self.ring, bytes_, at, tap_row, s.rows, row, tap_row)

        def read(step: int) -> None:
            ggml.ggml_backend_tensor_get(self.ring, bytes_, s.start(step) * row, s.rows * row)
            if to_float != ffi.NULL:
                to_float(bytes_, host, s.rows * s.width)
            data = host if to_float != ffi.NULL else bytes_
            ggml.ggml_backend_tensor_set(self.outputs[step], data, 0, s.rows * s.row_bytes)

        self.calls["capture"]["bounce"], self.calls["read"]["bounce"] = capture, read

    def _add_gguf(self, values: Rows) -> None:
        if self.dtype == FeatureDtype.F32:
            return  # gguf has nothing to do
        try:
            kind = gguf.GGMLQuantizationType[self.dtype.name]
            stored = gguf.quants.quantize(values, kind)
        except NotImplementedError:
            return
        count = self.shape.rows

        def at(step: int) -> slice:
            first = step * count % (len(values) - count + 1)
            return slice(first, first + count)

        for operation in "capture", "write":
            self.calls[operation]["gguf"] = lambda step: gguf.quants.quantize(values[at(step)], kind)
        for operation in "read", "array":
            self.calls[operation]["gguf"] = lambda step: gguf.quants.dequantize(stored[at(step)], kind)

    def warm_up(self) -> None:
        """Touch all memory, and see that each variant stored and read the same rows but for ties."""
        for operation, step in product(("write", "capture", "at once", "read"), range(self.shape.steps)):
            for variant, call in self.calls[operation].items():
                if variant not in SLOW or (variant == "bounce" and step == 0 and operation == "read"):
                    call(step)
        found = {}
        rows = min(self.shape.rows, 512)
        for variant in {"mirror", "checked", "stock", "bounce"} & self.calls["read"].keys():
            self.calls["read"][variant](0)
            found[variant] = np.empty((rows, self.shape.width), np.float32)
            data = ffi.from_buffer(found[variant])
            ggml.ggml_backend_tensor_get(self.outputs[0], data, 0, found[variant].nbytes)
        for variant in found:
            error = np.abs(found[variant] - found["mirror"]).mean() / np.abs(found["mirror"]).mean()
            if not error < 1e-3:
                raise SystemExit(f"{self.dtype}: the rows of {variant} differ from the mirror's by {error:.1%}")

    def run(self, rounds: int, tick: Callable[[], None]) -> list[Timing]:
        """``rounds`` rounds of every operation and variant; those that take long, in a few of them."""
        timings = {(o, v): Timing(self.dtype.value, self.shape, o, v) for o in OPERATIONS for v in self.calls[o]}
        steps = self.shape.steps
        seen = self._library_ns()
        for number in range(rounds):
            for operation in OPERATIONS:
                variants = list(self.calls[operation].items())
                turn = number % len(variants)
                for variant, call in variants[turn:] + variants[:turn]:
                    slow = SLOW.get(variant, SLOW["bounce"] if operation == "array" and self.on_device else rounds)
                    if number % max(rounds // slow, 1):
                        continue
                    # Far from where the calls before it were, so that none of its rows are in a cache.
                    place = list(timings).index((operation, variant))
                    step = (number + place * steps // len(timings)) % steps
                    start = time.perf_counter_ns()
                    call(step)
                    timing = timings[operation, variant]
                    timing.ns[number] = time.perf_counter_ns() - start
                    if variant == "mirror":
                        before, seen = seen, self._library_ns()
                        if operation in SINGLE_CALL:
                            timing.library_ns[number] = seen - before
            tick()
        return list(timings.values())

    def _library_ns(self) -> int:
        times = self.mirror.times()
        return times.write_ns + times.read_ns

    def close(self) -> None:
        self.calls.clear()  # they hold the mirrors' native handles
        self.mirror.close()
        self.checked.close()
        self.backend.close()


def _of_native(tensor: Tensor) -> Any:
    """The same pointer, of the type that ggml_mirror's own declarations know."""
    return native_ffi.cast("struct ggml_tensor *", int(ffi.cast("uintptr_t", tensor)))


# -------------------------------------------------------------------------------------------------------- results


@dataclass
class Timing:
    """Nanoseconds of one variant, by round: by the clock around the call, and of the mirror's single calls by its own."""

    dtype: str
    shape: Shape
    operation: str
    variant: str
    ns: dict[int, int] = field(default_factory=dict)
    library_ns: dict[int, int] = field(default_factory=dict)

    @property
    def median_us(self) -> float:
        return median(self.ns.values()) / 1e3

    @property
    def library_us(self) -> float | None:
        return median(self.library_ns.values()) / 1e3 if self.library_ns else None

    @property
    def n_bytes(self) -> int:
        """Read and written."""
        stored = self.shape.row_bytes if self.variant == "copy" else row_bytes(self.dtype, self.shape.width)
        return self.shape.rows * (self.shape.row_bytes + stored)

    @property
    def gb_per_s(self) -> float:
        return self.n_bytes / self.median_us / 1e3

    def speed_over(self, other: Timing) -> float:
        """How many times as fast as ``other``: the median over the rounds in which both ran."""
        return median(other.ns[number] / self.ns[number] for number in self.ns.keys() & other.ns.keys())

    def to_json(self) -> dict[str, Any]:
        spread = quantiles(self.ns.values(), n=4) if len(self.ns) > 1 else [*self.ns.values()] * 3
        return {
            "dtype": self.dtype,
            "rows": self.shape.rows,
            "cap": self.shape.cap,
            "operation": self.operation,
            "variant": self.variant,
            "rounds": len(self.ns),
            "median_us": self.median_us,
            "quartiles_us": [spread[0] / 1e3, spread[2] / 1e3],
            "library_us": self.library_us,
            "gb_per_s": self.gb_per_s,
        }


@dataclass(frozen=True)
class Comparison:
    """The mirror beside the other variants of an operation."""

    mirror: Timing
    others: dict[str, Timing]

    def ratio(self, variant: str) -> float | None:
        return self.mirror.speed_over(self.others[variant]) if variant in self.others else None

    @property
    def bandwidth(self) -> float | None:
        """Bytes per second, read and written, as a part of the copy's."""
        ratio = self.ratio("copy")
        return None if ratio is None else ratio * self.mirror.n_bytes / self.others["copy"].n_bytes


def compare(timings: list[Timing]) -> list[Comparison]:
    groups: dict[tuple[int, str, str], dict[str, Timing]] = {}
    for t in timings:
        groups.setdefault((t.shape.rows, t.operation, t.dtype), {})[t.variant] = t
    return [Comparison(group["mirror"], group) for group in groups.values()]


@dataclass(frozen=True)
class Goal:
    """``what`` of an operation is to be at least, or at most, ``wanted``."""

    dtype: str
    rows: int
    operation: str
    what: str
    wanted: float
    reached: float
    at_most: bool = False

    @property
    def met(self) -> bool:
        return self.reached <= self.wanted if self.at_most else self.reached >= self.wanted


def host_goals(c: Comparison) -> Iterator[Goal]:
    """512 rows and more: q8_0, f16, bf16 as fast as 0.9 x the stock op; q8_0 as 10 x gguf."""
    m = c.mirror
    if m.shape.rows < 512 or m.operation in ("array", "at once"):
        return
    for variant, dtypes, wanted in ("stock", ("q8_0", "f16", "bf16"), 0.9), ("gguf", ("q8_0",), 10.0):
        reached = c.ratio(variant)
        if m.dtype in dtypes and reached is not None:
            yield Goal(m.dtype, m.shape.rows, m.operation, f"x {variant}", wanted, reached)


def device_goals(c: Comparison) -> Iterator[Goal]:
    """8,192 rows: near the copy's bandwidth, and q8_0 read in less time than F32 rows are copied. 16 rows: soon, one call by the
    library's own clock."""
    m = c.mirror

    def goal(what: str, wanted: float, reached: float, at_most: bool = False) -> Goal:
        return Goal(m.dtype, m.shape.rows, m.operation, what, wanted, reached, at_most)

    captures, reads = m.operation in ("capture", "at once"), m.operation == "read"
    if m.shape.rows >= 8192 and (captures or reads) and c.bandwidth is not None:
        wanted = (
            {"q4_0": 0.7, "f16": 0.85, "bf16": 0.85, "q8_0": 0.85}
            if reads
            else {"q4_0": 0.7, "f32": 0.8, "f16": 0.8, "bf16": 0.8, "q8_0": 0.8}
        )
        if m.dtype in wanted:
            yield goal("of the copy's bandwidth", wanted[m.dtype], c.bandwidth)
        ratio = c.ratio("copy")
        if reads and m.dtype == "q8_0" and ratio:
            yield goal("of the copy's time", 0.7, 1 / ratio, at_most=True)
    what, took = ("us", m.median_us) if m.library_us is None else ("us in the library", m.library_us)
    if m.shape.rows == 16 and captures and m.dtype in ("f32", "f16", "bf16", "q8_0"):
        yield goal(what, 15, took, at_most=True)
    if m.shape.rows == 16 and reads and m.dtype in ("f16", "bf16", "q8_0"):
        yield goal(what, 10, took, at_most=True)


def goals(comparisons: list[Comparison], on_device: bool) -> list[Goal]:
    """What rows of 25,600 are to reach."""
    wanted = device_goals if on_device else host_goals
    return [goal for c in comparisons if c.mirror.shape.width == 25600 for goal in wanted(c)]


def result_table(comparisons: list[Comparison], markdown: bool, on_device: bool) -> Table:
    variants = ("copy", "stock", "checked", "bounce" if on_device else "gguf")
    table = Table(box=box.MARKDOWN if markdown else box.SIMPLE_HEAD)
    names = ("rows", "operation", "dtype", "us", "in library us", "us / row", "GB/s", "of copy's")
    for name in (*names, *(f"x {v}" for v in variants)):
        table.add_column(name, justify="left" if name in ("operation", "dtype") else "right", no_wrap=True)
    for c in sorted(comparisons, key=lambda c: (c.mirror.shape.rows, OPERATIONS.index(c.mirror.operation))):
        m = c.mirror
        ratios = [c.ratio(variant) for variant in variants]
        table.add_row(
            *(str(m.shape.rows), m.operation, m.dtype),
            f"{m.median_us:,.1f}",
            "" if m.library_us is None else f"{m.library_us:,.1f}",
            *(f"{m.median_us / m.shape.rows:.2f}", f"{m.gb_per_s:.2f}"),
            "" if c.bandwidth is None else f"{c.bandwidth:.0%}",
            *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
        )
    return table


def plot(comparisons: list[Comparison], title: str, path: Path) -> None:
    """GB/s of each variant by dtype, for the largest row count: capture and read."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = max(c.mirror.shape.rows for c in comparisons)
    figure = Figure(figsize=(9, 6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{rows} rows, {title}")
    colours = {
        "mirror": "#2563a8",
        "checked": "#8fb3d9",
        "stock": "#b4471f",
        "copy": "#6b7280",
        "gguf": "#c9a227",
        "bounce": "#c9a227",
    }
    variants = {v: colour for v, colour in colours.items() if any(v in c.others for c in comparisons)}
    for axes, operation in zip(figure.subplots(2, 1), ("capture", "read"), strict=True):
        shown = [c for c in comparisons if c.mirror.shape.rows == rows and c.mirror.operation == operation]
        for i, (variant, colour) in enumerate(variants.items()):
            places = [place for place, c in enumerate(shown) if variant in c.others]
            heights = [shown[place].others[variant].gb_per_s for place in places]
            axes.bar([place + (i - 2) * 0.16 for place in places], heights, 0.15, label=variant, color=colour)
        axes.set_xticks(range(len(shown)), [c.mirror.dtype for c in shown])
        axes.set_ylabel(f"{operation}, GB/s (read + written)")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    write_atomically(path, lambda file: figure.savefig(file, format=path.suffix.lstrip(".") or "png"))


# ---------------------------------------------------------------------------------------------------- command line


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _cpu_seconds() -> tuple[float, float] | None:
    """CPU time that this machine, and this process, have used so far; None where /proc does not say."""
    try:
        fields = Path("/proc/stat").read_text().split("\n")[0].split()[1:8]
    except OSError:
        return None
    user, nice, system, _, _, irq, softirq = map(int, fields)
    own = os.times()
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK"), own.user + own.system


def _cores_of_others(since: tuple[float, float] | None, seconds: float) -> float | None:
    now = _cpu_seconds()
    if since is None or now is None:
        return None
    return max((now[0] - since[0]) - (now[1] - since[1]), 0.0) / seconds


def main(
    width: Annotated[int, typer.Option(help="Values per row.")] = 25600,
    taps: Annotated[int, typer.Option(help="Slices per row.")] = 5,
    rows: Annotated[str, typer.Option(help="Rows at a time, comma-separated.")] = "16,512,2048",
    cap: Annotated[int, typer.Option(help="Slots of the ring, rounded down to a multiple of rows.")] = 4096,
    ring: Annotated[
        str, typer.Option(help="Bytes of the ring at least, such as 4GiB; takes more slots if need be.")
    ] = "0",
    dtypes: Annotated[str, typer.Option(help="Comma-separated.")] = "f32,f16,bf16,q8_0,q5_1,q4_0",
    device: Annotated[str, typer.Option(help="cpu, auto, or a ggml device name such as CUDA0.")] = "cpu",
    repeat: Annotated[int, typer.Option(help="Rounds.", min=3)] = 31,
    threads: Annotated[int, typer.Option(help="Threads on host devices; 0: all cores.", min=0)] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every figure to this file.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw a picture (.png, .svg, .pdf).")] = None,
    markdown: Annotated[bool, typer.Option(help="Print the table as Markdown.")] = False,
    strict: Annotated[bool, typer.Option(help="Exit with status 1 if a goal is missed.")] = False,
) -> None:
    """Time capture and read of feature rows beside an F32 copy, stock ggml ops, and numpy through gguf.

    "in library us" is the mirror's own clock in operations of one call. On a GPU the goals for 16 rows, "at once" and "read", are judged by
    it: a decoding loop calls the library from native code, not from Python. All other figures are by the clock around the call.
    """
    for file in filter(None, (json_file, plot_file)):
        check_writable(file)
    found, n_threads = find_device(device), threads or os.cpu_count() or 1
    wanted = [FeatureDtype.parse(name) for name in dtypes.split(",")]
    counts = [int(count) for count in rows.split(",")]
    ring_bytes = parse_bytes(ring)
    if width % taps or not all(count > 0 for count in counts):
        raise typer.BadParameter("width must be a multiple of taps, and rows positive")

    # As features are: unlike in size from row to row, a few channels far above the rest.
    rng = np.random.default_rng(0)
    values = rng.standard_normal((max(counts), width), np.float32) * rng.lognormal(0, 1, (max(counts), 1)).astype(
        np.float32
    )
    values[:, :: width // 16] *= 100

    timings: list[Timing] = []
    before, start = _cpu_seconds(), time.monotonic()
    console = Console(width=None if Console().is_terminal else 140)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(counts) * len(wanted) * repeat)
        for count, dtype in product(counts, wanted):
            progress.update(task, description=f"{count} rows, {dtype}")
            slots = max(cap // count, -(-ring_bytes // (row_bytes(dtype, width) * count)), 1) * count
            shape = Shape(taps, width // taps, count, slots)
            bench = Bench(shape, dtype, found, n_threads, values)
            bench.warm_up()
            timings += bench.run(repeat, lambda: progress.advance(task))
            bench.close()

    others = _cores_of_others(before, time.monotonic() - start)
    comparisons = compare(timings)
    name = (
        f"{_processor()}, {n_threads} thread{'s' * (n_threads > 1)}"
        if found.is_host
        else f"{found.name}: {found.description}"
    )
    console.print(f"{name}; rows of {taps} x {width // taps}; medians of {repeat} rounds; x: how many times as fast")
    if others is not None:
        console.print(f"other processes kept {others:.2f} cores busy")
    console.print(result_table(comparisons, markdown, not found.is_host))
    reached = goals(comparisons, not found.is_host)
    for goal in reached:
        verdict = "[green]PASS" if goal.met else "[red]FAIL"
        console.print(
            f"{verdict}[/] {goal.operation} of {goal.rows} rows, {goal.dtype}: {goal.reached:.2f} {goal.what}, "
            f"goal {'at most' if goal.at_most else 'at least'} {goal.wanted:g}"
        )
    if json_file:
        versions = ggml_versions()
        report = {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "device": found.name,
            "device_description": _processor() if found.is_host else found.description,
            "threads": n_threads,
            "cores_of_others": others,
            "width": width,
            "taps": taps,
            "ggml_mirror": __version__,
            "ggml": f"{versions.loaded} ({versions.loaded_commit})",
            "llama_cpp": llama_cpp.__version__,
            "timings": [timing.to_json() for timing in timings],
            "ratios": [
                {
                    "dtype": c.mirror.dtype,
                    "rows": c.mirror.shape.rows,
                    "operation": c.mirror.operation,
                    "bandwidth_of_copy": c.bandwidth,
                    **{f"x_{variant}": c.ratio(variant) for variant in c.others if variant != "mirror"},
                }
                for c in comparisons
            ],
            "goals": [{**asdict(goal), "met": goal.met} for goal in reached],
        }
        write_json(report, str(json_file))
    if plot_file:
        plot(comparisons, name, plot_file)
    if strict and not all(goal.met for goal in reached):
        raise typer.Exit(1)


if __name__ == "__main__":
    run_script(main)
