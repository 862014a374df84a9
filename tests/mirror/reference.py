"""What the stored bytes of rows must be, from numpy and the gguf package alone.

Two correct quantisers may round a value differently only where its exact quotient lies at a tie between two levels. The
sources of that are: ``127 / amax`` against ``1 / (amax / 127)``, half-to-even against half-away-from-zero, and fused
multiply-add. Each moves a quotient by a few units in the last place, so a level may differ, by one, only if the exact
quotient is within ``tie_epsilon`` of the boundary between both levels. GPU kernels may divide approximately: there
(``approximate``) the tolerance is four times as wide, and a scale may be the f16 beside the reference's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize as gguf_dequantize
from gguf.quants import quantize as gguf_quantize

from ggml_mirror import FeatureDtype

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

BLOCK = 32
F16_MAX = 65504.0
FLT_MAX = float(np.finfo(np.float32).max)
IQ4_NL_LEVELS = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float64)

#: Unquantised types convert value by value and exactly one result is right.
PLAIN = (FeatureDtype.F32, FeatureDtype.F16, FeatureDtype.BF16)

#: Largest |x| that each type can give back, from its layout: the largest level times the largest f16 scale; the _1
#: types store a block's minimum itself as f16. iq4_nl fits its scale to the block: no such product, see test_limits.py.
LIMITS = {
    FeatureDtype.F32: FLT_MAX,
    FeatureDtype.F16: F16_MAX,
    FeatureDtype.BF16: float(np.array(0x7F7F0000, np.uint32).view(np.float32)),
    FeatureDtype.Q8_0: 127 * F16_MAX,
    FeatureDtype.Q5_1: F16_MAX,
    FeatureDtype.Q5_0: 16 * F16_MAX,
    FeatureDtype.Q4_1: F16_MAX,
    FeatureDtype.Q4_0: 8 * F16_MAX,
}

#: (levels below zero or 0 for types with a minimum, levels)
_LEVELS = {
    FeatureDtype.Q8_0: (127, 255),
    FeatureDtype.Q5_1: (0, 32),
    FeatureDtype.Q5_0: (16, 32),
    FeatureDtype.Q4_1: (0, 16),
    FeatureDtype.Q4_0: (8, 16),
    FeatureDtype.IQ4_NL: (127, 255),
}
_WITH_MINIMUM = (FeatureDtype.Q5_1, FeatureDtype.Q4_1)


def gguf_type(dtype: FeatureDtype) -> GGMLQuantizationType:
    return GGMLQuantizationType[dtype.name]


def row_bytes(dtype: FeatureDtype, width: int) -> int:
    block, size = GGML_QUANT_SIZES[gguf_type(dtype)]
    return width // block * size


def tie_epsilon(dtype: FeatureDtype, approximate: bool = False) -> float:
    """In levels: the largest quotient times four roundings of a float32 (2^-24 each); of approximate ones, sixteen."""
    return _LEVELS[dtype][1] * (16 if approximate else 4) * 2.0**-24


def quantize(dtype: FeatureDtype, x: Floats) -> Bytes:
    """float32 [n, width] -> uint8 [n, row bytes]."""
    with np.errstate(all="ignore"):  # blocks whose scale underflows, see assert_same_bytes
        if dtype is FeatureDtype.IQ4_NL:
            stored = _quantize_iq4_nl(x.reshape(-1, BLOCK))
        else:
            stored = np.ascontiguousarray(gguf_quantize(x, gguf_type(dtype)))
    return stored.view(np.uint8).reshape(len(x), -1)


def dequantize(dtype: FeatureDtype, stored: Bytes) -> Floats:
    """uint8 [n, row bytes] -> float32 [n, width]."""
    with np.errstate(invalid="ignore"):  # an infinite scale times a level of 0
        return gguf_dequantize(np.ascontiguousarray(stored), gguf_type(dtype)).astype(np.float32, copy=False)


def _iq4_nl_scale0(blocks: Floats) -> npt.NDArray[np.float64]:
    """The scale with which levels are chosen: it puts the first largest |x| at -127. [blocks, 1]"""
    first_largest = np.abs(blocks).argmax(axis=1)[:, None]
    return np.take_along_axis(blocks, first_largest, axis=1).astype(np.float64) / -127


def _quantize_iq4_nl(blocks: Floats) -> Bytes:
    """ggml's reference for iq4_nl: nearest of 16 levels at scale0, then the scale that fits them best, x^2-weighted."""
    scale0 = _iq4_nl_scale0(blocks)
    x = blocks.astype(np.float64)
    quotient = np.where(scale0 == 0, 0, x / np.where(scale0 == 0, 1, scale0))
    # Exhaustive search. At a tie argmin takes the lower level and ggml the upper: assert_same_bytes allows both.
    index = np.abs(quotient[:, :, None] - IQ4_NL_LEVELS).argmin(axis=2)
    nibbles = (index[:, :16] | index[:, 16:] << 4).astype(np.uint8)
    return np.concatenate([_iq4_nl_scale(blocks, index).view(np.uint8).reshape(-1, 2), nibbles], axis=1)


def _iq4_nl_scale(blocks: Floats, index: npt.NDArray[np.int64]) -> npt.NDArray[np.uint16]:
    """f16 bits of the scale that minimises the squared error of these levels, weighted with x^2. [blocks]"""
    x, level = blocks.astype(np.float64), IQ4_NL_LEVELS[index]
    weight = x * x
    norm = (weight * level * level).sum(axis=1)
    scale = np.where(norm == 0, 0, (weight * level * x).sum(axis=1) / np.where(norm == 0, 1, norm))
    return scale.astype(np.float16).view(np.uint16)


@dataclass(frozen=True)
class Blocks:
    """A quantised block's parts: scale and minimum (f16 bits), levels as integers (for iq4_nl: indices)."""

    scale: npt.NDArray[np.uint16]  # [blocks]
    minimum: npt.NDArray[np.uint16]  # [blocks], 0 where the type has none
    level: npt.NDArray[np.int64]  # [blocks, 32]


def unpack(dtype: FeatureDtype, stored: Bytes) -> Blocks:
    raw = np.ascontiguousarray(stored).reshape(-1, row_bytes(dtype, BLOCK))
    scale, rest = raw[:, :2].copy().view(np.uint16)[:, 0], raw[:, 2:]
    minimum = np.zeros_like(scale)
    if dtype in _WITH_MINIMUM:
        minimum, rest = rest[:, :2].copy().view(np.uint16)[:, 0], rest[:, 2:]
    if dtype is FeatureDtype.Q8_0:
        return Blocks(scale, minimum, rest.view(np.int8).astype(np.int64))
    fifth = np.zeros((len(raw), BLOCK), np.int64)
    if dtype in (FeatureDtype.Q5_0, FeatureDtype.Q5_1):
        fifth, rest = np.unpackbits(rest[:, :4], axis=1, bitorder="little").astype(np.int64), rest[:, 4:]
    nibbles = np.concatenate([rest & 15, rest >> 4], axis=1).astype(np.int64)
    return Blocks(scale, minimum, nibbles | fifth << 4)


@dataclass(frozen=True)
class Exact:
    """A block in exact (float64) arithmetic."""

    scale: npt.NDArray[np.float64]  # [blocks, 1]
    minimum: npt.NDArray[np.float64]  # [blocks, 1]
    quotient: npt.NDArray[
        np.float64
    ]  # [blocks, 32]: in levels as unpack() gives them, or in units of scale0 for iq4_nl


def exact(dtype: FeatureDtype, x: Floats) -> Exact:
    blocks = x.reshape(-1, BLOCK)
    b = blocks.astype(np.float64)
    minimum = np.zeros((len(b), 1))
    below, levels = _LEVELS[dtype]
    if dtype in _WITH_MINIMUM:
        minimum = b.min(axis=1, keepdims=True)
        scale = (b.max(axis=1, keepdims=True) - minimum) / (levels - 1)
    elif dtype is FeatureDtype.Q8_0:
        scale, below = np.abs(b).max(axis=1, keepdims=True) / 127, 0
    elif dtype is FeatureDtype.IQ4_NL:
        scale, below = _iq4_nl_scale0(blocks), 0
    else:
        first_largest = np.abs(blocks).argmax(axis=1)[:, None]
        scale = np.take_along_axis(b, first_largest, axis=1) / -below
    quotient = np.where(scale == 0, 0, (b - minimum) / np.where(scale == 0, 1, scale)) + below
    return Exact(scale, minimum, quotient)


def _boundary(dtype: FeatureDtype, one: npt.NDArray[np.int64], other: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """The quotient at which two neighbouring levels are equally near."""
    if dtype is FeatureDtype.IQ4_NL:
        return (IQ4_NL_LEVELS[one] + IQ4_NL_LEVELS[other]) / 2
    return (one + other) / 2


def assert_same_bytes(
    dtype: FeatureDtype, x: Floats, stored: Bytes, *, approximate: bool = False, signed_zeros: bool = True
) -> int:
    """``stored`` is what the reference makes of ``x``, but for rounding ties. Returns how many levels differ at one.

    Blocks whose f16 scale is 0 hold values too small for it: their levels multiply that 0 and may be anything.
    """
    expected = quantize(dtype, x)
    assert stored.dtype == np.uint8 and stored.shape == expected.shape
    if dtype in PLAIN:
        if not signed_zeros:
            stored, expected = (_positive_zeros(dtype, b, approximate) for b in (stored, expected))
        np.testing.assert_array_equal(stored, expected)
        return 0
    ours, theirs = unpack(dtype, stored), unpack(dtype, expected)
    scale, scale_ulps = theirs.scale, int(approximate)
    if dtype is FeatureDtype.IQ4_NL:
        scale_ulps = 1  # sums of 32 products, in an order of the implementation's choice
        # A level taken at a tie moves the fitted scale: what counts is the fit to the levels as stored.
        with np.errstate(all="ignore"):
            scale = _iq4_nl_scale(x.reshape(-1, BLOCK), ours.level)
    away = np.abs(_f16_order(ours.scale) - _f16_order(scale))
    differ = (ours.level != theirs.level) & (_f16_order(theirs.scale) != 0)[:, None]
    assert away.max(initial=0) <= scale_ulps, f"scales differ: blocks {np.flatnonzero(away > scale_ulps)[:8]}"
    np.testing.assert_array_equal(_f16_order(ours.minimum), _f16_order(theirs.minimum), "minima differ")
    where = np.nonzero(differ)
    one, other = ours.level[where], theirs.level[where]
    assert (np.abs(one - other) == 1).all(), f"levels differ by more than one: {one[:8]} and {other[:8]}"
    from_tie = np.abs(exact(dtype, x).quotient[where] - _boundary(dtype, one, other))
    epsilon = tie_epsilon(dtype, approximate)
    assert (from_tie <= epsilon).all(), f"levels differ {from_tie.max()} from a tie; {epsilon} is allowed"
    return len(one)


def _positive_zeros(dtype: FeatureDtype, stored: Bytes, subnormals: bool) -> Bytes:
    """-0.0 as 0.0; with ``subnormals`` what can come of those of float32 as well, which GPUs may flush."""
    kind, magnitude = (np.uint32, 0x7FFFFFFF) if dtype is FeatureDtype.F32 else (np.uint16, 0x7FFF)
    # As bit patterns. In bf16 the largest subnormals are rounded up to 2^-126; f16 has none of them.
    largest = {FeatureDtype.F32: 0x007FFFFF, FeatureDtype.BF16: 0x0080}.get(dtype, 0) if subnormals else 0
    values = stored.copy().view(kind)
    values[values & magnitude <= largest] = 0
    return values.view(np.uint8)


def _f16_order(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.int64]:
    """f16 bit patterns as integers in the order of their values; both zeros are 0."""
    magnitude = (bits & 0x7FFF).astype(np.int64)
    return np.where(bits & 0x8000, -magnitude, magnitude)


def error_bound(dtype: FeatureDtype, x: Floats, approximate: bool = False) -> npt.NDArray[np.float64]:
    """[like x]: how far what is read may be from x: half a quantum, and the rounding of scale and minimum to f16."""
    magnitude = np.abs(x.astype(np.float64))
    if dtype is FeatureDtype.F32:
        return np.full_like(magnitude, 2.0**-126 if approximate else 0)
    if dtype is FeatureDtype.F16:
        return magnitude * 2.0**-11 + 2.0**-25
    if dtype is FeatureDtype.BF16:
        return magnitude * 2.0**-8 + (2.0**-126 if approximate else 2.0**-134)
    e = exact(dtype, x)
    scale, (below, levels) = np.abs(e.scale), _LEVELS[dtype]
    f16 = (below or levels) * (3 if approximate else 1) * (scale * 2.0**-11 + 2.0**-25)
    f16 = f16 + np.abs(e.minimum) * 2.0**-11 + 2.0**-25
    if dtype is FeatureDtype.IQ4_NL:
        # Half the widest gap is 12, +127 is clipped to 113 (14 away), and the fitted scale is within 12.2 % of scale0.
        half = np.full_like(e.quotient, 14 + 0.122 * 127)
    else:
        top = np.inf if dtype is FeatureDtype.Q8_0 else levels - 1
        # q4_0 and q5_0 clip the end opposite to the largest.
        half = np.maximum(0.5, e.quotient - top) + tie_epsilon(dtype, approximate)
    return (scale * half + f16).reshape(x.shape)
