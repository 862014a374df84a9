"""Holds that a mirror is the same, byte for byte, after a call that failed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple

import numpy as np

from ggml_mirror import FeatureMirror


@contextmanager
def unchanged(m: FeatureMirror) -> Iterator[None]:
    """Put outside pytest.raises, so that what comes after the failure is compared with what was before."""
    before, facts = m.snapshot(), _facts(m)
    yield
    facts_after = _facts(m)
    after = m.snapshot()
    assert after.header == before.header
    np.testing.assert_array_equal(after.positions, before.positions)
    np.testing.assert_array_equal(after.tap_masks, before.tap_masks)
    np.testing.assert_array_equal(after.rows, before.rows)
    np.testing.assert_equal(facts_after, facts)


def _facts(m: FeatureMirror) -> list[object]:
    """Counts of calls and rows, not times: a refused call may take some."""
    times = m.times()
    counts = [times.write_calls, times.write_rows, times.read_calls, times.read_rows, *astuple(m.bus())]
    return [
        m.cap,
        m.taps,
        m.n_embd,
        m.dtype,
        m.target,
        m.draft,
        *counts,
        *(astuple(m.tap_stats(t)) for t in range(m.taps)),
    ]
