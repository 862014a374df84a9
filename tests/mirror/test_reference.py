"""The oracle itself: it accepts its own bytes, what another correct quantiser may do at a tie, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from ggml_mirror import FeatureDtype

from . import reference
from .inputs import INPUTS

QUANTISED = [d for d in FeatureDtype if d not in reference.PLAIN]
N, WIDTH = 6, 256


@pytest.mark.parametrize("name", INPUTS)
def test_own_bytes_are_accepted(dtype: FeatureDtype, name: str) -> None:
    limit = np.float32(dtype.limit)
    x = INPUTS[name](N, WIDTH).clip(-limit, limit)
    assert reference.assert_same_bytes(dtype, x, reference.quantize(dtype, x)) == 0


def test_any_changed_bit_is_noticed(dtype: FeatureDtype) -> None:
    """Of values that lie far from every tie, in the first row. (The scale of iq4_nl may be one unit off.)"""
    x = INPUTS["normal-1"](N, WIDTH)
    good = reference.quantize(dtype, x)
    missed = []
    for byte in range(min(good.shape[1], 72)):
        for bit in range(8):
            bad = good.copy()
            bad[0, byte] ^= 1 << bit
            try:
                reference.assert_same_bytes(dtype, x, bad)
                missed.append((byte, bit))
            except AssertionError:
                pass
    if dtype is FeatureDtype.IQ4_NL:
        assert {byte % 18 for byte, _ in missed} <= {0, 1}
    else:
        assert missed == []


@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
def test_neighbouring_level_is_accepted_at_a_tie_only(dtype: FeatureDtype) -> None:
    x = INPUTS["normal-1"](N, WIDTH)
    x[:, ::32] = np.where(x[:, ::32] < 0, -6, 6)  # the largest of each block, for a scale that stays
    x[:, 1::32] = -x[:, ::32] if dtype in (FeatureDtype.Q5_1, FeatureDtype.Q4_1) else x[:, 1::32]
    e = reference.exact(dtype, x)
    levels = reference.unpack(dtype, reference.quantize(dtype, x)).level
    block, place = 3, 17
    low = int(np.floor(e.quotient[block, place]))
    if dtype is FeatureDtype.IQ4_NL:
        index = int(levels[block, place])
        tie = (reference.IQ4_NL_LEVELS[index] + reference.IQ4_NL_LEVELS[index + 1]) / 2
    else:
        tie = low + 0.5
    below = {FeatureDtype.Q5_0: 16, FeatureDtype.Q4_0: 8}.get(dtype, 0)
    epsilon = reference.tie_epsilon(dtype)
    outcomes = []
    for distance in (0.5 * epsilon, -0.5 * epsilon, 300 * epsilon, -300 * epsilon):
        y = x.astype(np.float64).reshape(-1, 32)
        y[block, place] = (tie + distance - below) * e.scale[block, 0] + e.minimum[block, 0]
        y = y.astype(np.float32).reshape(N, WIDTH)
        other_side = y.reshape(-1, 32).copy()
        other_side[block, place] = (tie - distance - below) * e.scale[block, 0] + e.minimum[block, 0]
        stored = reference.quantize(dtype, other_side.reshape(N, WIDTH))
        try:
            reference.assert_same_bytes(dtype, y, stored)
            outcomes.append("accepted")
        except AssertionError:
            outcomes.append("refused")
    assert outcomes == ["accepted", "accepted", "refused", "refused"]


@pytest.mark.parametrize("name", INPUTS)
def test_reference_is_within_its_own_bound(dtype: FeatureDtype, name: str) -> None:
    limit = np.float32(dtype.limit)
    x = INPUTS[name](N, WIDTH).clip(-limit, limit)
    read = reference.dequantize(dtype, reference.quantize(dtype, x))
    assert (np.abs(read.astype(np.float64) - x) <= reference.error_bound(dtype, x)).all()


@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
def test_bound_is_of_the_size_of_a_quantum(dtype: FeatureDtype) -> None:
    """Two quanta off is beyond it, but for iq4_nl whose levels lie 10 to 24 units apart."""
    x = INPUTS["normal-1"](N, WIDTH)
    quantum = np.abs(reference.exact(dtype, x).scale)
    bound = reference.error_bound(dtype, x).reshape(-1, 32)
    assert (bound < (31 if dtype is FeatureDtype.IQ4_NL else 1.1) * quantum + 1e-3).all()
