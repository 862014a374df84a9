"""The ladder that "auto" walks down as memory gets tight: kinds of rows and dtypes, most precise first, and what each costs.

A rung is there because it is smaller than all before it. That follows from the models: with few taps or a small window, fused rows,
which need room for raw ones that wait beside the mirror, are not always the smaller ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .byte_size import format_bytes, parse_bytes
from .device import Device
from .dtype import FeatureDtype
from .errors import ArgumentError
from .row_kind import FUSED, RAW

_D = FeatureDtype


@dataclass(frozen=True)
class Cost:
    """Measured change of tau (mean committed tokens per draft step) against raw f32, and its 95 % interval."""

    tau: float
    low: float
    high: float

    @property
    def measurable(self) -> bool:
        return self.high < 0

    def __str__(self) -> str:
        return f"{self.tau:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


#: Of raw f32, in the measurement that COSTS are from.
TAU = 3.680

SOURCE = (
    "measured on one H100: the demo pair, HumanEval's 164 prompts as they are, 128 tokens each (docs/benchmarks/humaneval-h100.md; "
    "iq4_nl with the draft on the CPU); intervals are of a bootstrap over prompts; a second pair agrees "
    "(docs/benchmarks/humaneval-gemma-h100.md)"
)

#: By rows and dtype. Fused f32 rows are the same arithmetic as raw ones.
COSTS: dict[tuple[str, FeatureDtype], Cost] = {
    (RAW, _D.F32): Cost(0.0, 0.0, 0.0),
    (RAW, _D.F16): Cost(-0.015, -0.030, -0.001),
    (RAW, _D.BF16): Cost(-0.009, -0.024, 0.005),
    (RAW, _D.Q8_0): Cost(0.000, -0.011, 0.012),
    (RAW, _D.Q5_1): Cost(-0.021, -0.042, 0.001),
    (RAW, _D.IQ4_NL): Cost(-0.035, -0.066, -0.004),
    (RAW, _D.Q4_0): Cost(-0.075, -0.109, -0.042),
    (FUSED, _D.F32): Cost(0.0, 0.0, 0.0),
    (FUSED, _D.F16): Cost(-0.005, -0.019, 0.008),
    (FUSED, _D.BF16): Cost(-0.010, -0.022, 0.003),
    (FUSED, _D.Q8_0): Cost(-0.006, -0.018, 0.005),
    (FUSED, _D.Q5_1): Cost(0.001, -0.012, 0.014),
    (FUSED, _D.IQ4_NL): Cost(-0.016, -0.039, 0.005),
    (FUSED, _D.Q4_0): Cost(-0.017, -0.037, 0.003),
}


@dataclass(frozen=True)
class Rung:
    """A kind of rows in a dtype; "f32" and "fused:q8_0" as text."""

    rows: str
    dtype: FeatureDtype

    @property
    def cost(self) -> Cost | None:
        """None: never measured."""
        return COSTS.get((self.rows, self.dtype))

    def __str__(self) -> str:
        return self.dtype.value if self.rows == RAW else f"{self.rows}:{self.dtype}"


#: What costs are measured against.
REFERENCE = Rung(RAW, _D.F32)

#: All that "auto" may take, by median signal-to-noise of the rows. f16 is as large as bf16 and cannot hold every value; smaller raw rows
#: than q8_0 cost acceptance. iq4_nl, as large as q4_0 and no better in drafting, takes ten times as long to store.
BY_PRECISION = (
    REFERENCE,
    Rung(FUSED, _D.F32),
    Rung(RAW, _D.BF16),
    Rung(FUSED, _D.BF16),
    Rung(FUSED, _D.Q8_0),
    Rung(RAW, _D.Q8_0),
    Rung(FUSED, _D.Q5_1),
    Rung(FUSED, _D.Q4_0),
)


def candidates(rows: str | None = None, dtype: FeatureDtype | None = None) -> tuple[Rung, ...]:
    """What may be chosen, most precise first; None: that is open. A dtype that is named is taken whether it is on the ladder or not.

    >>> [str(rung) for rung in candidates("raw")]
    ['f32', 'bf16', 'q8_0']
    """
    kinds = (RAW, FUSED) if rows is None else (rows,)
    if dtype is not None:
        return tuple(Rung(kind, dtype) for kind in kinds)
    return tuple(rung for rung in BY_PRECISION if rung.rows in kinds)


def descending(rungs: Iterable[Rung], bytes_of: Callable[[Rung], int]) -> dict[Rung, int]:
    """The rungs that take less than every one before them, with their bytes."""
    ladder: dict[Rung, int] = {}
    for rung in rungs:
        size = bytes_of(rung)
        if not ladder or size < min(ladder.values()):
            ladder[rung] = size
    return ladder


def choose(needed: Mapping[Rung, int], *, free: int, margin: int, device: str) -> tuple[Rung | None, str]:
    """The first rung that leaves ``margin`` bytes free, and why, with the numbers.

    Args:
        needed: by rung, the most precise first: bytes that everything takes on the device.
        free: bytes that are free there.

    >>> choose({Rung("raw", FeatureDtype.F32): 900, Rung("fused", FeatureDtype.F32): 600}, free=1000, margin=200, device="CUDA0")[1]
    'fused:f32 leaves 400 B free on CUDA0, the margin is 200 B; f32 would leave 100 B'
    """
    refused: list[str] = []
    for rung, size in needed.items():
        left = free - size
        if left >= margin:
            first = f"{rung} leaves {format_bytes(left)} free on {device}, the margin is {format_bytes(margin)}"
            return rung, "; ".join([first, *(refused or ["no dtype is more precise"])])
        would = f"leave {format_bytes(left)}" if left >= 0 else f"need {format_bytes(-left)} more than is free"
        refused.append(f"{rung} would {would}")
    return None, f"no dtype leaves {format_bytes(margin)} free on {device}, the margin: {'; '.join(refused)}"


def next_rung(ladder: Mapping[Rung, int], below: int, free: int) -> Rung | None:
    """Of the rungs that take less than ``below``, the first that fits."""
    return next((rung for rung, size in ladder.items() if size < below and size <= free), None)


def offer(rung: Rung, size: int, what: str) -> str:
    """Advice to take a rung, with its bytes and its cost."""
    cost = f"tau {rung.cost} of {TAU:.3f}" if rung.cost else "its cost was not measured"
    return f"the next rung that fits is feature_rows {rung.rows}, feature_dtype {rung.dtype}: {format_bytes(size)} {what}, {cost}"


#: What "auto" leaves free on the mirror's device unless told otherwise: this share of its memory, and so many bytes at most (the
#: margin of llama.cpp's own ``--fit``).
MARGIN_SHARE, MARGIN_MOST = 0.05, 1 << 30


def default_margin(device: Device) -> int:
    """Bytes that "auto" leaves free on a device unless told otherwise: 5 % of its memory, at most 1 GiB."""
    return min(int(MARGIN_SHARE * device.memory_total), MARGIN_MOST)


def parse_margin(asked: int | str | None) -> int | None:
    """Bytes that "auto" was told to leave free, or text such as "512MiB"; None: it was not told.

    Raises:
        ArgumentError: no size, or a negative one.
    """
    margin = parse_bytes(asked) if isinstance(asked, str) else asked
    if margin is not None and margin < 0:
        raise ArgumentError(f"the memory margin is {margin} bytes; it cannot be negative")
    return margin


def to_json(rung: Rung, size: int, *, chosen: bool) -> dict[str, Any]:
    """A rung in reports for machines."""
    cost = rung.cost
    return {
        "rows": rung.rows,
        "dtype": rung.dtype.value,
        "bytes": size,
        "tau_change": cost and cost.tau,
        "tau_interval": cost and [cost.low, cost.high],
        "chosen": chosen,
    }
