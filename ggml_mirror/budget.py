"""The memory that a target, its draft and its mirror take together, per device, before any of it is allocated.

The target's bytes are llama.cpp's own (:mod:`ggml_mirror.target_memory`), the draft's and the mirror's come from the functions that
their allocators use. Weights that are mapped from a file count, since they have to be in memory to be fast; but where they alone are
too much, the target still runs and reads its file again and again: that is a note, not an error.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .byte_size import format_bytes, parse_bytes
from .device import Device, find_device
from .dflash import LLAMA_DEFAULTS, resolve_n_draft, resolve_window
from .draft import DraftSpec
from .draft_memory import mirror_cap, row_shape, staging_cap
from .dtype import FeatureDtype
from .errors import ArgumentError, BudgetError, DtypeError
from .mechanism import CaptureMechanism
from .memory_parts import PairCosts, Part, Room, rooms, target_parts
from .model_info import ModelInfo
from .plan import largest
from .row_kind import FUSED, RAW, parse_rows
from .target_memory import measure

#: What "auto" chooses from, most precise first. f16 is as large as bf16 and cannot hold every value; smaller types cost acceptance.
LADDER = (FeatureDtype.F32, FeatureDtype.BF16, FeatureDtype.Q8_0)

#: What "auto" leaves free on the mirror's device unless told otherwise: this share of its memory, and so many bytes at most (the
#: margin of llama.cpp's own ``--fit``).
MARGIN_SHARE, MARGIN_MOST = 0.05, 1 << 30

_SMALLER_TARGET = (
    "use a smaller context (n_ctx, -c), a quantised KV cache (type_k, type_v) "
    "or fewer layers on the device (n_gpu_layers, -ngl)"
)


@dataclass(frozen=True)
class DeviceBudget:
    """A device and what is asked of it; bytes, ``mapped`` being a part of ``needed``. ``limit``: what sets ``free`` on a host device."""

    name: str
    description: str
    free: int
    total: int
    limit: str
    needed: int
    mapped: int

    @property
    def free_after(self) -> int:
        """Negative where it does not fit, or only without the mapped weights."""
        return self.free - self.needed

    @property
    def fits(self) -> bool:
        return self.needed - self.mapped <= self.free


@dataclass(frozen=True)
class Budget:
    """What :func:`make_budget` found. Without a draft, the fields from ``dtype`` on are None, 0 or empty.

    Attributes:
        error: why it cannot be; None if it fits.
        dtype: the feature dtype; None if "auto" found none, and the parts are then without a mirror.
        reason: why "auto" chose this dtype, in a sentence with the numbers; empty if one was named.
        cap: rows of the mirror.
        margin: bytes that "auto" leaves free on ``mirror_device``.
    """

    parts: tuple[Part, ...]
    devices: tuple[DeviceBudget, ...]
    n_ctx: int
    notes: tuple[str, ...]
    error: BudgetError | None
    dtype: FeatureDtype | None = None
    reason: str = ""
    draft_window: int = 0
    cap: int = 0
    mirror_device: str = ""
    margin: int = 0

    def require_fit(self) -> None:
        """Raise BudgetError unless everything fits."""
        if self.error is not None:
            raise self.error

    def to_json(self) -> dict[str, Any]:
        """As JSON-ready values; all sizes in bytes."""
        e = self.error
        return {
            "fits": e is None,
            "n_ctx": self.n_ctx,
            "feature_dtype": None if self.dtype is None else self.dtype.value,
            "reason": self.reason,
            "draft_window": self.draft_window,
            "cap": self.cap,
            "mirror_device": self.mirror_device,
            "memory_margin": self.margin,
            "parts": [asdict(part) for part in self.parts],
            "devices": [{**asdict(d), "free_after": d.free_after, "fits": d.fits} for d in self.devices],
            "notes": list(self.notes),
            "error": e
            and {
                "message": str(e),
                "device": e.device,
                "bytes_needed": e.bytes_needed,
                "bytes_free": e.bytes_free,
                "fitting_dtypes": list(e.fitting_dtypes),
                "max_window": e.max_window,
            },
        }


def make_budget(
    model_path: str | os.PathLike[str],
    *,
    draft_path: str | os.PathLike[str] | None = None,
    feature_dtype: str | FeatureDtype | None = None,
    draft_window: int | None = None,
    draft_device: str = "auto",
    n_draft: int | None = None,
    memory_margin: int | str | None = None,
    feature_rows: str = RAW,
    draft_kv: str = "f16",
    mechanism: str | CaptureMechanism | None = None,
    extra: Sequence[Part] = (),
    **llama_kwargs: Any,
) -> Budget:
    """What a ``DFlashLlama`` of these arguments would take; without ``draft_path``, what a ``Llama`` would.

    Nothing is allocated. Whether it fits is in the result: show it, then call :meth:`Budget.require_fit`.

    Args:
        feature_dtype: a dtype, or "auto": the most precise of :data:`LADDER` that leaves ``memory_margin`` free on the mirror's device.
        memory_margin: bytes, or text such as "512MiB"; None takes :func:`default_margin`.
        mechanism: how taps leave the target's graph, as for ``DFlashLlama``.
        extra: further parts that the caller will allocate.
        llama_kwargs: as for ``llama_cpp.Llama``.

    Raises:
        ModelFileError, UnsupportedDraftError, DraftMismatchError, ArgumentError, DtypeError, DeviceError: it cannot be made at all.
        UnsupportedError: this libllama does not tell what it would allocate.

    Example::

        budget = make_budget("target.gguf", draft_path="draft.gguf", feature_dtype="auto", n_ctx=32768)
        print(budget.dtype, budget.reason)
        budget.require_fit()
    """
    target = ModelInfo.read(model_path)
    outputs = llama_kwargs.get("n_batch", 512) if llama_kwargs.get("logits_all") else 1
    lora = llama_kwargs.get("lora_path")
    if draft_path is None:
        memory = measure(model_path, **llama_kwargs)
        parts = (*target_parts(memory, n_outputs=outputs, lora_path=lora), *extra)
        on = _devices(parts, rooms())
        error = None if all(d.fits for d in on) else _too_large(parts, _short(on), [_SMALLER_TARGET])
        return Budget(parts, on, memory.n_ctx, _notes(on), error)

    choice = FeatureDtype.resolve_choice(feature_dtype)
    spec = DraftSpec.read(draft_path, target)
    n_draft = resolve_n_draft(n_draft, spec)
    memory = measure(
        model_path, n_draft=n_draft, taps=spec.taps, mechanism=mechanism, **{**LLAMA_DEFAULTS, **llama_kwargs}
    )
    device = memory.output_device if draft_device == "auto" else find_device(draft_device)
    fixed = (*target_parts(memory, n_outputs=max(outputs, n_draft + 1), lora_path=lora), *extra)
    search = _Search(
        fixed,
        PairCosts(
            spec,
            device,
            memory.n_vocab,
            parse_rows(feature_rows),
            draft_kv,
            staging_cap(memory.n_ubatch, spec) if feature_rows == FUSED else 0,
        ),
        rooms(),
        resolve_window(draft_window, memory.n_ctx),
        _margin(memory_margin, device),
    )
    return search.fixed_dtype(choice, memory.n_ctx) if choice is not None else search.auto(memory.n_ctx)


def choose_dtype(
    needed: Mapping[FeatureDtype, int], *, free: int, margin: int, device: str
) -> tuple[FeatureDtype | None, str]:
    """The first dtype that leaves ``margin`` bytes free, and why, with the numbers.

    Args:
        needed: by dtype, the most precise first: bytes that everything takes on the device.
        free: bytes that are free there.

    >>> from ggml_mirror import FeatureDtype
    >>> choose_dtype({FeatureDtype.F32: 900, FeatureDtype.BF16: 600}, free=1000, margin=200, device="CUDA0")[1]
    'bf16 leaves 400 B free on CUDA0, the margin is 200 B; f32 would leave 100 B'
    """
    refused: list[str] = []
    for dtype, size in needed.items():
        left = free - size
        if left >= margin:
            first = f"{dtype} leaves {format_bytes(left)} free on {device}, the margin is {format_bytes(margin)}"
            return dtype, "; ".join([first, *(refused or ["no dtype is more precise"])])
        would = f"leave {format_bytes(left)}" if left >= 0 else f"need {format_bytes(-left)} more than is free"
        refused.append(f"{dtype} would {would}")
    return None, f"no dtype leaves {format_bytes(margin)} free on {device}, the margin: {'; '.join(refused)}"


def default_margin(device: Device) -> int:
    """Bytes that "auto" leaves free on a device unless told otherwise: 5 % of its memory, at most 1 GiB."""
    return min(int(MARGIN_SHARE * device.memory_total), MARGIN_MOST)


def _margin(asked: int | str | None, device: Device) -> int:
    margin = parse_bytes(asked) if isinstance(asked, str) else asked
    if margin is None:
        return default_margin(device)
    if margin < 0:
        raise ArgumentError(f"the memory margin is {margin} bytes; it cannot be negative")
    return margin


@dataclass(frozen=True)
class _Search:
    """Dtypes and windows that fit beside a target into the devices' memory of one moment."""

    fixed: tuple[Part, ...]
    pair: PairCosts
    rooms: tuple[Room, ...]
    window: int
    margin: int

    def fixed_dtype(self, dtype: FeatureDtype, n_ctx: int) -> Budget:
        if not self.pair.can_hold(dtype):
            (taps, n_embd), good = row_shape(self.pair.spec, self.pair.rows), self.pair.possible()
            raise DtypeError(
                f"{self.pair.device.name} cannot hold rows of {taps} taps x {n_embd} as {dtype}; use one of {', '.join(good)}"
            )
        fits = self.fits(dtype, self.window)
        return self.budget(n_ctx, dtype, "", None if fits else self.refusal(dtype))

    def auto(self, n_ctx: int) -> Budget:
        here = self.pair.device.name
        needed = {d: self.on(d)[here].needed for d in self.pair.possible(LADDER)}
        free = next(room.free for room in self.rooms if room.device == here)
        dtype, reason = choose_dtype(needed, free=free, margin=self.margin, device=here)
        if dtype is not None and self.fits(dtype, self.window):
            return self.budget(n_ctx, dtype, reason, None)
        if dtype is not None:  # another device is too small, whatever the dtype
            return self.budget(n_ctx, dtype, reason, self.refusal(dtype))
        return self.budget(n_ctx, None, reason, self.refusal_of_all(reason))

    def budget(self, n_ctx: int, dtype: FeatureDtype | None, reason: str, error: BudgetError | None) -> Budget:
        parts = self.parts(dtype, self.window)
        on, cap = _devices(parts, self.rooms), mirror_cap(self.pair.spec, self.window)
        device = self.pair.device.name
        return Budget(parts, on, n_ctx, _notes(on), error, dtype, reason, self.window, cap, device, self.margin)

    def parts(self, dtype: FeatureDtype | None, window: int) -> tuple[Part, ...]:
        return (*self.fixed, *self.pair.parts(dtype, window))

    def on(self, dtype: FeatureDtype | None, window: int | None = None) -> dict[str, DeviceBudget]:
        parts = self.parts(dtype, self.window if window is None else window)
        return {d.name: d for d in _devices(parts, self.rooms)}

    def fits(self, dtype: FeatureDtype, window: int, margin: int | None = None) -> bool:
        """Everything fits, and a margin is left on the mirror's device."""
        on = self.on(dtype, window)
        left = margin is None or on[self.pair.device.name].free_after >= margin
        return left and all(d.fits for d in on.values())

    def largest_window(self, dtype: FeatureDtype, margin: int | None = None) -> int:
        """The largest draft window, up to the one that was asked for, that fits; 0: none."""
        return largest(self.window, lambda window: self.fits(dtype, window, margin))

    def refusal(self, dtype: FeatureDtype) -> BudgetError:
        window = self.largest_window(dtype)
        smaller = tuple(d for d in self.pair.possible() if self.fits(d, self.window))
        advice = []
        if smaller:
            advice.append(f"a draft window of {self.window} fits as {', '.join(smaller)}")
        if window:
            advice.append(f"{dtype} fits with a draft window of {window}")
        parts = self.parts(dtype, self.window)
        short = _short(_devices(parts, self.rooms))
        return _too_large(
            parts, short, advice or [f"no dtype and no draft window fits; {_SMALLER_TARGET}"], smaller, window
        )

    def refusal_of_all(self, why: str) -> BudgetError:
        """No dtype of the ladder leaves the margin."""
        last = self.pair.possible(LADDER)[-1]
        window = self.largest_window(last, self.margin)
        without = tuple(d for d in self.pair.possible() if self.fits(d, self.window))
        advice = []
        if window:
            advice.append(f"with a draft window of {window}, {last} leaves it")
        if without:
            advice.append(f"without a margin {', '.join(without)} would fit: name one, or give a smaller margin")
        here = self.on(last)[self.pair.device.name]
        return _too_large(
            self.parts(last, self.window),
            here,
            advice or [f"no draft window fits either; {_SMALLER_TARGET}"],
            without,
            window,
            why,
        )


def _devices(parts: Sequence[Part], where: Sequence[Room]) -> tuple[DeviceBudget, ...]:
    """The devices that the parts are on."""
    out = []
    for room in where:
        mine = [part for part in parts if part.device == room.device]
        if mine:
            needed, mapped = sum(p.bytes for p in mine), sum(p.bytes for p in mine if p.mapped)
            out.append(DeviceBudget(room.device, room.description, room.free, room.total, room.limit, needed, mapped))
    return tuple(out)


def _short(on: Sequence[DeviceBudget]) -> DeviceBudget:
    return next(d for d in on if not d.fits)


def _too_large(
    parts: Sequence[Part],
    device: DeviceBudget,
    advice: Sequence[str],
    dtypes: Sequence[FeatureDtype] = (),
    window: int = 0,
    why: str = "it does not fit",
) -> BudgetError:
    listed = ", ".join(f"{p.name} {format_bytes(p.bytes)}" for p in parts if p.device == device.name and p.bytes)
    limit = f" ({device.limit})" if device.limit else ""
    message = (
        f"{why}: {device.name} needs {format_bytes(device.needed)} ({listed}) and has {format_bytes(device.free)} free{limit}; "
        f"{'; '.join(advice)}"
    )
    return BudgetError(
        message,
        device=device.name,
        bytes_needed=device.needed,
        bytes_free=device.free,
        max_window=window,
        fitting_dtypes=tuple(d.value for d in dtypes),
    )


def _notes(on: Sequence[DeviceBudget]) -> tuple[str, ...]:
    return tuple(
        f"{d.name} has {format_bytes(d.free)} free for {format_bytes(d.needed)}: weights that are mapped from the file "
        f"({format_bytes(d.mapped)}) will be read from it again and again; a smaller model or quantisation would be faster"
        for d in on
        if d.fits and d.free_after < 0
    )
