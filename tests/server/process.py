"""A server in a process of its own, as a user starts it."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import openai

#: With F32 weights, texts do not depend on how tokens are cut into batches: see tests/dflash/pair.py.
EXACT = ("-fa", "off", "-ctk", "f32", "-ctv", "f32")

_MOST_MEMORY = 16 << 30

_START = "from ggml_mirror.cli import main; main()"


class ServerProcess:
    """``ggml-mirror serve`` on a free port of this machine.

    Attributes:
        lines: what it has logged, so far.
    """

    def __init__(
        self, *flags: object, ready: bool = True, threads: bool = True, exact: bool = True, **environment: str
    ) -> None:
        own = ["-t", "1", "-tb", "1"] if threads else []
        own += EXACT if threads and exact else ()
        command = [sys.executable, "-c", _START, "serve", "--port", "0", *own, *map(str, flags)]
        env = {name: value for name, value in os.environ.items() if name not in ("LLAMA_API_KEY", "CONFIG_FILE")}
        # A request that makes llama.cpp fill the memory is to end this process, not the machine's others.
        self.process = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            text=True,
            env={**env, **environment},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (_MOST_MEMORY, _MOST_MEMORY)),
        )
        self.lines: list[str] = []
        self._grown = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()
        self.url = ""
        try:
            self.url = re.search(r"http://\S+:\d+", self.wait_for("listening on"))[0]  # type: ignore[index]
            if ready:
                self.wait_for("ready:")
        except BaseException:
            self.process.kill()
            raise
        self.http = httpx.Client(base_url=self.url, timeout=120)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._grown:
                self.lines.append(line.rstrip("\n"))
                self._grown.notify_all()
        with self._grown:
            self._grown.notify_all()

    def wait_for(self, text: str, timeout: float = 60.0, *, after: int = 0) -> str:
        """The first logged line with ``text`` in it, from line ``after`` on."""
        deadline = time.monotonic() + timeout
        with self._grown:
            while True:
                for line in self.lines[after:]:
                    if text in line:
                        return line
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(f"{text!r} was not logged:\n" + "\n".join(self.lines))
                self._grown.wait(0.2)

    def openai(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", max_retries=0, timeout=120, **{"api_key": "none", **options})

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return self.http.post(path, **({"json": body} if body is not None else {}), **options)

    def metric(self, name: str) -> float:
        """A metric's value, summed over its labels."""
        found = re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", self.http.get("/metrics").text, re.MULTILINE)
        return sum(map(float, found))

    def wait_until(self, metric: str, value: float, timeout: float = 60.0) -> None:
        """Wait until a gauge stands at a value."""
        deadline = time.monotonic() + timeout
        while self.metric(metric) != value:
            assert time.monotonic() < deadline, f"{metric} is {self.metric(metric)}, not {value}"
            time.sleep(0.01)

    @contextmanager
    def busy(self) -> Iterator[None]:
        """While a client streams a text that takes seconds."""
        body = {"prompt": "A story", "max_tokens": 1900, "min_tokens": 1900, "temperature": 0, "stream": True}
        with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=120) as response:
            lines = response.iter_lines()  # httpx closes the response with its iterator
            next(lines)
            yield
        self.wait_until("ggml_mirror_requests_running", 0)

    def stop(self, number: int = signal.SIGTERM, timeout: float = 60.0) -> int:
        """Send a signal and wait for the exit code."""
        self.process.send_signal(number)
        return self.process.wait(timeout)

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.http.close()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def write_tiny_pair(folder: Path) -> tuple[Path, Path]:
    """A random target and a draft for it, of a few hundred kilobytes."""
    from tiny_models import write_tiny_draft, write_tiny_model

    target = write_tiny_model(folder / "target.gguf", "llama", n_embd=64, n_ctx=2048, matrix_type="f32")
    return target, write_tiny_draft(folder / "draft.gguf", n_embd=64)
