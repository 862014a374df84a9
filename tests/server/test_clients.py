"""The checks of scripts/client_check.py, with OpenAI's own package, and the texts: those of a plain Llama."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from llama_cpp import Llama

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from client_check import CHECKS, Server, run_check, wrong_key  # noqa: E402

from .process import ServerProcess  # noqa: E402

NAMES = [check.__name__ for check in CHECKS]

#: What a model that can speak tells better than a random one; the others take minutes on it.
SPOKEN = ("chat_streamed", "tool_call", "json_schema")


@pytest.mark.parametrize(
    "check", [check for check in CHECKS if check is not wrong_key], ids=lambda check: check.__name__
)
def test_tiny_pair(check: Any, server: ServerProcess) -> None:
    outcome = run_check(check, Server(server.url))
    assert outcome.ok, outcome.detail


@pytest.mark.parametrize(
    "check",
    [pytest.param(check, marks=[] if check.__name__ in SPOKEN else pytest.mark.soak) for check in CHECKS],
    ids=NAMES,
)
def test_demo_pair(check: Any, demo_server: ServerProcess) -> None:
    outcome = run_check(check, Server(demo_server.url))
    if outcome.ok is None:
        pytest.skip(outcome.detail)
    assert outcome.ok, outcome.detail


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0}, {"temperature": 1.1, "top_p": 0.9, "seed": 7}], ids=["greedy", "sampled"]
)
def test_texts_are_those_of_a_plain_llama(
    sampling: dict[str, Any], server: ServerProcess, tiny: tuple[Path, Path]
) -> None:
    f32 = llama_cpp.GGML_TYPE_F32
    plain = Llama(str(tiny[0]), n_ctx=2048, n_threads=1, n_threads_batch=1, type_k=f32, type_v=f32, verbose=False)
    options = {"max_tokens": 64, "repeat_penalty": 1.0, **sampling}
    for prompt in ("The sea", "def f(x):", "A" * 200):
        expected = plain(prompt, **options)["choices"][0]["text"]
        answer = server.post("/v1/completions", {"prompt": prompt, **options}).json()
        assert answer["choices"][0]["text"] == expected
    plain.close()


def test_a_server_with_a_key(tiny: tuple[Path, Path]) -> None:
    with ServerProcess("-m", tiny[0], LLAMA_API_KEY="sesame") as keyed:
        outcome = run_check(wrong_key, Server(keyed.url, "sesame"))
        assert outcome.ok, outcome.detail


def test_the_script_says_what_is_wrong(server: ServerProcess) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, SCRIPTS / "client_check.py", *arguments], capture_output=True, text=True)

    # A key that the server does not ask for: it lets wrong ones in.
    bad = run(server.url, "--key", "sesame", "--only", "health_and_props,wrong_key", "--json", "-")
    report = json.loads(bad.stdout)
    assert bad.returncode == 1 and not report["ok"]
    assert [(one["name"], one["ok"]) for one in report["checks"]] == [("health_and_props", True), ("wrong_key", False)]
    nobody = run("http://127.0.0.1:9")
    assert nobody.returncode == 2 and nobody.stderr.startswith("error: ")
