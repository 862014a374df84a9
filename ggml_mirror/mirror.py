"""The feature mirror: a ring of rows in a ggml backend buffer."""

from __future__ import annotations

import ctypes
import operator
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ._native import check, ffi, lib, text
from .device import Device, find_device
from .dtype import FeatureDtype
from .errors import ArgumentError, ClosedError, MirrorMemoryError, ShapeError, SnapshotError
from .row_kind import FUSED, RAW, parse_rows

if TYPE_CHECKING:
    from .snapshot import Snapshot
    from .token_log import TokenLog

Rows = npt.NDArray[np.float32]

#: Most slots that a mirror can have.
MAX_CAP = 2**31 - 1


@dataclass(frozen=True)
class MirrorSize:
    """Bytes that a mirror takes: ``ring`` on its device, ``staging`` at most beside it, ``bookkeeping`` in host memory; of that, at most
    ``pinned`` more for snapshots (0 on host devices)."""

    row: int
    ring: int
    staging: int
    bookkeeping: int
    pinned: int


@dataclass(frozen=True)
class TapStats:
    """What one tap's writes have met. ``nan`` values are stored as 0; ``inf`` and ``overflow`` (finite, beyond
    ``FeatureDtype.limit``) as the limit with their sign. ``over_f16``: finite, ``|x| > 65504``, whatever the dtype.
    ``abs_max``: largest finite ``|x|``, NaN on paths that do not measure it."""

    values: int
    nan: int
    inf: int
    overflow: int
    over_f16: int
    abs_max: float


@dataclass(frozen=True)
class MirrorTransfers:
    """What snapshots and restores have moved: calls, copies between device and host (one for neighbouring slots: two at most for a range of
    positions) and storage bytes. ``pinned_copies``: those of both to or from pinned memory, of which the device's mirrors hold
    ``pinned_bytes`` now. ``unpinned``: why none was given when last asked for, or ""."""

    save_calls: int
    save_copies: int
    save_bytes: int
    load_calls: int
    load_copies: int
    load_bytes: int
    pinned_copies: int
    pinned_bytes: int
    unpinned: str


@dataclass(frozen=True)
class MirrorTimes:
    """Calls, rows and nanoseconds of the write and the read path."""

    write_calls: int
    write_rows: int
    write_ns: int
    read_calls: int
    read_rows: int
    read_ns: int


@dataclass(frozen=True)
class BusBytes:
    """Feature bytes that crossed between host memory and the memory of devices.

    Rows that are written, read, saved or restored count, as F32 or as they are stored; so does what a mirror in host memory takes from
    a tensor on a device. What devices copy among themselves does not, nor do slots and statistics, which are no features.
    """

    to_host: int
    to_device: int


def bus_bytes() -> BusBytes:
    """What the rows of all mirrors of this process have sent across so far, those of a fuser's staging included.

    Example::

        before = bus_bytes()
        llm.create_completion("def fibonacci(n):", max_tokens=64)
        assert bus_bytes() == before  # target, draft and mirror lie on one device
    """
    total = lib.gm_bus_total()
    return BusBytes(total.to_host, total.to_device)


def mirror_size(
    taps: int,
    n_embd: int,
    cap: int,
    dtype: str | FeatureDtype | None = None,
    device_index: int = 0,
    *,
    ggml_ops: bool = False,
) -> MirrorSize:
    """The bytes that :class:`FeatureMirror` would allocate: the allocator's own arithmetic, without allocating."""
    size = ffi.new("gm_mirror_size *")
    check(
        lib.gm_mirror_size_of(_params(taps, n_embd, cap, FeatureDtype.resolve(dtype), device_index, 0, ggml_ops), size)
    )
    return _size_of(size)


class FeatureMirror:
    """A ring of ``cap`` rows, each the features of one token position: ``taps`` slices of ``n_embd`` values.

    Position ``p`` lives in slot ``p % cap``; the last write to a slot wins. Values that the dtype cannot hold are replaced
    and counted (:class:`TapStats`), so that no block is poisoned. Safe to use from several threads: calls run one at a time.

    Args:
        taps: slices per row, 1 to 64.
        n_embd: values per slice, a multiple of the dtype's block size.
        cap: slots.
        dtype: how rows are stored; None takes ``DFLASH_FEATURE_DTYPE``, else f32.
        device: "cpu", "auto" (first GPU, else CPU) or a ggml device name such as "CUDA0".
        n_threads: threads for conversions on host devices; 0 takes all cores.
        target: fingerprint of the model that the rows come from, kept in snapshots.
        draft: fingerprint of the draft that reads them, kept in snapshots.
        ggml_ops: use stock ggml graph ops even where this library has its own loops (for comparison).
        rows: what a row holds, kept in snapshots: "raw", the tapped outputs, or "fused", what a draft makes of them (one tap).

    Raises:
        ArgumentError, DtypeError, ShapeError, DeviceError, UnsupportedError: what was asked for cannot be.
        MirrorMemoryError: it does not fit; names the bytes needed and free, and what would fit.

    Example:
        >>> import numpy as np
        >>> x = np.ones((3, 64), np.float32)
        >>> with FeatureMirror(taps=2, n_embd=64, cap=16, dtype="q8_0") as m:
        ...     m.write(tap=0, start=0, rows=x)
        ...     m.write(tap=1, start=0, rows=2 * x)
        ...     m.read(start=0, count=3).shape
        (3, 128)
    """

    def __init__(
        self,
        *,
        taps: int,
        n_embd: int,
        cap: int,
        dtype: str | FeatureDtype | None = None,
        device: str = "cpu",
        n_threads: int = 0,
        target: str | None = None,
        draft: str | None = None,
        ggml_ops: bool = False,
        rows: str = RAW,
    ) -> None:
        self._handle: Any = None
        self.rows = parse_rows(rows)
        self._lock = threading.RLock()
        #: Tokens whose features capture has written, by position; None: nobody has said.
        self._tokens: TokenLog | None = None
        #: Model and blocks that capture has written from.
        self._source: tuple[str, tuple[int, ...]] | None = None
        self.dtype = FeatureDtype.resolve(dtype)
        self.device: Device = find_device(device)
        self.taps, self.n_embd, self.cap = _index(taps, "taps"), _index(n_embd, "n_embd"), _index(cap, "cap")
        self.target, self.draft = target, draft
        if self.rows == FUSED and self.taps != 1:
            raise ArgumentError(f"fused rows have one tap, of the draft's n_embd; this mirror has {self.taps}")
        if self.cap > MAX_CAP:
            self._refuse_beyond_memory(ggml_ops)
        params = _params(
            self.taps, self.n_embd, self.cap, self.dtype, self.device.index, _index(n_threads, "n_threads"), ggml_ops
        )
        size = ffi.new("gm_mirror_size *")
        check(lib.gm_mirror_size_of(params, size))
        self.size = _size_of(size)
        out = ffi.new("gm_mirror **")
        try:
            check(lib.gm_mirror_new(params, out))
        except MirrorMemoryError as error:
            raise self._with_advice(error, ggml_ops) from None
        self._handle = ffi.gc(out[0], lib.gm_mirror_free, size=self.nbytes if self.device.is_host else 0)

    def _refuse_beyond_memory(self, ggml_ops: bool) -> None:
        """A cap beyond what the native library counts with is first of all beyond memory."""
        row, free = mirror_size(self.taps, self.n_embd, 1, self.dtype, self.device.index).row, self.device.memory_free
        if row * self.cap > free:
            error = MirrorMemoryError(
                f"{self.cap} rows of {row} bytes ({self.dtype}) need {row * self.cap} bytes on {self.device.name}, "
                f"which has {free} free",
                bytes_needed=row * self.cap,
                bytes_free=free,
            )
            raise self._with_advice(error, ggml_ops)

    def _with_advice(self, error: MirrorMemoryError, ggml_ops: bool) -> MirrorMemoryError:
        """The same error with what would fit instead, by the allocator's own arithmetic."""
        from .plan import fitting_dtypes, format_bytes, largest_cap

        sizes = f"needed {format_bytes(error.bytes_needed)}, free {format_bytes(error.bytes_free)}"
        if error.bytes_needed <= error.bytes_free:  # refused all the same, for what may be any reason
            message = f"{error} ({sizes}); try a smaller cap, another dtype or another device"
            return MirrorMemoryError(message, bytes_needed=error.bytes_needed, bytes_free=error.bytes_free)
        fitting: tuple[FeatureDtype, ...] = ()
        if self.cap <= MAX_CAP:
            fitting = fitting_dtypes(self.taps, self.n_embd, self.cap, error.bytes_free, self.device, ggml_ops=ggml_ops)
        cap = largest_cap(self.taps, self.n_embd, self.dtype, error.bytes_free, self.device, ggml_ops=ggml_ops)
        advice = [f"{self.dtype} fits with cap {cap}" if cap else f"not one row of {self.dtype} fits"]
        if fitting:
            advice.append(f"cap {self.cap} fits as {', '.join(fitting)}")
        message = f"{error} ({sizes}); {'; '.join(advice)}"
        return MirrorMemoryError(
            message, bytes_needed=error.bytes_needed, bytes_free=error.bytes_free, max_cap=cap, fitting_dtypes=fitting
        )

    # ------------------------------------------------------------------ facts

    @property
    def width(self) -> int:
        """Values per row: ``taps * n_embd``."""
        return self.taps * self.n_embd

    @property
    def row_nbytes(self) -> int:
        """Bytes of one stored row."""
        return self.size.row

    @property
    def nbytes(self) -> int:
        """Bytes of the ring."""
        return self.size.ring

    @property
    def closed(self) -> bool:
        return self._handle is None

    @property
    def positions(self) -> npt.NDArray[np.int64]:
        """Positions that can be read (every tap written), ascending."""
        return self._live(complete_only=True)[0]

    def __len__(self) -> int:
        return len(self.positions)

    def __repr__(self) -> str:
        shape = f"{self.taps} x {self.n_embd}, cap {self.cap}, {self.dtype} on {self.device.name}"
        if self.closed:
            return f"<FeatureMirror {shape}: closed>"
        held = self.positions
        what = f"positions {held[0]}..{held[-1]} ({len(held)} rows)" if len(held) else "empty"
        return f"<FeatureMirror {shape}, {self.nbytes} bytes: {what}>"

    # ------------------------------------------------------- the one write path

    def write(self, *, tap: int, start: int, rows: Rows) -> None:
        """Write a tap's slices of positions ``start..``.

        Args:
            tap: 0 to ``taps - 1``.
            start: position of the first row.
            rows: float32 ``[n, n_embd]``; rows need not be adjacent in memory, any other layout is copied first.
                Of more than ``cap`` rows the last ``cap`` are kept.

        Raises:
            ArgumentError, ShapeError: nothing was changed.
        """
        tap = _index(tap, "tap")
        if not 0 <= tap < self.taps:
            raise ArgumentError(f"tap {tap} is out of range; this mirror has taps 0 to {self.taps - 1}")
        self._write(tap, start, rows, self.n_embd)

    def write_rows(self, *, start: int, rows: Rows) -> None:
        """Write whole rows, float32 ``[n, taps * n_embd]``; otherwise as :meth:`write`."""
        self._write(-1, start, rows, self.width)

    def _write(self, tap: int, start: int, rows: Rows, width: int) -> None:
        rows = _checked_rows(rows, width)
        with self._lock:
            pointer = ffi.cast("const float *", rows.ctypes.data)
            check(
                lib.gm_mirror_write(
                    self._open(), tap, _int64(start, "start"), len(rows), pointer, max(rows.strides[0], 0)
                )
            )

    def write_tensor(self, tensor: Any, *, start: int, tap: int | None = None) -> None:
        """Write from an F32 ggml tensor on any device.

        Args:
            tensor: address of a ``ggml_tensor``, ``[n_embd, n]`` for a tap, ``[taps * n_embd, n]`` for whole rows (``tap=None``).
        """
        if tap is not None and not 0 <= _index(tap, "tap") < self.taps:
            raise ArgumentError(f"tap {tap} is out of range; this mirror has taps 0 to {self.taps - 1}")
        with self._lock:
            handle = self._open()
            check(
                lib.gm_mirror_write_tensor(
                    handle, -1 if tap is None else int(tap), _int64(start, "start"), _tensor(tensor)
                )
            )

    def write_taps(self, tensors: Sequence[Any], *, start: int) -> None:
        """Write all taps of the same positions, from one F32 ggml tensor ``[n_embd, n]`` per tap, on any device.

        The same as :meth:`write_tensor` for each tap; on a GPU with kernels of this library it is one launch, which for a few
        rows costs a fifth of five.
        """
        if len(tensors) != self.taps:
            raise ArgumentError(f"{len(tensors)} tensors given; this mirror has {self.taps} taps")
        with self._lock:
            handle = self._open()
            rows = ffi.new(_TENSORS, [_tensor(tensor) for tensor in tensors])
            check(lib.gm_mirror_write_taps(handle, _int64(start, "start"), rows))

    # -------------------------------------------------------- the one read path

    def read(self, *, start: int, count: int) -> Rows:
        """Rows ``start..start + count - 1`` as float32 ``[count, taps * n_embd]``.

        Raises:
            StaleRowError: names the first position that is missing, partial or overwritten.
        """
        start, count = self._range(start, count)
        with self._lock:
            handle = self._open()
            # A count beyond cap cannot be whole: let the native check name the position before allocating for it.
            out = np.empty((min(count, self.cap), self.width), np.float32)
            check(lib.gm_mirror_read(handle, start, count, ffi.cast("float *", out.ctypes.data)))
        return out

    def read_tensor(self, tensor: Any, *, start: int, count: int) -> None:
        """Read into a contiguous F32 ggml tensor ``[taps * n_embd, >= count]`` on the mirror's device."""
        start, count = self._range(start, count)
        with self._lock:
            check(lib.gm_mirror_read_tensor(self._open(), start, count, _tensor(tensor)))

    def view(self, *, start: int, count: int) -> Rows:
        """The rows in place, read-only float32 ``[count, taps * n_embd]``: only f32, in host memory, not wrapped, complete.

        The array shows the ring itself: it is good until a position of the range is written again or forgotten. It keeps the
        ring's memory alive, also after :meth:`close`.

        Raises:
            ViewError: the rows cannot be used in place; use :meth:`read`.
            StaleRowError: as in :meth:`read`.
        """
        start, count = self._range(start, count)
        with self._lock:
            handle = self._open()
            pointer = ffi.new("const float **")
            check(lib.gm_mirror_view(handle, start, count, pointer))
            # The handle in a closure keeps the native mirror alive as long as the buffer, hence the array, lives.
            memory = ffi.gc(ffi.cast("float *", pointer[0]), lambda _, keep=handle: None)
            # Read-only at its root: numpy would let the flag of an array over a writable buffer be set back.
            buffer = memoryview(ffi.buffer(memory, count * self.width * 4)).toreadonly()
            return np.frombuffer(buffer, np.float32).reshape(count, self.width)

    # ---------------------------------------------------------------- validity

    def truncate(self, start: int) -> None:
        """Forget positions >= ``start``."""
        with self._lock:
            check(lib.gm_mirror_truncate(self._open(), _int64(start, "start")))

    def clear(self) -> None:
        """Forget every position."""
        with self._lock:
            check(lib.gm_mirror_clear(self._open()))
            self._tokens = None

    def _live(self, *, complete_only: bool) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint64]]:
        """Live positions, ascending, and the bit masks of their written taps."""
        with self._lock:
            handle = self._open()
            count = ffi.new("int64_t *")
            check(lib.gm_mirror_live(handle, complete_only, 0, ffi.NULL, ffi.NULL, count))
            positions, masks = np.empty(count[0], np.int64), np.empty(count[0], np.uint64)
            check(
                lib.gm_mirror_live(
                    handle,
                    complete_only,
                    len(positions),
                    ffi.cast("int64_t *", positions.ctypes.data),
                    ffi.cast("uint64_t *", masks.ctypes.data),
                    count,
                )
            )
        n = min(len(positions), count[0])  # a capture on another thread may have come in between
        return positions[:n], masks[:n]

    # ---------------------------------------------------- snapshot and restore

    def snapshot(self) -> Snapshot:
        """The live rows in storage bytes, with a header. See :class:`ggml_mirror.snapshot.Snapshot`."""
        from .snapshot import Snapshot

        return Snapshot.take(self)

    def restore(self, snapshot: Snapshot) -> None:
        """Become the mirror that the snapshot was taken of.

        Raises:
            SnapshotMismatchError: it is of another dtype, shape, cap, target or draft; nothing was changed.
        """
        from .snapshot import Snapshot

        if not isinstance(snapshot, Snapshot):
            raise SnapshotError(f"a mirror is restored from a Snapshot, not from {type(snapshot).__name__}")
        snapshot.put(self)

    def _new_rows(self, count: int) -> npt.NDArray[np.uint8]:
        """Room for stored rows, uint8 ``[count, row_nbytes]``: pinned if the device has such memory to give, else any.

        Pinned memory goes back to its pool, to be used again, with the last array over it; also after :meth:`close`.
        """
        out, data = ffi.new("gm_host_rows **"), ffi.new("uint8_t **")
        check(lib.gm_host_rows_new(self._open(), count * self.row_nbytes, out, data))
        if out[0] == ffi.NULL:
            return np.empty((count, self.row_nbytes), np.uint8)
        owner = ffi.gc(out[0], lib.gm_host_rows_free, size=count * self.row_nbytes)
        # The owner in a closure lives as long as the buffer, hence the array.
        memory = ffi.gc(data[0], lambda _, keep=owner: None)
        rows = np.frombuffer(ffi.buffer(memory, count * self.row_nbytes), np.uint8)
        return rows.reshape(count, self.row_nbytes)

    # ------------------------------------------------------------- measurements

    def tap_stats(self, tap: int) -> TapStats:
        """Counts since the mirror was made, or :meth:`reset_stats`."""
        with self._lock:
            stats = ffi.new("gm_tap_stats *")
            check(lib.gm_mirror_tap_stats(self._open(), _int32(tap, "tap"), stats))
        return TapStats(stats.values, stats.nan, stats.inf, stats.overflow, stats.over_f16, stats.abs_max)

    def times(self) -> MirrorTimes:
        """Time spent in the write and read paths since the mirror was made, or :meth:`reset_stats`."""
        with self._lock:
            times = ffi.new("gm_mirror_times *")
            check(lib.gm_mirror_get_times(self._open(), times))
        return MirrorTimes(*(getattr(times, name) for name in MirrorTimes.__dataclass_fields__))

    def transfers(self) -> MirrorTransfers:
        """What snapshots and restores have moved since the mirror was made, or :meth:`reset_stats`."""
        with self._lock:
            out = ffi.new("gm_mirror_transfers *")
            check(lib.gm_mirror_get_transfers(self._open(), out))
        values: dict[str, Any] = {name: getattr(out, name) for name in MirrorTransfers.__dataclass_fields__}
        return MirrorTransfers(**{**values, "unpinned": text(out.unpinned)})

    def bus(self) -> BusBytes:
        """Feature bytes of this mirror that crossed since it was made, or :meth:`reset_stats`."""
        with self._lock:
            bus = ffi.new("gm_bus_bytes *")
            check(lib.gm_mirror_get_bus(self._open(), bus))
        return BusBytes(bus.to_host, bus.to_device)

    def reset_stats(self) -> None:
        with self._lock:
            check(lib.gm_mirror_reset_stats(self._open()))

    # ------------------------------------------------------------------ lifetime

    def close(self) -> None:
        """Free the ring (once no view of it is left). Closing twice is harmless; any other use afterwards raises ClosedError."""
        with self._lock:
            self._handle = None

    def __enter__(self) -> FeatureMirror:
        self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> Any:
        if self._handle is None:
            raise ClosedError("this FeatureMirror is closed; make a new one")
        return self._handle

    def _range(self, start: int, count: int) -> tuple[int, int]:
        start, count = _int64(start, "start"), _int64(count, "count")
        if start < 0 or count < 0:
            raise ArgumentError(f"start {start} and count {count} must not be negative")
        return start, count


def _size_of(size: Any) -> MirrorSize:
    return MirrorSize(*(getattr(size, name) for name in MirrorSize.__dataclass_fields__))


def _params(taps: int, n_embd: int, cap: int, dtype: FeatureDtype, device: int, n_threads: int, ggml_ops: bool) -> Any:
    params = ffi.new("gm_mirror_params *")
    params.device, params.type = device, dtype.ggml_type
    params.taps = _int32(taps, "taps")
    params.n_embd, params.cap = _int64(n_embd, "n_embd"), _int64(cap, "cap")
    params.n_threads, params.ggml_ops = _int32(n_threads, "n_threads"), ggml_ops
    return params


def _checked_rows(rows: Rows, width: int) -> Rows:
    if not isinstance(rows, np.ndarray):
        raise ShapeError(f"rows must be a numpy array, not {type(rows).__name__}")
    if rows.dtype != np.float32:
        raise ShapeError(f"rows must be float32, not {rows.dtype}; convert them with rows.astype(numpy.float32)")
    if rows.ndim != 2 or rows.shape[1] != width:
        raise ShapeError(f"rows must have shape [n, {width}], not {list(rows.shape)}")
    # In place: aligned rows of adjacent values, apart from one another. Windows and broadcasts are closer, views of records crooked.
    aligned = rows.flags.aligned and rows.strides[0] % 4 == 0
    if not aligned or rows.strides[1] != 4 or (len(rows) > 1 and rows.strides[0] < 4 * width):
        return np.array(rows, np.float32, order="C")
    return rows


_TENSOR, _TENSORS = ffi.typeof("struct ggml_tensor *"), ffi.typeof("struct ggml_tensor *[]")


def _tensor(tensor: Any) -> Any:
    """A ``struct ggml_tensor *`` from an address, a ctypes pointer or a cffi pointer."""
    if type(tensor) is int and 0 < tensor < 2**64:
        return ffi.cast(_TENSOR, tensor)
    if isinstance(tensor, ffi.CData) and ffi.typeof(tensor).kind == "pointer":
        return ffi.cast(_TENSOR, tensor)
    if isinstance(tensor, (ctypes._Pointer, ctypes.c_void_p)):
        tensor = ctypes.cast(tensor, ctypes.c_void_p).value
    if tensor is None or (type(tensor) is int and tensor == 0):
        raise ArgumentError("tensor is a null pointer")
    if type(tensor) is not int or not 0 < tensor < 2**64:
        raise ArgumentError(f"a tensor is given by its address or a pointer, not by {tensor!r:.80}")
    return ffi.cast(_TENSOR, tensor)


def _index(value: int, name: str) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ArgumentError(f"{name} must be an integer, not {value!r}") from None


def _bounded(value: int, name: str, bits: int) -> int:
    number = _index(value, name)
    if not -(2 ** (bits - 1)) <= number < 2 ** (bits - 1):
        raise ArgumentError(f"{name} is {number}, beyond {bits} bits")
    return number


def _int32(value: int, name: str) -> int:
    return _bounded(value, name, 32)


def _int64(value: int, name: str) -> int:
    return _bounded(value, name, 64)
