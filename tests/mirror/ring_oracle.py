"""The ring that a mirror must behave like, as a dictionary, and rows that every dtype under test stores exactly."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .reference import BLOCK, Floats

N_EMBD = BLOCK


def exact_rows(seed: int, n: int, width: int) -> Floats:
    """Random rows, different for each seed, that f32 and q8_0 give back bit for bit: k * 2^-e, and max |k| = 127."""
    rng = np.random.default_rng(seed)
    levels = rng.integers(-127, 128, (n, width // BLOCK, BLOCK))
    levels[:, :, rng.integers(BLOCK)] = 127
    return (levels * 2.0 ** -float(rng.integers(0, 9))).astype(np.float32).reshape(n, width)


@dataclass
class OracleRing:
    """Slot = position mod cap; the last write to a slot wins; a position is whole once all its taps were written."""

    cap: int
    taps: int
    slots: dict[int, tuple[int, dict[int, Floats]]] = field(default_factory=dict)
    slices_written: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.slices_written = self.slices_written or [0] * self.taps

    def copy(self) -> OracleRing:
        slots = {slot: (position, dict(slices)) for slot, (position, slices) in self.slots.items()}
        return OracleRing(self.cap, self.taps, slots, list(self.slices_written))

    def write(self, tap: int | None, start: int, rows: Floats) -> None:
        kept = rows[-self.cap :] if len(rows) else rows
        first = start + len(rows) - len(kept)
        for tap_, slices in enumerate(np.split(kept, self.taps, axis=1)) if tap is None else [(tap, kept)]:
            self.slices_written[tap_] += len(kept)
            for position, values in enumerate(slices, start=first):
                slot = position % self.cap
                if slot not in self.slots or self.slots[slot][0] != position:
                    self.slots[slot] = (position, {})
                self.slots[slot][1][tap_] = values

    def truncate(self, start: int) -> None:
        self.slots = {slot: held for slot, held in self.slots.items() if held[0] < start}

    def clear(self) -> None:
        self.slots = {}

    def positions(self, *, whole: bool = True) -> list[int]:
        return sorted(p for p, slices in self.slots.values() if len(slices) == self.taps or not whole)

    def stretches(self) -> list[tuple[int, int]]:
        """(start, count) of the longest ranges of whole positions."""
        found: list[tuple[int, int]] = []
        for p in self.positions():
            if found and sum(found[-1]) == p:
                found[-1] = (found[-1][0], found[-1][1] + 1)
            else:
                found.append((p, 1))
        return found

    def slices(self, position: int) -> dict[int, Floats]:
        held, slices = self.slots.get(position % self.cap, (-1, {}))
        return slices if held == position else {}

    def read(self, start: int, count: int) -> Floats | int:
        """The rows, or the first position that cannot be read."""
        rows = []
        for position in range(start, start + count):
            slices = self.slices(position)
            if len(slices) != self.taps:
                return position
            rows.append(np.concatenate([slices[tap] for tap in range(self.taps)]))
        return np.stack(rows) if rows else np.empty((0, self.taps * N_EMBD), np.float32)
