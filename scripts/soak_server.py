"""Many requests to one server: its memory stays flat, every answer is right, and it ends in order.

    python scripts/soak_server.py                                   # 10,000 requests to a server over a tiny random pair
    python scripts/soak_server.py --requests 2000 -- -m target.gguf -md draft.gguf --cache-ram 256MiB

What stands behind -- goes to `ggml-mirror serve`. Requests are of every kind: text and chat, whole and streamed, with grammars, tools and
JSON schemas, refused ones, and clients that hang up; some at a time. Greedy ones are compared with what the server said first, which is
fair where llama.cpp rounds batches of all sizes alike: the tiny pair runs in F32, without flash attention. Memory is the process's resident
set, from /metrics; the first tenth of the requests may still fill pools and caches, then it may grow by --growth.

Exit codes: 0 flat and right, 1 not, 2 the server does not start.
"""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import httpx
import numpy as np
import typer

from ggml_mirror.byte_size import format_bytes, parse_bytes
from ggml_mirror.output import check_writable, write_json
from ggml_mirror.report import make_console

ROOT = Path(__file__).resolve().parent.parent
N_PROMPTS = 16
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
AS_JSON = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
CHOICE = {"type": "function", "function": {"name": "f"}}

Request = tuple[str, dict[str, Any]]


class Server:
    """``ggml-mirror serve`` in a process of its own."""

    def __init__(self, flags: list[str]) -> None:
        start = "from ggml_mirror.cli import main; main()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", start, "serve", "--port", "0", "--log-json", *flags],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr is not None
        self.url, last = "", ""
        for line in self.process.stderr:
            last = line
            found = re.search(r"listening on (\S+);", line)
            self.url = found[1] if found else self.url
            if '"event": "ready' in line:
                break
        else:
            print(f"error: the server does not start: {last.strip()}", file=sys.stderr)
            raise typer.Exit(2)
        threading.Thread(target=self._drain, daemon=True).start()
        self.errors: list[str] = []
        self.http = httpx.Client(base_url=self.url, timeout=300)

    def _drain(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if '"level": "error"' in line:
                self.errors.append(line.strip())

    def metric(self, name: str) -> float:
        return sum(map(float, re.findall(rf"^{name}(?:{{.*}})? (\S+)$", self.http.get("/metrics").text, re.MULTILINE)))

    def rss(self) -> int:
        return int(self.metric("process_resident_memory_bytes"))


def request_of(number: int) -> tuple[str, Request]:
    """What to do with request ``number``, and the request."""
    draw = random.Random(number)
    prompt = f"Prompt {number % N_PROMPTS}: " + "some words " * (number % 7)
    text: dict[str, Any] = {"prompt": prompt, "max_tokens": 8, "temperature": 0}
    chat: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 8}
    kinds: list[tuple[str, Request]] = [
        ("same", ("/v1/completions", text)),
        ("same", ("/v1/completions", {**text, "stream": True})),
        ("any", ("/v1/completions", {**text, "temperature": 1.0, "logit_bias": {"65": 1}, "stop": ["zz"]})),
        ("any", ("/v1/chat/completions", chat)),
        ("any", ("/v1/chat/completions", {**chat, "stream": True, "stream_options": {"include_usage": True}})),
        ("any", ("/v1/completions", {**text, "grammar": 'root ::= "yes" | "no"'})),
        ("any", ("/v1/chat/completions", {**chat, "max_tokens": 40, "response_format": AS_JSON})),
        ("any", ("/v1/chat/completions", {**chat, "tools": [TOOL], "tool_choice": CHOICE})),
        ("any", ("/extras/tokenize", {"input": prompt})),
        ("refused", ("/v1/completions", {**text, "temperature": -1})),
        ("refused", ("/v1/completions", {**text, "grammar": "root ::= ("})),
        ("refused", ("/v1/completions", {**text, "prompt": "word " * 100_000})),
        ("hung up", ("/v1/completions", {**text, "max_tokens": 400, "stream": True})),
        ("hung up", ("/v1/completions", {**text, "max_tokens": 400})),
    ]
    return draw.choice(kinds)


def ask(server: Server, number: int, known: dict[str, str]) -> str | None:
    """Send request ``number``; what is wrong with the answer, or None."""
    what, (path, body) = request_of(number)
    if what == "hung up":
        try:
            with server.http.stream(
                "POST", path, json=body, timeout=httpx.Timeout(300, read=0.02 if "stream" not in body else 300)
            ) as r:
                lines = r.iter_lines()
                for _ in range(number % 5):
                    next(lines, None)
        except httpx.ReadTimeout:
            pass
        return None
    response = server.http.post(path, json=body)
    status = response.status_code
    if (what == "refused") != (400 <= status < 500) or status >= 500:
        return f"{path} {str(body)[:150]}: {status} {response.text[:200]}"
    if what != "same":
        return None
    if body.get("stream"):
        events = [json.loads(event[6:]) for event in response.text.split("\n\n") if event.startswith("data: {")]
        text = "".join(event["choices"][0]["text"] for event in events)
    else:
        text = response.json()["choices"][0]["text"]
    expected = known.setdefault(body["prompt"], text)
    return None if text == expected else f"{body['prompt']!r} gave {expected!r}, then {text!r}"


def main(
    flags: Annotated[
        list[str] | None, typer.Argument(help="For ggml-mirror serve. Default: a tiny random pair.")
    ] = None,
    requests: Annotated[int, typer.Option(min=10)] = 10_000,
    at_once: Annotated[int, typer.Option(min=1, help="Clients.")] = 4,
    growth: Annotated[
        str, typer.Option(metavar="BYTES", help="By how much memory may grow after the first tenth.")
    ] = "8MiB",
    json_file: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write what was measured.")] = None,
) -> None:
    allowed = parse_bytes(growth)
    if json_file is not None:
        check_writable(json_file)
    console = make_console()
    with tempfile.TemporaryDirectory() as folder:
        server = Server(flags or _tiny_pair(Path(folder)))
        # Greedy texts as the server gives them one by one, cold: what all later ones are compared with.
        known: dict[str, str] = {}
        samples: list[tuple[int, int]] = []
        wrong: list[str] = []
        started = time.monotonic()
        step = max(requests // 50, 1)
        with ThreadPoolExecutor(at_once) as pool:
            for first in range(0, requests, step):
                numbers = range(first, min(first + step, requests))
                wrong += [found for found in pool.map(lambda n: ask(server, n, known), numbers) if found]
                samples.append((numbers[-1] + 1, server.rss()))
                if wrong or server.process.poll() is not None:
                    break
        seconds = time.monotonic() - started
        tokens = server.metric("ggml_mirror_generated_tokens_total")
        server.process.send_signal(signal.SIGTERM)
        code = server.process.wait(60)

    warm = [size for done, size in samples if done >= requests / 10]
    settled = warm[: max(len(warm) // 5, 1)]
    grown = int(np.median(warm[-max(len(warm) // 5, 1) :]) - np.median(settled))
    slope = float(np.polyfit([done for done, _ in samples[-len(warm) :]], warm, 1)[0]) if len(warm) > 2 else 0.0
    if grown > allowed:
        wrong.append(f"memory grew by {format_bytes(grown)} after the first tenth; {format_bytes(allowed)} are allowed")
    if code != 0:
        wrong.append(f"after SIGTERM the exit code was {code}")
    wrong += [f"logged: {line[:300]}" for line in server.errors[:5]]
    report = {
        "ok": not wrong,
        "requests": samples[-1][0],
        "seconds": round(seconds, 1),
        "tokens": tokens,
        "rss_bytes": [{"requests": done, "bytes": size} for done, size in samples],
        "grown_bytes": grown,
        "bytes_per_request": round(slope, 1),
        "exit_code": code,
        "wrong": wrong,
    }
    if json_file is not None:
        write_json(report, json_file)
    console.print(
        f"{samples[-1][0]:,} requests, {tokens:,.0f} tokens, {seconds:.0f} s; memory {format_bytes(samples[0][1])} at first, "
        f"{format_bytes(settled[-1])} after a tenth, {format_bytes(samples[-1][1])} at last: {grown:+,} bytes, {slope:+.0f} a request"
    )
    for found in wrong:
        console.print(f"[red]wrong:[/] {found}", markup=True)
    raise typer.Exit(1 if wrong else 0)


def _tiny_pair(folder: Path) -> list[str]:
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny_models import write_tiny_draft, write_tiny_model

    target = write_tiny_model(folder / "target.gguf", "llama", n_embd=64, n_ctx=512, matrix_type="f32")
    draft = write_tiny_draft(folder / "draft.gguf", n_embd=64)
    exact = ["-fa", "off", "-ctk", "f32", "-ctv", "f32"]
    return ["-m", str(target), "-md", str(draft), "-t", "1", "-tb", "1", *exact]


if __name__ == "__main__":
    typer.run(main)
