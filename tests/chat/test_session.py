"""A conversation in a file: it goes on as the one that was never saved; another's, or a damaged one, changes nothing."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dflash.pair import TARGETS
from safetensors import safe_open
from safetensors.numpy import save_file

from ggml_mirror.chat.conversation import Chat, Sampling
from ggml_mirror.chat.session import FORMAT, load_session, save_session
from ggml_mirror.dflash import DFlashLlama
from ggml_mirror.errors import SnapshotError, SnapshotMismatchError

from .conftest import ChatPair, say

SAID = ["Once upon", "and then?", "why", "because"]


def go_on(chat: Chat) -> list[Any]:
    """Two more answers: texts, and each one's counts of the draft."""
    out: list[Any] = []
    for text in SAID[2:]:
        out.append(say(chat, text))
        s = chat.last
        out.append(s and (s.tokens, s.reused, s.draft_steps, s.proposed, s.accepted))
    return out


@pytest.mark.parametrize(
    ("name", "dtype", "window"),
    [("llama", "bf16", 40), *((name, "f32", None) for name in TARGETS), *((name, "q8_0", 40) for name in TARGETS)],
)
def test_a_loaded_conversation_goes_on_as_if_never_saved(
    dtype: str, window: int | None, name: str, pair: ChatPair, tmp_path: Path
) -> None:
    """Into a new object and into the same one after other work; tokens are drawn, so the seed has to come along."""
    options = {"temp": 0.8, "feature_dtype": dtype, "draft_window": window}
    chat = pair.chat(name, seed=3, **options)
    for text in SAID[:2]:
        say(chat, text)
    save_session(chat, tmp_path / "s")
    expected, messages = go_on(chat), list(chat.messages)
    for other in (pair.chat(name, seed=99, **options), chat):
        say(other, "something else entirely")
        load_session(other, tmp_path / "s")
        assert go_on(other) == expected
        assert other.messages == messages


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "window"), [("f32", 512), ("q8_0", 48)], ids=["f32-whole", "q8_0-wrapped"])
def test_the_demo_pair_goes_on(dtype: str, window: int, demo_target: Path, demo_draft: Path, tmp_path: Path) -> None:
    def chat() -> Chat:
        options = {"n_ctx": 1024, "n_threads": 2, "n_threads_batch": 2, "verbose": False, "draft_window": window}
        llm = DFlashLlama(str(demo_target), draft_path=str(demo_draft), feature_dtype=dtype, **options)
        return Chat(llm, system="You are a poet.", sampling=Sampling(temp=0.0, n_predict=12))

    unsaved, loaded = chat(), chat()
    say(unsaved, "Write about the sea.")
    save_session(unsaved, tmp_path / "s")
    load_session(loaded, tmp_path / "s")
    assert go_on(unsaved) == go_on(loaded)
    assert loaded.total.accepted > 0 and unsaved.messages == loaded.messages


@pytest.mark.parametrize(
    ("name", "window"), [("llama", None), ("llama", 40), ("gemma3-windowed", 40), ("qwen35", 40), ("mamba", 40)]
)
def test_fused_rows_go_on(window: int | None, name: str, pair: ChatPair, tmp_path: Path) -> None:
    """And are no raw ones."""
    options = {"feature_rows": "fused", "feature_dtype": "q8_0", "draft_window": window}
    chat = pair.chat(name, **options)
    say(chat, SAID[0])
    save_session(chat, tmp_path / "s")
    loaded = pair.chat(name, **options)
    load_session(loaded, tmp_path / "s")
    assert go_on(loaded) == go_on(chat)
    with pytest.raises(SnapshotMismatchError, match=r"rows fused \(here raw\)"):
        load_session(pair.chat(name, **{**options, "feature_rows": "raw"}), tmp_path / "s")


def test_plain_conversations(name: str, pair: ChatPair, tmp_path: Path) -> None:
    chat, other = pair.plain_chat(name, temp=0.8, seed=4), pair.plain_chat(name, temp=0.8, seed=5)
    say(chat, SAID[0])
    save_session(chat, tmp_path / "s")
    say(other, "x")
    load_session(other, tmp_path / "s")
    assert go_on(other) == go_on(chat)


def test_an_empty_conversation(pair: ChatPair, tmp_path: Path) -> None:
    save_session(pair.chat(), tmp_path / "s")
    chat = pair.chat()
    say(chat, SAID[0])
    load_session(chat, tmp_path / "s")
    assert chat.messages == [] and say(chat, SAID[0]) == say(pair.plain_chat(), SAID[0])


def test_the_file(pair: ChatPair, tmp_path: Path) -> None:
    """safetensors reads it; it is its owner's alone; an older session is replaced through a link, anything else is not."""
    chat, path, link = pair.chat(), tmp_path / "s", tmp_path / "link"
    chat.messages.append({"role": "system", "content": "Grüße 🦙"})
    say(chat, SAID[0])
    old = os.umask(0)
    try:
        save_session(chat, path)
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and os.listdir(tmp_path) == ["s"]
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
        assert json.loads(file.get_tensor("messages").tobytes()) == chat.messages
        assert file.get_tensor("tokens").tolist() == chat.llm.input_ids[: chat.llm.n_tokens].tolist()
        assert len(file.get_tensor("positions")) == chat.llm.n_tokens
    assert metadata["format"] == FORMAT and json.loads(metadata["identity"])["feature dtype"] == "f32"
    link.symlink_to(path)
    say(chat, SAID[1])
    save_session(chat, link)
    assert link.is_symlink()
    fresh = pair.chat()
    load_session(fresh, path)
    assert fresh.messages == chat.messages

    for name, content in {"model.gguf": b"GGUF" + bytes(100), "empty": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SnapshotError, match="exists and is no session"):
            save_session(chat, tmp_path / name)
        assert (tmp_path / name).read_bytes() == content
    for bad in (tmp_path, tmp_path / "none" / "s"):
        with pytest.raises(SnapshotError):
            save_session(chat, bad)


def test_a_disk_that_is_full_leaves_the_old_file(pair: ChatPair, tmp_path: Path) -> None:
    chat = pair.chat()
    say(chat, SAID[0])
    save_session(chat, tmp_path / "s")
    before = (tmp_path / "s").read_bytes()
    code = f"""
import resource, signal, sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from pathlib import Path
from chat.conftest import ChatPair, say
from ggml_mirror.chat.session import load_session, save_session
from ggml_mirror.errors import SnapshotError
chat = ChatPair(Path({str(pair.folder)!r})).chat()
load_session(chat, Path({str(tmp_path / "s")!r}))
say(chat, "more")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, -1))
try:
    save_session(chat, Path({str(tmp_path / "s")!r}))
except SnapshotError as error:
    assert "File too large" in str(error), error
else:
    raise AssertionError("written")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "s").read_bytes() == before and os.listdir(tmp_path) == ["s"]


OTHERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "dtype": ("llama", {"feature_dtype": "bf16"}, r"feature dtype f32 \(here bf16\)"),
    "window": ("llama", {"draft_window": 50}, r"draft window 1024 \(here 50\)"),
    "context": ("llama", {"n_ctx": 512, "draft_window": 512}, r"n_ctx 1024 \(here 512\)"),
    "cache": ("llama", {"type_k": 1, "type_v": 1}, r"type_k 0 \(here 1\), type_v 0 \(here 1\)"),
    "draft": ("llama", {"draft": 3}, r": draft [0-9a-f]{32} \(here [0-9a-f]{32}\); nothing"),
    "target": ("qwen3", {}, r"target [0-9a-f]{32} \(here [0-9a-f]{32}\)"),
}


@pytest.mark.parametrize("which", [*OTHERS, "plain"])
def test_a_session_of_another_set_up(which: str, pair: ChatPair, tmp_path: Path) -> None:
    """Refused whole: the conversation that was there goes on as if nothing had been tried."""
    saved = pair.chat()
    say(saved, SAID[0])
    save_session(saved, tmp_path / "s")

    def make() -> Chat:
        if which == "plain":
            return pair.plain_chat()
        name, options, _ = OTHERS[which]
        if "draft" in options:
            options = {"draft": pair.draft(seed=options["draft"])}
        return pair.chat(name, **options)

    chat, twin = make(), make()
    for c in (chat, twin):
        say(c, "tell me")
    message = OTHERS[which][2] if which in OTHERS else r"draft [0-9a-f]{32} \(here None\)"
    with pytest.raises(SnapshotMismatchError, match=message):
        load_session(chat, tmp_path / "s")
    assert go_on(chat) == go_on(twin)


# ------------------------------------------------------------------------------------------------------ damage


@pytest.fixture(scope="module")
def session(pair: ChatPair, tmp_path_factory: pytest.TempPathFactory) -> tuple[Chat, bytes]:
    """A conversation, and the file of another one."""
    chat, saved = pair.chat(n=5), pair.chat(n=5)
    path = tmp_path_factory.mktemp("session") / "s"
    say(saved, SAID[0])
    save_session(saved, path)
    say(chat, "hello")
    return chat, path.read_bytes()


def refused(chat: Chat, path: Path) -> SnapshotError:
    before = list(chat.messages), chat.seed, chat.llm.n_tokens, chat.llm.input_ids.tolist(), len(chat.llm.mirror)  # type: ignore[union-attr]
    with pytest.raises(SnapshotError) as caught:
        load_session(chat, path)
    after = list(chat.messages), chat.seed, chat.llm.n_tokens, chat.llm.input_ids.tolist(), len(chat.llm.mirror)  # type: ignore[union-attr]
    assert before == after
    return caught.value


def test_any_flipped_bit(session: tuple[Chat, bytes], tmp_path: Path) -> None:
    chat, whole = session
    header = int.from_bytes(whole[:8], "little") + 8
    random = np.random.default_rng(0)
    places = [*range(0, 8), *random.integers(8, header, 150), *random.integers(header, len(whole), 150)]
    for at in places:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << int(random.integers(8))
        if at < header and damaged[8:header].split() == whole[8:header].split():
            continue
        (tmp_path / "s").write_bytes(damaged)
        refused(chat, tmp_path / "s")


def test_any_truncation(session: tuple[Chat, bytes], tmp_path: Path) -> None:
    chat, whole = session
    for size in [*range(0, 40), *np.random.default_rng(1).integers(40, len(whole), 60).tolist(), len(whole) - 1]:
        (tmp_path / "s").write_bytes(whole[:size])
        refused(chat, tmp_path / "s")
    (tmp_path / "s").write_bytes(whole + b"\0")
    refused(chat, tmp_path / "s")


Change = Callable[[dict[str, Any], dict[str, str]], None]


def changed(**entries: Any) -> Change:
    """Metadata (text) or tensors (arrays) to set; None: to leave out."""

    def change(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
        for name, value in entries.items():
            into: dict[str, Any] = metadata if isinstance(value, str) or name in metadata else tensors
            if value is None:
                into.pop(name)
            else:
                into[name] = value

    return change


def text(value: Any) -> Any:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


HOSTILE: dict[str, tuple[Change, str]] = {
    "another format": (changed(format="ggml-mirror.snapshot"), "not of format"),
    "another version": (changed(format_version="2"), "reads version 1"),
    "no messages": (changed(messages=None), "lacks parts"),
    "no rows": (changed(rows=None), "lacks parts"),
    "no snapshot": (changed(snapshot=None), "lacks parts"),
    "a seed that is no number": (changed(seed="x"), "lacks parts"),
    "an identity that is no object": (changed(identity="[]"), "identity is no object"),
    "an identity that is no JSON": (changed(identity="{"), "lacks parts"),
    "messages that are none": (changed(messages=text({"role": "user"})), "not what a session has"),
    "a message without content": (changed(messages=text([{"role": "user"}])), "not what a session has"),
    "a message of a number": (changed(messages=text([{"role": "user", "content": 1}])), "not what a session has"),
    "more tokens than context": (changed(tokens=np.zeros(5000, np.int32)), "not what a session has"),
    "tokens of another type": (changed(tokens=np.zeros(5, np.int64)), "not what a session has"),
    "rows of another shape": (changed(rows=np.zeros((3, 7), np.uint8)), "is broken"),
    "positions that go back": (changed(positions=np.arange(26, dtype=np.int64)[::-1].copy()), "is broken"),
    "a foreign tensor": (changed(more=np.zeros(1, np.uint8)), "a tensor named 'more'"),
}


@pytest.mark.parametrize("what", list(HOSTILE))
def test_files_with_a_good_checksum_and_bad_content(what: str, session: tuple[Chat, bytes], tmp_path: Path) -> None:
    from ggml_mirror.tensor_file import write_tensors

    chat, whole = session
    (tmp_path / "s").write_bytes(whole)
    with safe_open(tmp_path / "s", "numpy") as file:
        metadata = {k: v for k, v in file.metadata().items() if k != "checksum"}
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    change, message = HOSTILE[what]
    change(tensors, metadata)
    write_tensors(tmp_path / "s", tensors, metadata)
    assert message in str(refused(chat, tmp_path / "s"))


def test_foreign_files(session: tuple[Chat, bytes], tmp_path: Path) -> None:
    chat, _ = session
    save_file({"x": np.zeros(3, np.float32)}, tmp_path / "foreign")
    assert "not of format" in str(refused(chat, tmp_path / "foreign"))
    chat.llm.mirror.snapshot().save(tmp_path / "rows")  # type: ignore[union-attr]
    assert "not of format" in str(refused(chat, tmp_path / "rows"))
    for name in ("none", "."):
        assert "cannot read" in str(refused(chat, tmp_path / name))


def test_a_state_that_llama_cpp_does_not_take(session: tuple[Chat, bytes], tmp_path: Path, pair: ChatPair) -> None:
    """Sound by its checksum, but not a state: the conversation stays, and is evaluated anew."""
    from ggml_mirror.tensor_file import write_tensors

    _, whole = session
    chat, twin = pair.chat(), pair.chat()
    for c in (chat, twin):
        say(c, "hello")
    (tmp_path / "s").write_bytes(whole)
    with safe_open(tmp_path / "s", "numpy") as file:
        metadata = {k: v for k, v in file.metadata().items() if k != "checksum"}
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    tensors["state"] = tensors["state"][: len(tensors["state"]) // 2]
    write_tensors(tmp_path / "s", tensors, metadata)
    with pytest.raises(SnapshotError, match="did not take the saved state"):
        load_session(chat, tmp_path / "s")
    assert say(chat, "go on") == say(twin, "go on")
