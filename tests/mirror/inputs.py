"""Rows that are hard to store, by name."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .reference import BLOCK, Floats


def _normal(scale: float) -> Callable[[int, int], Floats]:
    return lambda n, width: (np.random.default_rng(7).standard_normal((n, width)) * scale).astype(np.float32)


def _signed_zeros(n: int, width: int) -> Floats:
    x = np.zeros((n, width), np.float32)
    x[:, ::3] = -0.0
    x[n // 2 :, ::BLOCK] = 1.5  # and beside a value that gives the block a scale
    return x


def _subnormals(n: int, width: int) -> Floats:
    bits = np.random.default_rng(11).integers(0, 1 << 23, (n, width), np.uint32)
    bits |= np.random.default_rng(12).integers(0, 2, (n, width), np.uint32) << 31
    return bits.view(np.float32)


def _underflow(n: int, width: int) -> Floats:
    """Blocks whose scales run through the f16 subnormals and below, down to float32 subnormals."""
    exponent = np.linspace(-44, -3, n * width // BLOCK).repeat(BLOCK).reshape(n, width)
    return (np.random.default_rng(13).uniform(-1, 1, (n, width)) * 10.0**exponent).astype(np.float32)


def _massive_channel(n: int, width: int) -> Floats:
    x = _normal(1.0)(n, width)
    x[:, 5::64] = 23800 + 100 * x[:, 5::64]
    return x


def _near_f16_max(n: int, width: int) -> Floats:
    x = np.random.default_rng(17).uniform(64000, 65504, (n, width)).astype(np.float32)
    x[0] = 65504
    x *= np.where(np.random.default_rng(18).integers(0, 2, (n, width)), 1, -1).astype(np.float32)
    x[1] = np.abs(x[1])  # a narrow range far from zero
    return x


def _ties(n: int, width: int) -> Floats:
    """Quotients at halves, exactly, for scales that are powers of two."""
    x = np.random.default_rng(19).integers(-126, 127, (n, width)).astype(np.float32)
    x[:, 1::2] += 0.5
    x[:, ::BLOCK] = 127
    x[n // 2 :, ::BLOCK] = -128
    return x * np.float32(2.0) ** np.arange(-4, n - 4, dtype=np.float32)[:, None]


def _constant(n: int, width: int) -> Floats:
    return np.repeat(np.linspace(-3, 3, n, dtype=np.float32)[:, None], width, axis=1)


def _opposite_ends(n: int, width: int) -> Floats:
    """Blocks whose largest |x| occurs with both signs, either of them first."""
    x = _normal(0.3)(n, width).clip(-0.9, 0.9)
    x[:, ::BLOCK], x[:, 1::BLOCK] = 1, -1
    x[n // 2 :] *= -1
    return x


INPUTS: dict[str, Callable[[int, int], Floats]] = {
    "normal-1e-3": _normal(1e-3),
    "normal-1": _normal(1.0),
    "normal-100": _normal(100.0),
    "normal-1e4": _normal(1e4),
    "zeros": lambda n, width: np.zeros((n, width), np.float32),
    "signed-zeros": _signed_zeros,
    "subnormals": _subnormals,
    "underflow": _underflow,
    "massive-channel": _massive_channel,
    "near-65504": _near_f16_max,
    "ties": _ties,
    "constant": _constant,
    "opposite-ends": _opposite_ends,
}

#: Inputs whose scales are ordinary numbers, so that storing what was read back changes nothing.
STABLE_INPUTS = ("normal-1e-3", "normal-1", "normal-100", "normal-1e4", "massive-channel", "ties", "opposite-ends")
