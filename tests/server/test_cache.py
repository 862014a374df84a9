"""The prefix cache of a server: what it saves, that texts are the same, files over restarts, and that nothing breaks without room."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest

from .process import ServerProcess

LONG = "word " * 120
OTHER = "quite another text " * 30


def ask(server: ServerProcess, prompt: str, **options: Any) -> tuple[str, int]:
    """The text, and how many tokens of the prompt needed no evaluation."""
    body = {"prompt": prompt, "max_tokens": 12, "temperature": 0, **options}
    answer = server.post("/v1/completions", body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"], answer.json()["timings"]["cache_n"]


@pytest.mark.parametrize("drafted", [True, False], ids=["drafted", "plain"])
def test_prompts_come_back_from_memory_and_from_files(drafted: bool, tiny: tuple[Path, Path], tmp_path: Path) -> None:
    draft = ("-md", tiny[1], "--feature-dtype", "q8_0") if drafted else ()
    flags = (
        "-m",
        tiny[0],
        *draft,
        "--cache-ram",
        "64MiB",
        "--cache-disk",
        tmp_path / "cache",
        "--cache-disk-max",
        "1GiB",
    )
    with ServerProcess(*flags) as server:
        cold, cached = ask(server, LONG)
        assert cached == 0
        ask(server, OTHER)  # the context holds this now
        warm, cached = ask(server, LONG)
        assert warm == cold and cached > 300
        assert (
            server.metric("ggml_mirror_cache_hits_total") >= 1 and server.metric("ggml_mirror_cache_misses_total") >= 1
        )
        assert (
            server.metric("ggml_mirror_cache_restore_seconds_count") >= 1
            and server.metric("ggml_mirror_cache_bytes") > 0
        )
        assert server.stop() == 0
    with ServerProcess(*flags) as server:
        again, cached = ask(server, LONG)
        assert again == cold and cached > 300
        assert 'ggml_mirror_cache_hits_total{tier="disk"} 1.0' in server.http.get("/metrics").text
        assert server.stop() == 0
    # Another dtype, or none: another model's files are no good.
    with ServerProcess("-m", tiny[0], "-md", tiny[1], "--feature-dtype", "bf16", *flags[-4:]) as server:
        other, cached = ask(server, LONG)
        assert cached == 0 and (other == cold or not drafted)
        assert server.stop() == 0


def test_sigkill_leaves_files_that_are_whole_or_none(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    flags = ("-m", tiny[0], "-md", tiny[1], "--cache-ram", "64MiB", "--cache-disk", tmp_path / "cache")
    texts: dict[str, str] = {}
    for n in range(3):
        with ServerProcess(*flags) as server:
            for prompt, text in texts.items():
                assert ask(server, prompt)[0] == text
            for i in range(4):
                prompt = f"{n}{i} {LONG}"
                texts[prompt] = ask(server, prompt)[0]
            time.sleep(0.02 * n)
            assert server.stop(signal.SIGKILL) == -signal.SIGKILL


def test_a_client_that_hangs_up_caches_nothing_wrong(tiny: tuple[Path, Path]) -> None:
    with ServerProcess("-m", tiny[0], "-md", tiny[1], "--cache-ram", "64MiB") as server:
        expected, _ = ask(server, LONG)
        for n in range(4):
            with server.http.stream(
                "POST", "/v1/completions", json={"prompt": LONG + f"and {n}", "max_tokens": 500, "stream": True}
            ) as response:
                lines = response.iter_lines()
                for _ in range(n):
                    next(lines)
            server.wait_until("ggml_mirror_requests_running", 0)
            assert ask(server, LONG)[0] == expected


def test_grammars_and_kept_logits(tiny: tuple[Path, Path]) -> None:
    """Of a prompt that is cached whole, the first token is chosen from logits that were kept: by the same guarded sampler."""
    with ServerProcess("-m", tiny[0], "-md", tiny[1], "--cache-ram", "64MiB") as server:
        yes, _ = ask(server, LONG, grammar='root ::= "yes" | "no"')
        for grammar, expected in (('root ::= "yes" | "no"', yes), ('root ::= "\\x00"', None)):
            ask(server, OTHER)
            body = {"prompt": LONG, "max_tokens": 12, "temperature": 0, "grammar": grammar}
            answer = server.post("/v1/completions", body)
            if expected is None:
                assert answer.status_code == 400 and answer.json()["error"]["code"] == "grammar_dead_end"
            else:
                assert answer.json()["choices"][0]["text"] == expected
                assert answer.json()["timings"]["prompt_n"] == 0
        assert server.stop() == 0


def test_no_room_for_the_cache_is_no_failure(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    with ServerProcess(
        "-m", tiny[0], "-md", tiny[1], "--cache-ram", "1KiB", "--cache-disk", tmp_path, "--cache-disk-max", "1KiB"
    ) as server:
        first, _ = ask(server, LONG)
        assert ask(server, OTHER)[0] and ask(server, LONG)[0] == first
        assert server.metric("ggml_mirror_cache_not_stored_total") >= 1
        assert server.stop() == 0
