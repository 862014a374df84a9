"""The real program: through pipes, and at a terminal of its own."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

_CODE = "from ggml_mirror.cli import main; main()"


def piped(
    arguments: Sequence[object], said: str | bytes = "", env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """``ggml-mirror run`` with these arguments and this standard input."""
    data = said.encode() if isinstance(said, str) else said
    done = subprocess.run(
        [sys.executable, "-c", _CODE, "run", *map(str, arguments)],
        input=data,
        capture_output=True,
        timeout=300,
        env={**os.environ, "COLUMNS": "200", **(env or {})},
    )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


class Terminal:
    """``ggml-mirror`` at a pseudo-terminal.

    Attributes:
        seen: everything that it has printed.
    """

    def __init__(self, *arguments: object) -> None:
        self.seen = ""
        self._read_to = 0
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            # As a terminal starts it, also where what runs the tests ignores Ctrl-C.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.environ.update(TERM="xterm", COLUMNS="200")
            os.execv(sys.executable, [sys.executable, "-c", _CODE, *map(str, arguments)])

    def type(self, keys: str) -> None:
        data = keys.encode()
        while data:
            # Both ways at once: neither side takes more while what it echoed has not been read.
            readable, writable, _ = select.select([self.fd], [self.fd], [])
            if readable:
                self.seen += os.read(self.fd, 65536).decode("utf-8", "replace")
            if writable:
                data = data[os.write(self.fd, data[:256]) :]

    def interrupt(self) -> None:
        """Ctrl-C, by the terminal: as a signal to whatever runs in it."""
        self.type("\x03")

    def expect(self, pattern: str, timeout: float = 120.0) -> re.Match[str]:
        """Read until ``pattern`` is found behind what was found before."""
        end = time.monotonic() + timeout
        while not (found := re.compile(pattern).search(self.seen, self._read_to)):
            ready, _, _ = select.select([self.fd], [], [], max(0.0, end - time.monotonic()))
            try:
                piece = os.read(self.fd, 65536) if ready else b""
            except OSError:  # it has ended
                piece = b""
            if not piece:
                raise AssertionError(f"{pattern!r} was not printed; this was: {self.seen[self._read_to :]!r}")
            self.seen += piece.decode("utf-8", "replace")
        self._read_to = found.end()
        return found

    def wait_for_a_wait(self, timeout: float = 60.0) -> None:
        """Until it has slept, in one piece, for a tenth of a second: it waits for a key."""
        end, before = time.monotonic() + timeout, ""
        while time.monotonic() < end:
            status = Path(f"/proc/{self.pid}/status").read_text()
            now = "".join(re.findall(r"^State:\tS|^\w*voluntary_ctxt_switches:.*", status, re.MULTILINE))
            if now.startswith("State") and now == before:
                return
            before = now
            time.sleep(0.1)
        raise AssertionError(f"it never waited; it printed: {self.seen!r}")

    def wait(self, timeout: float = 60.0) -> int:
        """Its exit code, negative for a signal."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            ready, _, _ = select.select([self.fd], [], [], 0.05)
            if ready:
                try:
                    self.seen += os.read(self.fd, 65536).decode("utf-8", "replace")
                except OSError:
                    pass
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                os.close(self.fd)
                return os.waitstatus_to_exitcode(status)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise AssertionError(f"it did not end; it printed: {self.seen!r}")
