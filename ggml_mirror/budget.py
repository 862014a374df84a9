"""The memory that a target, its draft and its mirror take together, per device, before any of it is allocated.

The target's bytes are llama.cpp's own (:mod:`ggml_mirror.target_memory`), the draft's and the mirror's come from the functions that
their allocators use. Weights that are mapped from a file count, since they have to be in memory to be fast; but where they alone are
too much, the target still runs and reads its file again and again: that is a note, not an error.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from .byte_size import format_bytes
from .device import find_device
from .dflash import LLAMA_DEFAULTS, resolve_n_draft, resolve_window
from .draft import DraftSpec
from .draft_memory import mirror_cap, row_shape, staging_cap
from .dtype import FeatureDtype
from .errors import BudgetError, DtypeError
from .ladder import Rung, candidates, choose, default_margin, descending, next_rung, offer, parse_margin, to_json
from .mechanism import CaptureMechanism
from .memory_parts import PairCosts, Part, Room, rooms, target_parts
from .model_info import ModelInfo
from .plan import largest
from .row_kind import FUSED, RAW, parse_rows_choice
from .target_memory import measure

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
        dtype, rows: the feature dtype and rows; None and "" if "auto" found none, and the parts are then without a mirror.
        ladder: what "auto" chose from, most precise first, with the bytes that draft and mirror take on ``mirror_device``.
        reason: why "auto" chose what it did, in a sentence with the numbers; empty if both were named.
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
    rows: str = ""
    ladder: Mapping[Rung, int] = field(default_factory=dict)

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
            "feature_rows": self.rows or None,
            "ladder": [
                to_json(rung, size, chosen=(rung.rows, rung.dtype) == (self.rows, self.dtype))
                for rung, size in self.ladder.items()
            ],
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
                "next_rung": e.next_rung,
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
        feature_dtype, feature_rows: each a name or "auto": the first rung of the ladder (:mod:`ggml_mirror.ladder`), as far as it is open,
            that leaves ``memory_margin`` free on the mirror's device.
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

    dtype, rows = FeatureDtype.resolve_choice(feature_dtype), parse_rows_choice(feature_rows)
    spec = DraftSpec.read(draft_path, target)
    spec.require_rows(rows)
    n_draft = resolve_n_draft(n_draft, spec)
    memory = measure(
        model_path, n_draft=n_draft, taps=spec.taps, mechanism=mechanism, **{**LLAMA_DEFAULTS, **llama_kwargs}
    )
    device = memory.output_device if draft_device == "auto" else find_device(draft_device)
    fixed = (*target_parts(memory, n_outputs=max(outputs, n_draft + 1), lora_path=lora), *extra)
    assert memory.mechanism is not None
    waiting = {RAW: 0, FUSED: staging_cap(memory.n_ubatch, spec, memory.mechanism)}
    pairs = {
        kind: PairCosts(spec, device, memory.n_vocab, kind, draft_kv, waiting[kind], memory.n_ctx)
        for kind in ((RAW, FUSED) if spec.can_fuse else (RAW,))
    }
    window = resolve_window(draft_window, memory.n_ctx)
    margin = parse_margin(memory_margin)
    search = _Search(fixed, pairs, rooms(), window, default_margin(device) if margin is None else margin)
    if rows is not None and dtype is not None:
        return search.named(Rung(rows, dtype), memory.n_ctx)
    return search.auto(candidates(rows, dtype), memory.n_ctx)


@dataclass(frozen=True)
class _Search:
    """Rungs and windows that fit beside a target into the devices' memory of one moment. ``pairs``: by kind of rows."""

    fixed: tuple[Part, ...]
    pairs: Mapping[str, PairCosts]
    rooms: tuple[Room, ...]
    window: int
    margin: int

    @property
    def here(self) -> str:
        """The mirror's device."""
        return self.pairs[RAW].device.name

    def named(self, rung: Rung, n_ctx: int) -> Budget:
        pair = self.pairs[rung.rows]
        if not pair.can_hold(rung.dtype):
            (taps, n_embd), good = row_shape(pair.spec, rung.rows), pair.possible()
            raise DtypeError(
                f"{self.here} cannot hold rows of {taps} taps x {n_embd} as {rung.dtype}; use one of {', '.join(good)}"
            )
        fits = self.fits(rung, self.window)
        return self.budget(n_ctx, rung, "", None if fits else self.refusal(rung))

    def auto(self, wanted: Sequence[Rung], n_ctx: int) -> Budget:
        needed = self.ladder(wanted)
        if not needed:  # one dtype, in either kind of rows
            return self.named(wanted[0], n_ctx)
        free = next(room.free for room in self.rooms if room.device == self.here)
        rung, reason = choose(needed, free=free, margin=self.margin, device=self.here)
        error: BudgetError | None
        if rung is None:
            error = self.refusal_of_all(list(needed)[-1], reason)
        else:  # another device may be too small, whatever the rung
            error = None if self.fits(rung, self.window) else self.refusal(rung)
        sizes = {r: self.pair_bytes(r) for r in needed}
        return replace(self.budget(n_ctx, rung, reason, error), ladder=sizes)

    def ladder(self, wanted: Sequence[Rung]) -> dict[Rung, int]:
        """Those that can be, each smaller than the ones before, with all bytes on the mirror's device."""
        can = (r for r in wanted if r.rows in self.pairs and self.pairs[r.rows].can_hold(r.dtype))
        return descending(can, lambda r: self.on(r)[self.here].needed)

    def budget(self, n_ctx: int, rung: Rung | None, reason: str, error: BudgetError | None) -> Budget:
        parts = self.parts(rung, self.window)
        on, cap = _devices(parts, self.rooms), mirror_cap(self.pairs[RAW].spec, self.window)
        return Budget(
            parts,
            on,
            n_ctx,
            _notes(on),
            error,
            dtype=rung.dtype if rung else None,
            reason=reason,
            draft_window=self.window,
            cap=cap,
            mirror_device=self.here,
            margin=self.margin,
            rows=rung.rows if rung else "",
        )

    def parts(self, rung: Rung | None, window: int) -> tuple[Part, ...]:
        pair = self.pairs[rung.rows if rung else RAW]
        return (*self.fixed, *pair.parts(rung.dtype if rung else None, window))

    def pair_bytes(self, rung: Rung) -> int:
        """What draft and mirror take on the mirror's device."""
        parts = self.pairs[rung.rows].parts(rung.dtype, self.window)
        return sum(part.bytes for part in parts if part.device == self.here)

    def on(self, rung: Rung | None, window: int | None = None) -> dict[str, DeviceBudget]:
        parts = self.parts(rung, self.window if window is None else window)
        return {d.name: d for d in _devices(parts, self.rooms)}

    def fits(self, rung: Rung, window: int, margin: int | None = None) -> bool:
        """Everything fits, and a margin is left on the mirror's device."""
        on = self.on(rung, window)
        left = margin is None or on[self.here].free_after >= margin
        return left and all(d.fits for d in on.values())

    def largest_window(self, rung: Rung, margin: int | None = None) -> int:
        """The largest draft window, up to the one that was asked for, that fits; 0: none."""
        return largest(self.window, lambda window: self.fits(rung, window, margin))

    def fitting(self, rows: str) -> tuple[FeatureDtype, ...]:
        """The dtypes that fit without a margin."""
        return tuple(d for d in self.pairs[rows].possible() if self.fits(Rung(rows, d), self.window))

    def below(self, rung: Rung, margin: int | None = None) -> Rung | None:
        """The first smaller rung of the whole ladder that fits."""
        ladder = {r: size for r, size in self.ladder(candidates()).items() if self.fits(r, self.window, margin)}
        return next_rung(ladder, self.on(rung)[self.here].needed, max(ladder.values(), default=0))

    def refusal(self, rung: Rung) -> BudgetError:
        window, smaller = self.largest_window(rung), self.fitting(rung.rows)
        advice = []
        if smaller:
            advice.append(f"a draft window of {self.window} fits as {', '.join(smaller)}")
        if window:
            advice.append(f"{rung} fits with a draft window of {window}")
        parts = self.parts(rung, self.window)
        short = _short(_devices(parts, self.rooms))
        hopeless = f"no dtype and no draft window fits; {_SMALLER_TARGET}"
        return self.too_large(parts, short, advice, hopeless, smaller, window, self.below(rung))

    def refusal_of_all(self, last: Rung, why: str) -> BudgetError:
        """No rung leaves the margin; ``last`` takes the least."""
        window, without = self.largest_window(last, self.margin), self.fitting(last.rows)
        advice = []
        if window:
            advice.append(f"with a draft window of {window}, {last} leaves it")
        if without:
            kind = "" if last.rows == RAW else f" (feature_rows {last.rows})"
            advice.append(f"without a margin {', '.join(without)}{kind} would fit: name one, or give a smaller margin")
        here, parts = self.on(last)[self.here], self.parts(last, self.window)
        hopeless = f"no draft window fits either; {_SMALLER_TARGET}"
        return self.too_large(parts, here, advice, hopeless, without, window, self.below(last, self.margin), why)

    def too_large(
        self,
        parts: Sequence[Part],
        device: DeviceBudget,
        advice: list[str],
        hopeless: str,
        dtypes: Sequence[FeatureDtype],
        window: int,
        below: Rung | None,
        why: str = "it does not fit",
    ) -> BudgetError:
        if below is not None:
            advice.append(offer(below, self.pair_bytes(below), "for draft and mirror"))
        error = _too_large(parts, device, advice or [hopeless], dtypes, window, why)
        error.next_rung = (below.rows, below.dtype.value) if below else None
        return error


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
