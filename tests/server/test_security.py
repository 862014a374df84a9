"""Keys, addresses, limits."""

from __future__ import annotations

import time
from pathlib import Path

import httpx
import pytest

from ggml_mirror.server.front import Keys

from .process import ServerProcess

KEY = "sk-sesame-open"


def test_keys_open_by_either_header() -> None:
    keys = Keys(["öffne dich", "second"])
    good = [
        {b"authorization": "Bearer öffne dich".encode()},
        {b"authorization": b"bearer  second "},
        {b"x-api-key": b"second"},
    ]
    bad: list[dict[bytes, bytes]] = [
        {},
        {b"authorization": b""},
        {b"authorization": b"Bearer"},
        {b"authorization": b"Bearer "},
        {b"authorization": b"Basic second"},
        {b"authorization": b"second"},
        {b"authorization": b"Bearer second2"},
        {b"authorization": b"Bearer secon"},
        {b"authorization": b"Bearer \xff\xfe"},
        {b"x-api-key": b""},
    ]
    assert all(keys.open_for(headers) for headers in good)
    assert not any(keys.open_for(headers) for headers in bad)
    assert Keys([]).open_for({})


def test_all_but_health_is_behind_the_key(tiny: tuple[Path, Path]) -> None:
    with ServerProcess("-m", tiny[0], "--log-json", LLAMA_API_KEY=f"{KEY},another-key") as server:
        shut = ("/v1/models", "/metrics", "/props", "/docs", "/openapi.json", "/nothing", "/")
        for path in shut:
            response = server.http.get(path)
            assert response.status_code == 401 and response.headers["WWW-Authenticate"] == "Bearer"
            assert response.json()["error"]["code"] == "invalid_api_key"
        for path in ("/v1/completions", "/v1/chat/completions", "/extras/tokenize", "/v1/embeddings"):
            assert server.post(path, {"prompt": "x"}).status_code == 401
        assert server.http.get("/health").status_code == 200 and server.http.get("/v1/health").status_code == 200
        server.http.headers["Authorization"] = f"Bearer {KEY}"
        assert server.post("/v1/completions", {"prompt": "x", "max_tokens": 2}).status_code == 200
        assert KEY not in server.http.get("/props").text and "another-key" not in server.http.get("/metrics").text
        assert server.stop() == 0
        assert not any("sesame" in line or "another-key" in line for line in server.lines)


def test_a_key_is_seen_by_nobody_else_on_the_machine(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    """From a file or the environment it is not on the command line."""
    file = tmp_path / "keys"
    file.write_text(f"# the keys\n{KEY}\n")
    with ServerProcess("-m", tiny[0], "--api-key-file", file) as server:
        shown = Path(f"/proc/{server.process.pid}/cmdline").read_bytes().decode()
        assert str(file) in shown and KEY not in shown
        assert server.http.get("/v1/models").status_code == 401


def test_an_open_server_on_all_addresses_warns(tiny: tuple[Path, Path]) -> None:
    with ServerProcess("-m", tiny[0], "--host", "0.0.0.0") as server:
        assert any("WARNING" in line and "no key" in line for line in server.lines)
    with ServerProcess("-m", tiny[0], "--host", "0.0.0.0", LLAMA_API_KEY=KEY) as server:
        assert not any("WARNING" in line for line in server.lines)


def test_pages_of_other_machines_may_not_call(server: ServerProcess) -> None:
    ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    for origin, allowed in (
        ("http://localhost:3000", True),
        ("http://127.0.0.1", True),
        ("http://[::1]:80", True),
        ("https://evil.example", False),
        ("http://localhost.evil.example", False),
        ("null", False),
    ):
        preflight = server.http.options("/v1/completions", headers={**ask, "Origin": origin})
        answer = server.http.get("/v1/models", headers={"Origin": origin})
        assert (preflight.status_code == 200) is allowed
        assert answer.headers.get("Access-Control-Allow-Origin") == (origin if allowed else None)


def test_limits_are_flags(tiny: tuple[Path, Path]) -> None:
    flags = ("--max-body", "2KiB", "--cors-origins", "https://a.example", "-n", "3", "--timeout", "0.5")
    with ServerProcess("-m", tiny[0], *flags) as server:
        for body in ({"prompt": "x"}, {"prompt": "x", "max_tokens": 50}):
            answer = server.post("/v1/completions", body).json()
            assert answer["usage"]["completion_tokens"] == 3 and answer["choices"][0]["finish_reason"] == "length"
        assert (
            server.post("/v1/completions", {"prompt": "x", "max_tokens": 2}).json()["usage"]["completion_tokens"] == 2
        )
        assert server.post("/v1/completions", {"prompt": "x" * 3000}).status_code == 413
        allowed = server.http.get("/health", headers={"Origin": "https://a.example"})
        assert allowed.headers["Access-Control-Allow-Origin"] == "https://a.example"

        def slow() -> object:
            yield b'{"prompt":'
            time.sleep(1.5)
            yield b'"x"}'

        with httpx.Client(base_url=server.url) as client:
            late = client.post("/v1/completions", content=slow(), headers={"Content-Type": "application/json"})  # type: ignore[arg-type]
        assert late.status_code == 408 and "--timeout" in late.json()["error"]["message"]


def test_paths_in_requests_reach_no_file(server: ServerProcess, tmp_path: Path) -> None:
    bait = tmp_path / "bait"
    bait.write_text("nobody reads this")
    requests = [
        {"model": str(bait)},
        {"model": f"file://{bait}"},
        {"grammar": f"file://{bait}"},
        {"json_schema": {"$ref": f"file://{bait}"}},
        {"user": str(bait), "suffix": str(bait), "stop": [str(bait)]},
    ]
    for body in requests:
        response = server.post("/v1/completions", {"prompt": "x", "max_tokens": 2, **body})
        assert response.status_code in (200, 400) and "nobody reads" not in response.text
    image = {"type": "image_url", "image_url": {"url": f"file://{bait}"}}
    response = server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": [image]}]})
    assert response.status_code == 400 and "nobody reads" not in response.text
    assert server.http.get(f"/{bait}").status_code == 404


@pytest.mark.parametrize("name", ["X-Request-ID", "X-Forwarded-For", "User-Agent"])
def test_headers_are_not_believed(name: str, server: ServerProcess) -> None:
    start = len(server.lines)
    response = server.http.get("/v1/models", headers={name: "evil 2026-01-01 INFO request status=200" + "x" * 500})
    assert response.status_code == 200
    line = server.wait_for("/v1/models", after=start)
    assert not any("evil" in line for line in server.lines[start:])
    assert f"id={response.headers['X-Request-ID']} " in line


def test_a_request_id_of_the_client_is_kept(server: ServerProcess) -> None:
    given = "12345678-1234-5678-1234-567812345678"
    for path in ("/v1/models", "/health", "/nothing"):
        answer = server.http.get(path, headers={"X-Request-ID": given})
        assert answer.headers["X-Request-ID"] == given.replace("-", "")
