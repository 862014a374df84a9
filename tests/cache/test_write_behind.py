"""The thread that writes: in order, through failures, and to the end when it is closed."""

from __future__ import annotations

import threading
import time

import pytest

from ggml_mirror.cache.write_behind import WriteBehind


def test_items_are_written_in_order_and_a_failure_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    written = []

    def write(item: int) -> None:
        if item == 3:
            raise ValueError("broken item")
        written.append(item)

    writer = WriteBehind(write)
    for item in range(7):
        writer.submit(item)
    assert writer.flush(10) and len(writer) == 0
    assert written == [0, 1, 2, 4, 5, 6]
    assert "broken item" in caplog.text
    assert writer.close()
    with pytest.raises(RuntimeError):
        writer.submit(8)


def test_closing_writes_what_waits() -> None:
    written = []
    writer = WriteBehind(lambda item: (time.sleep(0.02), written.append(item)))
    for item in range(5):
        writer.submit(item)
    assert writer.close() and written == [0, 1, 2, 3, 4]
    assert WriteBehind(written.append).close()  # one that never wrote


def test_closing_gives_up_after_a_time() -> None:
    gate, written = threading.Event(), []
    writer = WriteBehind(lambda item: gate.wait(10) and written.append(item))
    for item in range(3):
        writer.submit(item)
    assert not writer.flush(0.01) and not writer.wait(0, 0.01)
    assert not writer.close(0.05)
    gate.set()
    assert writer.wait(0, 10)
    assert writer.flush(10) and written == [0]  # what was begun is finished, the rest is not begun


def test_items_are_told_apart_by_identity() -> None:
    gate = threading.Event()
    writer: WriteBehind[list[int]] = WriteBehind(lambda item: gate.wait(10) and None)
    a, b = [1], [1]
    writer.submit(a)
    assert writer.wait(b, 0) and not writer.wait(a, 0)
    gate.set()
    assert writer.close()
