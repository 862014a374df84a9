"""``ggml-mirror run``: through pipes and at a terminal, as a user has it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_run import Run

from .conftest import ChatPair, say
from .program import Terminal, piped


@pytest.fixture(scope="module")
def flags(pair: ChatPair) -> list[object]:
    """A tiny pair; an answer has 12 tokens."""
    return ["-m", pair.target("llama"), "-md", pair.draft(seed=2), "-c", 1024, "-t", 1, "--temp", 0, "-n", 12]


@pytest.fixture(scope="module")
def said(pair: ChatPair) -> Any:
    """``said(text, ...)``: what the plain target answers."""

    def answers(*texts: str) -> list[str]:
        chat = pair.plain_chat(n=12, type_k=1, type_v=1, flash_attn=True)
        return [say(chat, text) for text in texts]

    return answers


# ---------------------------------------------------------------------------------------------------------- pipes


def test_one_shot(flags: list[object], said: Any) -> None:
    """Standard output is the answer and nothing else; the budget comes first, statistics last."""
    done = piped([*flags, "-p", "Once upon"])
    assert done.returncode == 0, done.stderr
    assert done.stdout == said("Once upon")[0] + "\n"
    lines = done.stderr.splitlines()
    assert lines[0].startswith("note: tiny llama 0 has no chat template")
    part = re.compile(
        r"target weights .*\n(?s:.*)KV cache(?s:.*)draft weights(?s:.*)mirror .*f32, 1,032 rows x 1,280 B"
    )
    assert part.search(done.stderr)
    assert re.fullmatch(
        r"\[12 tokens, [\d.]+ tok/s, tau \d\.\d\d, acceptance [\d.]+% of \d+ drafted; prompt \d+ tokens, 0 of them reused, [\d,.]+ tok/s\]",
        lines[-1],
    )


def test_a_conversation_by_lines(flags: list[object], said: Any) -> None:
    """Blank lines are nothing, a backslash goes on, two slashes are one; the last line needs no end."""
    done = piped(flags, "Once upon\n\n   \r\nand\\\nthen?\r\n//why")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == said("Once upon", "and\nthen?", "/why")
    assert done.stderr.count(" tokens, ") == 6
    assert int(re.findall(r"(\d+) of them reused", done.stderr)[-1]) > 50


def test_commands(flags: list[object], said: Any, tmp_path: Path) -> None:
    session = tmp_path / "with space.session"
    script = f"/help\nOnce upon\n/save {session}\n/clear\nwhy\n/load {session}\nand?\n/stats\n/exit\nnever\n"
    done = piped(flags, script)
    assert done.returncode == 0, done.stderr
    once, more = said("Once upon", "and?")
    out = done.stdout
    for command in ("/help", "/stats", "/save FILE", "/load FILE", "/reset", "/exit"):
        assert command in out
    assert re.search(rf"{re.escape(once)}\n{re.escape(said('why')[0])}\n{re.escape(more)}\n", out)
    assert "never" not in done.stderr and session.stat().st_mode & 0o777 == 0o600
    for row in (
        r"answers +│ +3 ",
        r"tokens generated +│ +36 ",
        r"messages +│ +4 ",
        r"mirror +│ f32, 1,032 rows x 1,280 B",
    ):
        assert re.search(row, out), row


def test_what_goes_wrong_in_a_line_decides_the_exit_code(flags: list[object], said: Any, tmp_path: Path) -> None:
    done = piped(flags, f"/nonsense\n/load {tmp_path / 'none'}\n/save\nOnce upon\n")
    assert done.returncode == 2
    assert done.stdout == said("Once upon")[0] + "\n"
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 3
    assert "no command /nonsense" in errors[0] and "cannot read" in errors[1] and "/save needs a file name" in errors[2]


def test_bytes_that_are_no_text(flags: list[object]) -> None:
    done = piped(flags, b"\xff\xfe ol\xe1 \x00 \xed\xa0\x80 end\n")
    assert done.returncode == 0 and len(done.stdout) > 5, done.stderr


def test_tokens_of_many_bytes_keep_their_text(demo_target: Path) -> None:
    """llama-cpp-python's own detokenizer drops them; the others come out alike."""
    from llama_cpp import Llama

    from ggml_mirror.whole_tokenizer import WholeTokenizer

    llm = Llama(str(demo_target), vocab_only=True, verbose=False)
    whole = WholeTokenizer(llm)
    lost = 0
    for token in range(llm.n_vocab()):
        ours, theirs = whole.detokenize([token]), llm.detokenize([token])
        lost += ours != theirs
        assert ours == theirs or (len(ours) > 32 and theirs == b"")
    assert lost == 47
    text = "def f():\n" + " " * 60 + "return 1\n" + "=" * 80
    assert whole.detokenize(llm.tokenize(text.encode(), add_bos=False)) == text.encode()
    llm.tokenizer_ = whole
    assert llm.detokenize(llm.tokenize(text.encode(), add_bos=True)).endswith(text.encode())


def test_no_draft_and_no_input(flags: list[object], said: Any) -> None:
    plain = [*flags[:2], *flags[4:]]
    done = piped([*plain, "-p", "Once upon"])
    assert done.returncode == 0 and done.stdout == said("Once upon")[0] + "\n"
    assert "no draft was given (-md): the target runs plainly" in done.stderr and "tau" not in done.stderr
    assert piped(plain, "").returncode == 0


def test_the_demo_pair_and_its_template(demo_target: Path, demo_draft: Path, tmp_path: Path) -> None:
    """Greedy text with and without the draft, a system prompt, and auto by the variable."""
    common = [
        "-m",
        demo_target,
        "-t",
        2,
        "--temp",
        0,
        "-n",
        16,
        "-sys",
        "Answer in one word.",
        "-p",
        "The capital of France?",
    ]
    drafted = piped([*common, "-md", demo_draft, "--draft-window", 200], env={"DFLASH_FEATURE_DTYPE": "auto"})
    plain = piped(common)
    assert drafted.returncode == plain.returncode == 0, drafted.stderr + plain.stderr
    assert drafted.stdout == plain.stdout and len(drafted.stdout) > 3
    assert "feature dtype auto: f32 leaves" in drafted.stderr and "no chat template" not in drafted.stderr
    assert "f32, 208 rows x 11,520 B" in drafted.stderr


def test_sampling_flags_reach_the_sampler(flags: list[object], said: Any) -> None:
    hot = [*flags, "--temp", 5, "--top-k", 0, "--top-p", 1, "--min-p", 0]
    a, b, c = (piped([*hot, "-s", seed], "x\ny\n").stdout for seed in (1, 1, 2))
    assert a == b != c
    assert piped([*hot, "--top-k", 1, "-s", 3, "-p", "Once upon"]).stdout == said("Once upon")[0] + "\n"


def test_an_interrupted_answer_ends_as_a_shell_expects(flags: list[object]) -> None:
    arguments = [sys.executable, "-c", "from ggml_mirror.cli import main; main()", "run", *map(str, flags)]
    process = subprocess.Popen(
        [*arguments, "-c", "60000", "-n", "-1", "-p", "Once"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.read(8)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"(stopped)" in err and b"tok/s" in err and b"Traceback" not in err


# ------------------------------------------------------------------------------------------------ what cannot be


BAD: dict[str, tuple[list[object], int, str]] = {
    "no margin": (["--feature-dtype", "auto", "--memory-margin", "4TiB"], 3, "no dtype leaves 4 TiB free on CPU"),
    "dtype": (["--feature-dtype", "q9"], 2, "unknown feature dtype 'q9'"),
    "margin": (["--memory-margin", "some"], 2, "'some' is not a size"),
    "rows": (["--feature-rows", "cooked"], 2, "rows are raw, fused or auto, not 'cooked'"),
    "keys and values": (["--draft-kv", "f64"], 2, "f64"),
    "window": (["--draft-window", 0], 2, "draft_window is 0"),
    "n_draft": (["--draft-max", 8], 2, "n_draft is 8; this draft's block gives 1 to 7"),
    "device": (["-devd", "TPU9"], 2, "no device named 'TPU9'"),
    "cache type": (["-ctk", "q1"], 2, "-ctk q1: one of f32"),
    "layers": (["-ngl", "few"], 2, "-ngl few"),
    "flash attention": (["-fa", "maybe"], 2, "-fa maybe: on, off or auto"),
    "context": (["-c", -1], 2, "-c -1"),
    "length": (["-n", 0], 2, "-n 0"),
    "threads": (["-t", 0], 2, "n_threads is 0"),
    "batch": (["-b", 0], 2, "n_batch is 0"),
    "batch below the block": (["-b", 4], 2, "n_batch is 4; verifying 7 drafted tokens needs 8"),
    "prompt": (["-p", " "], 2, "the prompt is empty"),
}


@pytest.mark.parametrize("what", list(BAD))
def test_what_cannot_be(what: str, flags: list[object], run: Run) -> None:
    more, code, message = BAD[what]
    arguments = [*flags, *([] if "-p" in more else ["-p", "x"]), *more]
    result = run("run", *arguments)
    assert result.code == code, result.err
    assert message in result.err and result.out == ""
    assert result.err.count("error:") == 1


@pytest.mark.parametrize("what", ["dtype", "margin", "rows", "keys and values", "window"])
def test_a_typing_error_is_found_without_a_draft_too(what: str, flags: list[object], run: Run) -> None:
    more, code, message = BAD[what]
    result = run("run", *flags[:2], "-p", "x", *more)
    assert result.code == code and message in result.err and result.out == "", result.err
    assert result.err.count("error:") == 1


def test_files_that_cannot_be(flags: list[object], pair: ChatPair, tmp_path: Path, run: Run) -> None:
    target, draft = flags[1], flags[3]
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    for arguments, message in (
        (["-m", tmp_path / "none.gguf"], "no such file"),
        (["-m", tmp_path / "x.gguf"], "truncated"),
        (["-m", draft], "is a DFlash draft: it drafts for a target"),
        (["-m", target, "-md", target], "is a llama model, not a DFlash draft"),
        (["-m", target, "-md", tmp_path / "x.gguf"], "truncated"),
    ):
        result = run("run", *arguments, "-p", "x")
        assert result.code == 2 and message in result.err, result.err
        assert "Traceback" not in result.err and "Exception ignored" not in result.err
    assert run("run").code == 2


def test_a_prompt_beyond_the_context(flags: list[object]) -> None:
    done = piped([*flags, "-c", 256, "-p", "word " * 400])
    assert done.returncode == 2 and done.stdout == ""
    assert "no longer fits into the context" in done.stderr.splitlines()[-1]


def test_a_dry_run_is_the_budget_and_no_more(flags: list[object], run: Run, tmp_path: Path) -> None:
    shown = run("run", *flags, "--dry-run")
    assert shown.code == 0 and "draft weights" in shown.out and "note:" in shown.err
    asked = run("run", *flags, "--feature-dtype", "auto", "--dry-run", "--json")
    assert asked.code == 0 and asked.json["fits"] and asked.json["feature_dtype"] == "f32"
    assert {part["id"] for part in asked.json["parts"]} >= {"target_weights", "kv_cache", "draft_weights", "mirror"}
    never = run(
        "run", *flags, "--feature-dtype", "auto", "--memory-margin", "4TiB", "--dry-run", "--json", tmp_path / "b"
    )
    assert never.code == 3 and "no dtype leaves 4 TiB" in never.err
    written = json.loads((tmp_path / "b").read_text())
    assert not written["fits"] and written["error"]["fitting_dtypes"][0] == "f32" and written["feature_dtype"] is None
    assert run("run", *flags, "--json").code == 2
    plain = run("run", *flags[:2], "--dry-run", "--json")
    assert plain.json["mirror_device"] == "" and {d["name"] for d in plain.json["devices"]} == {"CPU"}


def test_too_little_memory_says_what_would_fit(flags: list[object]) -> None:
    """Under a limit on the process: the dtype that it names then runs."""
    program = f"""
import resource, sys
from ggml_mirror.budget import make_budget
from ggml_mirror.chat.terminal import ChatTerminal
from ggml_mirror.cli import main
make_budget({flags[1]!r}, draft_path={flags[3]!r}, n_ctx=256)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (900 << 20), -1))
main(sys.argv[1:])
"""

    def limited(*more: object) -> subprocess.CompletedProcess[str]:
        arguments = [*flags, "-c", 400_000, "-b", 16, "-ub", 16, "--draft-window", 400_000, "-p", "x", *more]
        return subprocess.run(
            [sys.executable, "-c", program, "run", *map(str, arguments)],
            capture_output=True,
            text=True,
            env={**os.environ, "COLUMNS": "200"},
        )

    refused = limited("--feature-dtype", "f32")
    assert refused.returncode == 3 and refused.stdout == ""
    message = refused.stderr.splitlines()[-1]
    assert message.startswith("error: it does not fit: CPU needs") and "ulimit -v" in message
    assert "q8_0" in message and re.search(r"f32 fits with a draft window of \d+", message)
    assert "mirror " in refused.stderr  # the table comes before
    hopeless = limited("-c", 20_000_000)
    assert hopeless.returncode == 3
    assert "a context of 20000000 tokens needs 915.53 MiB for llama.cpp's table of cells alone" in hopeless.stderr
    good = limited("--feature-dtype", "auto", "--memory-margin", "1MiB")
    assert good.returncode == 0, good.stderr
    assert "feature dtype auto: bf16 leaves" in good.stderr and "f32 would need" in good.stderr


# ------------------------------------------------------------------------------------------------------- terminal


@pytest.fixture
def terminal(flags: list[object]) -> Iterator[Any]:
    """``terminal(...)``: the program with further flags, at its first prompt."""
    started: list[Terminal] = []

    def start(*more: object) -> Terminal:
        started.append(Terminal("run", *flags, *more))
        started[-1].expect(r"/help lists commands")
        started[-1].expect(r"> ")
        return started[-1]

    yield start
    for one in started:
        try:
            os.kill(one.pid, 9)
            os.waitpid(one.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


def test_a_conversation_at_a_terminal(terminal: Any, said: Any) -> None:
    t = terminal()
    once, then = said("Once upon", "and then?")
    t.type("Once upon\n")
    t.expect(re.escape(once))
    t.expect(r"\[12 tokens")
    t.type("and then?\n")
    t.expect(re.escape(then))
    t.expect(r"> ")
    t.type("/stats\n")
    t.expect(r"answers +│ +2 ")
    t.type("/no\n")
    t.expect(r"error:.* there is no command /no")
    t.expect(r"> ")
    t.type("\x04")
    assert t.wait() == 0  # an error at a terminal was seen; it is no failure of the session


def test_ctrl_c_stops_an_answer_and_the_session_goes_on(terminal: Any) -> None:
    t = terminal("-c", 60000, "-n", -1, "-b", 64, "-ub", 64)
    for _ in range(3):
        t.type("Once upon\n")
        t.expect(r"Once upon\r\n.{5}")
        t.interrupt()
        t.expect(r"\(stopped\)", timeout=20)
        t.expect(r"\[[\d,]+ tokens")
        t.expect(r"> ")
    t.type("/stats\n")
    t.expect(r"answers +│ +3 ")
    t.type("/exit\n")
    assert t.wait() == 0


def test_ctrl_c_during_a_long_prompt(terminal: Any, said: Any) -> None:
    """Before the first piece it stops at once, and nothing was asked."""
    t = terminal("-c", 60000, "-b", 32, "-ub", 32)
    for _ in range(80):  # a terminal takes 4096 characters a line
        t.type("word " * 120 + "\\\n")
    t.type("end\n")
    t.expect(r"end\r\n")
    time.sleep(0.3)
    t.interrupt()
    t.expect(r"\(stopped\)", timeout=20)
    t.expect(r"> ")
    t.type("/stats\n")
    assert t.expect(r"messages +│ +(\d+) ")[1] == "0"
    t.type("Once upon\n")
    t.expect(r"\[12 tokens")
    t.expect(r"> ")
    t.type("\x04")
    assert t.wait() == 0


def test_ctrl_c_at_the_prompt_and_the_history(terminal: Any, said: Any) -> None:
    t = terminal()
    t.type("half a line")
    t.expect("half a line")
    t.wait_for_a_wait()  # Python's readline misses a signal between what it echoes and its wait for a key
    t.interrupt()
    t.expect(r"Ctrl-D or /exit leaves")
    t.expect(r"> ")
    t.type("why\n")
    t.expect(r"\[12 tokens")
    t.expect(r"> ")
    t.type("\x1b[A\n")  # the line before
    t.expect(r"why\r\n")
    t.expect(re.escape(said("why", "why")[1]))
    t.type("/quit\n")
    assert t.wait() == 0


def test_a_session_across_two_terminals(terminal: Any, said: Any, tmp_path: Path) -> None:
    path = tmp_path / "s"
    once, then = said("Once upon", "and then?")
    t = terminal()
    t.type("Once upon\n")
    t.expect(re.escape(once))
    t.type(f"/save {path}\n")
    t.expect(r"\(saved to ")
    t.expect(r"> ")
    t.type("\x04")
    assert t.wait() == 0
    t = terminal()
    t.type(f"/load {path}\n")
    t.expect(r"\(loaded .*: 2 messages")
    t.type("and then?\n")
    t.expect(re.escape(then))
    t = terminal("--feature-dtype", "q8_0")
    t.type(f"/load {path}\n")
    t.expect(r"error:.* session of another set-up: feature dtype f32 \(here q8_0\); nothing was changed")


def test_an_answer_cannot_take_over_the_terminal(pair: ChatPair, tmp_path: Path) -> None:
    """Control characters that a model says do not reach a terminal; a pipe gets them."""
    from ggml_mirror.chat.terminal import _CONTROLS

    assert _CONTROLS.sub("", "a\x1b[31mb\x07\tc\nd\x9b2Je\x7f\r") == "a[31mb\tc\nd2Je"
    assert json.dumps(_CONTROLS.sub("", "Grüße 🦙")) == json.dumps("Grüße 🦙")
