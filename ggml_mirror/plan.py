"""How many bytes a mirror takes, before one is made: exact, per dtype and device.

Every figure comes from :func:`ggml_mirror.mirror.mirror_size`, the function that the allocator itself uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .byte_size import format_bytes, parse_bytes
from .device import Device, devices, find_device
from .dtype import FeatureDtype
from .errors import ArgumentError, ShapeError
from .ladder import SOURCE, TAU, Rung, candidates, choose, default_margin, descending, to_json
from .mirror import MAX_CAP, MirrorSize, mirror_size
from .row_kind import FUSED, RAW, parse_rows

__all__ = [
    "MAX_CAP",
    "DevicePlan",
    "DtypeFit",
    "DtypePlan",
    "Ladder",
    "Plan",
    "device_bytes",
    "fitting_dtypes",
    "format_bytes",
    "largest",
    "largest_cap",
    "parse_bytes",
    "plan",
    "usable_dtypes",
]


_MICRO_BATCH = 512  # llama.cpp's n_ubatch unless told otherwise: of raw rows, no more wait to be fused


@dataclass(frozen=True)
class DtypeFit:
    """One dtype on one device.

    Attributes:
        bytes: what the mirror would allocate from this device's memory.
        fits: ``bytes`` is not more than the device has free.
        supported: the device can both capture rows into this dtype and read them back.
        max_cap: largest ``cap`` whose bytes fit into what is free.
    """

    bytes: int
    fits: bool
    supported: bool
    max_cap: int


@dataclass(frozen=True)
class DevicePlan:
    """A device, its memory in bytes, and each planned dtype on it."""

    name: str
    description: str
    memory_free: int
    memory_total: int
    dtypes: dict[FeatureDtype, DtypeFit]

    @property
    def fitting(self) -> tuple[FeatureDtype, ...]:
        """The dtypes that fit and are supported, most precise first."""
        return tuple(d for d, fit in self.dtypes.items() if fit.fits and fit.supported)


@dataclass(frozen=True)
class DtypePlan:
    """One dtype, whatever the device.

    Attributes:
        row_bytes: one stored row.
        ring_bytes: ``cap`` stored rows.
        max_cap: largest ``cap`` whose ring fits into the budget; None without a budget.
    """

    dtype: FeatureDtype
    row_bytes: int
    ring_bytes: int
    max_cap: int | None


@dataclass(frozen=True)
class Ladder:
    """What "auto" would choose from for such a mirror, and what it would choose.

    Attributes:
        device: whose memory it was held against; "" for a budget.
        sizes: bytes of mirror and waiting raw rows, most precise first.
        reason: why that rung, or none, in a sentence with the numbers.
        waiting: raw rows that the fused rungs have beside them. At most: where taps are taken together, 128 will do.
    """

    device: str
    sizes: dict[Rung, int]
    chosen: Rung | None
    reason: str
    waiting: int = 0


@dataclass(frozen=True)
class Plan:
    """What :func:`plan` found."""

    taps: int
    n_embd: int
    cap: int
    budget: int | None
    dtypes: tuple[DtypePlan, ...]
    devices: tuple[DevicePlan, ...]
    rows: str = RAW
    notes: tuple[str, ...] = field(default=())
    ladder: Ladder | None = None

    @property
    def width(self) -> int:
        return self.taps * self.n_embd

    def __getitem__(self, dtype: str | FeatureDtype) -> DtypePlan:
        wanted = FeatureDtype.parse(dtype)
        for entry in self.dtypes:
            if entry.dtype is wanted:
                return entry
        raise KeyError(f"{wanted} is not in this plan; it has {', '.join(e.dtype.value for e in self.dtypes)}")

    def to_json(self) -> dict[str, Any]:
        """As JSON-ready values; all sizes in bytes."""
        return {
            "rows": self.rows,
            "taps": self.taps,
            "n_embd": self.n_embd,
            "width": self.width,
            "cap": self.cap,
            "budget_bytes": self.budget,
            "dtypes": {
                e.dtype.value: {"row_bytes": e.row_bytes, "ring_bytes": e.ring_bytes, "max_cap_in_budget": e.max_cap}
                for e in self.dtypes
            },
            "devices": [
                {
                    "name": d.name,
                    "description": d.description,
                    "memory_free": d.memory_free,
                    "memory_total": d.memory_total,
                    "fitting_dtypes": [x.value for x in d.fitting],
                    "dtypes": {
                        x.value: {"bytes": f.bytes, "fits": f.fits, "supported": f.supported, "max_cap": f.max_cap}
                        for x, f in d.dtypes.items()
                    },
                }
                for d in self.devices
            ],
            "ladder": self.ladder
            and {
                "device": self.ladder.device or None,
                "reason": self.ladder.reason,
                "tau": TAU,
                "source": SOURCE,
                "raw_rows_waiting_at_most": self.ladder.waiting,
                "rungs": [to_json(r, size, chosen=r == self.ladder.chosen) for r, size in self.ladder.sizes.items()],
            },
            "notes": list(self.notes),
        }


def plan(
    *,
    cap: int,
    width: int | None = None,
    taps: int | None = None,
    n_embd: int | None = None,
    dtypes: Sequence[str | FeatureDtype] | None = None,
    device: str | None = None,
    budget: int | str | None = None,
    rows: str = RAW,
    draft_n_embd: int | None = None,
) -> Plan:
    """The bytes of a mirror of ``cap`` rows in each dtype, and where it fits.

    >>> plan(width=25600, cap=262144)["q8_0"].ring_bytes
    7130316800

    Args:
        cap: slots.
        width: values in a row; or give ``taps`` and ``n_embd``, whose product it is. A width alone counts as one tap.
        dtypes: those to plan for. Default: all, less those whose block size does not divide a tap (see ``notes``).
        device: ggml device name or "auto"; default: every device.
        budget: bytes, or text such as "8GiB": find the largest ``cap`` per dtype whose ring fits in it.
        rows: "raw", or "fused": one tap, as wide as the draft.
        draft_n_embd: width of the draft, for the fused rungs of the ladder. Default: that of a tap, if there are several.

    Raises:
        ArgumentError: numbers out of range, or a row that is not determined or contradicts itself.
        ShapeError: a dtype that was asked for whose block size does not divide a tap.
        DtypeError, DeviceError: unknown names.
    """
    taps, n_embd = _row_shape(width, taps, n_embd)
    if parse_rows(rows) == FUSED and taps != 1:
        raise ArgumentError(f"fused rows have one tap, of the draft's n_embd; {taps} were given")
    limit = parse_bytes(budget) if isinstance(budget, str) else budget
    if limit is not None and limit < 0:
        raise ArgumentError(f"budget = {limit} bytes; it cannot be negative")
    chosen, notes = usable_dtypes(n_embd, dtypes)
    entries = []
    for dtype in chosen:
        size = mirror_size(taps, n_embd, cap, dtype)
        max_cap = None if limit is None else min(limit // size.row, MAX_CAP)
        entries.append(DtypePlan(dtype, size.row, size.ring, max_cap))
    where = devices() if device is None else [find_device(device)]
    on = tuple(_on_device(d, taps, n_embd, cap, chosen) for d in where)
    ladder = _ladder(rows, taps, n_embd, draft_n_embd or (n_embd if taps > 1 else None), cap, limit, device)
    return Plan(taps, n_embd, cap, limit, tuple(entries), on, rows=rows, notes=notes, ladder=ladder)


def _ladder(
    rows: str, taps: int, n_embd: int, draft_n_embd: int | None, cap: int, budget: int | None, device: str | None
) -> Ladder:
    """Of a mirror alone: what a target and a draft take beside it, ``DFlashLlama`` weighs."""
    place = find_device(device or "auto")
    shapes = {FUSED: (1, n_embd)} if rows == FUSED else {RAW: (taps, n_embd)}
    if rows == RAW and draft_n_embd:
        shapes[FUSED] = (1, draft_n_embd)

    def can(rung: Rung) -> bool:
        n_taps, width = shapes[rung.rows]
        support = None if width % rung.dtype.block_size else place.supports(rung.dtype, taps=n_taps, n_embd=width)
        return support is not None and support.capture and support.read

    # Where the raw row is known. How taps will be taken is not: by the callback, a whole micro-batch waits.
    waiting = _MICRO_BATCH if rows == RAW and FUSED in shapes else 0

    def size(rung: Rung) -> int:
        mirror = mirror_size(*shapes[rung.rows], cap, rung.dtype, place.index)
        if rung.rows == RAW or not waiting:
            return device_bytes(mirror, place)
        staging = mirror_size(taps, n_embd, waiting, FeatureDtype.F32, place.index)
        return device_bytes(mirror, place) + device_bytes(staging, place)

    sizes = descending((r for r in candidates() if r.rows in shapes and can(r)), size)
    if budget is None:
        chosen, reason = choose(sizes, free=place.memory_free, margin=default_margin(place), device=place.name)
        return Ladder(place.name, sizes, chosen, reason, waiting)
    chosen, reason = choose(sizes, free=budget, margin=0, device="the budget")
    return Ladder("", sizes, chosen, reason, waiting)


def usable_dtypes(
    n_embd: int, dtypes: Iterable[str | FeatureDtype] | None
) -> tuple[tuple[FeatureDtype, ...], tuple[str, ...]]:
    """The dtypes to work with for taps of ``n_embd`` values, without repeats, and notes on those left out.

    Raises:
        ShapeError: a dtype that was asked for has a block size that does not divide ``n_embd``.
        ArgumentError: an empty list.
    """
    asked = dtypes is not None
    wanted = list(dict.fromkeys(FeatureDtype.parse(d) for d in (dtypes if dtypes is not None else FeatureDtype)))
    if not wanted:
        raise ArgumentError(f"no dtype was given; use one or more of {', '.join(d.value for d in FeatureDtype)}")
    good = tuple(d for d in wanted if n_embd % d.block_size == 0)
    bad = [d for d in wanted if d not in good]
    if bad and asked:
        works = ", ".join(d.value for d in FeatureDtype if n_embd % d.block_size == 0)
        raise ShapeError(
            f"a tap of {n_embd} values is not a multiple of {bad[0]}'s block of {bad[0].block_size}; use one of {works}"
        )
    if not bad:
        return good, ()
    names = ", ".join(d.value for d in bad)
    return good, (f"left out {names}: blocks of {bad[0].block_size} values do not divide a tap of {n_embd}",)


def device_bytes(size: MirrorSize, device: Device) -> int:
    """What a mirror of this size takes from the memory of the device that holds it, as the allocator counts it."""
    return size.ring + size.staging + (size.bookkeeping if device.is_host else 0)


def largest_cap(
    taps: int, n_embd: int, dtype: str | FeatureDtype, bytes_free: int, device: Device, *, ggml_ops: bool = False
) -> int:
    """The largest ``cap`` at which a mirror takes at most ``bytes_free`` of the device's memory; 0: none."""

    # The ring alone bounds it from above; scratch and bookkeeping grow with cap, so bisect.
    def size(cap: int) -> MirrorSize:
        return mirror_size(taps, n_embd, cap, dtype, device.index, ggml_ops=ggml_ops)

    most = min(max(bytes_free, 0) // size(1).row, MAX_CAP)
    return largest(most, lambda cap: device_bytes(size(cap), device) <= bytes_free)


def largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number from 1 to ``most`` that fits, where larger ones fit less; 0: none."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def fitting_dtypes(
    taps: int, n_embd: int, cap: int, bytes_free: int, device: Device, *, ggml_ops: bool = False
) -> tuple[FeatureDtype, ...]:
    """The dtypes that the device supports and in which ``cap`` rows fit into ``bytes_free``, most precise first."""
    dtypes, _ = usable_dtypes(n_embd, None)
    plans = {d: _fit(d, taps, n_embd, cap, bytes_free, device, ggml_ops=ggml_ops) for d in dtypes}
    return tuple(d for d, fit in plans.items() if fit.fits and fit.supported)


def _row_shape(width: int | None, taps: int | None, n_embd: int | None) -> tuple[int, int]:
    given = f"width={width}, taps={taps}, n_embd={n_embd}"
    for value in (width, taps, n_embd):
        if value is not None and value < 1:
            raise ArgumentError(f"a row of {given} is empty")
    if width is None:
        if taps is None or n_embd is None:
            raise ArgumentError(f"give width, or taps and n_embd (got {given})")
        return taps, n_embd
    if taps is None and n_embd is None:
        return 1, width
    taps = taps if taps is not None else width // (n_embd or 1)
    n_embd = n_embd if n_embd is not None else width // taps
    if taps * n_embd != width:
        raise ArgumentError(f"a row of {width} values does not divide into the taps that were given ({given})")
    return taps, n_embd


def _on_device(device: Device, taps: int, n_embd: int, cap: int, dtypes: Sequence[FeatureDtype]) -> DevicePlan:
    fits = {d: _fit(d, taps, n_embd, cap, device.memory_free, device) for d in dtypes}
    return DevicePlan(device.name, device.description, device.memory_free, device.memory_total, fits)


def _fit(
    dtype: FeatureDtype, taps: int, n_embd: int, cap: int, bytes_free: int, device: Device, *, ggml_ops: bool = False
) -> DtypeFit:
    size = device_bytes(mirror_size(taps, n_embd, cap, dtype, device.index, ggml_ops=ggml_ops), device)
    support = device.supports(dtype, taps=taps, n_embd=n_embd)
    max_cap = largest_cap(taps, n_embd, dtype, bytes_free, device, ggml_ops=ggml_ops)
    return DtypeFit(size, size <= bytes_free, support.capture and support.read, max_cap)
