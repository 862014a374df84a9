"""From start to end: readiness, what stops a start, signals, clients that hang up."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from cli_run import Run

from .process import ServerProcess

LONG = {"prompt": "A story", "max_tokens": 250, "min_tokens": 250, "temperature": 0}


def command(*flags: object, code: str = "from ggml_mirror.cli import main; main()") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, "serve", *map(str, flags)], capture_output=True, text=True, timeout=60
    )


# ----------------------------------------------------------------------------------------------------------- start


def test_not_ready_says_why(demo_target: Path) -> None:
    """The port opens before the model is there."""
    draft = Path(__file__).parents[2] / "models" / "smollm2-135m-instruct-dflash-q8_0.gguf"
    with ServerProcess("-m", demo_target, "-md", draft, ready=False, exact=False) as server:
        seen: list[str] = []
        while True:
            response = server.http.get("/health")
            if response.status_code == 200:
                break
            assert response.status_code == 503 and response.headers["Retry-After"] == "1"
            seen.append(response.json()["error"]["message"])
            if len(seen) == 1:
                refused = server.post("/v1/completions", {"prompt": "x"})
                assert refused.status_code == 503 and refused.json()["error"]["code"] == "not_ready"
                assert server.http.get("/props").status_code == 503
                assert server.metric("ggml_mirror_ready") == 0
        assert seen and seen[0].startswith("not ready: loading")
        # The draft step that made it ready is in no account.
        assert server.metric("ggml_mirror_ready") == 1 and server.metric("ggml_mirror_draft_steps_total") == 0
        assert server.post("/v1/completions", {"prompt": "x", "max_tokens": 2}).json()["timings"]["cache_n"] == 0


def test_sigterm_while_it_loads(demo_target: Path) -> None:
    with ServerProcess("-m", demo_target, ready=False, exact=False) as server:
        assert server.stop() == 0


def test_without_a_draft_it_serves_plainly_and_says_so(tiny: tuple[Path, Path]) -> None:
    with ServerProcess("-m", tiny[0]) as server:
        assert "without drafting: no draft was given (-md)" in server.wait_for("ready:")
        props = server.http.get("/props").json()
        assert props["drafting"] == {"on": False, "reason": "no draft was given (-md)"}
        assert props["mirror"] is None and props["draft"] is None and props["target"]["name"] == "tiny llama 0"
        first = server.post("/v1/completions", {"prompt": "Hello", "max_tokens": 5, "temperature": 0}).json()
        timings = first["timings"]
        assert (timings["cache_n"], timings["prompt_n"], timings["predicted_n"]) == (0, 6, 5)
        assert (timings["draft_n"], timings["tau"]) == (0, 0) and timings["predicted_ms"] > 0
        again = server.post("/v1/completions", {"prompt": "Hello", "max_tokens": 5, "temperature": 0}).json()
        assert again["timings"]["cache_n"] == 5 and again["choices"] == first["choices"]
        assert server.stop() == 0


def test_what_cannot_be_served_ends_in_one_line(tiny: tuple[Path, Path], tmp_path: Path, run: Run) -> None:
    target, draft = tiny
    torn = tmp_path / "torn.gguf"
    torn.write_bytes(target.read_bytes()[:1000])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        cases: list[tuple[int, str, tuple[object, ...]]] = [
            (2, "nowhere.gguf", ("-m", tmp_path / "nowhere.gguf")),
            (2, "torn.gguf", ("-m", torn)),
            (2, "give it with -md", ("-m", draft)),
            (2, "not a DFlash draft", ("-m", target, "-md", target)),
            (2, "q9_9", ("-m", target, "-md", draft, "--feature-dtype", "q9_9")),
            (2, "n_draft", ("-m", target, "-md", draft, "--draft-max", 99)),
            (2, "--nonsense", ("-m", target, "--nonsense", 1)),
            (2, "--timeout", ("-m", target, "--timeout", 0)),
            (2, "n_predict", ("-m", target, "-n", 0)),
            (2, "n_gpu_layers", ("-m", target, "--n_gpu_layers", -7)),
            (2, "prompt-lookup-decoding", ("-m", target, "--draft_model", draft)),
            (2, "config", ("--config-file", tmp_path / "nowhere.yaml")),
            (2, "--host", ("-m", target, "--host", "no.such.host.invalid")),
            (2, "key file", ("-m", target, "--api-key-file", tmp_path / "nowhere")),
            (1, "choose another --port", ("-m", target, "--port", taken.getsockname()[1])),
        ]
        for code, said, flags in cases:
            done = run("serve", *flags)
            assert done.code == code and done.err.startswith("error: ") and said in done.err, (flags, done)
            assert done.err.count("\n") == 1 and done.out == ""


def test_without_the_extra_one_line_says_what_to_install() -> None:
    blocked = """
import importlib.util, sys
EXTRA = ("fastapi", "starlette", "uvicorn", "sse_starlette", "starlette_context", "prometheus_client")
real = importlib.util.find_spec
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in EXTRA:
            raise ModuleNotFoundError(name)
importlib.util.find_spec = lambda name, package=None: None if name in EXTRA else real(name, package)
sys.meta_path.insert(0, Blocked())
import ggml_mirror, ggml_mirror.server
from ggml_mirror.cli import main
main()
"""
    done = command("-m", "target.gguf", code=blocked)
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr.count("\n") == 1 and 'pip install "ggml-mirror[server]"' in done.stderr and "fastapi" in done.stderr
    )


# ------------------------------------------------------------------------------------------------------------- end


def test_sigterm_finishes_what_runs_and_what_waits(tiny: tuple[Path, Path]) -> None:
    with ServerProcess("-m", tiny[0], "-md", tiny[1]) as server:
        done: list[Any] = []

        def ask(stream: bool) -> None:
            with httpx.stream("POST", f"{server.url}/v1/completions", json={**LONG, "stream": stream}, timeout=60) as r:
                done.append((stream, r.status_code, r.read().decode()))

        clients = [threading.Thread(target=ask, args=(stream,)) for stream in (True, False, True)]
        for client in clients:
            client.start()
        kept = httpx.Client(base_url=server.url)
        server.wait_until("ggml_mirror_requests_waiting", 2)
        kept.get("/health").raise_for_status()
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("SIGTERM: finishing 3 requests")
        with pytest.raises(httpx.TransportError):
            while True:  # until the port is closed, a moment later
                refused = httpx.post(f"{server.url}/v1/completions", json=LONG, timeout=30)
                assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down"
        assert server.process.wait(60) == 0
        for client in clients:
            client.join(10)
        assert len(done) == 3
        for stream, status, text in done:
            assert status == 200
            if stream:
                assert text.endswith("data: [DONE]\n\n")
            else:
                assert json.loads(text)["usage"]["completion_tokens"] == 250


def test_a_second_signal_ends_it_at_once(tiny: tuple[Path, Path]) -> None:
    with ServerProcess("-m", tiny[0]) as server, suppress(httpx.TransportError), server.busy():
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("SIGTERM: finishing")
        assert server.stop(signal.SIGINT, timeout=5) == 128 + signal.SIGINT


@pytest.mark.parametrize("flags", [("--shutdown-timeout", 1), ()], ids=["told", "untold"])
def test_a_client_that_does_nothing_does_not_keep_it_alive(flags: tuple[object, ...], tiny: tuple[Path, Path]) -> None:
    """Requests that have begun are waited for, but not for ever: a client has ten seconds to send the rest of one."""
    with ServerProcess("-m", tiny[0], *flags) as server:
        stalled = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])))
        head = (
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
        )
        stalled.sendall(head)  # and no more
        time.sleep(0.3)
        started = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - started < (8 if flags else 20)
        stalled.close()


def test_what_takes_longer_than_the_shutdown_may(tiny: tuple[Path, Path]) -> None:
    """Streamed or whole, running or waiting: each client is told."""
    with ServerProcess("-m", tiny[0], "-md", tiny[1], "--shutdown-timeout", 1) as server:
        body = {"prompt": "A story", "max_tokens": 1900, "min_tokens": 1900}
        answers: list[httpx.Response] = []

        def ask(stream: bool) -> None:
            answers.append(httpx.post(f"{server.url}/v1/completions", json={**body, "stream": stream}, timeout=60))

        clients = [threading.Thread(target=ask, args=(stream,)) for stream in (True, False)]
        clients[0].start()
        server.wait_until("ggml_mirror_requests_running", 1)
        clients[1].start()
        server.wait_until("ggml_mirror_requests_waiting", 1)
        started = time.monotonic()
        assert server.stop() == 0 and time.monotonic() - started < 8
        for client in clients:
            client.join(10)
        assert len(answers) == 2
        for answer in answers:
            assert "shutting_down" in answer.text
            assert answer.status_code == (200 if "event-stream" in answer.headers["content-type"] else 503)


def test_localhost_is_all_of_it(tiny: tuple[Path, Path]) -> None:
    with ServerProcess("-m", tiny[0], "--host", "localhost") as server:
        port = server.url.rpartition(":")[2]
        answers = []
        for address in ("127.0.0.1", "[::1]"):
            with suppress(httpx.ConnectError):  # a machine may have no IPv6
                answers.append(httpx.get(f"http://{address}:{port}/health").status_code)
        assert answers and set(answers) == {200}
        assert not any("WARNING" in line for line in server.lines)


# ------------------------------------------------------------------------------------------------ clients that go


def test_clients_that_hang_up_leave_the_model_as_it_was(server: ServerProcess) -> None:
    """Streamed, whole, in the queue, in mid-prompt: each ends, and the text after is the text before."""
    request = {"prompt": "The same", "max_tokens": 24, "temperature": 0}
    expected = server.post("/v1/completions", request).json()["choices"][0]["text"]
    for n in range(6):
        with server.http.stream("POST", "/v1/completions", json={**LONG, "prompt": f"{n} story", "stream": True}) as r:
            lines = r.iter_lines()
            for _ in range(n):
                next(lines)
        assert server.post("/v1/completions", request).json()["choices"][0]["text"] == expected
    for wait in (0.01, 0.05, 0.2):
        with pytest.raises(httpx.ReadTimeout):
            server.http.post("/v1/completions", json=LONG, timeout=httpx.Timeout(10, read=wait))
        assert server.post("/v1/completions", request).json()["choices"][0]["text"] == expected


def test_who_hangs_up_in_the_queue_never_has_a_turn(server: ServerProcess) -> None:
    before = server.metric("ggml_mirror_prompt_tokens_total")
    with server.busy():
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{server.url}/v1/completions", json={**LONG, "prompt": "x" * 500}, timeout=httpx.Timeout(10, read=0.1)
            )
        server.wait_until("ggml_mirror_requests_waiting", 0)
    assert server.metric("ggml_mirror_prompt_tokens_total") - before < 500


def test_a_client_that_reads_nothing_keeps_nobody_waiting(server: ServerProcess) -> None:
    """Its answer is far more than the sockets' buffers hold."""
    body = json.dumps({**LONG, "stream": True, "model": "m" * 256}).encode()  # 100 KB of answer
    lazy = socket.socket()
    lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    lazy.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    lazy.sendall(head.encode() + body)
    time.sleep(0.1)
    started = time.monotonic()
    assert server.post("/v1/completions", {"prompt": "x", "max_tokens": 2}).status_code == 200
    assert time.monotonic() - started < 30
    lazy.close()


def test_the_queue_has_an_end(tiny: tuple[Path, Path]) -> None:
    with ServerProcess("-m", tiny[0], "--max-queue", 1) as server:
        url = f"{server.url}/v1/completions"
        with server.busy():
            waits = threading.Thread(target=httpx.post, args=(url,), kwargs={"json": LONG, "timeout": 60})
            waits.start()
            server.wait_until("ggml_mirror_requests_waiting", 1)
            refused = httpx.post(url, json=LONG)
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "queue_full"
        waits.join()


def test_a_line_per_request(tiny: tuple[Path, Path]) -> None:
    with ServerProcess("-m", tiny[0], "-md", tiny[1], "--log-json") as server:
        answer = server.post("/v1/completions", {"prompt": "secret words", "max_tokens": 4}).json()
        server.post("/v1/completions", {"prompt": 5})
        server.http.get("/health")
        server.http.get('/"quoted" path')
        assert server.stop() == 0
        lines = [json.loads(line) for line in server.lines]
    requests = [line for line in lines if line["event"] == "request"]
    assert [line["status"] for line in requests] == [200, 400, 404]
    good, bad, lost = requests
    assert good["predicted_n"] == 4 and good["tau"] == answer["timings"]["tau"] and good["path"] == "/v1/completions"
    assert "prompt" in bad["message"] and lost["path"] == '/"quoted" path'
    assert not any("secret" in line for line in server.lines)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+Z", line["time"]) for line in lines)
