"""A closed mirror: every use raises ClosedError, closing again does not, and what it was can still be asked."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ggml_mirror import FeatureMirror
from ggml_mirror.errors import ClosedError

from .places import Place

ROWS = np.ones((1, 64), np.float32)

#: Every public method and every property that needs the ring.
USES: dict[str, Callable[[FeatureMirror, Any], Any]] = {
    "write": lambda m, snapshot: m.write(tap=0, start=0, rows=ROWS[:, :32]),
    "write_rows": lambda m, snapshot: m.write_rows(start=0, rows=ROWS),
    "write_tensor": lambda m, snapshot: m.write_tensor(1, start=0),
    "write_taps": lambda m, snapshot: m.write_taps([1, 1], start=0),
    "read": lambda m, snapshot: m.read(start=0, count=1),
    "read_tensor": lambda m, snapshot: m.read_tensor(1, start=0, count=1),
    "view": lambda m, snapshot: m.view(start=0, count=1),
    "truncate": lambda m, snapshot: m.truncate(0),
    "clear": lambda m, snapshot: m.clear(),
    "snapshot": lambda m, snapshot: m.snapshot(),
    "restore": lambda m, snapshot: m.restore(snapshot),
    "tap_stats": lambda m, snapshot: m.tap_stats(0),
    "bus": lambda m, snapshot: m.bus(),
    "times": lambda m, snapshot: m.times(),
    "transfers": lambda m, snapshot: m.transfers(),
    "reset_stats": lambda m, snapshot: m.reset_stats(),
    "positions": lambda m, snapshot: m.positions,
    "__len__": lambda m, snapshot: len(m),
    "__enter__": lambda m, snapshot: m.__enter__(),
}

#: What is known without the ring.
FACTS = ("width", "row_nbytes", "nbytes", "closed")


def test_every_public_name_is_covered() -> None:
    public = {n for n, _ in inspect.getmembers(FeatureMirror) if not n.startswith("_")}
    assert public - {"close", "rows"} == {n for n in USES if not n.startswith("_")} | set(FACTS)


@pytest.mark.parametrize("use", USES)
def test_use_after_close_raises(place: Place, use: str) -> None:
    with place.mirror(taps=2, n_embd=32, cap=4, dtype="f32") as m:
        m.write_rows(start=0, rows=ROWS)
        snapshot = m.snapshot()
    with pytest.raises(ClosedError, match="closed"):
        USES[use](m, snapshot)


def test_closing_twice_is_harmless(place: Place) -> None:
    m = place.mirror(taps=2, n_embd=32, cap=4)
    assert not m.closed
    for _ in range(3):
        m.close()
        assert m.closed


def test_closed_mirror_still_says_what_it_was(place: Place) -> None:
    with place.mirror(taps=2, n_embd=32, cap=4, dtype="q8_0") as m:
        facts = [getattr(m, name) for name in ("taps", "n_embd", "cap", "dtype", "size", *FACTS[:3])]
    assert [getattr(m, name) for name in ("taps", "n_embd", "cap", "dtype", "size", *FACTS[:3])] == facts
    assert repr(m).endswith(": closed>") and "2 x 32, cap 4, q8_0" in repr(m)


def test_leaving_by_an_exception_closes(place: Place) -> None:
    with pytest.raises(KeyError), place.mirror(taps=2, n_embd=32, cap=4) as m:
        raise KeyError
    assert m.closed


def test_mirror_of_a_failed_construction_is_closed_and_has_a_repr() -> None:
    m = FeatureMirror.__new__(FeatureMirror)
    with pytest.raises(ValueError):
        m.__init__(taps=0, n_embd=32, cap=4)  # type: ignore[misc]
    m.close()


def test_repr_says_what_is_held(place: Place) -> None:
    with place.mirror(taps=2, n_embd=32, cap=4, dtype="q8_0") as m:
        assert repr(m) == f"<FeatureMirror 2 x 32, cap 4, q8_0 on {m.device.name}, 272 bytes: empty>"
        m.write_rows(start=9, rows=np.repeat(ROWS, 3, axis=0))
        assert repr(m).endswith(", 272 bytes: positions 9..11 (3 rows)>")
