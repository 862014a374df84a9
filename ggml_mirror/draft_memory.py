"""Whether a draft and the mirror that it reads fit into a device's memory together, known before either takes any; and what would."""

from __future__ import annotations

from collections.abc import Callable

from ._native import lib
from .byte_size import format_bytes
from .device import Device, devices
from .draft import DraftBytes, DraftSpec
from .dtype import FeatureDtype
from .errors import MirrorMemoryError
from .ladder import Rung, candidates, descending, next_rung, offer
from .mechanism import CaptureMechanism
from .mirror import mirror_size
from .plan import device_bytes, fitting_dtypes, largest
from .row_kind import FUSED, RAW


def mirror_cap(spec: DraftSpec, window: int) -> int:
    """Slots of a mirror for a window: an unverified block must not displace rows of it."""
    return window + spec.block_size


def row_shape(spec: DraftSpec, rows: str) -> tuple[int, int]:
    """(taps, n_embd) of a mirror of such rows."""
    return (1, spec.n_embd) if rows == FUSED else (len(spec.taps), spec.n_embd_target)


def staging_cap(n_ubatch: int, spec: DraftSpec, mechanism: CaptureMechanism) -> int:
    """Slots of the ring in which raw rows wait to be fused: a block beside what waits for its outcome, at least.

    By ``callback`` taps of a micro-batch come one after another, and all its rows wait for the last one. By ``outputs`` they come
    together, and of more rows the older ones are fused at once.
    """
    least = 2 * spec.block_size
    if mechanism is CaptureMechanism.OUTPUTS:
        n_ubatch = min(n_ubatch, lib.GM_FUSE_ROWS)
    return max(n_ubatch, least)


def staging_bytes(spec: DraftSpec, slots: int, device: Device) -> int:
    """What that ring takes of the device's memory; 0 slots: there is none."""
    if not slots:
        return 0
    return device_bytes(mirror_size(*row_shape(spec, RAW), slots, FeatureDtype.F32, device.index), device)


def require_room(
    spec: DraftSpec,
    window: int,
    dtype: FeatureDtype,
    device: Device,
    draft_bytes: Callable[[int, str], DraftBytes],
    rows: str = RAW,
    staging: int = 0,
) -> None:
    """Nothing, if the draft with this window and its mirror fit into what the device has free.

    Args:
        draft_bytes: what the draft takes, by window and rows.
        rows: what the mirror holds.
        staging: slots for raw rows that wait, where rows are fused.

    Raises:
        MirrorMemoryError: names the bytes of both and the free ones; which dtypes and which window would fit, the next rung of the
            ladder, and other devices.
    """
    asked = Rung(rows, dtype)

    def waiting(rows: str) -> int:
        return staging_bytes(spec, staging if rows == FUSED else 0, device)

    def both(window: int, rung: Rung) -> tuple[int, int]:
        size = mirror_size(*row_shape(spec, rung.rows), mirror_cap(spec, window), rung.dtype, device.index)
        return draft_bytes(window, rung.rows).total, device_bytes(size, device) + waiting(rung.rows)

    def can(rung: Rung) -> bool:
        taps, n_embd = row_shape(spec, rung.rows)
        if n_embd % rung.dtype.block_size or (rung.rows == FUSED and not spec.can_fuse):
            return False
        support = device.supports(rung.dtype, taps=taps, n_embd=n_embd)
        return support.capture and support.read

    draft, mirror = both(window, asked)
    needed, free = draft + mirror, device.memory_free
    if needed <= free:
        return
    cap, fits = mirror_cap(spec, window), largest(window - 1, lambda w: sum(both(w, asked)) <= free)
    dtypes = fitting_dtypes(*row_shape(spec, rows), cap, free - draft - waiting(rows), device)
    ladder = descending(filter(can, candidates()), lambda rung: sum(both(window, rung)))
    below = next_rung(ladder, needed, free)
    advice = [f"draft_window {fits} fits" if fits else f"no draft_window fits as {dtype}"]
    if dtypes:
        advice.append(f"this one fits as {', '.join(dtypes)}")
    if below is not None:
        advice.append(offer(below, ladder[below], "for both"))
    advice += room_elsewhere(device.index, needed)
    error = MirrorMemoryError(
        f"a draft with window {window} ({draft} bytes) and its mirror of {cap} rows of {dtype} ({mirror} bytes) need {needed} bytes on "
        f"{device.name}, which has {free} free (needed {format_bytes(needed)}, free {format_bytes(free)}); {'; '.join(advice)}",
        bytes_needed=needed,
        bytes_free=free,
        max_cap=mirror_cap(spec, fits) if fits else 0,
        fitting_dtypes=dtypes,
        max_window=fits,
    )
    error.next_rung = (below.rows, below.dtype.value) if below else None
    raise error


def room_elsewhere(index: int, needed: int) -> list[str]:
    """Advice of other devices than ``index`` that have ``needed`` bytes free; at most one sentence."""
    others = [d.name for d in devices() if d.index != index and d.memory_free >= needed]
    return [f"{', '.join(others)} has room for it"] if others else []
