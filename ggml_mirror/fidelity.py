"""How far stored rows are from what the model computed: signal-to-noise in dB, and what the features look like."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

F16_MAX = 65504.0
_BLOCK = 32  # of ggml's quantised types
_REPLACED = np.finfo(np.float32).max  # what a mirror stores for an infinity in F32

Rows = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Snr:
    """Signal-to-noise ratio over rows, in dB: ``10 log10(sum x^2 / sum (x - y)^2)``; infinite where nothing was lost.

    Attributes:
        median: of the rows' ratios.
        p5: the ratio that 5 % of the rows fall below.
        energy: of the sums over all rows; rows of large magnitude dominate it.
        exact: every value came back bit for bit.
    """

    median: float
    p5: float
    energy: float
    exact: bool

    def to_json(self) -> dict[str, Any]:
        """With null for infinity, which JSON cannot express."""
        return {
            "median_db": _finite(self.median),
            "p5_db": _finite(self.p5),
            "energy_db": _finite(self.energy),
            "exact": self.exact,
        }


class SnrMeter:
    """Collects rows and what was read back for them; :meth:`result` gives the ratio."""

    def __init__(self) -> None:
        self._ratios: list[npt.NDArray[np.float64]] = []
        self._signal = 0.0
        self._noise = 0.0
        self._exact = True

    def add(self, rows: Rows, stored: Rows) -> None:
        """Take ``rows`` as computed and ``stored`` as read back, both ``[n, width]``."""
        x = rows.astype(np.float64)
        signal = np.einsum("ij,ij->i", x, x)
        x -= stored
        noise = np.einsum("ij,ij->i", x, x)
        with np.errstate(divide="ignore", invalid="ignore"):
            # A zero row that came back as zero lost nothing: infinite, where 0/0 would say NaN.
            self._ratios.append(np.where(noise == 0, np.inf, 10 * np.log10(signal / noise)))
        self._signal += float(signal.sum())
        self._noise += float(noise.sum())
        self._exact = self._exact and _same_bits(rows, stored)

    def result(self) -> Snr:
        """The ratio over everything added so far; at least one row."""
        ratios = np.concatenate(self._ratios)
        # Order statistics that exist among the rows: interpolating between infinities gives NaN.
        return Snr(
            median=float(np.percentile(ratios, 50, method="lower")),
            p5=float(np.percentile(ratios, 5, method="lower")),
            energy=10 * math.log10(self._signal / self._noise) if self._noise and self._signal else math.inf,
            exact=self._exact,
        )


@dataclass(frozen=True)
class TapProfile:
    """What one tap's features, or fused rows, look like before they are stored.

    Attributes:
        layer: block index; None for fused rows.
        abs_max: largest finite ``|x|``.
        over_f16: finite values with ``|x|`` > 65504, which F16 cannot hold.
        nan, inf: values that are not finite.
        top_channel: the channel with the most energy.
        top_channel_energy: its part of the tap's energy, 0..1.
        crest: largest values of blocks of 32 over the root mean square, ``sqrt(32 sum max^2 / sum x^2)`` of a row, median over
            rows. A block format's step is in proportion to that largest value. 1: all values alike; 2.4: normally distributed;
            5.7: one value holds all energy. 0 if the width is not a multiple of 32.
    """

    layer: int | None
    abs_max: float
    over_f16: int
    nan: int
    inf: int
    top_channel: int
    top_channel_energy: float
    crest: float


class TapMeter:
    """Collects one tap's rows; :meth:`result` describes them."""

    def __init__(self, n_embd: int) -> None:
        self._energy = np.zeros(n_embd)
        self._abs_max = 0.0
        self._over = 0
        self._crests: list[npt.NDArray[np.float64]] = []

    def add(self, rows: Rows) -> None:
        """Take rows ``[n, n_embd]`` as an F32 mirror gives them back, so without NaN and infinity."""
        size = np.abs(rows)
        size[size == _REPLACED] = 0  # an infinity, which the mirror counted; it is not a magnitude
        self._abs_max = max(self._abs_max, float(size.max(initial=0.0)))
        self._over += int(np.count_nonzero(size > F16_MAX))
        self._energy += np.einsum("ij,ij->j", rows, rows, dtype=np.float64)
        if rows.shape[1] % _BLOCK == 0:
            peaks = size.reshape(len(size), -1, _BLOCK).max(axis=2).astype(np.float64)
            energy = np.einsum("ij,ij->i", size, size, dtype=np.float64)
            some = energy > 0
            self._crests.append(np.sqrt(_BLOCK * np.einsum("ij,ij->i", peaks, peaks)[some] / energy[some]))

    def result(self, layer: int | None, *, nan: int, inf: int) -> TapProfile:
        """``nan`` and ``inf`` come from the mirror's own count: they were replaced when the rows were stored."""
        top = int(self._energy.argmax())
        total = float(self._energy.sum())
        share = float(self._energy[top]) / total if total else 0.0
        crests = np.concatenate(self._crests) if self._crests else np.zeros(0)
        crest = float(np.median(crests)) if crests.size else 0.0
        return TapProfile(layer, self._abs_max, self._over, nan, inf, top, share, crest)


def _same_bits(a: Rows, b: Rows) -> bool:
    return bool(np.array_equal(np.ascontiguousarray(a).view(np.uint32), np.ascontiguousarray(b).view(np.uint32)))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
