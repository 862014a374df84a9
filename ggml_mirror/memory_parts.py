"""What a target, its draft and its mirror take memory for, and on which device; each from the function that its allocator uses."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .device import Device, devices, find_device, host_memory
from .draft import DraftBytes, DraftSpec, draft_bytes
from .draft_memory import mirror_cap, row_shape
from .dtype import FeatureDtype
from .mirror import MirrorSize, mirror_size
from .row_kind import RAW
from .target_memory import BufferBytes, TargetMemory

#: llama.cpp's tables of tokens and merges, for want of anything that tells: what 49,152 tokens of byte-level BPE took.
_BYTES_PER_TOKEN = 260


@dataclass(frozen=True)
class Part:
    """One entry of a budget.

    Attributes:
        id: stable name for machines, as "kv_cache".
        name: the same for people.
        device: whose memory it is.
        mapped: pages of a file, which the system drops and reads again as it needs.
        at_most: an upper bound rather than what will be allocated.
    """

    id: str
    name: str
    device: str
    bytes: int
    detail: str = ""
    mapped: bool = False
    at_most: bool = False


@dataclass(frozen=True)
class Room:
    """A device's memory at one moment, in bytes. ``limit`` says what sets ``free`` on a host device."""

    device: str
    description: str
    free: int
    total: int
    limit: str


def rooms() -> tuple[Room, ...]:
    """Every device's memory as it is now."""
    limit = host_memory().limit
    return tuple(
        Room(d.name, d.description, d.memory_free, d.memory_total, limit if d.is_host else "") for d in devices()
    )


def target_parts(memory: TargetMemory, *, n_outputs: int, lora_path: Any = None) -> tuple[Part, ...]:
    """What a target takes.

    Args:
        n_outputs: positions whose logits one evaluation keeps, at most.
    """
    parts, cpu = [], find_device("cpu").name
    for b in memory.buffers:
        held = "mapped from the file: page cache" if b.mapped else ""
        parts.append(Part("target_weights", "target weights", b.device, b.weights, _detail(b, held), mapped=b.mapped))
    cells = f"n_ctx {memory.n_ctx:,}"
    if "KV" in memory.context_name:
        cells += ", K {}, V {}".format(*memory.cache_types)
    for b in memory.buffers:
        parts.append(Part("kv_cache", memory.context_name, b.device, b.context, _detail(b, cells)))
    for b in memory.buffers:
        parts.append(Part("target_compute", "target compute", b.device, b.compute, _detail(b, "")))
    # llama.cpp keeps logits in host memory and makes room for more positions as they come.
    logits, values = 4 * memory.output_values * memory.n_vocab * n_outputs, f"{n_outputs:,} x {memory.n_vocab:,} values"
    if memory.output_values > 1:
        values += f", {memory.output_values} of each: room for sampling in the graph"
    parts.append(Part("logits", "logits", cpu, logits, values))
    words = _BYTES_PER_TOKEN * memory.n_vocab
    parts.append(
        Part("vocabulary", "vocabulary", cpu, words, f"about {_BYTES_PER_TOKEN} B for each of {memory.n_vocab:,}")
    )
    if memory.copies_state:
        state = sum(b.context for b in memory.buffers)
        parts.append(Part("state_copy", "copy of the running state", cpu, state, at_most=True))
    if lora_path:
        parts.append(Part("lora", "LoRA adapter", cpu, os.path.getsize(lora_path), "its file's size", at_most=True))
    return _present(parts)


@dataclass(frozen=True)
class PairCosts:
    """Draft and mirror on ``device``, at any dtype and window. ``staging``: slots for raw rows that wait to be fused."""

    spec: DraftSpec
    device: Device
    n_vocab: int
    rows: str = RAW
    kv: str = "f16"
    staging: int = 0
    n_ctx: int = 0
    _drafts: dict[int, DraftBytes] = field(default_factory=dict, repr=False)

    def parts(self, dtype: FeatureDtype | None, window: int) -> tuple[Part, ...]:
        """What they take; without a dtype, the draft alone."""
        if window not in self._drafts:
            self._drafts[window] = draft_bytes(
                self.spec,
                n_vocab=self.n_vocab,
                device_index=self.device.index,
                window=window,
                rows=self.rows,
                kv=self.kv,
                n_ctx=self.n_ctx,
            )
        draft, here = self._drafts[window], self.device.name
        parts = [
            Part("draft_weights", "draft weights", here, draft.weights, self.spec.path.name),
            Part("draft_kv", "draft K and V", here, draft.kv, f"window {window:,}"),
            Part("draft_compute", "draft compute", here, draft.compute),
        ]
        if dtype is not None:
            cap = mirror_cap(self.spec, window)
            size = mirror_size(*row_shape(self.spec, self.rows), cap, dtype, self.device.index)
            kind = "" if self.rows == RAW else f"{self.rows} "
            parts += [
                Part("mirror", "mirror", here, size.ring, f"{dtype}, {cap:,} {kind}rows x {size.row:,} B"),
                *self._waiting(),
                _staging(here, size.staging + (self._raw.staging if self._raw else 0)),
                Part("mirror_bookkeeping", "mirror bookkeeping", find_device("cpu").name, size.bookkeeping),
                Part("mirror_pinned", "pinned for snapshots", find_device("cpu").name, size.pinned, at_most=True),
            ]
        return _present(parts)

    @property
    def _raw(self) -> MirrorSize | None:
        """Of the ring in which raw rows wait."""
        if not self.staging:
            return None
        return mirror_size(*row_shape(self.spec, RAW), self.staging, FeatureDtype.F32, self.device.index)

    def _waiting(self) -> tuple[Part, ...]:
        raw = self._raw
        if raw is None:
            return ()
        size = raw.ring + (raw.bookkeeping if self.device.is_host else 0)
        return (
            Part("raw_rows", "raw rows", self.device.name, size, f"f32, {self.staging:,} that wait x {raw.row:,} B"),
        )

    def can_hold(self, dtype: FeatureDtype) -> bool:
        """The device can capture rows into this dtype and read them back."""
        taps, n_embd = row_shape(self.spec, self.rows)
        if n_embd % dtype.block_size:
            return False
        support = self.device.supports(dtype, taps=taps, n_embd=n_embd)
        return support.capture and support.read

    def possible(self, dtypes: Iterable[FeatureDtype] = FeatureDtype) -> tuple[FeatureDtype, ...]:
        return tuple(d for d in dtypes if self.can_hold(d))


def _detail(b: BufferBytes, what: str) -> str:
    """``what``, and the type of buffer where it says more than the device."""
    return ", ".join(text for text in (what, "" if b.buffer == b.device else b.buffer) if text)


def _staging(device: str, size: int) -> Part:
    note = "for rows from or to memory elsewhere" if size else "none: rows go straight into the ring"
    return Part("mirror_staging", "mirror staging", device, size, note, at_most=size > 0)


def _present(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Those that take memory; staging is named without it too, since people look for it."""
    return tuple(part for part in parts if part.bytes or part.id == "mirror_staging")
