"""Bootstrap intervals, the gate, and how drafted tokens are counted."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

from decoding import Counts, count_steps, first_difference
from intervals import FAIL, OPEN, PASS, Interval, gate, median_interval, ratio, ratio_difference


def test_interval_of_a_mean_is_the_normal_one() -> None:
    # Of 400 values with deviation 1 the mean's deviation is 1 / 20: 1.96 / 20 to each side.
    values = np.random.default_rng(5).standard_normal(400)
    values = (values - values.mean()) / values.std() + 10
    got = ratio(list(values), [1.0] * 400)
    assert got.value == pytest.approx(10)
    assert got.low == pytest.approx(10 - 0.098, abs=0.006)
    assert got.high == pytest.approx(10 + 0.098, abs=0.006)


def test_interval_of_a_median() -> None:
    # The median of n normal values deviates by sqrt(pi / 2 / n): 1.96 * 0.0627 to each side.
    values = np.random.default_rng(6).standard_normal(400)
    got = median_interval(values - np.median(values) + 10)
    assert got.value == pytest.approx(10)
    assert got.high - got.low == pytest.approx(2 * 1.96 * 0.0627, rel=0.35)
    assert median_interval([3.0]) == Interval(3.0, 3.0, 3.0)
    assert median_interval([1.0, 1.0, 1.0, 1.0, 900.0]).value == 1.0
    for nothing in ([], [[1.0]]):
        with pytest.raises(ValueError, match="one dimension"):
            median_interval(nothing)


def test_same_data_give_the_same_interval() -> None:
    a, b = [3.0, 5.0, 1.0], [7.0, 7.0, 7.0]
    assert ratio(a, b, 100) == ratio(a, b, 100)


def test_a_ratio_is_of_sums_not_a_mean_of_ratios() -> None:
    assert ratio([1, 9], [1, 99], 100).value == pytest.approx(10.0)


def test_pairing_removes_what_prompts_have_in_common() -> None:
    rng = np.random.default_rng(1)
    easy = rng.uniform(0, 70, 100)  # prompts differ a lot from each other
    worse = easy - 1  # the other side loses 1 of 100 on each
    difference = ratio_difference((list(worse), [100.0] * 100), (list(easy), [100.0] * 100), 100)
    assert (difference.value, difference.low, difference.high) == pytest.approx((-1, -1, -1))
    unpaired = ratio(list(easy), [100.0] * 100, 100)
    assert unpaired.high - unpaired.low > 5


def test_nothing_drafted_is_zero_not_nan() -> None:
    assert ratio([0, 0], [0, 0]) == Interval(0, 0, 0)


@pytest.mark.parametrize("columns", [([], []), ([1.0], [1.0, 2.0])])
def test_columns_must_match(columns: tuple[list[float], list[float]]) -> None:
    with pytest.raises(ValueError):
        ratio(*columns)


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        (Interval(0.0, -0.4, 0.4), PASS),
        (Interval(0.5, 0.2, 0.9), PASS),
        (Interval(-0.9, -1.0, -0.1), PASS),  # the limit itself is allowed
        (Interval(-0.5, -1.5, 0.5), OPEN),
        (Interval(-1.4, -2.0, -0.9), OPEN),  # beyond the limit, but not beyond doubt
        (Interval(-1.4, -2.0, -1.0), OPEN),
        (Interval(-1.4, -1.8, -1.01), FAIL),
    ],
)
def test_gate(interval: Interval, verdict: str) -> None:
    assert gate(interval, 1.0) == verdict


def test_counts_leave_out_what_could_not_be_emitted() -> None:
    # 12 tokens: 1 from the prefill, then 5 + 1 and 2 + 1; two are left, so the third step had room for one drafted token,
    assert count_steps([5, 2, 1], n_draft=7, n_predict=12) == Counts(steps=3, proposed=7 + 4 + 1, accepted=5 + 2 + 1)
    # and a step for a single token drafts nothing that could count.
    assert count_steps([5, 3, 0], n_draft=7, n_predict=12) == Counts(steps=2, proposed=7 + 4, accepted=5 + 3)


def test_a_block_counts_up_to_the_room_for_it() -> None:
    assert count_steps([7], n_draft=7, n_predict=6) == Counts(steps=1, proposed=4, accepted=4)


def test_both_definitions_of_acceptance() -> None:
    counts = Counts(steps=10, proposed=70, accepted=28)
    assert counts.acceptance == pytest.approx(0.4)
    assert counts.acceptance_with_anchor == pytest.approx(38 / 80)
    assert counts.tau == pytest.approx(3.8)
    assert Counts().acceptance == Counts().acceptance_with_anchor == Counts().tau == 0.0


def test_first_difference() -> None:
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 5, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2
