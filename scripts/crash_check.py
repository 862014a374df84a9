"""Kill a process that generates and writes its prefix cache, again and again: what it leaves is whole, and what it serves is right.

    python scripts/crash_check.py -m TARGET.gguf -md DRAFT.gguf --kills 50
    python scripts/crash_check.py -m TARGET.gguf -md DRAFT.gguf --kills 50 --server          # over HTTP, `ggml-mirror serve`

A worker answers prompts in random order, from a cache with a disk tier that is too small for all of them, so that it writes and removes
files all the time. It gets SIGKILL at a random moment, every sixth time while it starts, every third time soon after it has begun to
write a file. Then

* every file under a final name is read whole and verified by this process;
* the worker is started again on the same directory, and every answer that it gives, from the first on, is compared with that
  of a model without a cache: text, and (without --server) the accepted tokens of each draft step;
* no answer may be missing, nothing may be skipped as damaged, and no temporary file of a killed worker may stay.

Exit code 1 if anything of this fails. What a kill hits is random, from --seed; the table says how often each thing was hit.
"""

from __future__ import annotations

import json
import os
import queue
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from decoding import load
from humaneval import humaneval_prompts
from machine import describe
from rich.console import Console
from rich.progress import Progress
from script import run as run_script

from ggml_mirror import DFlashLlama, PrefixCache, __version__
from ggml_mirror.byte_size import format_bytes, parse_bytes
from ggml_mirror.cache import state_file
from ggml_mirror.errors import ArgumentError, CacheFileError
from ggml_mirror.output import check_writable, write_json

N_CTX = 512
START_S = 120.0
SAMPLING: dict[str, float] = {"temperature": 0.0, "repeat_penalty": 1.0}  # a server has defaults of its own


@dataclass
class Setup:
    """What worker and check share."""

    model: str
    draft: str
    directory: str
    dtype: str
    threads: int
    ram_bytes: int
    disk_bytes: int
    n_predict: int
    prompts: list[list[int]] = field(default_factory=list)


@dataclass
class Answer:
    """What was said to a prompt; ``steps`` None: nobody told."""

    prompt: int
    text: str
    steps: list[int] | None


# ---------------------------------------------------------------------------------------------------------------- worker


def work(setup: Setup, seed: int) -> None:
    """Answer prompts for ever, one JSON line each; a line of counters before the first and after each."""
    llm = _model(setup)
    cache = PrefixCache(llm, ram_bytes=setup.ram_bytes, directory=setup.directory, disk_bytes=setup.disk_bytes)
    llm.set_cache(cache)
    order = random.Random(seed)
    _say({"counters": cache.counters.to_dict()})
    while True:
        number = order.randrange(len(setup.prompts))
        _say({"begun": number})
        answer = _answer(llm, setup, number)
        _say({"answer": asdict(answer), "counters": cache.counters.to_dict()})


def _model(setup: Setup) -> DFlashLlama:
    llm = load(setup.model, setup.draft, stored=setup.dtype, n_ctx=N_CTX, n_gpu_layers=-1, n_threads=setup.threads)
    assert isinstance(llm, DFlashLlama)
    return llm


def _answer(llm: DFlashLlama, setup: Setup, number: int) -> Answer:
    made: Any = llm.create_completion(setup.prompts[number], max_tokens=setup.n_predict, **SAMPLING)
    return Answer(number, made["choices"][0]["text"], list(llm.stats.steps))


def _say(what: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


class Worker:
    """The process of :func:`work`, and what it says."""

    def __init__(self, setup: Setup, seed: int) -> None:
        self.lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._log = tempfile.TemporaryFile("w+", errors="replace")
        command = [sys.executable, __file__, "--worker", str(seed)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(asdict(setup)))
        self.process.stdin.close()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.endswith("\n"):  # a kill may leave half of one
                self.lines.put(json.loads(line))
        self.lines.put(None)

    def next(self, timeout: float) -> dict[str, Any] | None:
        """What it says next; None: nothing within that time."""
        try:
            line = self.lines.get(timeout=max(timeout, 0.0))
        except queue.Empty:
            return None
        if line is None:
            raise ArgumentError(f"the worker ended by itself:\n{self.tail()}")
        return line

    def kill(self) -> list[dict[str, Any]]:
        """SIGKILL; what it had said and nobody had heard."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        rest = []
        while (line := self.lines.get()) is not None:
            rest.append(line)
        return rest

    def tail(self) -> str:
        self._log.seek(0)
        return self._log.read()[-2000:]


# ---------------------------------------------------------------------------------------------------------------- server


class Server:
    """`ggml-mirror serve` on a free port, and one client that asks it for ever."""

    def __init__(self, setup: Setup, seed: int) -> None:
        self.lines: queue.Queue[dict[str, Any]] = queue.Queue()
        self._setup, self._order, self._ended = setup, random.Random(seed), False
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self._url = f"http://127.0.0.1:{port}"
        self._log = tempfile.TemporaryFile("w+", errors="replace")
        command = [sys.executable, "-c", "from ggml_mirror.cli import main; main()", "serve", "-m", setup.model]
        command += [
            "-md",
            setup.draft,
            "--feature-dtype",
            setup.dtype,
            "-c",
            str(N_CTX),
            "-t",
            str(setup.threads),
            "--host",
            "127.0.0.1",
        ]
        command += [
            "--port",
            str(port),
            "--cache-ram",
            f"{setup.ram_bytes / 2**20}MiB",
            "--cache-disk",
            setup.directory,
        ]
        command += ["--cache-disk-max", f"{setup.disk_bytes / 2**20}MiB"]
        self.process = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT)
        self._client = threading.Thread(target=self._ask, daemon=True)
        self._client.start()

    def _ask(self) -> None:
        deadline = time.monotonic() + START_S
        while not self._ended and time.monotonic() < deadline and not self._ready():
            time.sleep(0.1)
        if not self._ended:
            self.lines.put({"counters": self._counters()})
        while not self._ended:
            number = self._order.randrange(len(self._setup.prompts))
            self.lines.put({"begun": number})
            body = {"prompt": self._setup.prompts[number], "max_tokens": self._setup.n_predict, **SAMPLING}
            try:
                made = json.loads(self._get("/v1/completions", body))
                answer = Answer(number, made["choices"][0]["text"], None)
                self.lines.put({"answer": asdict(answer), "counters": self._counters()})
            except (OSError, urllib.error.URLError, ValueError) as error:
                if not self._ended and self.process.poll() is None:
                    self.lines.put({"failed": str(error)})
                return

    def _ready(self) -> bool:
        try:
            self._get("/health")
            return True
        except (OSError, urllib.error.URLError):
            return False

    def _counters(self) -> dict[str, Any]:
        """What /metrics says of files that were skipped."""
        try:
            text = self._get("/metrics")
        except (OSError, urllib.error.URLError):
            return {}
        lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
        skipped = {name: float(value) for name, value in lines if "cache" in name and "skipped" in name}
        hits = {
            name.split('"')[1]: float(value) for name, value in lines if name.startswith("ggml_mirror_cache_hits_total")
        }
        return {"skipped": {k: v for k, v in skipped.items() if v}, "hits": hits}

    def _get(self, path: str, body: dict[str, Any] | None = None) -> str:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            text: str = answer.read().decode()
        return text

    def next(self, timeout: float) -> dict[str, Any] | None:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise ArgumentError(f"the server ended by itself:\n{self.tail()}")
            try:
                return self.lines.get(timeout=min(0.2, max(deadline - time.monotonic(), 0.001)))
            except queue.Empty:
                continue
        return None

    def kill(self) -> list[dict[str, Any]]:
        self._ended = True
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self._client.join(10)
        rest = []
        while not self.lines.empty():
            rest.append(self.lines.get())
        return rest

    def tail(self) -> str:
        self._log.seek(0)
        return self._log.read()[-2000:]


# ----------------------------------------------------------------------------------------------------------------- check


@dataclass
class Report:
    """Counts over all kills. ``problems``: what must not be."""

    kills: int = 0
    answers: int = 0
    files_checked: int = 0
    abandoned: int = 0
    hits: Counter[str] = field(default_factory=Counter)
    hit_by_kill: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    ready_s: list[float] = field(default_factory=list)


def check(setup: Setup, expected: list[Answer], kills: int, seed: int, *, server: bool, progress: Any) -> Report:
    report, rng = Report(), random.Random(seed)
    for number in range(kills + 1):
        process: Worker | Server = (Server if server else Worker)(setup, rng.randrange(2**31))
        started = time.monotonic()
        last = number == kills
        try:
            # Every sixth is killed while it starts; the last one is left to answer.
            if number % 6 == 5 and not last:
                time.sleep(rng.uniform(0, 2.0))
                said, state = [], "start"
            else:
                said, state = _listen(process, 8.0 if last else rng.uniform(0.05, 3.0), report, started)
            if number % 3 == 1 and not last:
                _await_write(process, setup.directory, rng.uniform(0, 0.02))
        finally:
            said_late = process.kill()
        if not last:
            report.kills += 1
            report.hit_by_kill["write" if _temporaries(setup.directory) else state] += 1
        _judge([*said, *said_late], expected, report, f"kill {number}")
        _check_files(Path(setup.directory), report, f"kill {number}")
        progress()
    left = _temporaries(setup.directory)
    if len(left) > 1:  # the last worker's own may be there
        report.problems.append(f"temporary files were left: {left}")
    return report


def _await_write(process: Worker | Server, directory: str, more: float) -> None:
    """Until a temporary file is there, and a little longer; a kill at any moment would seldom hit a write, which is short."""
    deadline = time.monotonic() + 10
    while not _temporaries(directory) and time.monotonic() < deadline and process.process.poll() is None:
        time.sleep(0.0005)
    time.sleep(more)


def _listen(
    process: Worker | Server, seconds: float, report: Report, started: float
) -> tuple[list[dict[str, Any]], str]:
    """What is said in ``seconds`` after the process is ready, and in what it is then."""
    first = process.next(START_S)
    if first is None:
        report.problems.append(f"it was not ready within {START_S:.0f} s:\n{process.tail()}")
        return [], "start"
    report.ready_s.append(time.monotonic() - started)
    said, deadline, state = [first], time.monotonic() + seconds, "between"
    while (left := deadline - time.monotonic()) > 0:
        line = process.next(left)
        if line is not None:
            said.append(line)
            state = "answer" if "begun" in line else "between"
    return said, state


def _judge(said: list[dict[str, Any]], expected: list[Answer], report: Report, where: str) -> None:
    counters: dict[str, Any] = {}
    for line in said:
        counters = line.get("counters") or counters
        if "failed" in line:
            report.problems.append(f"{where}: a request failed: {line['failed']}")
        if "answer" in line:
            answer = Answer(**line["answer"])
            right = expected[answer.prompt]
            report.answers += 1
            if answer.text != right.text or answer.steps not in (None, right.steps):
                report.problems.append(f"{where}: prompt {answer.prompt}: {answer} instead of {right}")
    damaged = {name: n for name, n in counters.get("skipped", {}).items() if n}
    if damaged:
        report.problems.append(f"{where}: files were skipped: {damaged}")
    report.hits.update({name: int(n) for name, n in counters.get("hits", {}).items() if n})
    report.abandoned += counters.get("abandoned", 0)


def _check_files(directory: Path, report: Report, where: str) -> None:
    for path in directory.glob("*.safetensors"):
        try:
            state_file.read(path)
            report.files_checked += 1
        except CacheFileError as error:
            report.problems.append(f"{where}: {error}")


def _temporaries(directory: str) -> list[str]:
    return [name for name in os.listdir(directory) if name.endswith(".tmp")]


# ---------------------------------------------------------------------------------------------------------- command line


def main(
    model: Annotated[Path, typer.Option("-m", "--model", help="Target (GGUF).")],
    draft: Annotated[Path, typer.Option("-md", "--model-draft", help="DFlash draft (GGUF).")],
    kills: Annotated[int, typer.Option(help="How often the process is killed.", min=1)] = 50,
    prompts: Annotated[int, typer.Option(help="Different prompts, in pairs that share a beginning.", min=2)] = 12,
    dtype: Annotated[str, typer.Option(help="Feature dtype.")] = "q8_0",
    n_predict: Annotated[int, typer.Option("-n", "--n-predict", help="Tokens per answer.", min=2)] = 8,
    cache_ram: Annotated[str, typer.Option(help="Budget in memory.")] = "12MiB",
    cache_disk: Annotated[str, typer.Option(help="Cap on disk: less than all prompts take.")] = "24MiB",
    threads: Annotated[int, typer.Option("-t", "--threads", help="0: llama.cpp's own number.", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="Of moments and orders.")] = 1,
    server: Annotated[
        bool, typer.Option("--server", help="Kill `ggml-mirror serve` instead of a small program.")
    ] = False,
    prompt_file: Annotated[Path | None, typer.Option(help="Other texts (.txt, .jsonl) than HumanEval's.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every count to this file.")] = None,
) -> None:
    if json_file:
        check_writable(json_file)
    console = Console(width=None if Console().is_terminal else 200)
    with tempfile.TemporaryDirectory() as folder:
        setup = Setup(
            model=str(model), draft=str(draft), directory=folder, dtype=dtype, threads=threads,
            ram_bytes=parse_bytes(cache_ram), disk_bytes=parse_bytes(cache_disk), n_predict=n_predict,
        )  # fmt: skip
        llm = _model(setup)
        words = llm.tokenize("\n\n".join(p.text for p in humaneval_prompts(prompt_file)).encode())
        for i in range(prompts):
            begin = 160 * (i // 2)
            setup.prompts.append([*words[begin : begin + 150], *words[5000 + 40 * i : 5030 + 40 * i]])
        expected = []
        for i in range(prompts):
            llm.reset()
            expected.append(_answer(llm, setup, i))
        llm.close()
        started = time.monotonic()
        with Progress(console=Console(stderr=True), transient=True) as progress:
            bar = progress.add_task("killing", total=kills + 1)
            report = check(
                setup, expected, kills, seed, server=server, progress=lambda: progress.advance(bar)
            )  # fmt: skip
        seconds = time.monotonic() - started
        size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    what = "ggml-mirror serve, over HTTP" if server else "a program with DFlashLlama and PrefixCache"
    console.print(f"{what}; {model.name} + {draft.name}, {dtype}; {describe(threads)}; {seconds:.0f} s")
    hit = ", ".join(f"{name} {count}" for name, count in report.hit_by_kill.most_common())
    console.print(f"{report.kills} kills (in: {hit}); ready again after {max(report.ready_s, default=0):.1f} s at most")
    console.print(
        f"{report.answers} answers, all compared with those of a model without a cache; hits: {dict(report.hits)}; "
        f"{report.files_checked} files read whole; {report.abandoned} temporary files removed; {format_bytes(size)} on disk at the end"
    )
    if size > setup.disk_bytes:
        report.problems.append(f"{size} bytes on disk, {setup.disk_bytes} were allowed")
    if not report.answers or not report.files_checked:
        report.problems.append("nothing was checked")
    for problem in report.problems:
        console.print(f"[red]PROBLEM[/] {problem}", markup=True)
    console.print("[green]PASS[/]" if not report.problems else "[red]FAIL[/]")
    if json_file:
        settings = {k: v for k, v in asdict(setup).items() if k not in ("prompts", "directory", "model", "draft")}
        found = {**vars(report), "seconds": seconds, "machine": describe(threads), "ggml_mirror": __version__}
        write_json({"settings": settings, "server": server, **found}, json_file)
    if report.problems:
        raise typer.Exit(1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(Setup(**json.load(sys.stdin)), int(sys.argv[2]))
    run_script(main)
