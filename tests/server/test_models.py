"""Several models in a config file, interrupted streams, and what /props and /v1/models say."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import httpx

from ggml_mirror import fingerprint

from .process import ServerProcess


def test_models_of_a_config_file_take_turns(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    config = tmp_path / "models.json"
    models: list[dict[str, Any]] = [
        {
            "model": str(tiny[0]),
            "model_draft": str(tiny[1]),
            "feature_dtype": "q8_0",
            "model_alias": "drafted",
            "n_ctx": 512,
        },
        {"model": str(tiny[0]), "model_alias": "plain", "n_ctx": 200},  # llama.cpp makes 256 of it
    ]
    for model in models:
        model |= {"n_threads": 1, "n_threads_batch": 1}
    config.write_text(json.dumps({"models": models}))
    with ServerProcess("--config-file", config, threads=False) as server:
        server.wait_for("a request that names plain exchanges it")
        assert [model["id"] for model in server.http.get("/v1/models").json()["data"]] == ["drafted", "plain"]
        texts: dict[str, list[str]] = {"drafted": [], "plain": []}
        for name in ("drafted", "plain", "drafted", "plain"):
            body = {"model": name, "prompt": "Hello", "max_tokens": 8, "temperature": 0}
            texts[name].append(server.post("/v1/completions", body).json()["choices"][0]["text"])
            props = server.http.get("/props").json()
            assert props["model_alias"] == name and props["drafting"]["on"] is (name == "drafted")
        assert len({*texts["drafted"], *texts["plain"]}) == 1
        # The limits are those of the model that is named, whichever is loaded.
        for name, status in (("drafted", 200), ("plain", 400)):
            body = {"model": name, "prompt": [72] * 300, "max_tokens": 2}
            assert server.post("/v1/completions", body).status_code == status
            assert server.post("/v1/completions", {**body, "prompt": [72] * 250}).status_code == 200
            assert server.post("/extras/tokenize", {"model": name, "input": "Hello"}).json()["tokens"]
        lost = server.post("/v1/completions", {"model": "other", "prompt": "x"})
        assert lost.status_code == 404 and lost.json()["error"]["param"] == "model" and "drafted, plain" in lost.text
        # Two at a time, each for another model.
        answers: list[Any] = []

        def ask(name: str) -> None:
            body = {"model": name, "prompt": "Hello", "max_tokens": 8, "temperature": 0}
            answers.append(
                httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]
            )

        clients = [threading.Thread(target=ask, args=(name,)) for name in ("drafted", "plain") * 3]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        assert set(answers) == set(texts["plain"]) and len(answers) == 6
        assert server.stop() == 0


def test_a_model_that_cannot_be_loaded_fails_only_its_own_requests(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(tiny[0].read_bytes())
    config = tmp_path / "models.json"
    content = {
        "models": [{"model": str(tiny[0]), "model_alias": "good"}, {"model": str(broken), "model_alias": "broken"}]
    }
    config.write_text(json.dumps(content))
    with ServerProcess("--config-file", config, threads=False) as server:
        broken.write_bytes(tiny[0].read_bytes()[:2000])
        for _ in range(2):
            failed = server.post("/v1/completions", {"model": "broken", "prompt": "x", "max_tokens": 2})
            assert failed.status_code == 500 and "broken" not in failed.json().get("choices", "")
            good = server.post("/v1/completions", {"model": "good", "prompt": "x", "max_tokens": 2})
            assert good.status_code == 200
            assert server.http.get("/health").status_code == 200
        assert server.stop() == 0


def test_interrupt_requests_is_llama_cpps(tiny: tuple[Path, Path]) -> None:
    """A new request ends the stream that runs, as if it were complete. It is off unless asked for."""
    with ServerProcess("-m", tiny[0], "--interrupt_requests", "true") as server:
        body = {"prompt": "A story", "max_tokens": 1900, "min_tokens": 1900, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            assert server.post("/v1/completions", {"prompt": "x", "max_tokens": 2}).status_code == 200
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and len(rest) < 1900


def test_props_and_models(server: ServerProcess, tiny: tuple[Path, Path]) -> None:
    props = server.http.get("/props").json()
    assert props["drafting"]["on"] and "up to 7 tokens" in props["drafting"]["reason"]
    assert props["target"] == {"name": "tiny llama 0", "path": str(tiny[0]), "fingerprint": fingerprint(tiny[0])}
    draft = props["draft"]
    assert (draft["name"], draft["fingerprint"]) == ("tiny dflash 0", fingerprint(tiny[1]))
    assert (draft["block_size"], draft["n_draft"], draft["taps"]) == (8, 7, [1, 2, 3, 4, 5])
    mirror = props["mirror"]
    assert (mirror["dtype"], mirror["window"], mirror["cap"], mirror["device"]) == ("f32", 2048, 2056, "CPU")
    assert mirror["bytes"] == 2056 * 5 * 64 * 4 == mirror["row_bytes"] * mirror["cap"]
    assert server.http.get("/v1/models").json()["data"][0]["id"] == "target.gguf"


def test_metrics(server: ServerProcess) -> None:
    answer = server.post("/v1/completions", {"prompt": "Count me", "max_tokens": 30, "temperature": 0}).json()
    server.post("/v1/completions", {"prompt": 5})
    response = server.http.get("/metrics")
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    text = response.text
    for name in (
        'requests_total{path="/v1/completions",status="200"}',
        'requests_total{path="/v1/completions",status="400"}',
        'errors_total{type="invalid_request_error"}',
        'tau_bucket{le="1.0"}',
        'acceptance_bucket{le="0.5"}',
        'phase_seconds_total{phase="verify"}',
        'phase_seconds_total{phase="capture"}',
        'mirror_bytes{device="CPU",dtype="f32"} 2.63168e+06',
        'cache_hits_total{tier="ram"} 0.0',
        "cache_misses_total 0.0",
        'cache_bytes{tier="disk"} 0.0',
        'cache_restore_seconds_sum{tier="ram"} 0.0',
        "time_to_first_token_seconds_bucket",
    ):
        assert f"\nggml_mirror_{name}" in text, name
    assert "process_resident_memory_bytes" in text and answer["timings"]["tau"] >= 1
    drafting = server.metric("ggml_mirror_draft_steps_total")
    assert server.metric("ggml_mirror_tau_count") > 0 and drafting > 0


def test_models_and_tokens_do_not_wait_for_a_text(server: ServerProcess) -> None:
    with server.busy():
        running = "ggml_mirror_requests_running"
        assert server.http.get("/v1/models").status_code == 200
        assert server.post("/extras/tokenize", {"input": "x"}).status_code == 200
        assert server.post("/extras/tokenize/count", {"input": "x" * 100_000}).json()["count"] == 100_001
        assert server.post("/extras/detokenize", {"tokens": [72]}).json() == {"text": "H"}
        assert server.metric(running) == 1


def test_texts_of_long_tokens_are_whole(demo_server: ServerProcess) -> None:
    """llama-cpp-python reads 32 bytes of a token's text."""
    rule = "-" * 64
    ids = demo_server.post("/extras/tokenize", {"input": rule}).json()["tokens"]
    assert len(ids) == 1
    assert demo_server.post("/extras/detokenize", {"tokens": ids}).json() == {"text": rule}
    body = {"prompt": "A rule:\n", "max_tokens": 1, "grammar": f'root ::= "{rule}"', "logit_bias": {str(ids[0]): 100}}
    answer = demo_server.post("/v1/completions", body).json()["choices"][0]
    assert answer["text"] == rule
    streamed = demo_server.post("/v1/completions", {**body, "stream": True}).text
    assert rule in streamed
